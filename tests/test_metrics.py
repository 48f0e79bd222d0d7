"""Image quality metrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sgacodec import metrics


def constant(value: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def test_psnr_of_known_errors() -> None:
    """PSNR follows from its definition."""
    assert metrics.psnr(constant(0), constant(255)) == pytest.approx(0, abs=1e-12)
    assert metrics.psnr(constant(100), constant(101)) == pytest.approx(20 * math.log10(255))
    a, b = constant(10), constant(10)
    b[0, 0, 0] = 0  # one sample of 192, off by 10
    assert metrics.psnr(a, b) == pytest.approx(10 * math.log10(255**2 * 192 / 100))
    assert metrics.psnr(a, a) == math.inf
    assert metrics.psnr_of_mse(1e-3) == pytest.approx(30)


def test_psnr_does_not_wrap_around() -> None:
    """Guards against differences in 8-bit arithmetic."""
    assert metrics.psnr(constant(0), constant(255)) == metrics.psnr(constant(255), constant(0))


@pytest.mark.parametrize("other", [constant(0, 8, 9), constant(0).astype(np.float32), np.zeros((8, 8), np.uint8)])
def test_psnr_of_other_shapes_or_types_is_an_error(other: np.ndarray) -> None:
    """Guards against broadcasting and against other pixel ranges."""
    with pytest.raises(ValueError, match=r"shape|uint8"):
        metrics.psnr(constant(0), other)


def test_ms_ssim_is_one_for_equal_images_falls_with_noise_and_is_none_when_undefined() -> None:
    """Sweeps include images that are too small for MS-SSIM."""
    rng = np.random.default_rng(1)
    small = rng.integers(0, 256, (161, 170, 3), dtype=np.uint8)
    noisy = np.clip(small.astype(int) + rng.normal(0, 20, small.shape), 0, 255).astype(np.uint8)
    same, worse = metrics.ms_ssim(small, small), metrics.ms_ssim(small, noisy)
    assert same == pytest.approx(1, abs=1e-6)
    assert worse is not None
    assert 0.5 < worse < 0.9999
    assert metrics.ms_ssim(small[:160], noisy[:160]) is None
    with pytest.raises(ValueError, match="shape"):
        metrics.ms_ssim(small, small[:160])


def test_ms_ssim_of_tensors_is_one_value_per_image_and_has_a_gradient() -> None:
    """Refinement optimizes the measure that is reported."""
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (2, 161, 170, 3), dtype=np.uint8)
    noisy = np.clip(images + rng.normal(0, [[[[10]]], [[[40]]]], images.shape), 0, 255).astype(np.uint8)
    a, b = (torch.from_numpy(v).permute(0, 3, 1, 2).float() / 255 for v in (noisy, images))
    a.requires_grad_(True)
    similarity = metrics.ms_ssim_of_tensors(a, b)
    expected = [metrics.ms_ssim(x, y) for x, y in zip(noisy, images, strict=True)]
    assert similarity.tolist() == pytest.approx(expected, abs=1e-5)
    assert similarity[0] > similarity[1]
    similarity.sum().backward()
    assert a.grad is not None
    assert all(gradient.abs().max() > 0 for gradient in a.grad)


def test_rd_loss_is_the_encoders_objective() -> None:
    """Tables contain the loss that the encoder minimizes."""
    error = metrics.mse(constant(100), constant(102))  # 4 in units of 0..255
    assert metrics.rd_loss(0.5, error, 0.01) == pytest.approx(0.54)


def test_flip_is_zero_for_equal_images_and_rises_with_the_error() -> None:
    """Guards against a column of another measure than its name says."""
    pytest.importorskip("flip_evaluator", reason="needs flip-evaluator: pip install 'sgacodec[peers]'")
    image = np.random.default_rng(0).integers(40, 200, (64, 64, 3), dtype=np.uint8)
    assert metrics.flip(image, image) == 0
    near, far = metrics.flip(image, image + 4), metrics.flip(image, image + 40)
    assert 0 < near < far < 1
