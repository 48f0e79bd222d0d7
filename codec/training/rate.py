"""The rate of latents in training: its value and gradients.

The entropy model learns from what is coded: its gradient is that of the bits of the rounded symbols. The encoder needs
a smooth rate: the gradient with respect to y is that of the bits of y − μ + U(−½, ½) under the same σ and μ. ŷ, which
later passes and the synthesis see, is rounded with a straight-through gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkerboard import merge, pick
from ..density import SCALE_BOUND, bits, gaussian_bits, lower_bound
from ..hyperprior import GainedHyperprior
from ..networks.context import ContextPass, code_passes, last_layer


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
) -> Rate:
    """Code latents y₀ (B, M, h, w) without gain, each image at its anchor λ (B,).

    Under autocast convolutions run in bf16.

    Parameters
    ----------
    noise_z, noise_y : Tensor (B, N, h/4, w/4), (B, M, h, w), optional
        In U(−½, ½). None: z or y is a constant, of which the bits of the rounded symbols are counted.
    z_0 : Tensor (B, N, h/4, w/4), optional
        Hyper-latents without gain; None: those of h_a.
    """
    g_y, g_z = anchor_gain(model.log_gain_y, anchor), anchor_gain(model.log_gain_z, anchor)
    unit = model.y_unit[None, :, None, None]
    median = model.density.median[None, :, None, None]
    if z_0 is None:
        z_0 = model.h_a(y_0 / unit).float()
    v_z = g_z * (z_0 - median)
    with torch.autocast(y_0.device.type, enabled=False):
        counted = torch.round(v_z) if noise_z is None else v_z + noise_z
        likelihood = model.density.likelihood(counted / g_z + median, 1 / g_z)
    z_bits = bits(likelihood).sum(dim=(1, 2, 3))

    features = model.h_s[:-1](round_ste(v_z) / g_z + median).permute(0, 2, 3, 1)
    mixed = [] if model.context is None else model.context.mix_features(features)
    y, gain = (v.permute(0, 2, 3, 1) for v in (g_y * y_0, unit * g_y))
    noise = None if noise_y is None else noise_y.permute(0, 2, 3, 1)
    symbols, noisy, sigmas, halves, groups = (list[Tensor]() for _ in range(5))

    def code(current: ContextPass) -> Tensor:
        channels, half = current.channels, current.half
        scale, mean = current.parameters.chunk(2, -1)
        own, own_gain = pick(y[..., channels], half), gain[..., channels]
        sigma = torch.exp(scale.clamp(-20, 20)) if model.architecture.scale == "exp" else scale
        mu = mean * own_gain
        rounded = torch.round(own - mu).detach()
        symbols.append((rounded + (mu.detach() - mu)).flatten(1))
        if noise is not None:
            noisy.append((own - mu.detach() + pick(noise[..., channels], half)).flatten(1))
        sigmas.append((sigma * own_gain).flatten(1))
        y_hat = own + (rounded + mu - own).detach()
        halves.append(y_hat)
        if half != 0:
            groups.append(merge(*halves) if half == 1 else y_hat)
            halves.clear()
        return y_hat / own_gain

    ones = torch.ones_like(model.y_unit)
    code_passes(model.context, mixed, last_layer(model.h_s, features), ones, anchor, code)
    sigma = lower_bound(torch.cat(sigmas, 1), SCALE_BOUND)
    y_bits = gaussian_bits(torch.cat(symbols, 1), sigma).sum(dim=1)
    if noisy:
        smooth = gaussian_bits(torch.cat(noisy, 1), sigma.detach()).sum(dim=1)
        y_bits = y_bits + (smooth - smooth.detach())
    return Rate(z=z_bits, y=y_bits, y_hat=torch.cat(groups, -1).permute(0, 3, 1, 2))
