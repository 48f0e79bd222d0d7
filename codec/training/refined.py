"""Latents as the encoder sends them: refined by a short annealing of SGA with the averaged weights, in stage "decoder".

y₀, z₀ ─► relax ─► ŷ, ẑ ─► λ·255²·MSE + bpp ─► gradient ─► Adam on y and z, `steps` times
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..annealing import Annealing
from ..density import bits
from ..hyperprior import GainedHyperprior
from ..networks.context import ContextPass, code_passes, last_layer, parts_of, whole_grid
from ..refine.fused import Relaxation, coded_latents
from ..refine.noise import sample_noise
from ..refine.relaxations import relax
from ..rounding import Rounding, rounding
from .objective import apply_transform, squared_error
from .rate import anchor_gain

METHOD = "ssl"
LR = 0.03  # of 10 to 40 steps; with the codec's own, larger rate so few steps increase the loss


def refine_latents(
    model: GainedHyperprior,
    x: Tensor,
    anchor: Tensor,
    lmbda: Tensor,
    steps: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """y₀ (B, M, H/16, W/16) and z₀ (B, N, H/64, W/64) after `steps` steps of SGA, without gains and not rounded.

    Parameters
    ----------
    model : GainedHyperprior
        Parameters that require no gradient; under autocast the convolutions run in bfloat16.
    x, anchor, lmbda
        As in `objective.losses`.
    generator : torch.Generator, optional
        Source of the noise, on the device of x.
    """
    g_y, g_z = anchor_gain(model.log_gain_y, anchor), anchor_gain(model.log_gain_z, anchor)
    median = model.density.median[None, :, None, None]
    with torch.no_grad():
        y_0 = apply_transform(model.g_a, x).float()
        z_0 = model.h_a(y_0 / model.y_unit[None, :, None, None]).float()
        y = (g_y * y_0).permute(0, 2, 3, 1).contiguous()
        v_z = (g_z * (z_0 - median)).permute(0, 2, 3, 1).contiguous()
    y.requires_grad_(True)
    v_z.requires_grad_(True)
    method, annealing = rounding(METHOD), replace(Annealing.default(METHOD, steps), lr=LR)
    optimizer = torch.optim.Adam([y, v_z], fused=True)
    for tau, rate in zip(annealing.temperatures(steps), annealing.learning_rates(steps), strict=True):
        with torch.enable_grad():
            loss = _relaxed_loss(model, x, anchor, lmbda, y, v_z, tau, method, generator)
        y.grad, v_z.grad = (gradient.contiguous() for gradient in torch.autograd.grad(loss, (y, v_z)))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return y.detach().permute(0, 3, 1, 2) / g_y, v_z.detach().permute(0, 3, 1, 2) / g_z + median


def _relaxed_loss(
    model: GainedHyperprior,
    x: Tensor,
    anchor: Tensor,
    lmbda: Tensor,
    y: Tensor,
    v_z: Tensor,
    tau: float,
    method: Rounding,
    generator: torch.Generator | None,
) -> Tensor:
    """Σ over the images of λ·255²·MSE + bpp for softly rounded y (B, h, w, M) and v_z (B, h/4, w/4, N), with gains."""
    g_y, g_z = anchor_gain(model.log_gain_y, anchor), anchor_gain(model.log_gain_z, anchor)
    median = model.density.median[None, :, None, None]
    log_scale = model.architecture.scale == "exp"
    gain = (g_y * model.y_unit[None, :, None, None]).permute(0, 2, 3, 1)  # (B, 1, 1, M)
    z_hat = relax(v_z, tau, method, generator).permute(0, 3, 1, 2) / g_z + median
    with torch.autocast(x.device.type, enabled=False):
        spent = [bits(model.density.likelihood(z_hat, 1 / g_z)).sum(dim=(1, 2, 3))]
    features = model.h_s[:-1](z_hat).permute(0, 2, 3, 1)
    mixed = [] if model.context is None else model.context.mix_features(features)
    sources = [y] if model.context is None else parts_of(y, model.context.context)
    parts: list[Tensor] = []

    def code(current: ContextPass) -> Tensor:
        own, own_gain = sources[len(parts)], gain[..., current.channels]
        scale, mean = current.parameters.chunk(2, -1)
        scale = scale + own_gain.log() if log_scale else scale * own_gain
        parameters = torch.cat((scale, mean * own_gain), -1)
        noise = sample_noise(own.shape, method, generator=generator, device=own.device)
        y_hat, bits_of_pass = coded_latents(own, parameters, Relaxation(tau, method, noise), log_scale)
        spent.append(bits_of_pass)
        parts.append(y_hat)
        return y_hat / own_gain

    ones = torch.ones_like(model.y_unit)
    code_passes(model.context, mixed, last_layer(model.h_s, features), ones, anchor, code)
    y_hat = parts[0] if model.context is None else whole_grid(parts, model.context.context)
    g_d = anchor_gain(model.log_gain_d, anchor)
    mse = squared_error(model.g_s, g_d * y_hat.permute(0, 3, 1, 2), x)
    bpp = torch.stack(spent).sum(dim=0) / (x.shape[2] * x.shape[3])
    return (lmbda * 255**2 * mse + bpp).sum()
