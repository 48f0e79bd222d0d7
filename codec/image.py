"""Image file → Picture, with Pillow.

Pixels are always (H, W, 3) uint8, also those of a grey picture (three equal channels).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import BinaryIO, cast

from PIL import Image, UnidentifiedImageError

from .bitstream import DEFAULT_MAX_PIXELS, MAGIC
from .bounded import BoundedFile, Spool
from .colour import matrix_profile, srgb_table, stated_colours
from .metadata import colour_space, orientation, read_metadata, to_srgb, turned
from .picture import ImageError, Picture, named
from .pillow import (
    MOST_METADATA,
    as_image,
    limited_pillow,
    load_8_bit,
    open_foreign,
    planes,
    refuse_programs,
    silent_libtiff,
    to_plain_mode,
)

_HEADER_BYTES = 2**26  # read of the smallest image file, at most
_PIXEL_BYTES = 16  # read more for each pixel: twice those of four 16-bit samples, which take two passes
_PIPE_BYTES = 4  # of a pipe, as they are kept in memory


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
            picture = _read(stream, max_pixels)
        return stripped(picture) if strip else picture
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
    raise ImageError(named(source, problem))


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
        spool = Spool(stream, _HEADER_BYTES + _PIPE_BYTES * max_pixels)
        yield BoundedFile(spool, limit)
        spool.drain()


def _read(stream: BoundedFile, max_pixels: int) -> Picture:
    stream.expect_header()
    stored = _opened(cast(BinaryIO, stream))
    refuse_programs(stored)
    _check_size(stored, max_pixels)
    colours = stated_colours(stored, stream)
    stream.expect_pixels()
    table = None if colours.gamma is None else srgb_table(colours.gamma)
    with silent_libtiff(stored):
        im, notes = load_8_bit(stored, cast(BinaryIO, stream), table)
    if colours.gamma is not None:
        notes.append(f"the gamma of the file, {colours.gamma:.4g}, is converted to that of sRGB")
    if colours.hdr:
        notes.append(f"the transfer curve of the file, {colours.hdr}, is not converted: it is shown as that of sRGB")
    _check_size(stored, max_pixels)  # some formats learn their true size only now
    icc, exif, xmp = read_metadata(stored)
    if icc is None and colours.primaries is not None and im.mode not in ("1", "L", "LA", "La"):
        icc = matrix_profile(colours.primaries)
    picture = to_picture(im, icc, exif, xmp, notes)
    note = _frames_left_out(stored, stream)  # last, as counting pages of a TIFF may leave another one loaded
    return replace(picture, warnings=(*picture.warnings, note)) if note else picture


def _frames_left_out(stored: Image.Image, stream: BoundedFile) -> str:
    """A warning about frames and pages behind the first; empty where there are none."""
    stream.expect_header()
    try:
        frames = getattr(stored, "n_frames", 1)
    except ImageError:  # too many to count
        return "only the first frame or page is kept"
    except Exception:  # a damaged later frame does not spoil the first
        return ""
    return f"only the first of {frames} frames or pages is kept" if frames > 1 else ""


def to_picture(
    im: Image.Image, icc: bytes | None, exif: bytes | None, xmp: bytes | None, notes: Sequence[str] = ()
) -> Picture:
    """The picture of an image of 8-bit samples, in any of Pillow's modes, and its metadata; `notes` become warnings."""
    notes = list(notes)
    for kind, data in (("ICC profile", icc), ("EXIF", exif), ("XMP", xmp)):
        if data is not None and len(data) > MOST_METADATA:
            notes.append(f"{kind} of {len(data)} bytes is dropped")
    icc, exif, xmp = (None if data is None or len(data) > MOST_METADATA else data for data in (icc, exif, xmp))
    if exif is not None and not exif.startswith((b"II", b"MM")):
        notes.append("EXIF that cannot be read is dropped")
        exif = None
    try:
        (xmp or b"").decode()
    except UnicodeDecodeError:
        notes.append("XMP that is not UTF-8 is dropped")
        xmp = None

    fitting = b"GRAY" if im.mode in ("1", "L", "LA", "La") else b"RGB "
    if im.mode == "CMYK":
        notes.append("CMYK is converted to RGB")
        if icc is not None and colour_space(icc) == b"CMYK":
            im = to_srgb(im, icc) or im
        icc = None
    elif icc is not None and colour_space(icc) != fitting:
        notes.append("an ICC profile that does not fit the pixels is dropped")
        icc = None

    pixels, grey, alpha = planes(to_plain_mode(im))
    return Picture(pixels=pixels, grey=grey, alpha=alpha, icc=icc, exif=exif, xmp=xmp, warnings=tuple(notes))


def _opened(stream: BinaryIO) -> Image.Image:
    head = stream.read(len(MAGIC))
    stream.seek(0)
    if head == MAGIC:
        raise ImageError("a .sga file: decode it, or copy it; coding it again would only lose quality")
    try:
        return Image.open(stream)
    except UnidentifiedImageError:
        im = open_foreign(stream)
        if im is None:
            raise
        return im


def stripped(picture: Picture) -> Picture:
    """A picture without ICC, EXIF and XMP that looks the same: in sRGB, and turned as its orientation says."""
    notes = picture.warnings
    pixels, alpha = picture.pixels, picture.alpha
    if picture.icc is not None:
        converted = to_srgb(as_image(picture), picture.icc)
        if converted is None:
            notes = (*notes, "an ICC profile that cannot be used is dropped")
        else:
            pixels, _, alpha = planes(converted)
    turn = orientation(picture.exif, picture.xmp)
    return Picture(
        pixels=turned(pixels, turn),
        grey=picture.grey,
        alpha=None if alpha is None else turned(alpha, turn),
        warnings=notes,
    )


def _check_size(im: Image.Image, max_pixels: int) -> None:
    if im.width < 1 or im.height < 1:
        raise ImageError("the image has no pixels")
    if im.width * im.height > max_pixels:
        raise ImageError(f"{im.width} x {im.height} pixels: {_too_large(max_pixels)}")
