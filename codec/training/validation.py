"""Validation of the model during training: rate and PSNR with hard rounding, in floating point."""

from __future__ import annotations

from statistics import mean

import torch
from torch import Tensor

from ..density import bits, gaussian_bits
from ..hyperprior import GainedHyperprior, Hyperprior, code_rounded, fold
from ..metrics import psnr_of_mse

_SIDE = 1024  # of the central part of an image that is used, in pixels


@torch.no_grad()
def validate(model: GainedHyperprior, images: list[Tensor], device: torch.device) -> list[tuple[float, float]]:
    """Mean (bpp, PSNR in dB) at each anchor over validation images (3, H, W) uint8, with hard rounding.

    The rate is estimated from the float densities, without entropy coding. Of an image, the central part is used.
    """
    levels = [(model.gains(lmbda)[0][None, :, None, None], fold(model, lmbda)) for lmbda in model.anchors]
    rows: list[list[tuple[float, float]]] = [[] for _ in levels]
    for image in images:
        x = central_part(image).to(device)[None].float() / 255
        y_0 = model.g_a(x)
        for measured, (gain, folded) in zip(rows, levels, strict=True):
            measured.append(_estimate(folded, x, gain * y_0))
    return [(mean(bpp for bpp, _ in measured), mean(psnr for _, psnr in measured)) for measured in rows]


def central_part(image: Tensor) -> Tensor:
    """The central part of an image (3, H, W): its sides are multiples of 64 and at most 1024 pixels."""
    height, width = (min(_SIDE, side // 64 * 64) for side in image.shape[1:])
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top : top + height, left : left + width]


def _estimate(model: Hyperprior, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Bpp and PSNR (dB) of x (1, 3, H, W) and its latents y with the float model and hard rounding."""
    networks, density = model.networks, model.density
    median = density.median[None, :, None, None]
    z_hat = torch.round(networks.h_a(y) - median) + median
    v, sigma, y_hat = code_rounded(model, y, z_hat)
    rate = bits(density.likelihood(z_hat)).sum() + gaussian_bits(v, sigma).sum()
    x_hat = (networks.g_s(y_hat).clamp(0, 1) * 255).round() / 255
    mse = (x - x_hat).square().mean()
    return float(rate) / (x.shape[2] * x.shape[3]), psnr_of_mse(float(mse))
