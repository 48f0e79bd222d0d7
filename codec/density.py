"""Probability models: the factorized density of z, the Gaussian of y, and their rates in bits.

Float and differentiable, for training and refinement. Files are coded with integer tables of these densities, which
coding/tables.py computes once, at export.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LIKELIHOOD_BOUND = 1e-9
SCALE_BOUND = 0.11
_FILTERS = (1, 3, 3, 3, 3, 1)


class FactorizedDensity(nn.Module):
    """A learned univariate density per channel (Ballé et al. 2018, arXiv 1802.01436, appendix 6.1).

    The parameters have the shapes of those of CompressAI's `EntropyBottleneck`, from which they can be loaded.
    """

    def __init__(self, channels: int, init_scale: float = 10.0) -> None:
        super().__init__()
        scale = init_scale ** (1 / (len(_FILTERS) - 1))
        self.matrices = nn.ParameterList()
        self.biases = nn.ParameterList()
        self.factors = nn.ParameterList()
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(_FILTERS)):
            start = math.log(math.expm1(1 / scale / fan_out))
            self.matrices.append(nn.Parameter(torch.full((channels, fan_out, fan_in), start)))
            self.biases.append(nn.Parameter(torch.rand(channels, fan_out, 1) - 0.5))
            if i < len(_FILTERS) - 2:
                self.factors.append(nn.Parameter(torch.zeros(channels, fan_out, 1)))
        self.register_buffer("median", torch.zeros(channels))
        self.median: Tensor

    def logits_cumulative(self, values: Tensor) -> Tensor:
        """Logit of the cumulative distribution, (C, 1, n) → (C, 1, n)."""
        logits = values
        for i, (matrix, bias) in enumerate(zip(self.matrices, self.biases, strict=True)):
            logits = torch.matmul(F.softplus(matrix), logits) + bias
            if i < len(self.factors):
                logits = logits + torch.tanh(self.factors[i]) * torch.tanh(logits)
        return logits

    def likelihood(self, values: Tensor, width: Tensor | float = 1.0) -> Tensor:
        """Probability of an interval of `width` around each value, (B, C, H, W) → the same shape.

        `width` is a float or broadcasts to `values`; for values without gain it is 1 / gain.
        """
        B, C, H, W = values.shape
        flat = values.transpose(0, 1).reshape(C, 1, -1)
        half = width / 2
        if isinstance(half, Tensor):
            half = half.expand_as(values).transpose(0, 1).reshape(C, 1, -1)
        lower, upper = self.logits_cumulative(torch.cat((flat - half, flat + half), dim=2)).chunk(2, dim=2)
        sign = -torch.sign(lower + upper).detach()  # evaluate in the tail where sigmoid is precise
        mass = torch.abs(torch.sigmoid(sign * upper) - torch.sigmoid(sign * lower))
        return mass.reshape(C, B, H, W).transpose(0, 1)

    @torch.no_grad()
    def inverse_logits_cumulative(self, logits: Tensor) -> Tensor:
        """Values whose `logits_cumulative` are `logits`, (C, 1, n) → (C, 1, n), by bisection between ±1e5."""
        low, high = torch.full_like(logits, -1e5), torch.full_like(logits, 1e5)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.logits_cumulative(middle) < logits
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    @torch.no_grad()
    def quantile(self, logit: float) -> Tensor:
        """The value of each channel at which the cumulative distribution has this logit, (C,) float64."""
        density = self if self.biases[0].dtype == torch.float64 else double(self)
        return density.inverse_logits_cumulative(torch.full_like(density.biases[0][:, :1, :1], logit)).flatten()

    @torch.no_grad()
    def update_median(self) -> None:
        """Set `median` to where the cumulative distribution is one half."""
        self.median.copy_(self.quantile(0.0))

    @torch.no_grad()
    def scale_values(self, gain: Tensor) -> None:
        """Replace, in place, the density of v by that of gain·v, gain (C,)."""
        slope = F.softplus(self.matrices[0].double()) / gain.double().view(-1, 1, 1)
        self.matrices[0].data = (slope + torch.log(-torch.expm1(-slope))).to(self.matrices[0].dtype)
        self.median.mul_(gain)


def double(density: FactorizedDensity) -> FactorizedDensity:
    """A float64 copy."""
    copy = FactorizedDensity(density.biases[0].shape[0])
    copy.load_state_dict(density.state_dict())
    return copy.to(density.biases[0].device).double()


def bits(likelihood: Tensor) -> Tensor:
    """−log₂ of a likelihood that is bounded below by 1e-9, with the gradient of :func:`lower_bound`."""
    return -torch.log2(lower_bound(likelihood, LIKELIHOOD_BOUND))


class _LowerBound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bound = bound
        return x.clamp(min=bound)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        (grad,) = grads
        return grad * ((x >= ctx.bound) | (grad < 0)), None


def lower_bound(x: Tensor, bound: float) -> Tensor:
    """max(x, bound); below the bound, gradients that would increase x pass, as in CompressAI's `LowerBound`."""
    return _LowerBound.apply(x, bound)


class _GaussianBits(torch.autograd.Function):
    """−log₂ of the probability of a unit interval around v under N(0, σ²), with a closed-form backward."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, sigma: Tensor) -> Tensor:
        inverse = 1 / sigma
        distance = v.abs()
        upper = (0.5 - distance) * inverse
        lower = (-0.5 - distance) * inverse
        mass = torch.special.erfc(upper * -math.sqrt(0.5)) - torch.special.erfc(lower * -math.sqrt(0.5))
        mass = (0.5 * mass).clamp_(min=LIKELIHOOD_BOUND)
        ctx.save_for_backward(v, inverse, upper, lower, mass)
        return -torch.log2(mass)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        v, inverse, upper, lower, mass = ctx.saved_tensors
        (grad,) = grads
        factor = grad * inverse / mass * (1 / (math.log(2) * math.sqrt(2 * math.pi)))
        phi_upper = torch.exp(-0.5 * upper * upper)
        phi_lower = torch.exp(-0.5 * lower * lower)
        grad_v = factor * (phi_upper - phi_lower) * torch.sign(v)
        grad_sigma = None
        if ctx.needs_input_grad[1]:
            grad_sigma = factor * (upper * phi_upper - lower * phi_lower)
        return grad_v, grad_sigma


def gaussian_bits(v: Tensor, sigma: Tensor) -> Tensor:
    """Bits of v = y − μ under N(0, σ²) convolved with U(−½, ½), at most −log₂ 1e-9; float32, any shape."""
    return _GaussianBits.apply(v, sigma)
