"""ICC profiles, EXIF and XMP of Pillow images."""

from __future__ import annotations

import contextlib
import io

from PIL import Image, ImageCms, ImageOps

# EXIF tags that describe the picture; the other tags of a TIFF directory describe the layout of that file.
_DESCRIPTIVE = {270, 271, 272, 274, 282, 283, 296, 305, 306, 315, 316, 33432, 34665, 34853}
_XMP_TAG = 700


def read_metadata(im: Image.Image) -> tuple[bytes | None, bytes | None, bytes | None]:
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


def tiff_tags(exif: bytes | None, xmp: bytes | None) -> Image.Exif:
    """EXIF and XMP as tags of a TIFF file, without those that would contradict the file's own layout."""
    tags = Image.Exif()
    with contextlib.suppress(Exception):  # unreadable EXIF
        tags.load(b"Exif\0\0" + (exif or b""))
        tags.load(b"Exif\0\0" + (_descriptive(tags) or b""))
    if xmp:
        tags[_XMP_TAG] = xmp
    return tags


def _descriptive(exif: Image.Exif) -> bytes | None:
    """The tags that describe the picture, not the file that it came from, as a TIFF stream; None without any."""
    for tag in set(exif) - _DESCRIPTIVE:
        del exif[tag]
    return exif.tobytes().removeprefix(b"Exif\0\0") if len(exif) else None


def colour_space(icc: bytes | None) -> bytes:
    """The colour space of an ICC profile, as the four characters in its header; empty if there is none."""
    return icc[16:20] if icc is not None and len(icc) >= 128 else b""


def to_srgb(im: Image.Image, icc: bytes) -> Image.Image:
    """Convert the colours of a CMYK, L, LA, RGB or RGBA image to sRGB; an image that was grey stays grey.

    The image is returned unchanged when the profile is sRGB already, or cannot be used.
    """
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        if "sRGB" in ImageCms.getProfileDescription(profile):
            return im
        colour = im.convert({"LA": "L", "RGBA": "RGB"}.get(im.mode, im.mode))
        out = ImageCms.profileToProfile(colour, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return im
    assert out is not None  # it is None only when converting in place
    if im.mode in ("L", "LA"):
        out = out.convert("L")
    if im.mode in ("LA", "RGBA"):
        out.putalpha(im.getchannel("A"))
    return out


def upright(im: Image.Image, exif: bytes | None, xmp: bytes | None) -> Image.Image:
    """Apply the orientation in the metadata to the pixels."""
    im.info = {key: data for key, data in (("exif", exif), ("xmp", xmp)) if data}
    with contextlib.suppress(Exception):  # without readable EXIF there is no orientation
        return ImageOps.exif_transpose(im)
    return im
