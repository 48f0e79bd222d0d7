"""The two halves of a checkerboard: half 0 holds the positions of even row + column, half 1 the others.

Grids are channels-last, (B, h, w, C) with h and w even; a half is (B, h, w/2, C).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pick(v: Tensor, half: int | None) -> Tensor:
    """One half; None: v itself."""
    if half is None:
        return v
    B, h, w, C = v.shape
    cells = v.reshape(B, h // 2, 2, w // 2, 2, C)
    return torch.stack((cells[:, :, 0, :, half], cells[:, :, 1, :, 1 - half]), 2).view(B, h, w // 2, C)


def place(whole: Tensor, half: int | None, v: Tensor) -> None:
    """Write v into one half of `whole`, in place; None: v has the shape of `whole`."""
    if half is None:
        whole.copy_(v)
        return
    whole[:, 0::2, half::2] = v[:, 0::2]
    whole[:, 1::2, 1 - half :: 2] = v[:, 1::2]


def halves(v: Tensor) -> tuple[Tensor, Tensor]:
    """Both halves, differentiable."""
    first, second = _Halves.apply(v)
    return first, second


def merge(first: Tensor, second: Tensor) -> Tensor:
    """The grid of both halves, differentiable."""
    grid: Tensor = _Merge.apply(first, second)
    return grid


def _merged(first: Tensor, second: Tensor) -> Tensor:
    B, h, w, C = first.shape
    grid = first.new_empty(B, h, 2 * w, C)
    place(grid, 0, first)
    place(grid, 1, second)
    return grid


class _Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor) -> tuple[Tensor, Tensor]:
        return pick(v, 0), pick(v, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _merged(*grads)


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
        return _merged(first, second)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return pick(grads[0], 0), pick(grads[0], 1)
