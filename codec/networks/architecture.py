"""The record of an architecture; no torch.

          ┌───┐  y          ┌───┐  z
x ──►─────┤g_a├──►──┬───►───┤h_a├──►── round ──►── ẑ
          └───┘     │       └───┘                  │
                    ▼                            ┌─┴─┐
                round(y − μ) ◄──── σ, μ ─────────┤h_s│
                    │                            └───┘
          ┌───┐     ▼ ŷ
x̂ ──◄─────┤g_s├─────┘
          └───┘
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

STRIDE = 16  # pixels a latent
HYPER_STRIDE = 64  # pixels a hyper-latent


def padded_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of the image that the networks see: rounded up to multiples of HYPER_STRIDE."""
    return height + -height % HYPER_STRIDE, width + -width % HYPER_STRIDE


@dataclass(frozen=True)
class Architecture:
    """What is needed to build the networks of a model, empty of weights.

    Attributes
    ----------
    family : {"lite", "mshyper", "bmshj"}
    N, M : int
        Channels of the hyper-latents z and of the latents y.
    scale : {"exp", "linear"}
        What the first M output channels of h_s are: log σ or σ.
    width, hidden : int
        `lite` only: channels of the half-resolution synthesis and of its residual filter.
    inner : int
        `lite` only: channels inside g_a, h_a and h_s.
    """

    family: str
    N: int
    M: int
    scale: str
    width: int = 0
    hidden: int = 0
    inner: int = 128


LITE = Architecture("lite", N=96, M=320, scale="exp", width=24, hidden=48)
MSHYPER_128 = Architecture("mshyper", N=128, M=192, scale="linear")
MSHYPER_192 = Architecture("mshyper", N=192, M=320, scale="linear")
ARCHITECTURES = {"lite": LITE, "mshyper-128": MSHYPER_128, "mshyper-192": MSHYPER_192}


@dataclass(frozen=True)
class Networks:
    """g_a (B, 3, H, W) → (B, M, H/16, W/16); h_a → (B, N, H/64, W/64); h_s → (B, 2M, H/16, W/16); g_s → pixels.

    All float32, images in 0..1; H and W are multiples of 64.
    """

    g_a: nn.Module
    h_a: nn.Sequential
    h_s: nn.Sequential
    g_s: nn.Module

    def items(self) -> Iterable[tuple[str, nn.Module]]:
        return (("g_a", self.g_a), ("h_a", self.h_a), ("h_s", self.h_s), ("g_s", self.g_s))


def architecture_from_dict(record: dict[str, Any]) -> Architecture:
    """The inverse of `dataclasses.asdict`; unknown keys are an error.

    Raises
    ------
    ValueError
        When keys are missing or unknown, or sizes are absurd.
    """
    try:
        a = Architecture(**record)
    except TypeError as error:
        raise ValueError(f"not an architecture: {error}") from None
    sizes = [a.N, a.M] + [a.width, a.hidden, a.inner] * (a.family == "lite")
    known = a.family in ("lite", "mshyper", "bmshj") and a.scale in ("exp", "linear")
    if not known or not all(type(s) is int and 1 <= s <= 1024 for s in sizes):
        raise ValueError(f"not an architecture: {record}")
    return a
