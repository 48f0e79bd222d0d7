"""Relaxed rounding: from real latents to values that an optimizer can pull towards integers.

    v ──► ⌊v⌋, u = v − ⌊v⌋ ──► logits of the classes ──► + noise, / τ ──► softmax ──► v̂ = Σ p_k · class_k
           (grid)                   f(u), f(1 − u)

Two-class rounding chooses between ⌊v⌋ and ⌊v⌋ + 1, three-class rounding between the three integers around
round(v). The temperature τ enters twice, once in the logits and once in the Gumbel-softmax:

    p = softmax((f/τ + G)/τ),   G Gumbel noise

so v̂ tends to an integer as τ tends to 0.

Two things make it fast. A softmax over two classes is a sigmoid of one difference, and the difference of two
Gumbel variables is one logistic variable, so two-class rounding is

    v̂ = ⌊v⌋ + σ(((f(1−u) − f(u))/τ + L)/τ),   L logistic noise

with a closed form of f(1−u) − f(u) for every method. And the derivative ∂v̂/∂v is elementwise, so it is
computed in the forward pass, and the backward pass is one multiplication.

Nothing here synchronizes with the host or has shapes that depend on data, so it can be compiled and captured in a
CUDA graph.

Equations: Perugachi-Diaz, Gansekoele, Bhulai, "Robustly overfitting latents for flexible neural image
compression", 2024 (arXiv 2401.17789), called SGA+ below; Yang, Bamler, Mandt, "Improving inference for neural
image compression", 2020 (arXiv 2006.04240), called SGA.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..rounding import Rounding
from .noise import sample_noise

EPS = 1e-6  # arguments stay in [EPS, 1 − EPS]; beyond, the gradient is zero
ATANH_EPS = 1e-5  # the same for atanh, as in SGA
LOGIT_FLOOR = -40.0  # e^−40 is below the rounding error of 1, and far from denormal numbers, which are slow on CPUs
_BLOCK = 1 << 15  # elements that fit into the cache of a CPU core with their temporaries


def block_size() -> int:
    """Elements that fit into the caches of a CPU's cores with their temporaries, for torch's present threads."""
    return _BLOCK * torch.get_num_threads()


def relax(
    v: Tensor,
    tau: float | Tensor,
    rounding: Rounding,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Relaxed rounding of latents (SGA+ section 3, SGA section 3.2).

    Parameters
    ----------
    v : Tensor
        Latents on the coded grid (y − μ, z − median), any shape; float32 or float64, others become float32.
    tau : float or Tensor
        Temperature above 0; a tensor is 0-dimensional and on v's device, as compiled code and CUDA graphs need it.
        A number is a little faster on a CPU.
    rounding : Rounding
        The method.
    generator : torch.Generator, optional
        Source of the noise; torch's default otherwise.
    noise : Tensor, optional
        The noise itself, as `noise.sample_noise` returns it.

    Returns
    -------
    Tensor
        v̂, of v's shape. Differentiable once with respect to v, with ⌊v⌋ and round(v) as constants. Value and
        gradient are finite for every finite v.
    """
    if v.dtype not in (torch.float32, torch.float64):
        v = v.float()
    if not isinstance(tau, Tensor) and not tau > 0:
        raise ValueError(f"the temperature must be above 0, not {tau!r}")
    if noise is None:
        noise = sample_noise(v.shape, rounding, generator=generator, device=v.device, dtype=v.dtype)
    elif not rounding.stochastic:
        raise ValueError(f"method {rounding.method!r} takes no noise")
    if rounding.method == "noise":
        assert noise is not None
        return v + noise
    with_slope = torch.is_grad_enabled() and v.requires_grad
    value, slope = _evaluate(v.detach(), tau, rounding, noise, with_slope)
    return _WithSlope.apply(v, value, slope) if with_slope else value


def value_and_slope(
    v: Tensor, tau: float | Tensor, rounding: Rounding, noise: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """v̂ of :func:`relax` and its elementwise derivative (None: 1), for code with a backward pass of its own.

    `noise` is None only where the method has none; v is float32 or float64 and needs no gradient.
    """
    if rounding.method == "noise":
        assert noise is not None
        return v + noise, None
    return _evaluate(v, tau, rounding, noise, True)


class _WithSlope(torch.autograd.Function):
    """`value`, whose elementwise derivative with respect to `v` is `slope` (None: 1)."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, value: Tensor, slope: Tensor | None) -> Tensor:
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return (grad if slope is None else grad * slope), None, None


def _evaluate(
    v: Tensor, tau: float | Tensor, rounding: Rounding, noise: Tensor | None, with_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """v̂ and, if `with_slope`, ∂v̂/∂v. Operates in place only on tensors that are created here."""
    if rounding.method == "ste":
        return v.round(), None
    inverse_tau = 1 / (tau.to(v.dtype) if isinstance(tau, Tensor) else tau)
    if rounding.classes == 3:
        assert noise is not None
        if v.device.type == "cpu" and not torch.compiler.is_compiling() and v.numel() > block_size():
            return _three_class_in_blocks(v, inverse_tau, rounding, noise, with_slope)
        return _three_class(v, inverse_tau, rounding, noise, with_slope)
    return _two_class(v, inverse_tau, rounding, noise, with_slope)


def _add_scaled(x: Tensor, noise: Tensor, inverse_tau: float | Tensor) -> None:
    """x += inverse_tau·noise in one pass, for a number and for a scalar on the device."""
    if isinstance(inverse_tau, Tensor):
        x.addcmul_(noise, inverse_tau)
    else:
        x.add_(noise, alpha=inverse_tau)


def _two_class(
    v: Tensor, inverse_tau: float | Tensor, rounding: Rounding, noise: Tensor | None, with_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """⌊v⌋ + σ((gain·g(u)·inverse_tau + noise)·inverse_tau) with gain·g(u) = f(1−u) − f(u) and inverse_tau = 1/τ."""
    low = v.floor()
    u = v - low  # [0, 1]: 1 where v is less than half a unit in the last place below an integer
    if rounding.method == "cosine":  # f(1−u) − f(u) = 2·log tan(πu/2)
        gain = 2.0
        u.clamp_(EPS, 1 - EPS)
        g = (u * (math.pi / 2)).tan_().log_()
    elif rounding.method in ("atanh", "danneal"):  # atanh(u) − atanh(1−u) = ½·(logit(u) + logit((1+u)/3))
        gain = 0.5
        third = (u * (1 / 3)).add_(1 / 3)
        g = torch.logit(u, eps=ATANH_EPS).add_(torch.logit(third))
    else:  # logit(u), for ssl times a
        gain = rounding.a
        g = torch.logit(u, eps=EPS)

    g.mul_(gain * inverse_tau * inverse_tau)
    if noise is not None:
        _add_scaled(g, noise, inverse_tau)
    p = g.clamp_(LOGIT_FLOOR, -LOGIT_FLOOR).sigmoid_()  # probability of the upper class

    slope = None
    if with_slope:
        scale = gain * inverse_tau * inverse_tau
        if not isinstance(scale, Tensor):
            scale = v.new_full((), scale)
        slope = torch.ops.aten.sigmoid_backward(scale.expand_as(p), p)  # scale·p·(1 − p), times g′(u):
        if rounding.method == "cosine":  # π/sin(πu)
            slope = slope.mul_(math.pi).div_((u * math.pi).sin_())
            slope = torch.ops.aten.hardtanh_backward(slope, u, EPS, 1 - EPS)  # 0 where clamped
        elif rounding.method in ("atanh", "danneal"):  # 1/(u(1−u)) + 3/((1+u)(2−u))
            far = torch.ops.aten.logit_backward(slope, third)
            slope = torch.ops.aten.logit_backward(slope, u, ATANH_EPS).add_(far, alpha=1 / 3)
        else:  # 1/(u(1−u))
            slope = torch.ops.aten.logit_backward(slope, u, EPS)
    return low.add_(p), slope


def _three_class(
    v: Tensor, inverse_tau: float | Tensor, rounding: Rounding, noise: Tensor, with_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """round(v) − p₋ + p₊; the leading dimension of 3 is the classes −1, 0, +1 around round(v)."""
    centre = v.round()
    w = v - centre  # [−½, ½]
    scale_d = rounding.r / 1.5 if rounding.method == "ssl" else rounding.r
    q = torch.stack((w + 1, w.abs(), 1 - w)).mul_(scale_d).clamp_(EPS, 1 - EPS)  # (3, *shape), scaled distances
    if rounding.method == "linear":
        weight = 1 - q
    elif rounding.method == "cosine":
        weight = (q * (math.pi / 2)).cos_()
    else:
        weight = torch.logit(q).mul_(-rounding.a).sigmoid_()

    x = weight.log().mul_(rounding.n * inverse_tau * inverse_tau)
    _add_scaled(x[0], noise[0], inverse_tau)
    _add_scaled(x[2], noise[1], inverse_tau)
    p = x.sub_(x.amax(dim=0)).clamp_(min=LOGIT_FLOOR).exp_()
    p.div_(p.sum(dim=0))
    mean = p[2] - p[0]
    value = centre.add_(mean)
    if not with_slope:
        return value, None

    # v̂′ = Σ_k p_k·(k − mean)·x_k′, and x_k′ = −(n/τ²)·(scale_d·steepness)·d_k′ with d′ = (1, sign w, −1)
    if rounding.method == "ssl":
        steepness = torch.ops.aten.logit_backward((1 - weight).mul_(rounding.a), q, EPS)
    else:
        if rounding.method == "linear":
            steepness = weight.reciprocal_()
        else:
            steepness = (q * (math.pi / 2)).sin_().mul_(math.pi / 2).div_(weight)
        steepness = torch.ops.aten.hardtanh_backward(steepness, q, EPS, 1 - EPS)  # 0 where clamped
    p.mul_(steepness)
    slope = p[0].mul_(mean + 1)
    slope += p[1].mul_(mean).mul_(w.sign())
    slope += p[2].mul_(1 - mean)
    return value, slope * (rounding.n * scale_d * inverse_tau * inverse_tau)


def _three_class_in_blocks(
    v: Tensor, inverse_tau: float | Tensor, rounding: Rounding, noise: Tensor, with_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """`_three_class` in blocks whose temporaries stay in the CPU's cache, which is twice as fast."""
    flat, flat_noise = v.reshape(-1), noise.reshape(2, -1)
    value = torch.empty_like(flat)
    slope = torch.empty_like(flat) if with_slope else None
    size = block_size()
    for start in range(0, flat.numel(), size):
        part = slice(start, start + size)
        value[part], part_slope = _three_class(flat[part], inverse_tau, rounding, flat_noise[:, part], with_slope)
        if slope is not None and part_slope is not None:
            slope[part] = part_slope
    return value.view(v.shape), None if slope is None else slope.view(v.shape)
