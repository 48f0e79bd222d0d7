"""Image quality (PSNR, MS-SSIM, R-D loss) and Bjøntegaard deltas between R-D curves (BD-rate, BD-PSNR).

PSNR and MS-SSIM are computed over all three channels together, as CompressAI's "psnr-rgb" and "ms-ssim-rgb".

Bjøntegaard deltas use the package `bjontegaard` with method "pchip": log₁₀ of the rate (bpp) against PSNR,
piecewise cubic Hermite interpolation through every point, integrated over the interval that both curves cover,
without extrapolation. On CompressAI's published Kodak curves against mbt2018-mean this gives VTM −17.5 % and
JPEG +138 %. The older single cubic ("cubic", VCEG-M33) is meant for four points; fitted to JPEG's nineteen points
it gives +139.3 %.

torch, pytorch_msssim, flip_evaluator and bjontegaard are imported inside the functions that need them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

BD_METHOD = "pchip"
MS_SSIM_MIN_SIDE = 161  # pixels: an 11-tap window at the fifth of five scales, (11 − 1)·2⁴ + 1


@dataclass(frozen=True)
class Curve:
    """An R-D curve: means over a set of images, one point per setting, in any order.

    Attributes
    ----------
    name : str
        Label in tables and legends.
    bpp, psnr : tuple of float
        Bits per pixel and dB, of equal length.
    """

    name: str
    bpp: tuple[float, ...]
    psnr: tuple[float, ...]


# ---------------------------------------------------------------------------------------------- image quality


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


# ------------------------------------------------------------------------------------------- Bjøntegaard deltas


def bd_rate(curve: Curve, anchor: Curve) -> float:
    """BD-rate: mean change of rate at equal PSNR, in percent; negative if `curve` needs fewer bits than `anchor`.

    The difference in log rate is averaged over the PSNR range that both curves cover (:func:`shared_psnr`).

    Raises
    ------
    ValueError
        If a curve has fewer than two points or its PSNR does not increase with the rate, or if the PSNR ranges
        do not overlap.
    """
    import bjontegaard

    shared_psnr(curve, anchor)
    points = [*_points(anchor), *_points(curve)]
    return float(bjontegaard.bd_rate(*points, method=BD_METHOD, require_matching_points=False, min_overlap=0))


def bd_psnr(curve: Curve, anchor: Curve) -> float:
    """BD-PSNR: mean change of PSNR in dB at equal rate, over the rates that both cover; positive if `curve` is better.

    Raises
    ------
    ValueError
        If a curve has fewer than two points or its PSNR does not increase with the rate, or if the ranges of rates
        do not overlap.
    """
    import bjontegaard

    points = [*_points(anchor), *_points(curve)]
    _shared("rate", "bpp", curve.name, anchor.name, points[2], points[0])
    return float(bjontegaard.bd_psnr(*points, method=BD_METHOD, require_matching_points=False, min_overlap=0))


def shared_psnr(curve: Curve, anchor: Curve) -> tuple[float, float]:
    """PSNR range in dB that both curves cover, over which :func:`bd_rate` integrates.

    Raises
    ------
    ValueError
        As :func:`bd_rate`.
    """
    return _shared("PSNR", "dB", curve.name, anchor.name, _points(curve)[1], _points(anchor)[1])


def _shared(what: str, unit: str, name: str, anchor: str, a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """The interval that two sorted axes have in common."""
    low, high = float(max(a[0], b[0])), float(min(a[-1], b[-1]))
    if low >= high:
        raise ValueError(
            f"curves share no {what}: {name} covers {a[0]:.4g} to {a[-1]:.4g} {unit}, "
            f"{anchor} {b[0]:.4g} to {b[-1]:.4g}"
        )
    return low, high


def _points(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Rates and PSNR values, both (n,) and strictly increasing; duplicate points are dropped."""
    if len(curve.bpp) != len(curve.psnr):
        raise ValueError(f"{curve.name}: {len(curve.bpp)} rates but {len(curve.psnr)} PSNR values")
    points = np.array(sorted(set(zip(curve.bpp, curve.psnr, strict=True))), dtype=np.float64)  # (n, 2)
    if len(points) < 2:
        raise ValueError(f"{curve.name}: a curve needs at least two different points")
    if not np.isfinite(points).all() or points[0, 0] <= 0:
        raise ValueError(f"{curve.name}: rates must be positive, and rates and PSNR finite")
    if (np.diff(points, axis=0) <= 0).any():
        raise ValueError(f"{curve.name}: PSNR does not rise with the rate")
    return points[:, 0], points[:, 1]
