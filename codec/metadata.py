"""ICC profiles, EXIF, XMP, orientation and resolution of Pillow images."""

from __future__ import annotations

import contextlib
import io
import re
import struct
import warnings
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image, ImageCms

# EXIF tags that describe the picture; the other tags of a TIFF directory describe the layout of that file.
_DESCRIPTIVE = {270, 271, 272, 274, 282, 283, 296, 305, 306, 315, 316, 33432, 34665, 34853}
_ORIENTATION, _X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT, _XMP = 274, 282, 283, 296, 700
_ESSENTIAL = {_ORIENTATION, _X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT}
_MOST_DPI = 1e6  # at least, it is more than 1, which stands for an unknown one
_SAME_COLOUR = 2  # difference of 8-bit samples between sRGB profiles of different vendors


def read_metadata(im: Image.Image) -> tuple[bytes | None, bytes | None, bytes | None]:
    """Return ICC, EXIF (as a TIFF stream) and XMP of a loaded image; None for what is absent.

    A resolution that the file states elsewhere is entered into EXIF.
    """
    exif = im.info.get("exif")
    if not isinstance(exif, bytes):
        exif = None
        with contextlib.suppress(Exception):
            exif = _descriptive(im.getexif())
    else:
        exif = exif.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0")  # some files have it twice
    xmp = im.info.get("xmp")
    xmp = xmp.encode() if isinstance(xmp, str) else xmp
    icc = im.info.get("icc_profile")
    if resolution(exif) is None:
        guessed = im.format in ("JPEG", "MPO") and im.info.get("jfif_unit") not in (1, 2)  # Pillow's, 72
        exif = _with_resolution(exif or None, None if guessed else im.info.get("dpi"))
    return icc or None, exif or None, (xmp or None) if isinstance(xmp, bytes) else None


def tiff_tags(exif: bytes | None, xmp: bytes | None) -> Image.Exif:
    """EXIF and XMP as tags of a TIFF file, without those that would contradict the file's own layout."""
    tags = _tags(exif)
    reduced = _tags(_descriptive(tags))
    if xmp:
        reduced[_XMP] = xmp
    return reduced


def _tags(exif: bytes | None) -> Image.Exif:
    """The tags of the first directory; none if EXIF cannot be read."""
    tags = Image.Exif()
    with _unreadable_ignored():
        tags.load_from_fp(_ReadOnce(exif or b""))
    return tags


class _ReadOnce(io.BytesIO):
    """EXIF of which hardly more can be read than it has bytes (some files share values).

    Tags whose values overlap would multiply it: versions of Pillow before 13 copy each of them.
    """

    def __init__(self, exif: bytes) -> None:
        super().__init__(exif)
        self._left = 2 * len(exif)

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self._left -= len(data)
        if self._left < 0:
            raise OSError("values overlap")
        return data


@contextlib.contextmanager
def _unreadable_ignored() -> Iterator[None]:
    """End the block silently where Pillow warns of damaged EXIF, or raises an exception of one of many types."""
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        yield


def _descriptive(exif: Image.Exif) -> bytes | None:
    """The tags that describe the picture, not the file that it came from, as a TIFF stream; None without any."""
    for tag in set(exif) - _DESCRIPTIVE:
        del exif[tag]
    return exif.tobytes().removeprefix(b"Exif\0\0") if len(exif) else None


def only_essential(exif: bytes) -> bool:
    """Whether EXIF states nothing but orientation and resolution."""
    tags = set(_tags(exif))
    return bool(tags) and tags <= _ESSENTIAL


def essential_exif(exif: bytes | None, xmp: bytes | None) -> bytes | None:
    """EXIF that states the orientation and the resolution only; None where there are none."""
    turn = orientation(exif, xmp)
    out = None
    if turn not in (None, 1):
        tags = Image.Exif()
        tags[_ORIENTATION] = turn
        out = tags.tobytes().removeprefix(b"Exif\0\0")
    return _with_resolution(out, resolution(exif))


def resolution(exif: bytes | None) -> tuple[float, float] | None:
    """Horizontal and vertical pixels per inch that EXIF states."""
    tags = _tags(exif)
    with contextlib.suppress(Exception):  # values of any type
        inch = 2.54 if tags.get(_RESOLUTION_UNIT, 2) == 3 else 1.0
        x, y = float(tags[_X_RESOLUTION]) * inch, float(tags[_Y_RESOLUTION]) * inch
        if 1 < x < _MOST_DPI and 1 < y < _MOST_DPI:
            return x, y
    return None


def _with_resolution(exif: bytes | None, dpi: Any) -> bytes | None:
    """EXIF with a resolution in pixels per inch; unchanged if that is not one, or if EXIF is damaged.

    The first directory is written anew behind the others, so that nothing else moves: cameras store data to which
    only they know the offsets.
    """
    try:
        x, y = (Fraction(value).limit_denominator(100) for value in dpi)
        if not (1 < x < _MOST_DPI and 1 < y < _MOST_DPI):
            return exif
        out = exif or b"II*\0\x08\0\0\0"
        order = {b"II": "<", b"MM": ">"}[out[:2]]
        entries, following = [], 0
        if exif is not None:
            (start,) = struct.unpack_from(order + "I", out, 4)
            (count,) = struct.unpack_from(order + "H", out, start)
            entries = [out[start + 2 + 12 * i :][:12] for i in range(count)]
            (following,) = struct.unpack_from(order + "I", out, start + 2 + 12 * count)
    except (ArithmeticError, KeyError, TypeError, ValueError, struct.error):
        return exif
    stated = [struct.pack(order + "H", tag) for tag in (_X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT)]
    entries = [entry for entry in entries if entry[:2] not in stated]  # without a unit it is the inch
    out += bytes(len(out) % 2)
    values = b""
    for tag, value in ((_X_RESOLUTION, x), (_Y_RESOLUTION, y)):
        rational = struct.pack(order + "II", value.numerator, value.denominator)
        values = values if values == rational else values + rational
        entries.append(struct.pack(order + "HHII", tag, 5, 1, len(out) + len(values) - 8))
    entries.sort(key=lambda entry: struct.unpack_from(order + "H", entry))
    directory = struct.pack(order + "H", len(entries)) + b"".join(entries) + struct.pack(order + "I", following)
    return out[:4] + struct.pack(order + "I", len(out) + len(values)) + out[8:] + values + directory


def colour_space(icc: bytes | None) -> bytes:
    """The colour space of an ICC profile, as the four characters in its header; empty if there is none."""
    return icc[16:20] if icc is not None and len(icc) >= 128 else b""


def to_srgb(im: Image.Image, icc: bytes) -> Image.Image | None:
    """Convert the colours of a CMYK, L, LA, RGB or RGBA image to sRGB; an image that was grey stays grey.

    Returns
    -------
    Image, optional
        The image itself where the profile is sRGB already; None where the profile cannot be used.
    """
    mode = {"LA": "L", "RGBA": "RGB"}.get(im.mode, im.mode)
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode != "CMYK" and _is_identity(transform, mode):
            return im
        out = ImageCms.applyTransform(im.convert(mode), transform)
    except (ImageCms.PyCMSError, OSError):
        return None
    assert out is not None  # it is None only when converting in place
    out.info.pop("icc_profile", None)
    if im.mode in ("L", "LA"):
        out = out.convert("L")
    if im.mode in ("LA", "RGBA"):
        out.putalpha(im.getchannel("A"))
    return out


def _is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a transform of 8-bit samples of L or RGB to RGB changes none by more than `_SAME_COLOUR`."""
    if mode == "L":
        samples = np.arange(256, dtype=np.uint8)[None]
    else:
        levels = np.arange(0, 256, 17, dtype=np.uint8)
        samples = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    out = ImageCms.applyTransform(Image.fromarray(samples), transform)
    before = samples if mode == "RGB" else samples[..., None]
    return bool(np.abs(np.asarray(out, np.int16) - before).max() <= _SAME_COLOUR)


def orientation(exif: bytes | None, xmp: bytes | None) -> int | None:
    """The orientation that EXIF or XMP states, 1 to 8; None if they state none."""
    im = Image.new("L", (1, 1))
    im.info = {"xmp": xmp} if xmp else {}
    with _unreadable_ignored():
        tags = _tags(exif)
        value = (tags if _ORIENTATION in tags else im.getexif()).get(_ORIENTATION)
        return value if value in range(1, 9) else None
    return None


def upright_xmp(xmp: bytes) -> bytes:
    """XMP with orientation 1 where it states another one."""
    return re.sub(rb"""(tiff:Orientation(?:>|=["']))[2-8]""", rb"\g<1>1", xmp)


def turned(samples: np.ndarray, orientation: int | None) -> np.ndarray:
    """Samples (H, W, ...) as they are shown by an orientation, for which height and width may change places."""
    if orientation in (5, 6, 7, 8):
        samples = samples.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        samples = samples[::-1]
    if orientation in (2, 3, 6, 7):
        samples = samples[:, ::-1]
    return np.ascontiguousarray(samples)


def turned_back(samples: np.ndarray, orientation: int | None) -> np.ndarray:
    """Undo `turned`."""
    return turned(samples, {6: 8, 8: 6}.get(orientation or 1, orientation))
