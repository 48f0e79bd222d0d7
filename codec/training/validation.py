"""Validation of the model during training: rate and PSNR with hard rounding, in floating point."""

from __future__ import annotations

import torch
from torch import Tensor

from ..density import bits, gaussian_bits
from ..hyperprior import GainedHyperprior, Hyperprior, code_rounded, fold
from ..metrics import psnr_of_mse


@torch.no_grad()
def validate(model: GainedHyperprior, images: list[Tensor], device: torch.device) -> list[tuple[float, float]]:
    """Mean (bpp, PSNR in dB) at each anchor over validation images (3, H, W) uint8, with hard rounding.

    The rate is estimated from the float densities, without entropy coding.
    """
    curve = []
    for lmbda in model.anchors:
        folded = fold(model, lmbda)
        rows = [estimate(folded, image.to(device)) for image in images]
        bpp = sum(r[0] for r in rows) / len(rows)
        psnr = sum(r[1] for r in rows) / len(rows)
        curve.append((bpp, psnr))
    return curve


@torch.no_grad()
def estimate(model: Hyperprior, image: Tensor) -> tuple[float, float]:
    """Estimate bpp and PSNR (dB) of the float model with hard rounding.

    Parameters
    ----------
    image : Tensor (3, H, W) uint8
        Cropped to multiples of 64; at least 64×64.
    """
    height, width = image.shape[1] // 64 * 64, image.shape[2] // 64 * 64
    x = image[None, :, :height, :width].float() / 255
    networks, density = model.networks, model.density
    y = networks.g_a(x)
    median = density.median[None, :, None, None]
    z_hat = torch.round(networks.h_a(y) - median) + median
    v, sigma, y_hat = code_rounded(model, y, z_hat)
    rate = bits(density.likelihood(z_hat)).sum() + gaussian_bits(v, sigma).sum()
    x_hat = (networks.g_s(y_hat).clamp(0, 1) * 255).round() / 255
    mse = (x - x_hat).square().mean()
    return float(rate) / (height * width), psnr_of_mse(float(mse))
