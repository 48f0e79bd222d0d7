"""Image quality: PSNR, MS-SSIM, FLIP and the R-D loss.

PSNR and MS-SSIM are computed over all three channels together, as CompressAI's "psnr-rgb" and "ms-ssim-rgb".

torch, pytorch_msssim and flip_evaluator are imported inside the functions that need them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

MS_SSIM_MIN_SIDE = 161  # pixels: an 11-tap window at the fifth of five scales, (11 − 1)·2⁴ + 1


def mse(a: np.ndarray, b: np.ndarray) -> float:
    """Mean squared error of two uint8 images (H, W, 3), for pixels scaled to 0..1.

    Raises
    ------
    ValueError
        If the shapes differ, or an image is not uint8 or is empty.
    """
    if a.shape != b.shape:
        raise ValueError(f"images of different shapes: {a.shape} and {b.shape}")
    if a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ValueError(f"images must be uint8, not {a.dtype} and {b.dtype}")
    if a.size == 0:
        raise ValueError("images without pixels")
    difference = a.astype(np.int32) - b
    return float(np.mean(difference * difference, dtype=np.float64)) / 255**2


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 images (H, W, 3); infinite for identical ones.

    Raises
    ------
    ValueError
        As :func:`mse`.
    """
    return psnr_of_mse(mse(a, b))


def psnr_of_mse(mse: float) -> float:
    """PSNR in dB of a mean squared error of pixels in 0..1; infinite for 0."""
    return math.inf if mse == 0 else -10 * math.log10(mse)


def ms_ssim(a: np.ndarray, b: np.ndarray) -> float | None:
    """MS-SSIM (0..1, five scales) of two uint8 images (H, W, 3); None if a side is below `MS_SSIM_MIN_SIDE`.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"images of different shapes: {a.shape} and {b.shape}")
    if min(a.shape[:2]) < MS_SSIM_MIN_SIDE:
        return None
    import torch

    x, y = (torch.tensor(image).permute(2, 0, 1)[None].float() for image in (a, b))  # (1, 3, H, W), 0..255
    with torch.inference_mode():
        return float(ms_ssim_of_tensors(x, y, data_range=255))


def ms_ssim_of_tensors(a: Tensor, b: Tensor, data_range: float = 1.0) -> Tensor:
    """MS-SSIM (Wang et al. 2003), differentiable: float images (B, C, H, W) in 0..`data_range` → (B,).

    Both sides have at least `MS_SSIM_MIN_SIDE` pixels.
    """
    import pytorch_msssim

    similarity: Tensor = pytorch_msssim.ms_ssim(a, b, data_range=data_range, size_average=False)
    return similarity


def flip(a: np.ndarray, b: np.ndarray) -> float:
    """Mean FLIP error (0..1, perceptual, 0: equal) of two uint8 images (H, W, 3), from the package flip-evaluator.

    FLIP (Andersson et al. 2020) models the difference that is seen when two images are shown in turn, here at its
    default of 67 pixels a degree.

    Raises
    ------
    ImportError
        If the package is not installed.
    """
    import flip_evaluator

    x, y = (image.astype(np.float32) / 255 for image in (a, b))
    return float(flip_evaluator.evaluate(x, y, "LDR", applyMagma=False, computeMeanError=True)[1])


def rd_loss(bpp: float, mse: float, lmbda: float) -> float:
    """λ·255²·MSE + bpp, the encoder's objective; `mse` for pixels in 0..1."""
    return lmbda * 255**2 * mse + bpp
