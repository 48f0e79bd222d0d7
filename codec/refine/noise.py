"""Noise of relaxed rounding: uniform, logistic, or differences of Gumbel variables."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..rounding import Rounding


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
    size = (2, *shape) if rounding.classes == 3 else tuple(shape)
    u = torch.rand(size, generator=generator, device=device, dtype=dtype)
    if rounding.method == "noise":
        return u.sub_(0.5)
    tiny = 2.0**-53 if dtype == torch.float64 else 2.0**-24  # rand can return 0
    if rounding.classes == 2:
        return torch.logit(u, eps=tiny)
    # The two differences have the joint CDF 1/(1 + e^−x + e^−y): x is logistic, and given x the CDF of y is
    # ((1 + e^−x)/(1 + e^−x + e^−y))². Both are inverted here, with two logarithms instead of six.
    first, second = u.clamp_(tiny, 1 - tiny).unbind(0)
    ratio = (1 - second) / (second.sqrt() + second)  # second^−½ − 1 without cancellation
    return torch.stack((torch.logit(first), (first / ratio).log()))


def noise_pool(
    shape: Sequence[int],
    rounding: Rounding,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor | None:
    """Noise for many steps, drawn once: at least twice as many values as latents of `shape` need in one step.

    On a CPU, drawing noise takes as long as the rest of a relaxation. A window at a random offset
    (:func:`noise_window`) takes no time, its values are independent of each other, and an element gets the same
    value again only when an offset is drawn twice.

    Returns
    -------
    Tensor or None
        (samples,), or (2, samples) for three classes; None for `ste` and `danneal`.
    """
    count = math.prod(shape)
    samples = count + max(count, 1 << 16)
    return sample_noise((samples,), rounding, generator=generator, device=device, dtype=dtype)


def noise_window(pool: Tensor, shape: Sequence[int], offset: int) -> Tensor:
    """A view of `pool` as noise for latents of `shape`, at an `offset` in 0 … samples − numel (inclusive)."""
    count = math.prod(shape)
    if not 0 <= offset <= pool.shape[-1] - count:
        raise ValueError(f"offset must be in 0 … {pool.shape[-1] - count}, not {offset}")
    return pool.narrow(-1, offset, count).view(*pool.shape[:-1], *shape)
