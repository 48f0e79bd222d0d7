"""Picture → image file, with Pillow; what a format cannot hold is converted, or dropped with a warning."""

from __future__ import annotations

import io
import os
import sys
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from PIL import Image, PngImagePlugin

from .metadata import (
    essential_exif,
    only_essential,
    orientation,
    resolution,
    tiff_tags,
    to_srgb,
    turned,
    upright_xmp,
)
from .picture import ImageError, Picture, named
from .pillow import as_image, limited_pillow, planes

_ALPHA_FORMATS = {"PNG", "WEBP", "TIFF", "AVIF", "JPEG2000", "TGA", "QOI", "SGI", "DDS", "ICO"}
_METADATA_FORMATS = {"PNG", "JPEG", "WEBP", "TIFF", "AVIF"}
_COLOUR_ONLY_FORMATS = {"WEBP", "AVIF"}  # a grey profile would not fit
_RESOLUTION_FORMATS = {"PNG", "JPEG", "BMP", "DIB", "PDF"}
_CODESTREAMS = {".j2k", ".j2c", ".jpc"}  # JPEG 2000 without the container of .jp2
_NO_MODES = {("L", "QOI"), ("LA", "QOI"), ("LA", "SGI")}
_MOST_SIDE = {"ICO": 256, "WEBP": 16383, "JPEG": 65500, "PDF": 65500, "AVIF": 65535}  # pixels
_MOST_SIDE |= dict.fromkeys(("GIF", "TGA", "PCX", "SGI"), 65535)
_NAMES = {"icc": "ICC profile", "exif": "EXIF", "xmp": "XMP"}
_LEFT_OUT = ((), ("exif",), ("xmp",), ("exif", "xmp"), ("icc",), ("icc", "exif", "xmp"))  # one after the other
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "PNG": {"compress_level": 4},  # 2 % larger than with Pillow's default, in half the time
    "JPEG": {"quality": 95, "subsampling": 0},
    "PDF": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 100},
}


@dataclass(frozen=True)
class Written:
    """What `write_image` has written.

    Attributes
    ----------
    format : str
        Pillow's name of the format.
    width, height : int
        In pixels. They change places where an orientation is applied.
    bytes : int
    warnings : tuple of str
        What was lost or converted, one line each.
    """

    format: str
    width: int
    height: int
    bytes: int
    warnings: tuple[str, ...]


def write_image(picture: Picture, destination: str | os.PathLike[str] | BinaryIO, format: str | None = None) -> Written:
    """Write a picture to an image file.

    Grey stays grey where the format can hold it. ICC, EXIF and XMP go into PNG, JPEG, WebP, TIFF and AVIF; for other
    formats the pixels are converted to sRGB and turned upright. JPEG has quality 95, AVIF 100, both without
    subsampling of colours; GIF has 256 colours; all other formats are lossless.

    Parameters
    ----------
    picture : Picture
        What to write.
    destination : path or binary file
        A path is written in place: an interrupted call leaves half a file.
    format : str, optional
        A file extension without the dot. By default that of the path; PNG where there is none.

    Returns
    -------
    Written

    Raises
    ------
    ImageError
        If the format is unknown, cannot hold the picture (alpha is never flattened) or writing fails.
    """
    kind, extension = _format(destination, format)
    if extension == ".pgm" and not picture.grey:
        raise ImageError(named(destination, "PGM cannot hold colours: write PPM"))
    if picture.alpha is not None and kind not in _ALPHA_FORMATS:
        problem = f"{kind} cannot hold the image's transparency: write PNG, WebP or TIFF"
        raise ImageError(named(destination, problem))
    height, width = picture.pixels.shape[:2]
    if max(height, width) > _MOST_SIDE.get(kind, sys.maxsize):
        raise ImageError(named(destination, _too_large(kind, width, height)))
    try:
        with limited_pillow(sys.maxsize):
            data, written = _encoded(picture, kind, extension)
        if isinstance(destination, (str, os.PathLike)):
            with open(destination, "wb") as file:
                file.write(data)
            return written
    except ImageError as error:
        raise ImageError(named(destination, str(error))) from None
    except OSError as error:
        problem = error.strerror or f"cannot be written as {kind} ({error})"
        raise ImageError(named(destination, problem)) from None
    except Exception as error:  # Pillow's writers raise exceptions of many types for what a format cannot hold
        problem = f"cannot be written as {kind} ({' '.join(str(error).split())})"
        raise ImageError(named(destination, problem)) from None
    destination.write(data)
    return written


def writable_format(extension: str) -> str | None:
    """Pillow's name of the format with a file extension, ".png" for example; None if it writes no such files."""
    if extension.lower() in (".pbm", ".pfm"):  # which Pillow would write as PGM or PPM
        return None
    Image.preinit()  # the commonest formats; importing all others takes time
    kind = Image.EXTENSION.get(extension.lower()) or Image.registered_extensions().get(extension.lower())
    return kind if kind in Image.SAVE and kind != "SGA" else None  # SGA: our own plugin, which would code it again


def _format(destination: str | os.PathLike[str] | BinaryIO, format: str | None) -> tuple[str, str]:
    """Return Pillow's name of the format to write, and the extension in lower case."""
    path = os.fspath(destination) if isinstance(destination, (str, os.PathLike)) else ""
    extension = "." + format.lstrip(".") if format else os.path.splitext(path)[1]
    kind = writable_format(extension or ".png")
    if kind is None:
        raise ImageError(named(destination, f"cannot write images of type {extension}"))
    return "JPEG" if kind == "MPO" else kind, extension.lower()  # an MPO file of one picture is a JPEG file


def _encoded(picture: Picture, kind: str, extension: str) -> tuple[bytes, Written]:
    """The content of the image file. Metadata that the format does not take is left out, with a warning."""
    shown, notes = (picture, []) if kind in _METADATA_FORMATS else _without_metadata(picture, kind)
    problem: Exception | None = None
    for names in _LEFT_OUT:
        if any(getattr(shown, name) is None for name in names):
            continue
        reduced = _without(shown, names)
        try:
            im, options = _to_pillow(reduced, kind, notes)
            if extension in _CODESTREAMS:
                options["no_jp2"] = True
            data = _saved(im, kind, options)
        except ImageError:
            raise
        except Exception as error:  # the first one tells what is wrong if leaving out metadata does not help
            problem = problem or error
            continue
        for name in names:
            size = len(getattr(shown, name))
            notes.append(f"{kind} cannot hold this {_NAMES[name]} of {size} bytes: it is dropped")
        return data, Written(kind, im.width, im.height, len(data), tuple(dict.fromkeys(notes)))
    assert problem is not None
    raise problem


def _without(picture: Picture, names: tuple[str, ...]) -> Picture:
    """A picture without some of its metadata; the orientation and the resolution stay."""
    exif = None if "exif" in names else picture.exif
    if names:
        exif = exif or essential_exif(picture.exif, picture.xmp)
    return replace(
        picture,
        icc=None if "icc" in names else picture.icc,
        exif=exif,
        xmp=None if "xmp" in names else picture.xmp,
    )


def _without_metadata(picture: Picture, kind: str) -> tuple[Picture, list[str]]:
    """A picture in sRGB and upright, without metadata, and warnings about what is lost."""
    notes: list[str] = []
    if picture.icc is not None:
        im = as_image(picture)
        converted = _in_srgb(im, picture.icc, f"{kind} holds no ICC profile: the colours are", notes)
        if converted is not im:
            pixels, _, _ = planes(converted)
            picture = replace(picture, pixels=pixels)
    lost = [] if picture.exif is None or only_essential(picture.exif) else ["EXIF"]
    lost += [] if picture.xmp is None else ["XMP"]
    if lost:
        notes.append(f"{kind} holds no {' and no '.join(lost)}: dropped")
    turn = orientation(picture.exif, picture.xmp)
    alpha = None if picture.alpha is None else turned(picture.alpha, turn)
    kept = essential_exif(picture.exif, None) if kind in _RESOLUTION_FORMATS else None
    pixels = turned(picture.pixels, turn)
    return replace(picture, pixels=pixels, alpha=alpha, icc=None, exif=kept, xmp=None), notes


def _in_srgb(im: Image.Image, icc: bytes, subject: str, notes: list[str]) -> Image.Image:
    """An image in sRGB, which may be the same, and a warning if it is another one or the profile cannot be used."""
    converted = to_srgb(im, icc)
    if converted is None:
        notes.append("an ICC profile that cannot be used is dropped")
        return im
    if converted is not im:
        notes.append(f"{subject} converted to sRGB")
    return converted


def _to_pillow(picture: Picture, kind: str, notes: list[str]) -> tuple[Image.Image, dict[str, Any]]:
    """Return the image and the options for Pillow to save it; add warnings to `notes`."""
    im = as_image(picture)
    options = dict(_SAVE_OPTIONS.get(kind, {}))
    if kind == "ICO":
        options["sizes"] = [im.size]
    if kind == "AVIF" and not picture.grey:
        options["subsampling"] = "4:4:4"
    dpi = resolution(picture.exif)
    if dpi is not None and kind in _RESOLUTION_FORMATS:
        options["dpi"] = dpi
    if (im.mode, kind) in _NO_MODES:
        im = im.convert("RGBA" if im.mode == "LA" else "RGB")
    if kind not in _METADATA_FORMATS:
        return im, options
    if picture.icc and picture.grey and kind in _COLOUR_ONLY_FORMATS:
        im = _in_srgb(im, picture.icc, f"{kind} holds no ICC profile of grey: the grey levels are", notes)
    elif picture.icc:
        options["icc_profile"] = picture.icc
    if kind == "TIFF":
        options["exif"] = tags = tiff_tags(picture.exif, picture.xmp)
        if picture.exif and len(tags) == (1 if picture.xmp else 0):
            notes.append("EXIF that cannot be read is dropped")
        return im, options
    if picture.exif:
        options["exif"] = b"Exif\0\0" + picture.exif
    if picture.xmp and kind == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", picture.xmp)
    elif picture.xmp:
        options["xmp"] = picture.xmp
    if "xmp" in options and kind == "AVIF" and orientation(picture.exif, picture.xmp) == 1:
        options["xmp"] = upright_xmp(options["xmp"])  # Pillow leaves out that EXIF says 1, and XMP would be believed
    return im, options


def _saved(im: Image.Image, kind: str, options: dict[str, Any]) -> bytes:
    """The content of the image file.

    Raises
    ------
    ImageError
        If the format has changed the size, as those do that hold icons only.
    """
    stream = io.BytesIO()
    im.save(stream, format=kind, **options)
    if kind in Image.OPEN:
        with Image.open(stream, formats=[kind]) as back:
            if sorted(back.size) != sorted(im.size):  # some readers turn it upright
                raise ImageError(_too_large(kind, im.width, im.height))
    return stream.getvalue()


def _too_large(kind: str, width: int, height: int) -> str:
    limit = f": at most {_MOST_SIDE[kind]} a side" if kind in _MOST_SIDE else ""
    return f"{kind} cannot hold an image of {width} x {height} pixels{limit}"
