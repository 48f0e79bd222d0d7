"""Noise of relaxed rounding: uniform, logistic, or differences of Gumbel variables."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..rounding import Rounding

_GOLDEN = (math.sqrt(5) - 1) / 2  # the irrational number that rational ones approximate worst
_PLASTIC = 0.7548776662466927  # 1/ρ with ρ³ = ρ + 1: its powers do the same in two dimensions


def sample_noise(
    shape: Sequence[int],
    rounding: Rounding,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor | None:
    """Noise of one relaxation (`relaxations.relax`) of latents of `shape`.

    Returns
    -------
    Tensor or None
        Method `noise`: U(−½, ½), of `shape`. Other methods with two classes: the difference of two Gumbel variables
        G₂ − G₁ ~ Logistic(0, 1), of `shape`. Three classes: the differences (G₋ − G₀, G₊ − G₀), where G₀ belongs to the
        middle class, of shape (2, *shape). None for `ste` and `danneal`.
    """
    if not rounding.stochastic:
        return None
    return _noise_of(torch.rand(_size(shape, rounding), generator=generator, device=device, dtype=dtype), rounding)


def _size(shape: Sequence[int], rounding: Rounding) -> tuple[int, ...]:
    """Of the uniform numbers that noise of `shape` is computed from."""
    return (2, *shape) if rounding.classes == 3 else tuple(shape)


def _noise_of(u: Tensor, rounding: Rounding) -> Tensor:
    """The noise of `sample_noise` for u in U[0, 1), of `_size`."""
    if rounding.method == "noise":
        return u - 0.5
    tiny = 2.0**-53 if u.dtype == torch.float64 else 2.0**-24  # u can be 0
    if rounding.classes == 2:
        return torch.logit(u, eps=tiny)
    # The two differences have the joint CDF 1/(1 + e^−x + e^−y): x is logistic, and given x the CDF of y is
    # ((1 + e^−x)/(1 + e^−x + e^−y))². Both are inverted here, with two logarithms instead of six.
    first, second = u.clamp(tiny, 1 - tiny).unbind(0)
    ratio = (1 - second) / (second.sqrt() + second)  # second^−½ − 1 without cancellation
    return torch.stack((torch.logit(first), (first / ratio).log()))


class NoiseSequence:
    """Noise of consecutive steps whose gradients are averaged, as Adam does.

    An element's uniform numbers of successive steps are u, u + α, u + 2α, … modulo 1 with an irrational α (a Kronecker
    sequence). They cover [0, 1) more evenly than independent numbers, so that the mean of a few gradients has less
    variance. u is drawn anew every `period` steps, since the differences between elements are constant until then; with
    a period of 1 the noise of all steps is independent. `scale` is a factor of the noise.
    """

    def __init__(
        self,
        shape: Sequence[int],
        rounding: Rounding,
        period: int,
        device: torch.device | str | None = None,
        scale: float = 1.0,
    ) -> None:
        self.rounding, self.period, self.scale = rounding, period, scale
        self.prepared = 0  # steps
        self.uniform = torch.zeros(_size(shape, rounding), device=device) if rounding.stochastic else None

    def prepare(self, generator: torch.Generator | None = None) -> None:
        """Draw u where the next step begins a period; not part of a CUDA graph. Without a generator: torch's."""
        if self.uniform is not None and self.prepared % self.period == 0:
            self.uniform.uniform_(generator=generator)
        self.prepared += 1

    def next(self) -> Tensor | None:
        """The noise of the next step, as `sample_noise` returns it, times `scale`."""
        if self.uniform is None:
            return None
        if self.rounding.classes == 3:
            self.uniform[0].add_(_PLASTIC)
            self.uniform[1].add_(_PLASTIC**2)
        else:
            self.uniform.add_(_GOLDEN)
        noise = _noise_of(self.uniform.frac_(), self.rounding)
        return noise if self.scale == 1 else noise.mul_(self.scale)
