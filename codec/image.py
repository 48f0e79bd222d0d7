"""Image files ↔ 8-bit pixels: colour, transparency and metadata.

    file ─ read_image ──► Picture ─ pixels.py ─► x
    file ◄ write_image ── Picture ◄ pixels.py ── x̂

Pixels are always (H, W, 3) uint8, also those of a grey picture (three equal channels). Pillow does the
reading and the writing.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError

from .bitstream import DEFAULT_MAX_PIXELS, FormatError

_ALPHA_FORMATS = {"PNG", "WEBP", "TIFF", "AVIF", "JPEG2000", "TGA"}
_METADATA_FORMATS = {"PNG", "JPEG", "WEBP", "TIFF", "AVIF"}
_COLOUR_ONLY_FORMATS = {"WEBP", "AVIF"}
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True},
}

# EXIF tags that describe the picture; the other tags of a TIFF directory describe the layout of that file.
_DESCRIPTIVE = {270, 271, 272, 274, 282, 283, 296, 305, 306, 315, 316, 33432, 34665, 34853}
_XMP_TAG = 700

_TO_8_BIT = ((np.arange(2**16, dtype=np.uint32) * 255 + 32767) // 65535).astype(np.uint8)  # round(v / 257)
_OTHER_BYTE = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}
_GREY_STEPS = {"L;2": 85, "L;4": 17}  # raw mode: what one step of the stored sample is in 8 bits

_pillow_lock = threading.RLock()  # Pillow's pixel limit and Python's warning filters are global


class ImageError(ValueError):
    """An image that cannot be read or written. The message is one line and names the file."""


@dataclass(frozen=True)
class Picture:
    """An image as it is coded: 8 bits, colour and transparency apart.

    Attributes
    ----------
    pixels : ndarray
        (H, W, 3) uint8 RGB; three equal channels when `grey`.
    grey : bool
        One channel in the file.
    alpha : ndarray, optional
        (H, W) uint8, not premultiplied; None when opaque.
    icc : bytes, optional
        ICC profile of the pixels.
    exif : bytes, optional
        EXIF as a TIFF stream, without ``Exif\\0\\0`` before it. Its orientation is not applied to the pixels.
    xmp : bytes, optional
        XMP packet.
    warnings : tuple of str
        What was lost in reading, one line each.
    """

    pixels: np.ndarray
    grey: bool = False
    alpha: np.ndarray | None = None
    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    warnings: tuple[str, ...] = ()


# ---------------------------------------------------------------------------------------------------- reading


def read_image(
    source: str | os.PathLike[str] | BinaryIO, *, strip: bool = False, max_pixels: int = DEFAULT_MAX_PIXELS
) -> Picture:
    """Read an image file of any kind that Pillow knows.

    Parameters
    ----------
    source : path or binary file
        A binary file is read to its end.
    strip : bool
        Drop ICC, EXIF and XMP, keeping the looks: the EXIF orientation is applied to the pixels, and colours
        are converted to sRGB.
    max_pixels : int
        Refuse a larger width times height before pixels are decoded.

    Raises
    ------
    ImageError
        If the file is missing, damaged, too large or of an unsupported kind.
    """
    name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else str(getattr(source, "name", "image"))
    try:
        with _open_stream(source) as stream, _quiet_pillow(max_pixels):
            return _read(stream, strip, max_pixels)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        problem = _too_large(max_pixels)
    except UnidentifiedImageError:
        problem = "not an image of a known format"
    except ImageError as error:
        problem = str(error)
    except MemoryError:
        problem = "not enough memory"
    except OSError as error:
        problem = error.strerror or _damaged(error)
    except Exception as error:  # Pillow's parsers raise nearly anything for a damaged file
        problem = _damaged(error)
    raise ImageError(f"{name}: {problem}")


def _damaged(error: Exception) -> str:
    return f"damaged or unsupported image ({' '.join(str(error).split()) or type(error).__name__})"


def _too_large(max_pixels: int) -> str:
    return f"more than the limit of {max_pixels} pixels (--max-pixels raises it)"


@contextlib.contextmanager
def _open_stream(source: str | os.PathLike[str] | BinaryIO) -> Iterator[BinaryIO]:
    """A seekable binary file positioned at the start of the image."""
    if not isinstance(source, (str, os.PathLike)):
        yield io.BytesIO(source.read())
        return
    with open(source, "rb") as file:
        yield file if file.seekable() else io.BytesIO(file.read())


@contextlib.contextmanager
def _quiet_pillow(max_pixels: int) -> Iterator[None]:
    """Give Pillow our pixel limit in place of its own, and keep its warnings off standard error."""
    with _pillow_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _read(stream: BinaryIO, strip: bool, max_pixels: int) -> Picture:
    stored = Image.open(stream)
    _check_size(stored, max_pixels)
    im, notes = _load(stored, stream)
    _check_size(stored, max_pixels)  # some formats learn their true size only now
    with contextlib.suppress(Exception):  # a damaged later frame does not spoil the first
        frames = getattr(stored, "n_frames", 1)
        if frames > 1:
            notes.append(f"only the first of {frames} frames or pages is kept")
    icc, exif, xmp = _metadata(stored)

    space = _colour_space(icc)
    kept = {b"GRAY"} if im.mode in ("1", "L", "LA", "La") else {b"RGB "}
    if im.mode == "CMYK":
        notes.append("CMYK is converted to RGB")
        with contextlib.suppress(ImageCms.PyCMSError, OSError):
            if icc is not None and space == b"CMYK":
                im = _to_srgb(im, icc)
        icc = None
    elif icc is not None and space not in kept:
        notes.append("an ICC profile that does not fit the pixels is dropped")
        icc = None

    im = _to_plain_mode(im)
    if strip:
        if icc is not None:
            with contextlib.suppress(ImageCms.PyCMSError, OSError):
                im = _to_srgb(im, icc)
        im = _upright(im, exif, xmp)
        icc = exif = xmp = None
    grey = im.mode in ("L", "LA")
    samples = np.array(im).reshape(im.height, im.width, -1)  # (H, W, 1 to 4)
    alpha = np.ascontiguousarray(samples[..., -1]) if im.mode in ("LA", "RGBA") else None
    if alpha is not None and alpha.min() == 255:
        alpha = None
    pixels = np.repeat(samples[..., :1], 3, axis=2) if grey else np.ascontiguousarray(samples[..., :3])
    return Picture(pixels, grey, alpha, icc, exif, xmp, tuple(notes))


def _check_size(im: Image.Image, max_pixels: int) -> None:
    if im.width < 1 or im.height < 1:
        raise ImageError("the image has no pixels")
    if im.width * im.height > max_pixels:
        raise ImageError(f"{im.width} x {im.height} pixels: {_too_large(max_pixels)}")


def _load(stored: Image.Image, stream: BinaryIO) -> tuple[Image.Image, list[str]]:
    """Decode the first frame to an image of 8-bit samples of any mode; return it and notes for the user.

    Pillow keeps 16 bits for one channel only. For the others the high and the low bytes are decoded in two
    passes (grey with alpha: in one, as four 8-bit channels), so that rounding is right: v / 257, not v >> 8.
    """
    layout = _layout(stored)
    kind, _, depth = layout.partition(";")
    wide = depth.startswith("16") or any(
        tile.codec_name.startswith("ppm") and tile.args[1] > 255 for tile in _tiles(stored)
    )
    samples: np.ndarray | None = None  # (H, W, C) uint16
    if layout == "LA;16B":
        _set_layout(stored, "RGBA")
        samples = np.array(stored).view(">u2")  # 4 bytes -> 2 samples a pixel
    elif kind == stored.mode in ("RGB", "RGBA") and depth in _OTHER_BYTE:
        samples = np.array(stored).astype(np.uint16) << 8
        low = Image.open(stream)
        _set_layout(low, f"{kind};{_OTHER_BYTE[depth]}")
        samples |= np.array(low)
    else:
        stored.load()
    if stored.mode in ("I", "F"):
        samples = _wide_samples(stored)
    elif stored.mode.startswith("I;16"):
        samples = np.array(stored)[..., None]

    notes = ["samples of more than 8 bits are reduced to 8"]
    transparent = stored.info.get("transparency")
    if samples is None:
        if stored.mode == "L" and isinstance(transparent, int):
            stored.info["transparency"] = transparent * _GREY_STEPS.get(layout, 1)
        return stored, notes if wide else []
    eight = _TO_8_BIT[samples]
    if transparent is not None and samples.shape[2] in (1, 3):  # PNG's colour that stands for transparency
        alpha = np.where((samples == np.asarray(transparent)).all(axis=2), 0, 255).astype(np.uint8)
        eight = np.dstack([eight, alpha])
    return Image.fromarray(eight[..., 0] if eight.shape[2] == 1 else eight), notes


def _layout(im: Image.Image) -> str:
    """How Pillow unpacks the file's samples (its raw mode, as "RGB;16B"); empty if it does not say."""
    found = {str(tile.args if isinstance(tile.args, str) else (tile.args or [""])[0]) for tile in _tiles(im)}
    return found.pop() if len(found) == 1 else ""


def _tiles(im: Image.Image) -> list[Any]:
    return list(getattr(im, "tile", []))


def _set_layout(im: Image.Image, layout: str) -> None:
    """Make Pillow unpack the file's samples as `layout` says."""
    im.tile = [  # type: ignore[attr-defined]
        tile._replace(args=layout if isinstance(tile.args, str) else (layout, *tile.args[1:])) for tile in _tiles(im)
    ]
    im._mode = layout.partition(";")[0]


def _wide_samples(im: Image.Image) -> np.ndarray:
    """Return the samples (H, W, 1) of a 32-bit mode as 16-bit ones, if that is what they are."""
    if im.mode == "F":
        raise ImageError("floating-point samples are not supported: convert the image to 8 or 16 bits")
    samples = np.array(im)[..., None]
    if samples.min() < 0 or samples.max() > 65535:
        raise ImageError("32-bit samples are not supported: convert the image to 8 or 16 bits")
    return samples


def _to_plain_mode(im: Image.Image) -> Image.Image:
    """Convert an image of 8-bit samples to L, LA, RGB or RGBA."""
    if im.mode in ("1", "L", "LA", "La"):
        mode = "LA" if im.has_transparency_data else "L"
    else:
        mode = "RGBA" if im.has_transparency_data else "RGB"
    return im if im.mode == mode else im.convert(mode)


def _metadata(im: Image.Image) -> tuple[bytes | None, bytes | None, bytes | None]:
    """Return ICC, EXIF (as a TIFF stream) and XMP of a loaded image; None for what is absent."""
    exif = im.info.get("exif")
    if not isinstance(exif, bytes):
        exif = None
        with contextlib.suppress(Exception):
            exif = _descriptive(im.getexif())
    elif exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    xmp = im.info.get("xmp")
    xmp = xmp.encode() if isinstance(xmp, str) else xmp
    icc = im.info.get("icc_profile")
    return icc or None, exif or None, (xmp or None) if isinstance(xmp, bytes) else None


def _descriptive(exif: Image.Exif) -> bytes | None:
    """Return what in `exif` describes the picture, not the file that it came from, as a TIFF stream."""
    for tag in set(exif) - _DESCRIPTIVE:
        del exif[tag]
    return exif.tobytes().removeprefix(b"Exif\0\0") if len(exif) else None


def _colour_space(icc: bytes | None) -> bytes:
    """The colour space that an ICC profile is made for, as its header's four characters."""
    return icc[16:20] if icc is not None and len(icc) >= 128 else b""


def _to_srgb(im: Image.Image, icc: bytes) -> Image.Image:
    """Convert the colours of a CMYK, L, LA, RGB or RGBA image to sRGB; an image that was grey stays grey."""
    profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    if "sRGB" in ImageCms.getProfileDescription(profile):
        return im
    colour = im.convert({"LA": "L", "RGBA": "RGB"}.get(im.mode, im.mode))
    out = ImageCms.profileToProfile(colour, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert out is not None  # it is None only when converting in place
    if im.mode in ("L", "LA"):
        out = out.convert("L")
    if im.mode in ("LA", "RGBA"):
        out.putalpha(im.getchannel("A"))
    return out


def _upright(im: Image.Image, exif: bytes | None, xmp: bytes | None) -> Image.Image:
    """Apply the orientation that the metadata asks for."""
    im.info = {key: data for key, data in (("exif", exif), ("xmp", xmp)) if data}
    with contextlib.suppress(Exception):  # unreadable EXIF asks for nothing
        return ImageOps.exif_transpose(im)
    return im


# ---------------------------------------------------------------------------------------------------- writing


def write_image(picture: Picture, destination: str | os.PathLike[str] | BinaryIO, format: str | None = None) -> None:
    """Write a picture to an image file.

    Grey stays grey where the format can hold it. ICC, EXIF and XMP go into PNG, JPEG, WebP, TIFF and AVIF; in
    other formats the EXIF orientation is applied to the pixels, so that the picture stays upright. WebP is
    lossless, JPEG has quality 95.

    Parameters
    ----------
    picture : Picture
        What to write.
    destination : path or binary file
        A path is written in place: an interrupted call leaves half a file.
    format : str, optional
        A file extension without the dot. By default that of the path; PNG where there is none.

    Raises
    ------
    ImageError
        If the format is unknown, cannot hold the picture (alpha is never flattened) or writing fails.
    """
    path = os.fspath(destination) if isinstance(destination, (str, os.PathLike)) else None
    name = path if path is not None else str(getattr(destination, "name", "output"))
    kind = _format(name, path, format)
    if picture.alpha is not None and kind not in _ALPHA_FORMATS:
        raise ImageError(f"{name}: {kind} cannot hold the image's transparency: write PNG, WebP or TIFF")
    try:
        with _quiet_pillow(sys.maxsize):
            im, options = _to_pillow(picture, kind)
        if isinstance(destination, (str, os.PathLike)):
            im.save(destination, format=kind, **options)
            return
        encoded = io.BytesIO()  # standard output cannot seek, as some formats want
        im.save(encoded, format=kind, **options)
    except OSError as error:
        raise ImageError(f"{name}: {error.strerror or f'cannot be written as {kind} ({error})'}") from None
    except Exception as error:  # Pillow's writers raise nearly anything for what a format cannot hold
        raise ImageError(f"{name}: cannot be written as {kind} ({' '.join(str(error).split())})") from None
    destination.write(encoded.getbuffer())


def _format(name: str, path: str | None, format: str | None) -> str:
    """Return Pillow's name of the format to write."""
    extension = "." + format.lstrip(".") if format else os.path.splitext(path or "")[1]
    kind = Image.registered_extensions().get(extension.lower() or ".png", "")
    if kind not in Image.SAVE:
        raise ImageError(f"{name}: cannot write images of type {extension}")
    return kind


def _to_pillow(picture: Picture, kind: str) -> tuple[Image.Image, dict[str, Any]]:
    """Return the image and the options for Pillow to save it."""
    colour = picture.pixels[..., 0] if picture.grey else picture.pixels
    im = Image.fromarray(np.ascontiguousarray(colour))
    if picture.alpha is not None:
        im.putalpha(Image.fromarray(picture.alpha))
    options = dict(_SAVE_OPTIONS.get(kind, {}))
    if kind not in _METADATA_FORMATS:
        return _upright(im, picture.exif, picture.xmp), options
    if picture.icc and picture.grey and kind in _COLOUR_ONLY_FORMATS:  # a grey profile would not fit
        with contextlib.suppress(ImageCms.PyCMSError, OSError):
            im = _to_srgb(im, picture.icc)
    elif picture.icc:
        options["icc_profile"] = picture.icc
    if kind == "TIFF":
        options["exif"] = _tiff_tags(picture)
        return im, options
    if picture.exif:
        options["exif"] = b"Exif\0\0" + picture.exif
    if picture.xmp and kind == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", picture.xmp)
    elif picture.xmp:
        options["xmp"] = picture.xmp
    return im, options


def _tiff_tags(picture: Picture) -> Image.Exif:
    """EXIF and XMP as tags of a TIFF file; tags that would contradict the file's own layout are left out."""
    tags = Image.Exif()
    with contextlib.suppress(Exception):  # unreadable EXIF
        tags.load(b"Exif\0\0" + (picture.exif or b""))
        tags.load(b"Exif\0\0" + (_descriptive(tags) or b""))
    if picture.xmp:
        tags[_XMP_TAG] = picture.xmp
    return tags


# ---------------------------------------------------------------------------------------------- transparency


def encode_alpha(alpha: np.ndarray) -> bytes:
    """Compress an alpha plane (H, W) uint8 without loss, as the PNG stream that docs/format.md describes."""
    plane = Image.fromarray(np.ascontiguousarray(alpha))
    candidates = [plane]
    if np.isin(alpha, (0, 255)).all():
        candidates.append(plane.convert("1", dither=Image.Dither.NONE))
    streams = []
    for candidate in candidates:
        stream = io.BytesIO()
        candidate.save(stream, format="PNG", optimize=True)
        streams.append(stream.getvalue())
    return min(streams, key=len)


def decode_alpha(data: bytes, width: int, height: int) -> np.ndarray:
    """Return the alpha plane (height, width) uint8 of a file's alpha section.

    Raises
    ------
    FormatError
        If the section is not a PNG stream of this size and of a kind that the format allows. Both are
        checked before pixels are decoded.
    """
    if len(data) < 33 or data[:16] != b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR":
        raise FormatError("the alpha section is not a PNG stream")
    columns, rows, depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", data[16:29])
    if (columns, rows) != (width, height):
        raise FormatError(f"alpha has {columns} x {rows} pixels, but the image has {width} x {height}")
    if depth not in (1, 8) or colour != 0 or interlace != 0:
        raise FormatError("the alpha section is not a grey PNG of 1 or 8 bits without interlacing")
    try:
        with _quiet_pillow(width * height), Image.open(io.BytesIO(data), formats=["PNG"]) as im:
            im.load()
            if "transparency" in im.info or im.size != (width, height):
                raise ValueError("tRNS or a second size")
            return np.array(im.convert("L"))
    except Exception:  # Pillow's parsers raise nearly anything for a damaged file
        raise FormatError("the alpha section is damaged") from None
