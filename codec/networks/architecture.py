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

from dataclasses import dataclass, replace
from typing import Any

STRIDE = 16  # pixels per latent, along each axis: the same for every architecture, as the file format fixes it
HYPER_STRIDE = 64  # pixels per hyper-latent; images are padded to a multiple of it
MAX_GROUPS = 16  # of a context model
MAX_BLOCKS = 16  # of a branch at stride 16


def padded_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of the image that the networks see: rounded up to multiples of HYPER_STRIDE."""
    return height + -height % HYPER_STRIDE, width + -width % HYPER_STRIDE


def _up(length: int, grid: int) -> int:
    return length + -length % grid


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
    context : int
        From a latent to the latents whose entropy parameters depend on it; a multiple of STRIDE. The dependences
        through `h_s` extend further by as much.
    """

    g_a: int
    h_a: int
    g_s: int
    h_s: int
    context: int = 0


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
    optimizer: str = "adam"


@dataclass(frozen=True)
class Family:
    """What the architectures of a family share; `reach` is that without branches at stride 16, not rounded up."""

    reach: Reach
    training: TrainingDefaults


_LITE_TRAINING = TrainingDefaults(
    batch=8, lr=1e-3, lr_end=2e-5, transforms=0.3, warmup=600, ema=0.9995, optimizer="soap"
)
_MSHYPER_TRAINING = TrainingDefaults(
    batch=32, lr=2e-4, lr_end=2e-6, transforms=1.0, warmup=1000, ema=0.9999, final_crop=384
)
FAMILIES = {
    "lite": Family(Reach(g_a=40, h_a=112, g_s=10, h_s=106), _LITE_TRAINING),
    "mshyper": Family(Reach(g_a=30, h_a=112, g_s=30, h_s=142), _MSHYPER_TRAINING),
    "bmshj": Family(Reach(g_a=30, h_a=112, g_s=30, h_s=142), _MSHYPER_TRAINING),
}


@dataclass(frozen=True)
class Context:
    """The context model of y.

    Attributes
    ----------
    groups : tuple of int
        Channels of each group in coding order; their sum is M.
    checkerboard : bool
        Whether a group is coded in two halves of a checkerboard, or at once.
    past, near, hidden : int
        Features of the earlier groups, of the first half of the own group, and of both with those of h_s.
    """

    groups: tuple[int, ...]
    checkerboard: bool = True
    past: int = 96
    near: int = 64
    hidden: int = 160

    def kernel(self, k: int) -> int:
        """Side of the kernel that sees the first half of group k; the widest group has little spatial structure."""
        return 5 if self.groups[k] <= 64 else 3

    @property
    def reach(self) -> int:
        """From a latent to the latents whose entropy parameters depend on it through all passes, in latents."""
        near = sum(self.kernel(k) // 2 for k in range(len(self.groups))) if self.checkerboard else 0
        return near + len(self.groups) - 1  # `past` is 3×3


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
    deep_width, deep_blocks : int
        `lite` only: channels and number of the depthwise blocks at stride 16 in g_a; no blocks: no such branch.
    body_width, body_blocks : int
        `lite` only: the same in g_s.
    context : Context, optional
        The context model of y; None: σ and μ depend on ẑ alone.
    """

    family: str
    N: int
    M: int
    scale: str
    width: int = 0
    hidden: int = 0
    inner: int = 128
    deep_width: int = 0
    deep_blocks: int = 0
    body_width: int = 0
    body_blocks: int = 0
    context: Context | None = None

    @property
    def reach(self) -> Reach:
        reach = FAMILIES[self.family].reach
        deep = 24 + 2 * STRIDE * self.deep_blocks if self.deep_blocks else 0  # three 3×3 at stride 8, then 5×5 each
        body = STRIDE * self.body_blocks  # 3×3 each
        return Reach(
            g_a=_up(max(reach.g_a, deep), HYPER_STRIDE),
            h_a=_up(reach.h_a, HYPER_STRIDE),
            g_s=_up(reach.g_s + body, STRIDE),
            h_s=_up(reach.h_s + body, HYPER_STRIDE),
            context=0 if self.context is None else STRIDE * self.context.reach,
        )

    @property
    def training(self) -> TrainingDefaults:
        return FAMILIES[self.family].training


ARCHITECTURES = {
    "lite": Architecture(
        "lite",
        N=96,
        M=320,
        scale="exp",
        width=24,
        hidden=48,
        deep_width=256,
        deep_blocks=3,
        body_width=192,
        body_blocks=2,
        context=Context((8, 24, 64, 224)),
    ),
    "mshyper-128": Architecture("mshyper", N=128, M=192, scale="linear", context=Context((16, 48, 128))),
    "mshyper-192": Architecture("mshyper", N=192, M=320, scale="linear", context=Context((16, 48, 96, 160))),
}


def architecture_from_dict(record: Any) -> Architecture:
    """The inverse of `dataclasses.asdict`; unknown keys are an error.

    Raises
    ------
    ValueError
        When keys are missing or unknown, or a size is outside its limits (1 to 1024 for channels).
    """
    shown = str(record)[:200]
    try:
        a = Architecture(**record)
        if a.context is not None:
            fields = {**record["context"], "groups": tuple(record["context"]["groups"])}
            a = replace(a, context=Context(**fields))
    except (KeyError, TypeError):
        raise ValueError(f"not an architecture: {shown}") from None
    sizes = [a.N, a.M] + [a.width, a.hidden, a.inner] * (a.family == "lite")
    for branch in ((a.deep_width, a.deep_blocks), (a.body_width, a.body_blocks)):
        if branch != (0, 0):
            sizes += branch
    c = a.context
    if c is not None:
        sizes += [*c.groups, c.past, c.near, c.hidden]
    valid = a.family in tuple(FAMILIES) and a.scale in ("exp", "linear")
    valid = valid and all(type(s) is int and 1 <= s <= 1024 for s in sizes)
    valid = valid and max(a.deep_blocks, a.body_blocks) <= MAX_BLOCKS
    if valid and c is not None:
        valid = type(c.checkerboard) is bool and len(c.groups) <= MAX_GROUPS and sum(c.groups) == a.M
    if not valid:
        raise ValueError(f"not an architecture: {shown}")
    return a
