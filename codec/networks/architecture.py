"""The record of an architecture: its sizes, its sampling grid, its receptive fields, its training defaults; no torch.

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

from dataclasses import dataclass
from typing import Any

STRIDE = 16  # pixels per latent, along each axis: the same for every architecture, as the file format fixes it
HYPER_STRIDE = 64  # pixels per hyper-latent; images are padded to a multiple of it


def padded_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of the image that the networks see: rounded up to multiples of HYPER_STRIDE."""
    return height + -height % HYPER_STRIDE, width + -width % HYPER_STRIDE


@dataclass(frozen=True)
class Reach:
    """How far dependences extend beyond the 16×16 block of a latent or the 64×64 block of a hyper-latent, in pixels.

    Attributes
    ----------
    g_a : int
        From a pixel to the latents that depend on it; a multiple of HYPER_STRIDE.
    h_a : int
        From a latent to the hyper-latents that depend on it; a multiple of HYPER_STRIDE.
    g_s : int
        From a latent to the pixels that depend on it; a multiple of STRIDE.
    h_s : int
        From a hyper-latent to the entropy parameters that depend on it and, through the means, to the pixels; a
        multiple of HYPER_STRIDE.
    """

    g_a: int
    h_a: int
    g_s: int
    h_s: int


@dataclass(frozen=True)
class TrainingDefaults:
    """Hyperparameters of training that suit a family; the meaning of each is in `training.recipe.Recipe`."""

    batch: int
    lr: float
    lr_end: float
    transforms: float
    warmup: int
    ema: float
    final_crop: int = 0


@dataclass(frozen=True)
class Family:
    """What the architectures of a family share; they differ in numbers of channels only."""

    reach: Reach
    training: TrainingDefaults


_LITE_TRAINING = TrainingDefaults(batch=8, lr=1e-3, lr_end=2e-5, transforms=0.3, warmup=600, ema=0.9995)
_MSHYPER_TRAINING = TrainingDefaults(
    batch=32, lr=2e-4, lr_end=2e-6, transforms=1.0, warmup=1000, ema=0.9999, final_crop=384
)
FAMILIES = {
    "lite": Family(Reach(g_a=64, h_a=128, g_s=16, h_s=128), _LITE_TRAINING),
    "mshyper": Family(Reach(g_a=64, h_a=128, g_s=32, h_s=192), _MSHYPER_TRAINING),
    "bmshj": Family(Reach(g_a=64, h_a=128, g_s=32, h_s=192), _MSHYPER_TRAINING),
}


@dataclass(frozen=True)
class Architecture:
    """What a model file records of its networks. The fields are part of the model's id.

    Attributes
    ----------
    family : {"lite", "mshyper", "bmshj"}
    N, M : int
        Channels of the hyper-latents z and of the latents y.
    scale : {"exp", "linear"}
        Whether the first M output channels of h_s are log σ or σ.
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

    @property
    def reach(self) -> Reach:
        return FAMILIES[self.family].reach

    @property
    def training(self) -> TrainingDefaults:
        return FAMILIES[self.family].training


ARCHITECTURES = {
    "lite": Architecture("lite", N=96, M=320, scale="exp", width=24, hidden=48),
    "mshyper-128": Architecture("mshyper", N=128, M=192, scale="linear"),
    "mshyper-192": Architecture("mshyper", N=192, M=320, scale="linear"),
}


def architecture_from_dict(record: dict[str, Any]) -> Architecture:
    """The inverse of `dataclasses.asdict`; unknown keys are an error.

    Raises
    ------
    ValueError
        When keys are missing or unknown, or a size is outside 1 … 1024.
    """
    try:
        a = Architecture(**record)
    except TypeError as error:
        raise ValueError(f"not an architecture: {error}") from None
    sizes = [a.N, a.M] + [a.width, a.hidden, a.inner] * (a.family == "lite")
    known = a.family in tuple(FAMILIES) and a.scale in ("exp", "linear")
    if not known or not all(type(s) is int and 1 <= s <= 1024 for s in sizes):
        raise ValueError(f"not an architecture: {record}")
    return a
