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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..hyperprior import GainedHyperprior
from ..networks.architecture import HYPER_STRIDE, STRIDE
from ..settings import refined_lambda
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
    compiled: bool = False,
    dead_zone: bool = False,
) -> Losses:
    """The losses of a batch of images, with noise drawn from `generator`.

    Parameters
    ----------
    x : Tensor (B, 3, H, W) float32
        Images in 0..1; H and W are multiples of 64.
    anchor : Tensor (B,) int64
        Index of each image's λ among the anchors.
    generator : torch.Generator or None
        Source of the additive noise; None: torch's default generator.
    compiled : bool
        Compile the computation.
    dead_zone : bool
        Round y with a dead zone, as `latents.quantize` can.
    """
    B, _, H, W = x.shape
    noise_z = _uniform((B, model.architecture.N, H // HYPER_STRIDE, W // HYPER_STRIDE), x.device, generator)
    noise_y = _uniform((B, model.architecture.M, H // STRIDE, W // STRIDE), x.device, generator)
    run = compile_once(losses) if compiled else losses
    return Losses(*run(model, x, anchor, lambdas(model, anchor), noise_z, noise_y, dead_zone=dead_zone))


def forward_prior(
    model: GainedHyperprior,
    y_0: Tensor,
    anchor: Tensor,
    generator: torch.Generator | None,
    compiled: bool = False,
) -> Losses:
    """The same for the rate alone of latents y₀ (B, M, H/16, W/16) without gain, which are constants; the MSE is 0."""
    B, _, h, w = y_0.shape
    factor = HYPER_STRIDE // STRIDE
    noise_z = _uniform((B, model.architecture.N, h // factor, w // factor), y_0.device, generator)
    run = compile_once(prior_losses) if compiled else prior_losses
    return Losses(*run(model, y_0, anchor, lambdas(model, anchor), noise_z))


def forward_decoder(
    model: GainedHyperprior,
    x: Tensor,
    anchor: Tensor,
    lmbda: Tensor,
    sent: tuple[Tensor, Tensor],
    compiled: bool = False,
) -> Losses:
    """The same for an encoder that sends the latents y₀ and z₀, without gains, at the levels of anchors but with λ."""
    run = compile_once(losses) if compiled else losses
    return Losses(*run(model, x, anchor, lmbda, None, None, sent))


def losses(
    model: GainedHyperprior,
    x: Tensor,
    anchor: Tensor,
    lmbda: Tensor,
    noise_z: Tensor | None,
    noise_y: Tensor | None,
    sent: tuple[Tensor, Tensor] | None = None,
    dead_zone: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, bpp and MSE as in `Losses`; a pure function without host synchronization, so that it can be compiled.

    Under autocast only the convolutions run in bfloat16.

    Parameters
    ----------
    x, anchor
        As in `forward`.
    lmbda : Tensor (B,) float32
        λ of each image.
    noise_z, noise_y : Tensor (B, N, H/64, W/64), (B, M, H/16, W/16) float32, optional
        Samples of U(−½, ½); None for latents that are constants.
    sent : pair of Tensor, optional
        y₀ and z₀; None: those of g_a and h_a.
    dead_zone : bool
        As in `forward`.
    """
    y_0, z_0 = (apply_transform(model.g_a, x).float(), None) if sent is None else sent  # (B, M, H/16, W/16)
    coded = rate(model, y_0, anchor, noise_z, noise_y, z_0, dead_zone)
    mse = squared_error(model.g_s, anchor_gain(model.log_gain_d, anchor) * coded.y_hat, x)
    bpp = (coded.z + coded.y) / (x.shape[2] * x.shape[3])
    loss = (loss_weight(lmbda) * (lmbda * 255**2 * mse + bpp)).mean()
    return loss, bpp.detach(), mse.detach()


def prior_losses(
    model: GainedHyperprior, y_0: Tensor, anchor: Tensor, lmbda: Tensor, noise_z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for the rate of constant latents y₀ (B, M, H/16, W/16)."""
    coded = rate(model, y_0, anchor, noise_z, None)
    bpp = (coded.z + coded.y) / (y_0.shape[2] * y_0.shape[3] * STRIDE**2)
    return (loss_weight(lmbda) * bpp).mean(), bpp.detach(), torch.zeros_like(bpp)


def squared_error(g_s: nn.Module, y_hat: Tensor, x: Tensor) -> Tensor:
    """The mean squared error of each image, (B,); where g_s ends in a pixel shuffle, pixels are compared before it."""
    unshuffled: Any = getattr(g_s, "unshuffled", None)
    if unshuffled is None:
        return _MeanSquares.apply(apply_transform(g_s, y_hat), x)
    return _MeanSquares.apply(unshuffled(y_hat), F.pixel_unshuffle(x, int(getattr(g_s, "shuffle", 1))))


class _MeanSquares(torch.autograd.Function):
    """Mean of (x̂ − x)² over each image, (B,) float32, for x̂ of any precision, with a closed-form backward."""

    @staticmethod
    def forward(ctx: Any, x_hat: Tensor, x: Tensor) -> Tensor:
        difference = x_hat.float() - x
        ctx.save_for_backward(difference)
        ctx.dtype = x_hat.dtype
        return difference.square().mean(dim=(1, 2, 3))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        scale = (2 / difference[0].numel()) * grads[0].view(-1, 1, 1, 1)
        return (difference * scale).to(ctx.dtype), None


def loss_weight(lmbda: Tensor) -> Tensor:
    """Weight of the images of each λ: the loss grows about as √λ."""
    return (LAMBDA_REFERENCE / lmbda).sqrt()


def apply_transform(network: nn.Module, x: Tensor) -> Tensor:
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


def lambdas(model: GainedHyperprior, anchor: Tensor) -> Tensor:
    """λ of each image (B,) of its anchor."""
    return _anchors(model.anchors, anchor.device)[anchor]


def refined_lambdas(model: GainedHyperprior, anchor: Tensor) -> Tensor:
    """λ of each image (B,) whose refined files have the level of its anchor."""
    return _anchors(tuple(map(refined_lambda, model.anchors)), anchor.device)[anchor]


@functools.cache
def _anchors(anchors: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(anchors, device=device)  # cached: the copy to a GPU synchronizes


def _uniform(shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Samples of U(−½, ½)."""
    return torch.rand(shape, generator=generator, device=device) - 0.5


@functools.cache
def compile_once(
    function: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The function compiled, with fused elementwise operations."""
    return torch.compile(function, dynamic=False)
