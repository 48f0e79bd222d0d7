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
    """Noise as :func:`relax` takes it, for latents of `shape`.

    Returns
    -------
    Tensor or None
        `noise`: U(−½, ½), of `shape`. Two classes: G₂ − G₁ ~ Logistic(0, 1), of `shape`. Three classes:
        (G₋ − G₀, G₊ − G₀) with G₀ of the class in the middle, of (2, *shape). None for `ste` and `danneal`.
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
    """Noise for many steps, drawn once: at least twice what one step on latents of `shape` needs.

    Drawing takes as long as all the rest of a relaxation on a CPU. A window at a random offset
    (:func:`noise_window`) costs nothing, is independent between elements, and repeats a value for one element
    only when an offset is drawn twice.

    Returns
    -------
    Tensor or None
        (samples,), or (2, samples) for three classes; None for `ste` and `danneal`.
    """
    count = math.prod(shape)
    samples = count + max(count, 1 << 16)
    return sample_noise((samples,), rounding, generator=generator, device=device, dtype=dtype)


def noise_window(pool: Tensor, shape: Sequence[int], offset: int) -> Tensor:
    """A view of `pool` as noise for latents of `shape`; `offset` in 0 … samples − numel, both included."""
    count = math.prod(shape)
    if not 0 <= offset <= pool.shape[-1] - count:
        raise ValueError(f"offset must be in 0 … {pool.shape[-1] - count}, not {offset}")
    return pool.narrow(-1, offset, count).view(*pool.shape[:-1], *shape)
