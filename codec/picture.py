"""The record of a decoded image: what the codec codes, whatever file it came from. Imports numpy on use only."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


class ImageError(ValueError):
    """An image that cannot be read, coded or written. The message is one line and names the file, if there is one."""


@dataclass(frozen=True)
class Picture:
    """An image as it is coded: 8-bit RGB, with transparency and metadata beside it.

    Attributes
    ----------
    pixels : ndarray
        (H, W, 3) uint8 RGB; three equal channels when `grey`.
    grey : bool
        The image has one colour channel, and is written with one.
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


def check_picture(picture: Picture) -> None:
    """Raise ImageError unless pixels and alpha have the types and shapes of `Picture`, and metadata are bytes."""
    shape, depth = picture.pixels.shape, picture.pixels.dtype
    if len(shape) != 3 or shape[2] != 3 or 0 in shape or depth != "uint8":
        raise ImageError(f"pixels must be (height, width, 3) uint8, not {shape} {depth}")
    alpha = picture.alpha
    if alpha is not None and (alpha.shape != shape[:2] or alpha.dtype != "uint8"):
        raise ImageError(f"alpha must be {shape[:2]} uint8, not {alpha.shape} {alpha.dtype}")
    for kind in ("icc", "exif", "xmp"):
        data = getattr(picture, kind)
        if data is not None and not (isinstance(data, bytes) and data):
            raise ImageError(f"{kind} must be bytes, and not empty")


def named(file: object, problem: str) -> str:
    """The message of an error in a file, which begins with its path if it has one."""
    return f"{os.fspath(file)}: {problem}" if isinstance(file, (str, os.PathLike)) else problem


def to_grey(pixels: np.ndarray) -> np.ndarray:
    """Replace the channels of (H, W, 3) uint8 by their rounded mean, as docs/format.md specifies for grey files."""
    import numpy as np

    mean = (pixels.sum(axis=2, dtype=np.uint16) + 1) // 3  # a third is never halfway between integers
    return np.repeat(mean.astype(np.uint8)[..., None], 3, axis=2)
