"""The training objective: rate with additive noise, distortion through straight-through rounding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..density import SCALE_BOUND, bits, gaussian_bits, lower_bound
from ..hyperprior import GainedHyperprior
from ..networks.architecture import HYPER_STRIDE, STRIDE, Architecture
from ..networks.build import start_transforms
from ..settings import ANCHORS

LAMBDA_REFERENCE = 0.0075
_START_STD = 2.0  # of mshyper's gained latents at the reference λ: a rate of some bits a pixel, falling at once


@dataclass(frozen=True)
class Losses:
    """Loss of a batch. `loss` is a scalar; the others are (B,): bits a pixel, MSE in 0..1."""

    loss: Tensor
    bpp: Tensor
    mse: Tensor


# ------------------------------------------------------------------------------------------------------- start


@torch.no_grad()
def initial_model(architecture: Architecture, crops: Tensor) -> GainedHyperprior:
    """A model that is ready to be trained, its scales measured on `crops`; `lite` starts as a DCT.

    Parameters
    ----------
    crops : Tensor (B, 3, H, W) float32
        Photographs in 0..1, H and W multiples of 64; about a hundred 256×256 crops do.
    """
    model = GainedHyperprior(architecture)
    slope = torch.log(torch.tensor(ANCHORS) / LAMBDA_REFERENCE)[:, None]
    last: Any = model.h_s[-1]
    last.weight.mul_(0.1)
    last.bias.zero_()
    unit = start_transforms(architecture, model.networks, crops)
    if unit is not None:
        model.y_unit.copy_(unit)
        start = float(torch.log(torch.tensor(255 / 40)))
    else:
        start = _start_centred(model, crops)
        last.bias[: architecture.M] = 1.0  # σ = y_unit · gain, what was measured
    model.log_gain_y.add_(start + 0.5 * slope)
    model.log_gain_d.add_(-start - 0.5 * slope)
    model.log_gain_z.add_(1.4 + slope / 6)
    return model


def _start_centred(model: GainedHyperprior, crops: Tensor) -> float:
    """Centre latents and pictures through the last biases of g_a and g_s, set y_unit; log-gain at the reference λ."""
    y = torch.cat([model.g_a(x) for x in crops.split(8)])
    mean = y.mean(dim=(0, 2, 3))
    centred = y - mean[None, :, None, None]
    last: Any = list(model.g_a.children())[-1]
    last.bias.sub_(mean)
    last = list(model.g_s.children())[-1]
    last.bias.add_((crops[:8] - model.g_s(centred[:8])).mean(dim=(0, 2, 3)))
    model.y_unit.copy_(centred.abs().mean(dim=(0, 2, 3)).clamp(min=1e-4))
    return float(torch.log(_START_STD / centred.std()))


# --------------------------------------------------------------------------------------------------- objective


def round_ste(x: Tensor) -> Tensor:
    """round(x) with the gradient of the identity."""
    return x + (torch.round(x) - x).detach()


def forward(
    model: GainedHyperprior,
    x: Tensor,
    anchor: Tensor,
    generator: torch.Generator | None,
    run: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None,
) -> Losses:
    """The loss of a batch in which every image has a λ of its own.

    Parameters
    ----------
    x : Tensor (B, 3, H, W) float32 in 0..1
    anchor : Tensor (B,) int64
        Index of each image's λ among the anchors.
    generator : torch.Generator or None
        Source of the additive noise.
    run : callable, optional
        A compiled `losses`.
    """
    B, _, H, W = x.shape

    def noise(channels: int, stride: int) -> Tensor:
        shape = (B, channels, H // stride, W // stride)
        return torch.rand(shape, generator=generator, device=x.device) - 0.5

    noise_z = noise(model.architecture.N, HYPER_STRIDE)
    noise_y = noise(model.architecture.M, STRIDE)
    lmbda = _lambdas(model.anchors, x.device)[anchor]
    return Losses(*(run or losses)(model, x, anchor, lmbda, noise_z, noise_y))


def losses(
    model: GainedHyperprior, x: Tensor, anchor: Tensor, lmbda: Tensor, noise_z: Tensor, noise_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, bpp and MSE (see `Losses`) with the noise in U(−½, ½) and λ of each image (B,) given.

    Nothing is random, and the host waits for nothing. Under autocast only convolutions are in bf16.
    """

    def gain(log: Tensor) -> Tensor:
        return torch.exp(log[anchor])[:, :, None, None]  # (B, C, 1, 1)

    g_y, g_z, d_y = gain(model.log_gain_y), gain(model.log_gain_z), gain(model.log_gain_d)
    unit = model.y_unit[None, :, None, None]
    median = model.density.median[None, :, None, None]

    y_0 = _apply(model.g_a, x).float()  # (B, M, H/16, W/16)
    z_0 = model.h_a(y_0 / unit).float()  # (B, N, H/64, W/64)
    v_z = g_z * (z_0 - median)
    with torch.autocast(x.device.type, enabled=False):
        likelihood = model.density.likelihood((v_z + noise_z) / g_z + median, 1 / g_z)
    z_rate = bits(likelihood).sum(dim=(1, 2, 3))
    features = model.h_s[:-1](round_ste(v_z) / g_z + median)
    with torch.autocast(x.device.type, enabled=False):
        scale, mean = model.h_s[-1](features.float()).chunk(2, 1)
    if model.architecture.scale == "exp":
        sigma = torch.exp(scale.clamp(-20, 20)) * (unit * g_y)
    else:
        sigma = scale * (unit * g_y)
    sigma = lower_bound(sigma, SCALE_BOUND)
    mu = mean * (unit * g_y)
    v_y = g_y * y_0 - mu
    y_rate = gaussian_bits(v_y + noise_y, sigma).sum(dim=(1, 2, 3))
    x_hat = _apply(model.g_s, d_y * (round_ste(v_y) + mu)).float()

    pixels = x.shape[2] * x.shape[3]
    mse = (x - x_hat).square().mean(dim=(1, 2, 3))
    bpp = (z_rate + y_rate) / pixels
    weight = (LAMBDA_REFERENCE / lmbda).sqrt()
    loss = (weight * (lmbda * 255**2 * mse + bpp)).mean()
    return loss, bpp.detach(), mse.detach()


def _apply(network: nn.Module, x: Tensor) -> Tensor:
    """Run g_a or g_s; under autocast a GDN stays in float32 (its norm is a sum of squares of all channels)."""
    if not isinstance(network, nn.Sequential):
        return network(x)
    for layer in network:
        if hasattr(layer, "gamma_reparam"):  # CompressAI's GDN, which takes seconds to import
            with torch.autocast(x.device.type, enabled=False):
                x = layer(x.float())
        else:
            x = layer(x)
    return x


@functools.cache
def _lambdas(anchors: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(anchors, device=device)  # cached: the copy to a GPU would wait for it in every step


@functools.cache
def compiled_losses() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`losses` through torch.compile, which fuses everything elementwise."""
    return torch.compile(losses, dynamic=False)
