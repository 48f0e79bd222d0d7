"""The rate of latents in training: its value and gradients.

The entropy model learns from what is coded: its gradient is that of the bits of the rounded symbols. The encoder needs
a smooth rate: the gradient with respect to y is that of the bits of y − μ + U(−½, ½) under the same σ and μ. ŷ, which
later passes and the synthesis see, is rounded with a straight-through gradient.

The symbols of refined latents minimize the loss, so its gradient is that at constant symbols (envelope theorem): μ
moves ŷ = symbol + μ, and does not change the bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..density import SCALE_BOUND, bits
from ..hyperprior import GainedHyperprior
from ..latents import dead_zone_of
from ..networks.context import ContextPass, code_passes, last_layer, parts_of, whole_grid
from ..refine.fused import gaussian_derivatives
from ..refine.relaxations import block_size


@dataclass(frozen=True)
class Rate:
    """Bits of each image, (B,), of z and y, and ŷ (B, M, h, w) with the gain of y."""

    z: Tensor
    y: Tensor
    y_hat: Tensor


def round_ste(x: Tensor) -> Tensor:
    """round(x) with the gradient of the identity."""
    return x + (torch.round(x) - x).detach()


def anchor_gain(log: Tensor, anchor: Tensor) -> Tensor:
    """Gains (B, C, 1, 1) of log-gains (A, C) for the anchor λ of each image, (B,)."""
    return torch.exp(log[anchor])[:, :, None, None]


def rate(
    model: GainedHyperprior,
    y_0: Tensor,
    anchor: Tensor,
    noise_z: Tensor | None,
    noise_y: Tensor | None,
    z_0: Tensor | None = None,
    dead_zone: bool = False,
) -> Rate:
    """Code latents y₀ (B, M, h, w) without gain, each image at its anchor λ (B,).

    Under autocast convolutions run in bf16.

    Parameters
    ----------
    noise_z, noise_y : Tensor (B, N, h/4, w/4), (B, M, h, w), optional
        In U(−½, ½). None: z or y is a constant, of which the bits of the rounded symbols are counted.
    z_0 : Tensor (B, N, h/4, w/4), optional
        Hyper-latents without gain, of refined latents; None: those of h_a.
    dead_zone : bool
        Round y with a dead zone, as `latents.quantize` can.
    """
    g_y, g_z = anchor_gain(model.log_gain_y, anchor), anchor_gain(model.log_gain_z, anchor)
    unit = model.y_unit[None, :, None, None]
    median = model.density.median[None, :, None, None]
    refined = z_0 is not None
    if z_0 is None:
        z_0 = model.h_a(y_0 / unit).float()
    v_z = g_z * (z_0 - median)
    with torch.autocast(y_0.device.type, enabled=False):
        counted = torch.round(v_z) if noise_z is None else v_z + noise_z
        likelihood = model.density.likelihood(counted / g_z + median, 1 / g_z)
    z_bits = bits(likelihood).sum(dim=(1, 2, 3))

    features = model.h_s[:-1](round_ste(v_z) / g_z + median).permute(0, 2, 3, 1)
    mixed = [] if model.context is None else model.context.mix_features(features)
    log_gain = (model.log_gain_y[anchor] + model.y_unit.log())[:, None, None]  # (B, 1, 1, M)
    sources = latents_of_passes(model, g_y * y_0)
    noises = [] if noise_y is None else latents_of_passes(model, noise_y)
    parts: list[Tensor] = []
    spent: list[Tensor] = []

    def code(current: ContextPass) -> Tensor:
        k, own_gain = len(parts), log_gain[..., current.channels]
        noise, log_scale = noises[k] if noises else None, model.architecture.scale == "exp"
        y_hat, bits_of_pass = coded_symbols(
            sources[k], current.parameters, own_gain, noise, log_scale, refined, dead_zone
        )
        parts.append(y_hat)
        spent.append(bits_of_pass)
        return y_hat / own_gain.exp()

    ones = torch.ones_like(model.y_unit)
    code_passes(model.context, mixed, last_layer(model.h_s, features), ones, anchor, code)
    y_hat = parts[0] if model.context is None else whole_grid(parts, model.context.context)
    return Rate(z=z_bits, y=torch.stack(spent).sum(dim=0), y_hat=y_hat.permute(0, 3, 1, 2))


def latents_of_passes(model: GainedHyperprior, v: Tensor) -> list[Tensor]:
    """The latents (B, M, h, w) of each pass, channels-last."""
    v = v.permute(0, 2, 3, 1)
    return [v] if model.context is None else parts_of(v, model.context.context)


def coded_symbols(
    y: Tensor,
    parameters: Tensor,
    log_gain: Tensor,
    noise: Tensor | None,
    log_scale: bool,
    refined: bool = False,
    dead_zone: bool = False,
) -> tuple[Tensor, Tensor]:
    """ŷ = round(y − μ) + μ and its bits, with gradients as this module says, in closed form.

    Parameters
    ----------
    y : Tensor (B, h, w, C) float32
        Latents with gain.
    parameters : Tensor (B, h, w, 2C) float32
        Scale, log σ or σ as `log_scale` says, and mean, without gain.
    log_gain : Tensor (B, 1, 1, C) float32
        Logarithm of what σ and μ are multiplied by.
    noise : Tensor (B, h, w, C), optional
        In U(−½, ½); None: y is a constant.
    refined : bool
        y is a constant whose symbols minimize the loss.
    dead_zone : bool
        The symbol is 0 where |y − μ| is below `gaussian_dead_zone` of its σ.

    Returns
    -------
    y_hat (B, h, w, C), bits (B,)
        ŷ has the gradient of y, or of μ if y is refined. The incoming gradient of the bits must not be negative: a σ
        below its bound has a gradient only where descent would raise it.
    """
    return _CodedSymbols.apply(y, parameters, log_gain, noise, log_scale, refined, dead_zone)


def gaussian_dead_zone(sigma: Tensor) -> Tensor:
    """The dead zone of `latents.quantize` for σ, from the Gaussian that its tables are computed from."""
    beyond = torch.special.ndtr(-0.5 / sigma)  # the probability of all symbols above 0
    one = beyond - torch.special.ndtr(-1.5 / sigma)
    return dead_zone_of(((1 - 2 * beyond) / one.clamp(min=2**-20)).log2())


class _CodedSymbols(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        parameters: Tensor,
        log_gain: Tensor,
        noise: Tensor | None,
        log_scale: bool,
        refined: bool,
        dead_zone: bool,
    ) -> tuple[Tensor, Tensor]:
        C = y.shape[-1]
        y, parameters = y.contiguous(), parameters.contiguous()
        y_hat, by_y, by_mu, by_scale = (torch.empty(y.shape, device=y.device) for _ in range(4))
        bits_of_image = y.new_empty(len(y))
        images = max(1, block_size() // y[0].numel()) if y.device.type == "cpu" else len(y)
        for first in range(0, len(y), images):
            part = slice(first, first + images)
            scale, mean = parameters[part].split(C, -1)
            gain = log_gain[part].exp()
            scale = (scale.clamp(-20, 20) + log_gain[part]) if log_scale else scale * gain
            mu = mean * gain
            v = y[part] - mu
            symbols = v.round()
            if dead_zone:
                sigma = scale.exp() if log_scale else scale
                symbols.masked_fill_(v.abs() < gaussian_dead_zone(sigma.clamp(min=SCALE_BOUND)), 0)
            torch.add(symbols, mu, out=y_hat[part])
            spent = y.new_empty(v.shape[:-1]).view(-1)
            symbols, scale, to_mu, to_scale = (t.view(-1, C) for t in (symbols, scale, by_mu[part], by_scale[part]))
            gaussian_derivatives(symbols, scale, log_scale, spent, to_mu, to_scale, raising=True)
            bits_of_image[part] = spent.view(len(v), -1).sum(dim=1)
            if noise is not None:
                v += noise[part]
                gaussian_derivatives(v.view(-1, C), scale, log_scale, spent, by_y[part].view(-1, C), None)
        ctx.save_for_backward(by_y if noise is not None else None, by_mu, by_scale, parameters, log_gain)
        ctx.log_scale, ctx.refined = log_scale, refined
        return y_hat, bits_of_image

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_y, by_mu, by_scale, parameters, log_gain = ctx.saved_tensors
        grad, grad_bits = grads
        weight = grad_bits.view(-1, 1, 1, 1)
        scale, mean = parameters.split(grad.shape[-1], -1)
        gain = log_gain.exp()
        to_scale = by_scale * weight  # of log σ or σ with gain
        to_mean = grad * gain if ctx.refined else by_mu * (-weight * gain)
        to_gain = torch.addcmul(to_scale if ctx.log_scale else to_scale * scale * gain, to_mean, mean)
        to_parameters = torch.cat((to_scale if ctx.log_scale else to_scale * gain, to_mean), -1)
        to_y = None if by_y is None else torch.addcmul(grad, by_y, weight)
        return to_y, to_parameters, to_gain.sum(dim=(1, 2), keepdim=True), None, None, None, None
