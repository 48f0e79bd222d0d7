"""The exact prior of y: the integer networks of one level, and what they give for the symbols of one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkerboard import pick
from .context_layers import IntegerContextGroup
from .hyper_decoder import IntegerGains, IntegerHyperDecoder


@dataclass(frozen=True)
class ExactPrior:
    """The integer networks that give the entropy parameters of y at one level, on one device.

    `context` is empty where σ and μ depend on z alone.
    """

    h_s: IntegerHyperDecoder
    gains: IntegerGains
    context: tuple[IntegerContextGroup, ...] = ()

    @property
    def device(self) -> torch.device:
        return self.gains.mean.device

    def to(self, device: torch.device | str) -> ExactPrior:
        context = tuple(group.to(device) for group in self.context)
        return ExactPrior(h_s=self.h_s.to(device), gains=self.gains.to(device), context=context)


@dataclass(frozen=True)
class Pass:
    """Symbols of y that can be coded at once.

    Attributes
    ----------
    channels : slice
        Which channels of y.
    half : int, optional
        Which half of the checkerboard (codec/checkerboard.py); None: all positions.
    index : Tensor (1, Mk, 4h, 4w or 2w) uint8
        Gaussian table of each symbol.
    mu : Tensor (1, Mk, 4h, 4w or 2w) int32
        Mean with MU_BITS fractional bits.
    """

    channels: slice
    half: int | None
    index: Tensor
    mu: Tensor

    def of(self, v: Tensor) -> Tensor:
        """What v (1, M, 4h, 4w) holds for the symbols of this pass, of the shape of `mu`."""
        return part_of(v, self.channels, self.half)


def part_of(v: Tensor, channels: slice, half: int | None) -> Tensor:
    """What v (1, M, 4h, 4w) holds for a pass, (1, Mk, 4h, 4w or 2w)."""
    return pick(v[:, channels].permute(0, 2, 3, 1), half).permute(0, 3, 1, 2)
