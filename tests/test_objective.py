"""The relaxed loss and its gradient against plain formulas, and against the true loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sgacodec.density import SCALE_BOUND, gaussian_bits
from sgacodec.models.level import LevelModel
from sgacodec.picture import Picture
from sgacodec.refine import steps
from sgacodec.refine.fused import Relaxation, coded_latents, weighted_squares
from sgacodec.refine.noise import sample_noise
from sgacodec.refine.objective import Batch, channel_curvature, relaxed_loss, relaxed_parameters
from sgacodec.refine.problem import Problem
from sgacodec.refine.relaxations import relax
from sgacodec.rounding import METHODS, THREE_CLASS_METHODS, Rounding, rounding

LMBDA = 0.0075
ROUNDINGS = [rounding(m) for m in METHODS] + [rounding(m, 3) for m in THREE_CLASS_METHODS]
DETERMINISTIC = rounding("danneal")
SIZES = {"mse": (70, 100), "ms-ssim": (163, 170)}


def name(case: object) -> str | None:
    return f"{case.method}{case.classes}" if isinstance(case, Rounding) else None


def problem_of(
    level: LevelModel, photograph: np.ndarray, metric: str = "mse", grey: bool = False
) -> tuple[Problem, Batch, Tensor, Tensor]:
    """A small problem, its batch and its unrefined latents, channels last."""
    height, width = SIZES[metric]
    pixels = np.ascontiguousarray(photograph[120 : 120 + height, 200 : 200 + width])
    if grey:
        pixels = np.repeat(pixels[..., 1:2], 3, axis=2)
    problem = Problem.of(level, Picture(pixels, grey=grey), None, LMBDA, metric)
    start = problem.start()
    y, z = (v.permute(0, 2, 3, 1).contiguous() for v in (start.y, start.z))
    return problem, Batch.of(level, [problem]), y, z


def loss_of(
    level: LevelModel,
    batch: Batch,
    y: Tensor,
    z: Tensor,
    tau: float,
    how: Rounding,
    noise: tuple[Tensor | None, Tensor | None] = (None, None),
    metric: str = "mse",
    bf16: bool = False,
) -> Tensor:
    """The relaxed loss of y and z, (B,); `noise` of y and of z."""
    given = relaxed_parameters(level, batch, z, tau, how, noise[1], bf16)
    return relaxed_loss(level, batch, y, given, tau, how, noise[0], LMBDA, metric, bf16)


# ------------------------------------------------------------------------------------------------ fused functions


def with_gradients(
    rate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], y: Tensor, parameters: Tensor
) -> tuple[Tensor, ...]:
    """ŷ and bits (2,) of `rate`, and the gradients of a weighted sum of them by y and parameters."""
    towards, weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)), torch.tensor([0.3, 0.01])
    y, parameters = y.clone().requires_grad_(), parameters.clone().requires_grad_()
    y_hat, bits = rate(y, parameters)
    loss = (y_hat * towards).sum() + (bits * weight).sum()
    return y_hat, bits, *torch.autograd.grad(loss, (y, parameters))


@pytest.mark.parametrize("log_scale", [True, False])
@pytest.mark.parametrize("how", ROUNDINGS, ids=name)
def test_the_fused_rate_is_that_of_autograd(how: Rounding, log_scale: bool) -> None:
    """Guards against a gradient of the rate, or of ŷ, that is not that of the loss."""
    generator = torch.Generator().manual_seed(3)
    shape = (2, 15, 9, 160)  # more than one block
    y = 3 * torch.randn(shape, generator=generator)
    parameters = torch.randn(*shape[:3], 320, generator=generator)
    parameters[..., :160].mul_(1.5).sub_(0 if log_scale else 0.3)  # some scales are below the bound
    noise = sample_noise(shape, how, generator=generator)
    active = torch.rand(1, 15, 9, 1, generator=generator) < 0.7

    def fused(y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return coded_latents(y, parameters, Relaxation(0.6, how, noise, active), log_scale)

    def plain(y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        scale, mu = parameters.chunk(2, 3)
        sigma = (torch.exp(scale) if log_scale else scale).clamp(min=SCALE_BOUND)
        v = y - mu
        v = torch.where(active, relax(v, 0.6, how, noise=noise), torch.round(v))
        return v + mu, gaussian_bits(v, sigma).sum(dim=(1, 2, 3))

    results = (with_gradients(function, y, parameters) for function in (fused, plain))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("log_scale", [True, False])
@pytest.mark.parametrize("how", [rounding("ssl"), rounding("danneal"), rounding("noise")], ids=name)
def test_the_fused_expected_rate_is_that_of_autograd(how: Rounding, log_scale: bool) -> None:
    """Guards against a gradient of the expected bits, or of the variance, that is not that of the loss."""
    generator = torch.Generator().manual_seed(4)
    shape = (2, 15, 9, 160)  # more than one block
    y = 3 * torch.randn(shape, generator=generator)
    parameters = torch.randn(*shape[:3], 320, generator=generator)
    parameters[..., :160].mul_(1.5).sub_(0 if log_scale else 0.3)
    noise = sample_noise(shape, how, generator=generator)
    curvature = 20 * torch.rand(160, generator=generator)

    def fused(y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return coded_latents(y, parameters, Relaxation(0.6, how, noise, None, curvature), log_scale)

    def plain(y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        scale, mu = parameters.chunk(2, 3)
        sigma = (torch.exp(scale) if log_scale else scale).clamp(min=SCALE_BOUND)
        v = relax(y - mu, 0.6, how, noise=noise)
        low = v.detach().floor()
        p = v - low
        bits = (1 - p) * gaussian_bits(low, sigma) + p * gaussian_bits(low + 1, sigma)
        return v + mu, (bits + 0.5 * curvature * p * (1 - p)).sum(dim=(1, 2, 3))

    results = (with_gradients(function, y, parameters) for function in (fused, plain))
    for ours, expected in zip(*results, strict=True):
        assert (ours - expected).norm() < 1e-3 * expected.norm()  # both derivatives exist where v̂ is an integer


def test_the_curvature_is_that_of_the_visible_pixels(lite_level: LevelModel, photograph: np.ndarray) -> None:
    """Guards against a variance of the rounding that counts less where a picture is padded, or refined in tiles."""
    picture = Picture(np.ascontiguousarray(photograph[:128, :256]))
    problem = Problem.of(lite_level, picture, None, LMBDA, "mse")
    batch, y = Batch.of(lite_level, [problem]), problem.start().y.permute(0, 2, 3, 1).contiguous()
    whole = channel_curvature(lite_level, batch, y, False)
    weight = batch.weight.clone()
    weight[..., weight.shape[3] // 2 :] = 0
    columns = slice(0, weight.shape[3] // 2)
    left = {k: getattr(batch, k)[..., columns].contiguous() for k in ("x", "weight")}
    window = slice(None), slice(0, y.shape[2] // 2)
    for part in (replace(batch, weight=weight), replace(batch, **left, window=window)):
        half = channel_curvature(lite_level, part, y, False)
        assert float(half.sum() / whole.sum()) == pytest.approx(1, abs=0.2)


def test_the_bits_of_y_have_the_same_gradient_where_the_parameters_are_constant() -> None:
    """Guards against another gradient of y after z has been rounded, when the entropy parameters need none."""
    generator = torch.Generator().manual_seed(4)
    y, parameters = (2 * torch.randn(2, 3, 3, c, generator=generator) for c in (6, 12))
    gradients = []
    for needed in (True, False):
        y_, parameters_ = y.clone().requires_grad_(), parameters.clone().requires_grad_(needed)
        y_hat, bits = coded_latents(y_, parameters_, Relaxation(0.5, DETERMINISTIC), log_scale=True)
        gradients.append(torch.autograd.grad(y_hat.square().sum() + bits.sum(), y_)[0])
    assert torch.equal(*gradients)


def test_the_fused_distortion_is_that_of_autograd() -> None:
    """Guards against a wrong gradient of the squared error, also for weights per image of either sign."""
    generator = torch.Generator().manual_seed(4)
    x_hat, x, weight = (torch.rand(2, 12, 5, 7, generator=generator) for _ in range(3))
    x_hat.requires_grad_()
    ours, plain = weighted_squares(x_hat, x, weight), ((x_hat - x).square() * weight).sum(dim=(1, 2, 3))
    torch.testing.assert_close(ours, plain)
    scale = torch.tensor([2.0, -1.0])
    for a, b in zip(*(torch.autograd.grad((v * scale).sum(), x_hat) for v in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b)


# --------------------------------------------------------------------------------------------------- relaxed loss


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("metric", ["mse", "ms-ssim"])
def test_a_cold_relaxed_loss_is_the_true_one(
    lite_level: LevelModel, photograph: np.ndarray, metric: str, grey: bool
) -> None:
    """Guards against a relaxed loss that estimates something else than the file.

    The float h_s agrees with the exact one, the densities with the tables, soft rounding with hard rounding.
    """
    problem, batch, y, z = problem_of(lite_level, photograph, metric, grey)
    true = problem.evaluate(y.permute(0, 3, 1, 2), z.permute(0, 3, 1, 2)).loss
    hard = loss_of(lite_level, batch, y, z, 1e-3, rounding("ste"), metric=metric)
    assert float(hard) == pytest.approx(true, rel=0.01 if metric == "mse" else 0.05)
    no_noise = torch.zeros_like(y), torch.zeros_like(z)
    soft = loss_of(lite_level, batch, y, z, 0.02, rounding("ssl"), no_noise, metric)
    assert float(soft) == pytest.approx(float(hard), rel=0.005)


@pytest.mark.parametrize("metric", ["mse", "ms-ssim"])
@pytest.mark.parametrize("how", ROUNDINGS, ids=name)
def test_the_gradient_is_finite_and_not_zero(
    lite_level: LevelModel, photograph: np.ndarray, how: Rounding, metric: str
) -> None:
    """Guards against NaN latents, and against a refinement that does not move."""
    _, batch, y, z = problem_of(lite_level, photograph, metric)
    y, z = y.mul(3).requires_grad_(), z.mul(3).requires_grad_()
    noise = sample_noise(y.shape, how), sample_noise(z.shape, how)
    loss = loss_of(lite_level, batch, y, z, 0.05, how, noise, metric)
    gradients = torch.autograd.grad(loss.sum(), (y, z))
    assert torch.isfinite(loss).all()
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in gradients)


def test_the_gradient_is_the_slope_of_the_loss(lite_level: LevelModel, photograph: np.ndarray) -> None:
    """Guards against a gradient that is finite but wrong: it is compared with finite differences along itself."""
    _, batch, y, z = problem_of(lite_level, photograph)
    y, z = y.requires_grad_(), z.requires_grad_()
    gradients = torch.autograd.grad(loss_of(lite_level, batch, y, z, 0.7, DETERMINISTIC).sum(), (y, z))
    for i, gradient in enumerate(gradients):
        direction = gradient / gradient.norm()
        ends = []
        for sign in (1, -1):
            moved = [v.detach() + 0.03 * sign * direction if i == j else v.detach() for j, v in enumerate((y, z))]
            ends.append(float(loss_of(lite_level, batch, *moved, 0.7, DETERMINISTIC)))
        # not exactly: a σ below its bound has a gradient where descent would raise it
        assert (ends[0] - ends[1]) / 0.06 == pytest.approx(float(gradient.norm()), rel=0.1)


@pytest.mark.parametrize("metric", ["mse", "ms-ssim"])
def test_the_padding_has_no_influence(lite_level: LevelModel, photograph: np.ndarray, metric: str) -> None:
    """Guards against bits that are spent on pixels which the decoder cuts off."""
    problem, batch, y, z = problem_of(lite_level, photograph, metric)
    height, width = SIZES[metric]
    x = problem.x.clone()
    x[:, :, height:] = 0
    x[:, :, :, width:] = 1
    other = replace(batch, x=F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last))
    losses = [loss_of(lite_level, b, y, z, 0.5, DETERMINISTIC, metric=metric) for b in (batch, other)]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-6 if metric == "mse" else 0.1)


# ------------------------------------------------------------------------------------------------ prepared levels


def test_weights_kept_in_bfloat16_change_nothing(
    lite_level: LevelModel, photograph: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a conversion of the weights that rounds otherwise than autocast, or changes the level itself."""
    monkeypatch.setattr(steps, "reduced_precision", lambda device: True)
    _, batch, y, z = problem_of(lite_level, photograph)
    y.requires_grad_()
    losses = [
        loss_of(level, batch, y, z, 0.5, DETERMINISTIC, bf16=True) for level in (lite_level, steps.prepare(lite_level))
    ]
    assert torch.equal(*losses)
    assert torch.equal(*(torch.autograd.grad(loss.sum(), y)[0] for loss in losses))
    assert lite_level.folded.networks.g_s.blocks.weight.dtype == torch.float32  # type: ignore[union-attr]


def test_the_layers_of_refinement_give_the_same_loss(
    lite_level: LevelModel, photograph: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against faster layers, with a closed-form backward, that compute another loss or gradient."""
    monkeypatch.setattr(steps, "reduced_precision", lambda device: False)
    _, batch, y, z = problem_of(lite_level, photograph)
    y.requires_grad_()
    z.requires_grad_()
    levels = steps.prepare(lite_level), lite_level
    ours, plain = (loss_of(level, batch, y, z, 0.5, DETERMINISTIC) for level in levels)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0)
    for a, b in zip(*(torch.autograd.grad(loss.sum(), (y, z)) for loss in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
