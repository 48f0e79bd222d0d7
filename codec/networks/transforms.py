"""The record of the four networks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Networks:
    """g_a (B, 3, H, W) → (B, M, H/16, W/16); h_a → (B, N, H/64, W/64); h_s → (B, 2M, H/16, W/16); g_s → (B, 3, H, W).

    All float32, images in 0..1; H and W are multiples of 64.
    """

    g_a: nn.Module
    h_a: nn.Sequential
    h_s: nn.Sequential
    g_s: nn.Module

    def items(self) -> Iterable[tuple[str, nn.Module]]:
        return (("g_a", self.g_a), ("h_a", self.h_a), ("h_s", self.h_s), ("g_s", self.g_s))
