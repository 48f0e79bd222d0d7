"""The training objective: the rate of the latents (rate.py), and the distortion with straight-through rounding.

Each image x of a batch has a λ of its own (an anchor), whose gains are applied to y, z and ŷ:

    x ─►g_a─► y₀ ─(·g_y)─► y ─► v_y = y − μ ─► round(v_y) + μ = ŷ ─(·d_y)─► g_s ─► x̂ ─► MSE
               │                           ▲ σ, μ (·g_y)
               └►h_a─► z₀ ─(·g_z)─► v_z ─► round(v_z) ─(/g_z)─► h_s
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..hyperprior import GainedHyperprior
from ..networks.architecture import HYPER_STRIDE, STRIDE
from .rate import anchor_gain, rate

LAMBDA_REFERENCE = 0.0075  # weight 1 in the loss


@dataclass(frozen=True)
class Losses:
    """Results of a batch.

    Attributes
    ----------
    loss : Tensor ()
        Mean over the batch of (λ·255²·MSE + bpp)·√(`LAMBDA_REFERENCE` / λ).
    bpp, mse : Tensor (B,)
        Bits per pixel, and mean squared error of pixels in 0..1; without gradients.
    """

    loss: Tensor
    bpp: Tensor
    mse: Tensor


def forward(
    model: GainedHyperprior,
    x: Tensor,
    anchor: Tensor,
    generator: torch.Generator | None,
    run: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None,
) -> Losses:
    """The losses of a batch with noise drawn from `generator`.

    Parameters
    ----------
    x : Tensor (B, 3, H, W) float32
        Images in 0..1; H and W are multiples of 64.
    anchor : Tensor (B,) int64
        Index of each image's λ among the anchors.
    generator : torch.Generator or None
        Source of the additive noise; None: torch's default generator.
    run : callable, optional
        `losses` or its compiled version.
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
    """Loss, bpp and MSE as in `Losses`; a pure function without host synchronisation, so that it can be compiled.

    Under autocast only the convolutions run in bfloat16.

    Parameters
    ----------
    x, anchor
        As in `forward`.
    lmbda : Tensor (B,) float32
        λ of each image.
    noise_z, noise_y : Tensor (B, N, H/64, W/64), (B, M, H/16, W/16) float32
        Samples of U(−½, ½).
    """
    y_0 = _apply(model.g_a, x).float()  # (B, M, H/16, W/16)
    coded = rate(model, y_0, anchor, noise_z, noise_y)
    x_hat = _apply(model.g_s, anchor_gain(model.log_gain_d, anchor) * coded.y_hat).float()

    pixels = x.shape[2] * x.shape[3]
    mse = (x - x_hat).square().mean(dim=(1, 2, 3))
    bpp = (coded.z + coded.y) / pixels
    weight = (LAMBDA_REFERENCE / lmbda).sqrt()
    loss = (weight * (lmbda * 255**2 * mse + bpp)).mean()
    return loss, bpp.detach(), mse.detach()


def _apply(network: nn.Module, x: Tensor) -> Tensor:
    """Run g_a or g_s; under autocast GDN stays in float32, because its norm sums squares over all channels."""
    if not isinstance(network, nn.Sequential):
        return network(x)
    for layer in network:
        if hasattr(layer, "gamma_reparam"):  # CompressAI's GDN, recognized without its slow import
            with torch.autocast(x.device.type, enabled=False):
                x = layer(x.float())
        else:
            x = layer(x)
    return x


@functools.cache
def _lambdas(anchors: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(anchors, device=device)  # cached: the copy to a GPU synchronizes


@functools.cache
def compiled_losses() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`losses` compiled, with fused elementwise operations."""
    return torch.compile(losses, dynamic=False)
