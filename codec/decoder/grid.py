"""Activations on a grid with a margin of zeros, and the windows around some of its positions as rows of a matrix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MARGIN = 2  # of all grids, so that positions and offsets are the same in all: half of the largest kernel


@dataclass(frozen=True)
class Grid:
    """Integers (h, w, C) within a margin of zeros; `flat` is (positions, C)."""

    flat: np.ndarray
    height: int
    width: int

    @staticmethod
    def zeros(height: int, width: int, channels: int) -> Grid:
        size = (height + 2 * MARGIN) * (width + 2 * MARGIN)
        return Grid(np.zeros((size, channels), np.int16), height, width)

    @property
    def inside(self) -> np.ndarray:
        """(h, w, C), a view."""
        whole = self.flat.reshape(self.height + 2 * MARGIN, self.width + 2 * MARGIN, -1)
        return whole[MARGIN : MARGIN + self.height, MARGIN : MARGIN + self.width]


def positions(width: int, top: int, bottom: int, half: int | None) -> np.ndarray:
    """Indexes into `Grid.flat` of rows `top` to `bottom` − 1: of one half of the checkerboard, or of all positions.

    Half 0 has those of even row + column, half 1 the others.

    Returns
    -------
    ndarray (rows, width or width / 2)
    """
    rows = np.arange(top, bottom)[:, None]
    columns = np.arange(width)[None] if half is None else 2 * np.arange(width // 2)[None] + (rows + half) % 2
    found: np.ndarray = (rows + MARGIN) * (width + 2 * MARGIN) + MARGIN + columns
    return found


def taps(width: int, side: int, odd: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The taps of a kernel: their numbers u · side + v, and their offsets in `Grid.flat`.

    `odd`: only those of the other half of the checkerboard.
    """
    u, v = (w.ravel() - side // 2 for w in np.indices((side, side)))
    numbers = np.flatnonzero((u + v) % 2) if odd else np.arange(side * side)
    return numbers, (u * (width + 2 * MARGIN) + v)[numbers]


def columns(grids: list[Grid], where: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The windows around positions (n,): (n, K) float64, grid by grid, tap by tap, channel by channel."""
    index = where[:, None] + offsets
    sizes = [len(offsets) * grid.flat.shape[1] for grid in grids]
    out = np.empty((len(where), sum(sizes)))
    done = 0
    for grid, size in zip(grids, sizes, strict=True):
        out[:, done : done + size] = grid.flat[index].reshape(len(where), size)
        done += size
    return out
