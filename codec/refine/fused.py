"""Fused forward and backward of the two large elementwise parts of the loss: rate of y and squared error.

Autograd would store a dozen tensors of the size of y and half a dozen of the size of the picture. Here the forward pass
computes the derivatives as well, in blocks of y that fit into a CPU's cache, and the backward pass only scales them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..density import LIKELIHOOD_BOUND, SCALE_BOUND
from ..rounding import Rounding
from .relaxations import block_size, value_and_slope

_BELOW_BOUND = SCALE_BOUND * (1 - 2**-24)  # the last float32 below SCALE_BOUND

_threshold_backward: Any = torch.ops.aten.threshold_backward.grad_input


@dataclass(frozen=True)
class Relaxation:
    """How latents are rounded softly, and where.

    Attributes
    ----------
    tau : float or Tensor
        Temperature, as in `relaxations.relax`.
    rounding : Rounding
    noise : Tensor (…, B, h, w, M), optional
        As `noise.sample_noise` returns it for the latents (B, h, w, M); None where the method has none.
    active : Tensor (1, h, w, 1) bool, optional
        Where latents are relaxed; elsewhere they are rounded. None: everywhere.
    curvature : Tensor (M,) float32, optional
        Second derivative of the distortion by each channel, in bits. The rate is that of `expected_derivatives` then;
        None: the bits of v̂.
    """

    tau: float | Tensor
    rounding: Rounding
    noise: Tensor | None = None
    active: Tensor | None = None
    curvature: Tensor | None = None

    def flat(self, shape: Sequence[int]) -> Relaxation:
        """That of the rows (n, M) of latents of a shape (B, h, w, M): noise (…, n, M), active (n, 1)."""
        noise, active, rows = self.noise, self.active, math.prod(shape[:3])
        return replace(
            self,
            noise=None if noise is None else noise.reshape(*noise.shape[:-4], rows, shape[3]),
            active=None if active is None else active.expand(*shape[:3], 1).reshape(rows, 1),
        )

    def part(self, rows: slice, channels: slice = slice(None)) -> Relaxation:
        """Of a flat one, that of some rows and channels."""
        return replace(
            self,
            noise=None if self.noise is None else self.noise[..., rows, channels],
            active=None if self.active is None else self.active[rows],
            curvature=None if self.curvature is None else self.curvature[channels],
        )

    def relax(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Softly rounded v (n, C) and the derivative, of a flat one; v is overwritten."""
        value, slope = value_and_slope(v, self.tau, self.rounding, self.noise)
        if slope is None:
            slope = torch.ones_like(value)
        if self.active is None:
            return value, slope
        return torch.where(self.active, value, v.round_()), slope.mul_(self.active)


def coded_latents(y: Tensor, parameters: Tensor, relaxation: Relaxation, log_scale: bool) -> tuple[Tensor, Tensor]:
    """ŷ = relax(y − μ) + μ and its bits: −log₂ of its likelihood, at least 1e-9, under N(μ, σ²) ∗ U(−½, ½).

    Parameters
    ----------
    y : Tensor (B, h, w, M) float32
    parameters : Tensor (B, h, w, 2M) float32
        Scale and mean, the output of h_s.
    log_scale : bool
        Whether the scale is log σ; otherwise it is σ.

    Returns
    -------
    y_hat (B, h, w, M), bits (B,)
        Both differentiable once with respect to y and parameters. A σ below its bound has no gradient: the networks are
        frozen, so that it need not be kept near the bound, as CompressAI's `LowerBound` does in training.
    """
    return _CodedLatents.apply(y, parameters, relaxation, log_scale)


class _CodedLatents(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, parameters: Tensor, relaxation: Relaxation, log_scale: bool
    ) -> tuple[Tensor, Tensor]:
        M = y.shape[-1]
        flat_y, flat_parameters, flat = y.reshape(-1, M), parameters.reshape(-1, 2 * M), relaxation.flat(y.shape)
        y_hat, by_v, slope = (torch.empty_like(flat_y) for _ in range(3))
        by_scale = torch.empty_like(flat_y) if ctx.needs_input_grad[1] else None
        bits = flat_y.new_empty(flat_y.shape[0])  # of each position
        for part in _blocks(flat_y):
            scale, mu = flat_parameters[part].split(M, dim=1)
            value, slope[part] = flat.part(part).relax(flat_y[part] - mu)
            torch.add(value, mu, out=y_hat[part])
            into = bits[part], by_v[part], None if by_scale is None else by_scale[part]
            _derivatives(value, scale, log_scale, relaxation.curvature, *into)
        ctx.save_for_backward(slope, by_v, by_scale)
        return y_hat.view(y.shape), bits.view(y.shape[0], -1).sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slope, by_v, by_scale = ctx.saved_tensors
        grad, grad_bits = grads
        M = grad.shape[-1]
        through_mu = grad.reshape(-1, M)
        weight = grad_bits.repeat_interleave(through_mu.shape[0] // grad_bits.shape[0])[:, None]
        grad_y = torch.addcmul(through_mu, by_v, weight).mul_(slope)
        shape = grad.shape[:-1]
        if by_scale is None:
            return grad_y.view(*shape, M), None, None, None
        grad_parameters = grad_y.new_empty(grad_y.shape[0], 2 * M)
        torch.mul(by_scale, weight, out=grad_parameters[:, :M])
        torch.sub(through_mu, grad_y, out=grad_parameters[:, M:])
        return grad_y.view(*shape, M), grad_parameters.view(*shape, 2 * M), None, None


def relaxed_into(value: Tensor, v: Tensor, relaxation: Relaxation) -> Tensor:
    """Write softly rounded v into `value`, (n, C), and return the derivative; v is overwritten."""
    blocks = _blocks(v)
    if len(blocks) == 1:
        found, slope = relaxation.relax(v)
        value.copy_(found)
        return slope
    slope = torch.empty_like(v)
    for part in blocks:
        value[part], slope[part] = relaxation.part(part).relax(v[part])
    return slope


def rate_of(
    value: Tensor, scale: Tensor, log_scale: bool, curvature: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Bits (n,) of relaxed v̂ (n, M), and their derivatives by v̂ and by the scale (n, M), in blocks.

    `curvature` is that of `Relaxation`.
    """
    by_v, by_scale, bits = torch.empty_like(value), torch.empty_like(value), value.new_empty(len(value))
    for part in _blocks(value):
        _derivatives(value[part], scale[part], log_scale, curvature, bits[part], by_v[part], by_scale[part])
    return bits, by_v, by_scale


def _blocks(v: Tensor) -> list[slice]:
    """Parts of the rows of v (n, C) that fit into a CPU's cache; all rows on other devices."""
    n, C = v.shape
    rows = max(1, block_size() // C) if v.device.type == "cpu" else n
    return [slice(top, top + rows) for top in range(0, n, rows)]


def _derivatives(
    value: Tensor,
    scale: Tensor,
    log_scale: bool,
    curvature: Tensor | None,
    bits: Tensor,
    by_v: Tensor,
    by_scale: Tensor | None,
) -> None:
    if curvature is None:
        gaussian_derivatives(value, scale, log_scale, bits, by_v, by_scale)
    else:
        expected_derivatives(value, scale, log_scale, curvature, bits, by_v, by_scale)


def expected_derivatives(
    value: Tensor,
    scale: Tensor,
    log_scale: bool,
    curvature: Tensor,
    bits: Tensor,
    by_v: Tensor,
    by_scale: Tensor | None,
) -> None:
    """As `gaussian_derivatives`, for v̂ = k + p that stands for the integer k + 1 with probability p and else for k.

    The bits are their expected value (1 − p)·b(k) + p·b(k + 1), with b those of an integer, plus ½·curvature·p·(1 − p),
    the distortion by the variance of the rounding, for `curvature` (M,). A σ below its bound has no gradient.
    """
    sigma = torch.exp(scale) if log_scale else scale
    inverse = sigma.clamp(min=SCALE_BOUND).reciprocal_()
    p = value.abs()  # b is even, so that k is the integer of smaller magnitude here
    k = p.floor()
    p -= k
    upper = (0.5 - k).mul_(inverse)
    edges = (upper, upper - inverse, upper - 2 * inverse)  # of the intervals of −k and −k − 1, divided by σ
    tails = [torch.special.erfc(edge * -math.sqrt(0.5)) for edge in edges]
    masses = [(tails[i] - tails[i + 1]).mul_(0.5).clamp_(min=LIKELIHOOD_BOUND) for i in range(2)]
    first, second = (mass.log2().neg_() for mass in masses)
    rest, step = 1 - p, second - first
    torch.addcmul(step, rest - p, curvature, value=0.5, out=by_v)
    torch.where(value < 0, -by_v, by_v, out=by_v)
    torch.sum(first.addcmul_(p, step).addcmul_(p * rest, curvature, value=0.5), dim=1, out=bits)
    if by_scale is None:
        return
    slopes = [edge.square().mul_(-0.5).exp_().mul_(edge) for edge in edges]
    torch.div((slopes[0] - slopes[1]).mul_(rest), masses[0], out=by_scale)
    by_scale.add_((slopes[1] - slopes[2]).mul_(p).div_(masses[1]))
    by_scale.mul_(inverse).mul_(1 / (math.log(2) * math.sqrt(2 * math.pi)))
    _threshold_backward(by_scale, sigma, _BELOW_BOUND, grad_input=by_scale)
    if log_scale:
        by_scale.mul_(sigma)


def gaussian_derivatives(
    value: Tensor,
    scale: Tensor,
    log_scale: bool,
    bits: Tensor,
    by_v: Tensor,
    by_scale: Tensor | None,
    raising: bool = False,
) -> None:
    """Write bits of each position, and their derivatives by v̂ and by the scale, into `bits`, `by_v` and `by_scale`.

    The derivative by a σ below its bound is 0; if `raising`, only where descent would lower σ further, as with
    CompressAI's `LowerBound`, for networks that are trained.
    """
    sigma = torch.exp(scale) if log_scale else scale
    inverse = sigma.clamp(min=SCALE_BOUND).reciprocal_()
    distance = value.abs()
    upper = (0.5 - distance).mul_(inverse)
    lower = upper - inverse  # (−½ − |v̂|)/σ
    mass = torch.special.erfc(upper * -math.sqrt(0.5)).sub_(torch.special.erfc(lower * -math.sqrt(0.5)))
    mass = mass.mul_(0.5).clamp_(min=LIKELIHOOD_BOUND)
    torch.sum(torch.log2(mass), dim=1, out=bits).neg_()

    factor = inverse.div_(mass).mul_(1 / (math.log(2) * math.sqrt(2 * math.pi)))
    density_upper = upper.square().mul_(-0.5).exp_()
    density_lower = lower.square().mul_(-0.5).exp_()
    torch.sub(density_upper, density_lower, out=by_v)
    by_v.mul_(factor).copysign_(value)
    if by_scale is None:
        return
    torch.sub(upper.mul_(density_upper), lower.mul_(density_lower), out=by_scale)
    by_scale.mul_(factor)
    if raising:
        upward = by_scale.clamp(max=0)
        by_scale.clamp_(min=0)
    _threshold_backward(by_scale, sigma, _BELOW_BOUND, grad_input=by_scale)  # 0 where σ is below its bound
    if raising:
        by_scale.add_(upward)
    if log_scale:
        by_scale.mul_(sigma)


def weighted_squares(x_hat: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Σ weight·(x̂ − x)² of each image, (B,) float32, for x̂ (B, C, H, W) of any precision. Only x̂ gets a gradient."""
    return _WeightedSquares.apply(x_hat, x, weight)


class _WeightedSquares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_hat: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        difference = x_hat.float().sub(x)
        weighted = difference * weight
        ctx.save_for_backward(weighted)
        ctx.dtype = x_hat.dtype
        return difference.mul_(weighted).sum(dim=(1, 2, 3))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weighted,) = ctx.saved_tensors
        return (weighted * (2 * grad).view(-1, 1, 1, 1)).to(ctx.dtype), None, None
