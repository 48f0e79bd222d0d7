"""Pillow with limits of ours, with samples of more than 8 bits rounded to 8; its images ↔ Picture."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import Image, PngImagePlugin

from .picture import ImageError, Picture

MOST_METADATA = 2**24  # bytes of an ICC profile, of EXIF, and of XMP

_TO_8_BIT = ((np.arange(2**16, dtype=np.uint32) * 255 + 32767) // 65535).astype(np.uint8)  # round(v / 257)
_OTHER_BYTE = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
_GREY_STEPS = {"L;2": 85, "L;4": 17}  # raw mode: 8-bit difference between neighbouring values of the stored sample
_BITS, _PHOTOMETRIC, _FILL_ORDER, _PLANES = 258, 262, 266, 284  # tags of TIFF

_lock = threading.RLock()  # Pillow's pixel limit and Python's warning filters are global


@contextlib.contextmanager
def limited_pillow(max_pixels: int) -> Iterator[None]:
    """Replace Pillow's pixel limit by `max_pixels`, raise its limits of metadata in PNG, and suppress its warnings.

    Pillow raises ``DecompressionBombError`` or ``DecompressionBombWarning`` for an image above the limit.
    """
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        before = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = max_pixels, MOST_METADATA + 1
        PngImagePlugin.MAX_TEXT_MEMORY = 4 * MOST_METADATA
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = before


def refuse_programs(im: Image.Image) -> None:
    """Refuse PostScript: Pillow would run Ghostscript to show it, that is, run a program that the file brings.

    Raises
    ------
    ImageError
    """
    if im.format == "EPS":
        raise ImageError("PostScript is a program, not an image: convert it first")


@contextlib.contextmanager
def silent_libtiff(im: Image.Image) -> Iterator[None]:
    """Discard what libtiff prints on standard error while a TIFF file is decoded: Pillow's exceptions say it as well.

    It prints with C, so the file descriptor is led elsewhere, which is the same for all threads.
    """
    try:
        kept = os.dup(2) if im.format == "TIFF" else None
    except OSError:  # there is no standard error
        kept = None
    if kept is None:
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def load_8_bit(
    stored: Image.Image, stream: BinaryIO | None = None, table: np.ndarray | None = None
) -> tuple[Image.Image, list[str]]:
    """Decode the first frame of an opened image.

    Pillow keeps 16 bits for one channel only. For the others the high and the low bytes are decoded in two
    passes (grey with alpha: in one, as four 8-bit channels), so that rounding is right: v / 257, not v >> 8.

    Parameters
    ----------
    stored : Image
        As ``Image.open`` returns it.
    stream : binary file, optional
        The file that it was opened from; read a second time where two passes are needed. None: an image in memory.
    table : ndarray, optional
        (65536,) uint8: the 8-bit samples for 16-bit samples of colour, where these are not to be rounded only.

    Returns
    -------
    Image
        8-bit samples, in any of Pillow's modes.
    list of str
        Warnings for the user, one line each.

    Raises
    ------
    ImageError
        If the samples are floating-point numbers, or integers outside 0 to 65535, or in planes that Pillow mixes up.
    """
    _refuse_planes(stored)
    layout = _layout(stored)
    kind, _, depth = layout.partition(";")
    wide = depth.startswith("16") or any(_largest_sample(tile) > 255 for tile in _tiles(stored))
    samples: np.ndarray | None = None  # (H, W, C) uint16
    if layout == "LA;16B":
        _set_layout(stored, "RGBA")
        samples = np.array(stored).view(">u2")  # 4 bytes -> 2 samples a pixel
    elif kind == stored.mode in ("RGB", "RGBA") and depth in _OTHER_BYTE:
        samples = np.array(stored).astype(np.uint16) << 8
        low = Image.open(cast(BinaryIO, stream))
        _set_layout(low, f"{kind};{_OTHER_BYTE[depth]}")
        samples |= np.array(low)
    else:
        stored.load()
    if stored.mode in ("I", "F"):
        samples = _wide_samples(stored)
    elif stored.mode.startswith("I;16"):
        samples = np.array(stored)[..., None]
        if layout == "I;12":
            samples = ((samples.astype(np.uint32) * 65535 + 2047) // 4095).astype(np.uint16)
        elif layout in ("I;16", "I;16N") and _tiff_tags(stored).get(_PHOTOMETRIC) == 0:
            samples = ~samples  # 0 is white, which Pillow heeds at 8 bits only

    notes = ["samples of more than 8 bits are reduced to 8"]
    transparent = stored.info.get("transparency")
    if samples is None:
        if stored.mode == "L" and isinstance(transparent, int):
            stored.info["transparency"] = transparent * _GREY_STEPS.get(layout, 1)
        return stored if table is None else _mapped(stored, table), notes if wide else []
    eight = _TO_8_BIT[samples]
    if table is not None:
        colours = samples.shape[2] - (1 - samples.shape[2] % 2)  # two and four channels have alpha
        eight[..., :colours] = table[samples[..., :colours]]
    if transparent is not None and samples.shape[2] in (1, 3):  # PNG's colour that stands for transparency
        alpha = np.where((samples == np.asarray(transparent)).all(axis=2), 0, 255).astype(np.uint8)
        eight = np.dstack([eight, alpha])
    return Image.fromarray(eight[..., 0] if eight.shape[2] == 1 else eight), notes


def _refuse_planes(im: Image.Image) -> None:
    """Refuse a TIFF file with a plane for each channel of which Pillow would take some samples for others.

    Where they are uncompressed, it heeds neither their bit depth, nor the order of bits, nor that 0 may be white; where
    they are compressed, it puts them into red, green, blue and alpha whatever they are.
    """
    tags, tiles = _tiff_tags(im), _tiles(im)
    if not tiles or tags.get(_PLANES) != 2:
        return
    right = im.mode not in ("LA", "La", "PA", "LAB", "YCbCr")
    if right and tiles[0].codec_name == "raw":
        right = set(tags.get(_BITS, (1,))) == {1 if im.mode == "1" else 8}
        right = right and tags.get(_PHOTOMETRIC, 0) != 0 and tags.get(_FILL_ORDER, 1) == 1
    if not right:
        raise ImageError("TIFF with separate planes of a kind that is not supported: store the channels together")


def _tiff_tags(im: Image.Image) -> Any:
    return getattr(im, "tag_v2", {})


def _mapped(im: Image.Image, table: np.ndarray) -> Image.Image:
    """Map the colours of an image of 8-bit samples; `table` is that for 16-bit samples."""
    im = to_plain_mode(im)
    colours = table[::257].tolist() * (1 if im.mode in ("L", "LA") else 3)
    return im.point(colours + (list(range(256)) if im.mode in ("LA", "RGBA") else []))


def _layout(im: Image.Image) -> str:
    """How Pillow unpacks the file's samples (its raw mode, as "RGB;16B"); empty if it does not say."""
    found = {str(tile.args if isinstance(tile.args, str) else (tile.args or [""])[0]) for tile in _tiles(im)}
    return found.pop() if len(found) == 1 else ""


def _tiles(im: Image.Image) -> list[Any]:
    return list(getattr(im, "tile", []))


def _largest_sample(tile: Any) -> int:
    """The largest sample that the header of a PPM file allows (bilevel ones do not state it); 0 for other formats."""
    stated = tile.codec_name.startswith("ppm") and isinstance(tile.args, tuple)
    return int(tile.args[1]) if stated else 0


def _set_layout(im: Image.Image, layout: str) -> None:
    """Make Pillow unpack the file's samples as `layout` says."""
    im.tile = [  # type: ignore[attr-defined]
        tile._replace(args=layout if isinstance(tile.args, str) else (layout, *tile.args[1:])) for tile in _tiles(im)
    ]
    im._mode = layout.partition(";")[0]


def _wide_samples(im: Image.Image) -> np.ndarray:
    """The samples (H, W, 1) of a 32-bit mode, if all are 16-bit integers."""
    if im.mode == "F":
        raise ImageError("floating-point samples are not supported: convert the image to 8 or 16 bits")
    samples = np.array(im)[..., None]
    if samples.min() < 0 or samples.max() > 65535:
        raise ImageError("32-bit samples are not supported: convert the image to 8 or 16 bits")
    return samples


def to_plain_mode(im: Image.Image) -> Image.Image:
    """Convert an image of 8-bit samples to L, LA, RGB or RGBA."""
    if im.mode in ("1", "L", "LA", "La"):
        mode = "LA" if im.has_transparency_data else "L"
    else:
        mode = "RGBA" if im.has_transparency_data else "RGB"
    return im if im.mode == mode else im.convert(mode)


def planes(im: Image.Image) -> tuple[np.ndarray, bool, np.ndarray | None]:
    """Pixels, greyness and alpha of an L, LA, RGB or RGBA image, as `Picture` holds them."""
    grey = im.mode in ("L", "LA")
    samples = np.array(im).reshape(im.height, im.width, -1)  # (H, W, 1 to 4)
    alpha = np.ascontiguousarray(samples[..., -1]) if im.mode in ("LA", "RGBA") else None
    if alpha is not None and alpha.min() == 255:
        alpha = None
    return np.repeat(samples[..., :1], 3, axis=2) if grey else np.ascontiguousarray(samples[..., :3]), grey, alpha


def as_image(picture: Picture) -> Image.Image:
    """The pixels and alpha of a picture as an L, LA, RGB or RGBA image."""
    im = Image.fromarray(np.ascontiguousarray(picture.pixels[..., 0]) if picture.grey else picture.pixels)
    if picture.alpha is not None:
        im.putalpha(Image.fromarray(picture.alpha))
    return im


def open_foreign(stream: BinaryIO) -> Image.Image | None:
    """Open an image of a format that another package reads; None if it is of none.

    Raises
    ------
    ImageError
        If the package is not installed.
    """
    stream.seek(0)
    head = stream.read(12)
    stream.seek(0)
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS:
        name, package, module = "HEIC", "pillow-heif", "pillow_heif"
    elif head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")):
        name, package, module = "JPEG XL", "pillow-jxl-plugin", "pillow_jxl"
    else:
        return None
    try:
        plugin = importlib.import_module(module)
    except ImportError:
        raise ImageError(f"a {name} image: to read it, install {package} (pip install {package})") from None
    getattr(plugin, "register_heif_opener", lambda: None)()
    return Image.open(stream)
