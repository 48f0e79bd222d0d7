"""Image files ↔ Picture, with Pillow.

    file ─ read_image ──► Picture
    file ◄ write_image ── Picture

Pixels are always (H, W, 3) uint8, also those of a grey picture (three equal channels).
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from .bitstream import DEFAULT_MAX_PIXELS
from .bounded import BoundedFile, Spool
from .metadata import colour_space, read_metadata, tiff_tags, to_srgb, upright
from .picture import ImageError, Picture
from .pillow import limited_pillow, load_8_bit, silent_libtiff, to_plain_mode

_ALPHA_FORMATS = {"PNG", "WEBP", "TIFF", "AVIF", "JPEG2000", "TGA"}
_METADATA_FORMATS = {"PNG", "JPEG", "WEBP", "TIFF", "AVIF"}
_COLOUR_ONLY_FORMATS = {"WEBP", "AVIF"}
_HEADER_BYTES = 2**26  # read of the smallest image file, at most
_PIXEL_BYTES = 16  # read more for each pixel: twice those of four 16-bit samples, which take two passes
_MOST_METADATA = 2**24  # bytes
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True},
}


# ---------------------------------------------------------------------------------------------------- reading


def read_image(
    source: str | os.PathLike[str] | BinaryIO, *, strip: bool = False, max_pixels: int = DEFAULT_MAX_PIXELS
) -> Picture:
    """Read an image file of any kind that Pillow knows.

    Parameters
    ----------
    source : path or binary file
        A binary file is read from where it stands to its end, or as far as an image can reach.
    strip : bool
        Drop ICC, EXIF and XMP, but keep the appearance: the EXIF orientation is applied to the pixels, and colours
        are converted to sRGB.
    max_pixels : int
        Refuse a larger width times height before pixels are decoded.

    Raises
    ------
    ImageError
        If the file is missing, damaged, too large or of an unsupported kind.
    """
    try:
        with _open_stream(source, max_pixels) as stream, limited_pillow(max_pixels):
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
    except Exception as error:  # Pillow's parsers raise exceptions of many types for a damaged file
        problem = _damaged(error)
    raise ImageError(_named(source, problem))


def _named(file: str | os.PathLike[str] | BinaryIO, problem: str) -> str:
    """The message of an error in a file, with its path if it has one."""
    return f"{os.fspath(file)}: {problem}" if isinstance(file, (str, os.PathLike)) else problem


def _damaged(error: Exception) -> str:
    return f"damaged or unsupported image ({' '.join(str(error).split()) or type(error).__name__})"


def _too_large(max_pixels: int) -> str:
    return f"more than the limit of {max_pixels} pixels (--max-pixels raises it)"


@contextlib.contextmanager
def _open_stream(source: str | os.PathLike[str] | BinaryIO, max_pixels: int) -> Iterator[BoundedFile]:
    """A file positioned at the start of the image, of which no more can be read than an image of `max_pixels` takes."""
    limit = _HEADER_BYTES + _PIXEL_BYTES * max_pixels
    with contextlib.ExitStack() as opened:
        stream = source if not isinstance(source, (str, os.PathLike)) else opened.enter_context(open(source, "rb"))
        if stream is not source and stream.seekable():
            yield BoundedFile(stream, limit)
            return
        spool = Spool(stream, limit)
        yield BoundedFile(spool, limit)
        spool.drain()


def _read(stream: BoundedFile, strip: bool, max_pixels: int) -> Picture:
    stream.expect_header()
    stored = Image.open(cast(BinaryIO, stream))
    _check_size(stored, max_pixels)
    stream.expect_pixels()
    with silent_libtiff(stored):
        im, notes = load_8_bit(stored, cast(BinaryIO, stream))
    _check_size(stored, max_pixels)  # some formats learn their true size only now
    stream.expect_header()
    try:
        frames = getattr(stored, "n_frames", 1)
        if frames > 1:
            notes.append(f"only the first of {frames} frames or pages is kept")
    except ImageError:  # too many to count
        notes.append("only the first frame or page is kept")
    except Exception:  # a damaged later frame does not spoil the first
        pass
    stream.expect_pixels()
    icc, exif, xmp = read_metadata(stored)
    for kind, data in (("ICC profile", icc), ("EXIF", exif), ("XMP", xmp)):
        if data is not None and len(data) > _MOST_METADATA:
            notes.append(f"{kind} of {len(data)} bytes is dropped")
    icc, exif, xmp = (None if data is None or len(data) > _MOST_METADATA else data for data in (icc, exif, xmp))

    fitting = b"GRAY" if im.mode in ("1", "L", "LA", "La") else b"RGB "
    if im.mode == "CMYK":
        notes.append("CMYK is converted to RGB")
        if icc is not None and colour_space(icc) == b"CMYK":
            im = to_srgb(im, icc)
        icc = None
    elif icc is not None and colour_space(icc) != fitting:
        notes.append("an ICC profile that does not fit the pixels is dropped")
        icc = None

    im = to_plain_mode(im)
    if strip:
        if icc is not None:
            im = to_srgb(im, icc)
        im = upright(im, exif, xmp)
        icc = exif = xmp = None
    grey = im.mode in ("L", "LA")
    samples = np.array(im).reshape(im.height, im.width, -1)  # (H, W, 1 to 4)
    alpha = np.ascontiguousarray(samples[..., -1]) if im.mode in ("LA", "RGBA") else None
    if alpha is not None and alpha.min() == 255:
        alpha = None
    pixels = np.repeat(samples[..., :1], 3, axis=2) if grey else np.ascontiguousarray(samples[..., :3])
    return Picture(pixels=pixels, grey=grey, alpha=alpha, icc=icc, exif=exif, xmp=xmp, warnings=tuple(notes))


def _check_size(im: Image.Image, max_pixels: int) -> None:
    if im.width < 1 or im.height < 1:
        raise ImageError("the image has no pixels")
    if im.width * im.height > max_pixels:
        raise ImageError(f"{im.width} x {im.height} pixels: {_too_large(max_pixels)}")


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
    kind = _format(destination, format)
    if picture.alpha is not None and kind not in _ALPHA_FORMATS:
        problem = f"{kind} cannot hold the image's transparency: write PNG, WebP or TIFF"
        raise ImageError(_named(destination, problem))
    try:
        with limited_pillow(sys.maxsize):
            im, options = _to_pillow(picture, kind)
        if isinstance(destination, (str, os.PathLike)):
            im.save(destination, format=kind, **options)
            return
        encoded = io.BytesIO()  # standard output cannot seek, as some formats require
        im.save(encoded, format=kind, **options)
    except OSError as error:
        problem = error.strerror or f"cannot be written as {kind} ({error})"
        raise ImageError(_named(destination, problem)) from None
    except Exception as error:  # Pillow's writers raise exceptions of many types for what a format cannot hold
        problem = f"cannot be written as {kind} ({' '.join(str(error).split())})"
        raise ImageError(_named(destination, problem)) from None
    destination.write(encoded.getbuffer())


def _format(destination: str | os.PathLike[str] | BinaryIO, format: str | None) -> str:
    """Return Pillow's name of the format to write."""
    path = os.fspath(destination) if isinstance(destination, (str, os.PathLike)) else ""
    extension = "." + format.lstrip(".") if format else os.path.splitext(path)[1]
    kind = Image.registered_extensions().get(extension.lower() or ".png", "")
    if kind not in Image.SAVE:
        raise ImageError(_named(destination, f"cannot write images of type {extension}"))
    return kind


def _to_pillow(picture: Picture, kind: str) -> tuple[Image.Image, dict[str, Any]]:
    """Return the image and the options for Pillow to save it."""
    colour = picture.pixels[..., 0] if picture.grey else picture.pixels
    im = Image.fromarray(np.ascontiguousarray(colour))
    if picture.alpha is not None:
        im.putalpha(Image.fromarray(picture.alpha))
    options = dict(_SAVE_OPTIONS.get(kind, {}))
    if kind not in _METADATA_FORMATS:
        return upright(im, picture.exif, picture.xmp), options
    if picture.icc and picture.grey and kind in _COLOUR_ONLY_FORMATS:  # a grey profile would not fit
        im = to_srgb(im, picture.icc)
    elif picture.icc:
        options["icc_profile"] = picture.icc
    if kind == "TIFF":
        options["exif"] = tiff_tags(picture.exif, picture.xmp)
        return im, options
    if picture.exif:
        options["exif"] = b"Exif\0\0" + picture.exif
    if picture.xmp and kind == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", picture.xmp)
    elif picture.xmp:
        options["xmp"] = picture.xmp
    return im, options
