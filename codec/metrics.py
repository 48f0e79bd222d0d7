"""Quality of one image (PSNR, MS-SSIM, R-D loss) and distance between curves (BD-rate, BD-PSNR).

PSNR and MS-SSIM compare 8-bit images, over all three channels together, as CompressAI's "psnr-rgb" and
"ms-ssim-rgb" do.

Bjøntegaard deltas use the package `bjontegaard` with method "pchip": log₁₀ of the rate (bpp) against PSNR,
piecewise cubic Hermite interpolation through every point, integrated over the whole interval that both curves
cover and no further (nothing is extrapolated). On CompressAI's published Kodak curves against mbt2018-mean this
gives VTM −17.5 % and JPEG +138 %. The older single cubic ("cubic", VCEG-M33) fits four points; through JPEG's
nineteen it misses the curve and gives +139.3 %.

The packages are imported where they are used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

BD_METHOD = "pchip"
MS_SSIM_SMALLEST_SIDE = 160  # an 11-tap window after four halvings: (11 − 1)·2⁴; the side must be larger


@dataclass(frozen=True)
class Curve:
    """An R-D curve: means over a set of images, one point a setting, in any order.

    Attributes
    ----------
    name : str
        What a legend shows.
    bpp, psnr : tuple of float
        Bits per pixel and dB, of equal length.
    """

    name: str
    bpp: tuple[float, ...]
    psnr: tuple[float, ...]


# -------------------------------------------------------------------------------------------------- one image


def mse(a: np.ndarray, b: np.ndarray) -> float:
    """Mean squared error of two uint8 images (H, W, 3) in units of 0..1 pixels.

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
    error = mse(a, b)
    return math.inf if error == 0 else -10 * math.log10(error)


def ms_ssim(a: np.ndarray, b: np.ndarray) -> float | None:
    """Multi-scale structural similarity (0..1, five scales) of two uint8 images (H, W, 3).

    None when the smaller side is at most 160 pixels: the fifth scale is smaller than the window there.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"images of different shapes: {a.shape} and {b.shape}")
    if min(a.shape[:2]) <= MS_SSIM_SMALLEST_SIDE:
        return None
    import pytorch_msssim
    import torch

    x, y = (torch.tensor(image).permute(2, 0, 1)[None].float() for image in (a, b))  # (1, 3, H, W), 0..255
    with torch.inference_mode():
        return float(pytorch_msssim.ms_ssim(x, y, data_range=255))


def rd_loss(bpp: float, mse: float, lmbda: float) -> float:
    """Return λ·255²·MSE + bpp, what the encoder minimises; `mse` in units of 0..1 pixels."""
    return lmbda * 255**2 * mse + bpp


# --------------------------------------------------------------------------------------------------- two curves


def bd_rate(curve: Curve, anchor: Curve) -> float:
    """Mean change of rate at equal PSNR in percent; negative when `curve` needs fewer bits than `anchor`.

    The mean is over the PSNR range that both cover (:func:`shared_psnr`) of the difference in log rate.

    Raises
    ------
    ValueError
        If a curve has fewer than two points or does not rise, or the curves share no PSNR.
    """
    import bjontegaard

    shared_psnr(curve, anchor)
    points = [*_points(anchor), *_points(curve)]
    return float(bjontegaard.bd_rate(*points, method=BD_METHOD, require_matching_points=False, min_overlap=0))


def bd_psnr(curve: Curve, anchor: Curve) -> float:
    """Mean change of PSNR in dB at equal rate, over the rates that both cover; positive when `curve` is better.

    Raises
    ------
    ValueError
        If a curve has fewer than two points or does not rise, or the curves share no rate.
    """
    import bjontegaard

    points = [*_points(anchor), *_points(curve)]
    _shared("rate", "bpp", curve.name, anchor.name, points[2], points[0])
    return float(bjontegaard.bd_psnr(*points, method=BD_METHOD, require_matching_points=False, min_overlap=0))


def shared_psnr(curve: Curve, anchor: Curve) -> tuple[float, float]:
    """Return the PSNR range in dB that both curves cover, which is what :func:`bd_rate` integrates over.

    Raises
    ------
    ValueError
        As :func:`bd_rate`.
    """
    return _shared("PSNR", "dB", curve.name, anchor.name, _points(curve)[1], _points(anchor)[1])


def _shared(what: str, unit: str, name: str, anchor: str, a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Return the interval common to two sorted axes."""
    low, high = float(max(a[0], b[0])), float(min(a[-1], b[-1]))
    if low >= high:
        raise ValueError(
            f"curves share no {what}: {name} covers {a[0]:.4g} to {a[-1]:.4g} {unit}, "
            f"{anchor} {b[0]:.4g} to {b[-1]:.4g}"
        )
    return low, high


def _points(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Return rate and PSNR, both rising; equal points once."""
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
