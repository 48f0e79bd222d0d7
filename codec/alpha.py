"""Transparency: the lossless coding of the alpha plane, and the colours under alpha 0.

Picture.alpha  ─ encode_alpha ─► alpha section of the .sga file ─ decode_alpha ─► Picture.alpha
Picture.pixels ─ fill_transparent ─► pixels whose invisible part costs few bits
"""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image

from .bitstream import FormatError
from .pillow import limited_pillow

_END = b"\0\0\0\0IEND\xaeB`\x82"  # the last chunk of a PNG stream


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
        If the section is not a complete PNG stream of this size and of a kind that the format allows. Size, kind and
        end are checked before pixels are decoded.
    """
    if len(data) < 33 or data[:16] != b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR":
        raise FormatError("the alpha section is not a PNG stream")
    columns, rows, depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", data[16:29])
    if (columns, rows) != (width, height):
        raise FormatError(f"alpha has {columns} x {rows} pixels, but the image has {width} x {height}")
    if depth not in (1, 8) or colour != 0 or interlace != 0:
        raise FormatError("the alpha section is not a grey PNG of 1 or 8 bits without interlacing")
    try:
        _check_chunks(data)
        with limited_pillow(width * height), Image.open(io.BytesIO(data), formats=["PNG"]) as im:
            im.load()
            if "transparency" in im.info or im.size != (width, height):
                raise ValueError("tRNS or a second size")
            return np.array(im.convert("L"))
    except Exception:  # Pillow's parsers raise exceptions of many types for a damaged file
        raise FormatError("the alpha section is damaged") from None


def _check_chunks(data: bytes) -> None:
    """Raise ValueError or struct.error unless a PNG stream ends with its first IEND, and is of one image."""
    at = 8
    while at < len(data) - len(_END):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind in (b"IEND", b"acTL"):
            raise ValueError("bytes after the end, or an animation")
        at += 12 + length
    if data[at:] != _END:
        raise ValueError("no end")


def fill_transparent(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Replace the colours of invisible pixels by smooth ones, which cost few bits.

    Push-pull interpolation: means of the visible pixels in squares of 2, 4, 8, … pixels a side fill the invisible
    ones, coarse to fine.

    Parameters
    ----------
    pixels : ndarray
        (H, W, 3) uint8. Not changed.
    alpha : ndarray
        (H, W) uint8. Pixels are invisible where it is 0.

    Returns
    -------
    ndarray
        (H, W, 3) uint8: `pixels` wherever alpha is above 0.
    """
    visible = alpha > 0
    if visible.all():
        return pixels
    if not visible.any():
        return np.full_like(pixels, 128)
    out = np.empty_like(pixels)
    for c in range(pixels.shape[2]):
        out[..., c] = _fill(pixels[..., c], visible)
    return out


def _fill(plane: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return `plane` (H, W) with its unknown values interpolated from the known ones (at least one)."""
    if known.all():
        return plane
    count = _sum_squares(known)
    guess = _fill(_sum_squares(plane * known) / np.maximum(count, 1), count > 0)
    if plane.dtype == np.uint8:
        guess = np.rint(guess).astype(np.uint8)
    height, width = guess.shape
    doubled = Image.fromarray(guess).resize((2 * width, 2 * height), Image.Resampling.BILINEAR)
    out = np.array(doubled)[: plane.shape[0], : plane.shape[1]]
    np.copyto(out, plane, where=known)
    return out


def _sum_squares(a: np.ndarray) -> np.ndarray:
    """Sum squares of 2 x 2: (H, W) -> (ceil(H / 2), ceil(W / 2)) float32."""
    a = np.pad(a, ((0, a.shape[0] % 2), (0, a.shape[1] % 2)))
    out = a[0::2, 0::2].astype(np.float32)
    for part in (a[0::2, 1::2], a[1::2, 0::2], a[1::2, 1::2]):
        out += part
    return out
