"""The four networks of a model, for every architecture the same interface."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Networks:
    """Analysis and synthesis transforms, of the image (g_a, g_s) and of the latents (h_a, h_s).

    All tensors are float32. H and W are multiples of 64.

    Attributes
    ----------
    g_a : Module
        Image (B, 3, H, W) in 0..1 → y (B, M, H/16, W/16).
    h_a : Sequential
        y → z (B, N, H/64, W/64).
    h_s : Sequential
        ẑ → scales and means of y (B, 2M, H/16, W/16).
    g_s : Module
        ŷ → x̂ (B, 3, H, W), not clamped.
    """

    g_a: nn.Module
    h_a: nn.Sequential
    h_s: nn.Sequential
    g_s: nn.Module

    def items(self) -> Iterable[tuple[str, nn.Module]]:
        return (("g_a", self.g_a), ("h_a", self.h_a), ("h_s", self.h_s), ("g_s", self.g_s))
