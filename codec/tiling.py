"""Boxes of a picture, tiles with halos, and their positions in latents of any stride; no torch.

A picture is worked through in tiles, each with the pixels around it that the receptive fields need, so that the memory
for activations is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Box = tuple[int, int, int, int]  # top, left, bottom, right, in pixels of the padded picture; half open


def slices(box: Box, stride: int, origin: tuple[int, ...] = (0, 0)) -> tuple[slice, slice]:
    """Rows and columns of a box in an array with one position per `stride` pixels that starts at pixel `origin`."""
    top, left = origin[:2]
    return (
        slice((box[0] - top) // stride, (box[2] - top) // stride),
        slice((box[1] - left) // stride, (box[3] - left) // stride),
    )


def cut(v: Tensor, box: Box, stride: int, origin: tuple[int, ...] = (0, 0)) -> Tensor:
    """A view of a box of (B, C, H, W); stride and origin as in :func:`slices`."""
    rows, cols = slices(box, stride, origin)
    return v[:, :, rows, cols]


def tiles(box: Box, side: int, height: int, width: int) -> Iterator[Box]:
    """Tiles of `side` pixels that cover a box, row by row; the box itself if the picture is at most two tiles large."""
    top, left, bottom, right = box
    if height * width <= 2 * side**2:
        yield box
        return
    for y in range(top, bottom, side):
        for x in range(left, right, side):
            yield y, x, min(y + side, bottom), min(x + side, right)


def with_halo(box: Box, halo: int, height: int, width: int) -> Box:
    """A box extended by `halo` pixels on each side, within a picture of this size."""
    top, left, bottom, right = box
    return max(0, top - halo), max(0, left - halo), min(height, bottom + halo), min(width, right + halo)
