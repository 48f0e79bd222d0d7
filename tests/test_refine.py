"""Refinement on a real photograph: never worse, better by a margin, and measured as the decoder will show it."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import tiny_model
import torch
import torch.nn.functional as F
from torch import Tensor

from sgacodec import bitstream, latents, metrics
from sgacodec.annealing import Annealing
from sgacodec.api import Codec, Encoded, Settings
from sgacodec.density import SCALE_BOUND, gaussian_bits, lower_bound
from sgacodec.metrics import psnr
from sgacodec.models.level import LevelModel
from sgacodec.networks.architecture import FAMILIES, Architecture
from sgacodec.picture import ImageError, Picture
from sgacodec.refine import loop, steps, tiles
from sgacodec.refine.fused import coded_latents, weighted_squares
from sgacodec.refine.loop import Progress, refine
from sgacodec.refine.noise import sample_noise
from sgacodec.refine.objective import Batch, relaxed_loss, relaxed_parameters
from sgacodec.refine.problem import Candidate, Problem
from sgacodec.refine.relaxations import relax
from sgacodec.rounding import Rounding, rounding

LMBDA = 0.0075
EVERY_ROUNDING = [(m, 2) for m in ("ste", "noise", "danneal", "atanh", "linear", "cosine", "ssl")]
EVERY_ROUNDING += [(m, 3) for m in ("linear", "cosine", "ssl")]


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec("lite", device="cpu")


@pytest.fixture(scope="module")
def crop(photograph: np.ndarray) -> Picture:
    return Picture(np.ascontiguousarray(photograph[120:248, 200:328]))


@pytest.fixture(scope="module")
def wide(photograph: np.ndarray) -> Picture:
    return Picture(np.ascontiguousarray(photograph[100:292, 150:406]))


def one(codec: Codec, picture: Picture, settings: Settings, **options: object) -> Encoded:
    return codec.encode([picture], settings, **options)[0]  # type: ignore[arg-type]


def problem_of(
    level: LevelModel, picture: Picture, metric: str = "mse", lmbda: float = LMBDA
) -> tuple[Problem, Batch, Tensor, Tensor]:
    """The problem of a picture, its batch and its unrefined latents, channels last."""
    problem = Problem.of(level, picture, None, lmbda, metric)
    start = problem.start()
    y, z = (v.permute(0, 2, 3, 1).contiguous() for v in (start.y, start.z))
    return problem, Batch.of(level, [problem]), y, z


def loss_of(
    level: LevelModel,
    batch: Batch,
    y: Tensor,
    z: Tensor,
    tau: float,
    rounding: Rounding,
    noise: tuple[Tensor | None, Tensor | None],
    metric: str = "mse",
    bf16: bool = False,
) -> Tensor:
    """The relaxed loss of y and z, (B,)."""
    given = relaxed_parameters(level, batch, z, tau, rounding, noise[1], bf16)
    return relaxed_loss(level, batch, y, given, tau, rounding, noise[0], LMBDA, metric, bf16)


def no_noise(settings: str, y: Tensor, z: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Zeros where a method wants noise."""
    method = rounding(settings)
    drawn = [sample_noise(v.shape, method) for v in (y, z)]
    return tuple(None if n is None else torch.zeros_like(n) for n in drawn)  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------ the promises


@pytest.mark.parametrize(("method", "classes"), EVERY_ROUNDING)
def test_no_method_makes_a_file_worse(codec: Codec, crop: Picture, method: str, classes: int) -> None:
    report = one(codec, crop, Settings(method=method, classes=classes, steps=8)).report
    assert report["rd_loss"] <= report["rd_loss_unrefined"]
    assert (report["method"], report["classes"], report["steps"]) == (method, classes, 8)


@pytest.mark.parametrize("schedule", ["exp", "sga", "cold"])
def test_every_schedule_runs(codec: Codec, crop: Picture, schedule: str) -> None:
    report = one(codec, crop, Settings(schedule=schedule, steps=6)).report
    assert report["rd_loss"] <= report["rd_loss_unrefined"]


@pytest.mark.parametrize("classes", [2, 3])
def test_ssl_lowers_the_loss_by_a_real_margin(codec: Codec, wide: Picture, classes: int) -> None:
    report = one(codec, wide, Settings(steps=60, classes=classes)).report
    assert report["rd_loss"] < 0.985 * report["rd_loss_unrefined"]


def test_even_a_hopeless_learning_rate_returns_the_unrefined_file(codec: Codec, crop: Picture) -> None:
    plain = one(codec, crop, Settings(method="none"))
    refined = one(codec, crop, Settings(steps=5, lr=30.0, rounds=0))
    assert refined.data == plain.data
    assert refined.report["rd_loss"] == refined.report["rd_loss_unrefined"] == plain.report["rd_loss"]
    polished = one(codec, crop, Settings(steps=5, lr=30.0)).report
    assert polished["rd_loss"] < plain.report["rd_loss"]


@pytest.mark.parametrize("settings", [Settings(method="none"), Settings(steps=10)])
def test_the_reported_loss_is_that_of_the_decoded_file(codec: Codec, wide: Picture, settings: Settings) -> None:
    cropped = Picture(wide.pixels[:150, :201])
    encoded = one(codec, cropped, settings)
    shown = codec.decode(encoded.data).picture.pixels
    error = shown.astype(np.float64) - cropped.pixels.astype(np.float64)
    file = bitstream.read(encoded.data)
    spent = 8 * (len(file.z) + len(file.y)) / (150 * 201)
    loss = settings.lmbda * np.square(error).mean() + spent
    assert encoded.report["rd_loss"] == pytest.approx(loss, rel=0.005)  # the coder's overhead over the estimate
    assert encoded.report["psnr"] == pytest.approx(psnr(shown, cropped.pixels), abs=1e-3)
    assert encoded.report["bytes"] == len(encoded.data)


def test_the_seed_alone_decides_the_bytes(codec: Codec, crop: Picture) -> None:
    first, again, other = (one(codec, crop, Settings(steps=15, seed=s)).data for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_no_steps_are_method_none(codec: Codec, crop: Picture) -> None:
    assert one(codec, crop, Settings(steps=0)).data == one(codec, crop, Settings(method="none")).data


def test_grey_and_coloured_pictures_of_one_shape_can_be_given_together(codec: Codec, crop: Picture) -> None:
    grey = Picture(np.repeat(crop.pixels[..., 1:2], 3, axis=2), grey=True)
    settings = Settings(steps=3)
    together = codec.encode([crop, grey, crop], settings)
    assert [bitstream.read(e.data).grey for e in together] == [False, True, False]
    assert together[1].data == one(codec, grey, settings).data


def test_a_batch_refines_its_pictures_as_if_alone(codec: Codec, photograph: np.ndarray) -> None:
    pictures = [
        Picture(np.ascontiguousarray(photograph[top : top + 128, left : left + 128]))
        for top, left in ((100, 200), (0, 0))
    ]
    settings = Settings(steps=30)
    together = codec.encode(pictures, settings)
    for picture, in_batch in zip(pictures, together, strict=True):
        alone = one(codec, picture, settings).report
        assert in_batch.report["rd_loss"] == pytest.approx(alone["rd_loss"], rel=0.02)  # as far as seeds are apart
        assert in_batch.report["rd_loss_unrefined"] == pytest.approx(alone["rd_loss_unrefined"], rel=1e-3)


def test_pictures_of_one_padded_shape_keep_their_own_sizes(codec: Codec, photograph: np.ndarray) -> None:
    pictures = [
        Picture(np.ascontiguousarray(photograph[100 : 100 + h, 200 : 200 + w])) for h, w in ((70, 100), (128, 65))
    ]
    for picture, encoded in zip(pictures, codec.encode(pictures, Settings(steps=6)), strict=True):
        assert codec.decode(encoded.data).picture.pixels.shape == picture.pixels.shape
        assert encoded.report["rd_loss"] <= encoded.report["rd_loss_unrefined"]


def test_an_interrupt_inside_progress_is_not_swallowed(codec: Codec, crop: Picture) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one(codec, crop, Settings(steps=10), progress=stop)


def test_progress_counts_to_the_end_and_tells_of_the_best(codec: Codec, crop: Picture) -> None:
    told: list[Progress] = []
    report = one(codec, crop, Settings(steps=10), progress=told.append).report
    assert [p.step for p in told] == list(range(11))
    assert {p.steps for p in told} == {10}
    assert told[-1].psnr == pytest.approx(report["psnr"], abs=1e-6)


# --------------------------------------------------------------------------------------------------- the budget


def test_a_time_limit_shortens_the_annealing(codec: Codec, crop: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0, 0.1)  # every look at the clock takes a tenth of a second
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(clock))
    report = one(codec, crop, Settings(steps=500, time_limit=6.0)).report
    assert 20 < report["steps"] <= 60
    assert report["rd_loss"] <= report["rd_loss_unrefined"]


def test_a_time_limit_that_is_over_at_once_gives_the_unrefined_file(
    codec: Codec, crop: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(0, 10)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(clock))
    refined = one(codec, crop, Settings(steps=500, time_limit=1.0))
    assert refined.report["steps"] == 0
    assert refined.data == one(codec, crop, Settings(method="none")).data


def test_a_generous_time_limit_changes_nothing(codec: Codec, crop: Picture) -> None:
    limited, free = (one(codec, crop, Settings(steps=5, time_limit=t)) for t in (1e6, None))
    assert limited.data == free.data


# -------------------------------------------------------------------------------------------------- the objective


@pytest.mark.parametrize("exponential", [True, False])
@pytest.mark.parametrize(("method", "classes"), EVERY_ROUNDING)
def test_the_fused_rate_is_the_plain_one(method: str, classes: int, exponential: bool) -> None:
    """Otherwise refinement would follow a gradient that is not that of the loss."""
    generator = torch.Generator().manual_seed(3)
    shape = (2, 15, 9, 160)  # more than one block
    y = 3 * torch.randn(shape, generator=generator)
    parameters = torch.randn(*shape[:3], 320, generator=generator)
    parameters[..., :160].mul_(1.5).sub_(0 if exponential else 0.3)  # some scales are below the bound
    method_ = rounding(method, classes)
    noise = sample_noise(shape, method_, generator=generator)
    active = torch.rand(1, 15, 9, 1, generator=generator) < 0.7
    towards, weight = torch.randn(shape, generator=generator), torch.tensor([0.3, 0.01])

    results = []
    for fused in (True, False):
        y_, p_ = y.clone().requires_grad_(), parameters.clone().requires_grad_()
        if fused:
            y_hat, spent = coded_latents(y_, p_, 0.6, method_, noise, active, exponential)
        else:
            scale, mu = p_.chunk(2, 3)
            sigma = lower_bound(torch.exp(scale) if exponential else scale, SCALE_BOUND)
            v = y_ - mu
            v = torch.where(active, relax(v, 0.6, method_, noise=noise), torch.round(v))
            y_hat, spent = v + mu, gaussian_bits(v, sigma).sum(dim=(1, 2, 3))
        loss = (y_hat * towards).sum() + (spent * weight).sum()
        results.append((y_hat, spent, *torch.autograd.grad(loss, (y_, p_))))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-5, atol=2e-5)


def test_the_bits_of_y_have_the_same_gradient_where_the_parameters_are_fixed() -> None:
    generator = torch.Generator().manual_seed(4)
    y, parameters = (2 * torch.randn(2, 3, 3, c, generator=generator) for c in (6, 12))
    found = []
    for moving in (True, False):
        y_, p_ = y.clone().requires_grad_(), parameters.clone().requires_grad_(moving)
        y_hat, spent = coded_latents(y_, p_, 0.5, rounding("danneal"), None, None, log_scale=True)
        found.append(torch.autograd.grad(y_hat.square().sum() + spent.sum(), y_)[0])
    assert torch.equal(*found)


def test_z_settles_on_its_grid_and_y_goes_on(lite_level: LevelModel, crop: Picture) -> None:
    level = steps.prepare(lite_level)
    problem, _, y, z = problem_of(lite_level, crop)
    batch = Batch.of(level, [problem])
    step = steps.stepper(level, batch, y, z, Settings(), 10)
    seen = []
    for _ in range(10):
        step()
        seen.append((y.detach().clone(), z.detach().clone()))
    moved = [[not torch.equal(a[i], b[i]) for a, b in itertools.pairwise(seen)] for i in (0, 1)]
    assert moved == [9 * [True], 6 * [True] + 3 * [False]]
    k = seen[-1][1] - level.folded.density.median
    torch.testing.assert_close(k, k.round(), rtol=0, atol=1e-4)
    assert Annealing.published("ssl").steps_of_z(10) == 10


def test_the_fused_distortion_is_the_plain_one() -> None:
    generator = torch.Generator().manual_seed(4)
    x_hat, x, weight = (torch.rand(2, 12, 5, 7, generator=generator) for _ in range(3))
    x_hat.requires_grad_()
    ours, plain = weighted_squares(x_hat, x, weight), ((x_hat - x).square() * weight).sum(dim=(1, 2, 3))
    torch.testing.assert_close(ours, plain)
    scale = torch.tensor([2.0, -1.0])
    for a, b in zip(*(torch.autograd.grad((v * scale).sum(), x_hat) for v in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b)


def test_weights_kept_in_bfloat16_change_nothing(
    lite_level: LevelModel, crop: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "reduced_precision", lambda device: True)
    _, batch, y, z = problem_of(lite_level, crop)
    y.requires_grad_()
    losses = [
        loss_of(level, batch, y, z, 0.5, rounding("danneal"), (None, None), bf16=True)
        for level in (lite_level, steps.prepare(lite_level))
    ]
    assert torch.equal(*losses)
    assert torch.equal(*(torch.autograd.grad(loss.sum(), y)[0] for loss in losses))
    assert lite_level.folded.networks.g_s.blocks.weight.dtype == torch.float32  # type: ignore[union-attr]


def test_the_layers_of_refinement_give_the_same_loss(
    lite_level: LevelModel, crop: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "reduced_precision", lambda device: False)
    _, batch, y, z = problem_of(lite_level, crop)
    y.requires_grad_()
    z.requires_grad_()
    fast = steps.prepare(lite_level)
    plain, ours = (loss_of(level, batch, y, z, 0.5, rounding("danneal"), (None, None)) for level in (lite_level, fast))
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0)
    for a, b in zip(*(torch.autograd.grad(loss.sum(), (y, z)) for loss in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("metric", ["mse", "ms-ssim"])
def test_a_cold_relaxed_loss_is_the_true_one(lite_level: LevelModel, wide: Picture, metric: str, grey: bool) -> None:
    """The float h_s agrees with the exact one, the densities with the tables, soft rounding with hard rounding."""
    pixels = wide.pixels[:170, :250]
    picture = Picture(np.repeat(pixels[..., 1:2], 3, axis=2), grey=True) if grey else Picture(pixels)
    problem, batch, y, z = problem_of(lite_level, picture, metric)
    true = problem.evaluate(y.permute(0, 3, 1, 2), z.permute(0, 3, 1, 2)).loss
    loss = loss_of(lite_level, batch, y, z, 1e-3, rounding("ste"), (None, None), metric)
    assert float(loss) == pytest.approx(true, rel=0.01 if metric == "mse" else 0.05)
    soft = loss_of(lite_level, batch, y, z, 0.02, rounding("ssl"), no_noise("ssl", y, z), metric)
    assert float(soft) == pytest.approx(float(loss), rel=0.005)


@pytest.mark.parametrize("metric", ["mse", "ms-ssim"])
@pytest.mark.parametrize(("method", "classes"), EVERY_ROUNDING)
def test_the_gradient_is_finite(lite_level: LevelModel, wide: Picture, method: str, classes: int, metric: str) -> None:
    _, batch, y, z = problem_of(lite_level, wide)
    y, z = y.mul(3).requires_grad_(), z.mul(3).requires_grad_()
    how = rounding(method, classes)
    noise = sample_noise(y.shape, how), sample_noise(z.shape, how)
    loss = loss_of(lite_level, batch, y, z, 0.05, how, noise, metric)
    gradients = torch.autograd.grad(loss.sum(), (y, z))
    assert torch.isfinite(loss).all()
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("metric", ["mse", "ms-ssim"])
def test_what_lies_in_the_padding_does_not_matter(lite_level: LevelModel, wide: Picture, metric: str) -> None:
    size = (70, 50) if metric == "mse" else (170, 165)
    problem, batch, y, z = problem_of(lite_level, Picture(wide.pixels[: size[0], : size[1]]), metric)
    x = problem.x.clone()
    x[:, :, size[0] :] = 0
    x[:, :, :, size[1] :] = 1
    other = replace(batch, x=F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last))
    losses = [loss_of(lite_level, b, y, z, 0.5, rounding("danneal"), (None, None), metric) for b in (batch, other)]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-6 if metric == "mse" else 0.1)


def test_colour_under_alpha_zero_costs_nothing(codec: Codec, lite_level: LevelModel, crop: Picture) -> None:
    alpha = np.full((128, 128), 255, np.uint8)
    alpha[:, :64] = 0
    noisy = crop.pixels.copy()
    noisy[:, :64] = np.random.default_rng(0).integers(0, 256, (128, 64, 3))
    problem, _, _, _ = problem_of(lite_level, Picture(noisy, alpha=alpha))
    assert not problem.weight[..., :64].any()
    assert float(problem.weight.sum()) == pytest.approx(128 * 64)
    plain, hidden = (one(codec, Picture(p, alpha=alpha), Settings(steps=3)) for p in (crop.pixels, noisy))
    assert hidden.data == plain.data
    assert hidden.report["rd_loss"] == plain.report["rd_loss"]


def test_a_weight_map_moves_quality_to_where_it_is_wanted(codec: Codec, crop: Picture) -> None:
    roi = np.full((128, 128), 0.2)
    roi[32:96, 32:96] = 5.0
    shown = [codec.decode(one(codec, crop, Settings(steps=50), rois=[r]).data).picture.pixels for r in (roi, None)]
    inside = [psnr(s[32:96, 32:96], crop.pixels[32:96, 32:96]) for s in shown]
    outside = [psnr(s[:, :16], crop.pixels[:, :16]) for s in shown]
    assert inside[0] > inside[1] + 0.1
    assert outside[0] < outside[1]


@pytest.mark.parametrize(
    ("roi", "says"),
    [
        (np.ones((64, 128)), "has 128x64 pixels, not 128x128"),
        (np.full((128, 128), -1.0), "at least 0"),
        (np.zeros((128, 128)), "one above 0"),
        (np.full((128, 128), np.nan), "finite"),
    ],
)
def test_a_wrong_weight_map_is_refused(codec: Codec, crop: Picture, roi: np.ndarray, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        one(codec, crop, Settings(steps=1), rois=[roi])


def test_ms_ssim_is_raised_where_it_is_the_metric(codec: Codec, wide: Picture) -> None:
    def similarity(encoded: Encoded) -> float:
        value = metrics.ms_ssim(codec.decode(encoded.data).picture.pixels, wide.pixels)
        assert value is not None
        return value

    settings = Settings(steps=40, metric="ms-ssim")
    plain, refined = one(codec, wide, Settings(method="none", metric="ms-ssim")), one(codec, wide, settings)
    assert refined.report["rd_loss"] < 0.99 * plain.report["rd_loss"]
    gain = similarity(refined) - similarity(plain)
    assert gain > 0 or len(refined.data) < 0.95 * len(plain.data)


def test_ms_ssim_of_a_small_picture_is_an_image_error(codec: Codec, crop: Picture) -> None:
    with pytest.raises(ImageError, match="161 pixels"):
        one(codec, crop, Settings(steps=1, metric="ms-ssim"))


def test_level_and_lambda_are_apart_when_the_level_is_pinned(codec: Codec, crop: Picture) -> None:
    rates = []
    for lmbda in (0.004, 0.02):
        report = one(codec, crop, Settings(lmbda=lmbda, level_lambda=0.0075, steps=40)).report
        assert report["level"] == one(codec, crop, Settings(method="none")).report["level"]
        assert report["lambda"] == lmbda
        rates.append((report["bpp"], report["psnr"]))
    assert rates[1][0] > 1.03 * rates[0][0]
    assert rates[1][1] > rates[0][1]


# ------------------------------------------------------------------------------------------------------------ tiles


@pytest.mark.parametrize(
    ("size", "count", "apart"),
    [
        ((256, 256), 30, 0.2),  # decibels; over so short a border the noise alone is worth 0.1
        pytest.param((400, 600), 60, 0.05, marks=pytest.mark.slow),
    ],
)
def test_tiles_gain_what_the_whole_picture_gains_and_leave_no_seams(
    lite_level: LevelModel,
    photograph: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int],
    count: int,
    apart: float,
) -> None:
    picture = Picture(np.ascontiguousarray(photograph[-size[0] :, -size[1] :]))
    settings = Settings(steps=count)
    problem = Problem.of(lite_level, picture, None, LMBDA, "mse")
    start = problem.start()
    (whole,), _ = refine(lite_level, [problem], [start], settings)
    monkeypatch.setattr(tiles, "TILE", 128)
    assert tiles.needs_tiles(*problem.shape)
    told: list[Progress] = []
    tiled, done = tiles.refine_tiles(lite_level, problem, start, settings, told.append)
    assert done == count
    regions = list(tiles.regions(*problem.shape, lite_level.folded.architecture.reach))
    assert told[-1].step == told[-1].steps == (count + settings.rounds_after(count)) * len(regions)
    assert told[-1].bpp == pytest.approx(tiled.bits / problem.pixels, rel=1e-3)
    assert told[-1].psnr == pytest.approx(-10 * math.log10(tiled.mse), abs=0.01)
    assert tiled.loss < 0.98 * start.loss
    assert tiled.loss == pytest.approx(whole.loss, rel=0.015)

    border = np.zeros(problem.shape, bool)
    for region in regions:
        top, left = region.inner[:2]
        border[max(0, top - 8) : top + 8 if top else 0, left : region.inner[3]] = True
        border[top : region.inner[2], max(0, left - 8) : left + 8 if left else 0] = True
    border = border[: size[0], : size[1]]
    # The gain in PSNR over the same picture without tiles, so that content cancels out.
    with_tiles, without = squares(lite_level, tiled, picture), squares(lite_level, whole, picture)
    gains = [10 * math.log10(without[mask].mean() / with_tiles[mask].mean()) for mask in (border, ~border)]
    assert abs(gains[0] - gains[1]) < apart


def test_a_wider_decoder_is_tiled_as_well(photograph: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents of mshyper reach farther, through GDN; its weights here are random, so there is little to gain."""
    gained = tiny_model.untrained(Architecture("mshyper", N=8, M=12, scale="linear"), photograph)
    level = tiny_model.exported(gained, photograph, levels=1).at(0)
    problem = Problem.of(level, Picture(np.ascontiguousarray(photograph[:200, :300])), None, LMBDA, "mse")
    start = problem.start()
    before = start.loss
    monkeypatch.setattr(tiles, "TILE", 128)
    told: list[Progress] = []
    tiled, _ = tiles.refine_tiles(level, problem, start, Settings(steps=30), told.append)
    assert tiled.loss < before
    assert told[-1].bpp == pytest.approx(tiled.bits / problem.pixels, rel=1e-3)
    assert told[-1].psnr == pytest.approx(-10 * math.log10(tiled.mse), abs=0.01)


def squares(level: LevelModel, candidate: Candidate, picture: Picture) -> np.ndarray:
    """Squared error of each pixel."""
    height, width = picture.pixels.shape[:2]
    found = latents.quantize(level, candidate.y, candidate.z)
    shown = latents.render(level, found, height, width)
    return np.square(shown.astype(float) - picture.pixels).mean(axis=2)


@pytest.mark.parametrize("tile", [64, 128, 1024])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (1088, 2112), (192, 3200)])
def test_tiles_cover_a_picture_once(height: int, width: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", tile)
    covered = np.zeros((height // 64, width // 64), int)
    for region in tiles.regions(height, width, FAMILIES["lite"].reach):
        top, left, bottom, right = (v // 64 for v in region.inner)
        assert all(v % 64 == 0 for v in (*region.inner, *region.wide))
        assert max(bottom - top, right - left) * 64 <= tile
        covered[top:bottom, left:right] += 1
        for box, halo in ((region.outer, 32), (region.wide, 128)):
            assert box[0] == max(0, top * 64 - halo)
            assert box[3] == min(width, right * 64 + halo)
    assert (covered == 1).all()


def test_no_tile_is_too_small_for_ms_ssim() -> None:
    """A picture of 1025 pixels once ended in a tile that MS-SSIM could not measure."""
    for width in range(2048 + 64, 5000, 64):
        for region in tiles.regions(1088, width, FAMILIES["lite"].reach):
            top, left, bottom, right = region.outer
            assert min(bottom - top, right - left) - 63 >= metrics.MS_SSIM_MIN_SIDE


def test_tiles_keep_a_time_limit(
    lite_level: LevelModel, photograph: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem.of(lite_level, Picture(photograph[:128, :256]), None, LMBDA, "mse")
    monkeypatch.setattr(tiles, "TILE", 128)
    clock = itertools.count(0, 0.1)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(clock))
    _, done = tiles.refine_tiles(lite_level, problem, problem.start(), Settings(steps=500, time_limit=12.0))
    assert 20 < done <= 60


# ------------------------------------------------------------------------------------------------------------- CUDA


@pytest.fixture(scope="module")
def cuda_codec() -> Codec:
    return Codec("lite", device="cuda")


@pytest.mark.cuda
def test_the_graph_refines_as_the_eager_loop_does(
    cuda_codec: Codec, wide: Picture, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(steps=150)
    graph = one(cuda_codec, wide, settings).report
    assert "no CUDA graph" not in caplog.text
    assert graph["rd_loss"] < 0.985 * graph["rd_loss_unrefined"]
    monkeypatch.setattr(steps, "_captured", steps._eager)
    eager = one(cuda_codec, wide, settings).report
    assert graph["rd_loss"] == pytest.approx(eager["rd_loss"], rel=0.005)


@pytest.mark.cuda
def test_a_graph_is_deterministic(cuda_codec: Codec, crop: Picture) -> None:
    first, again, other = (one(cuda_codec, crop, Settings(steps=30, seed=s)).data for s in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.cuda
def test_a_file_holds_the_same_integers_on_every_device(cuda_codec: Codec, codec: Codec, wide: Picture) -> None:
    for encoder, settings in ((cuda_codec, Settings(steps=50)), (codec, Settings(steps=10))):
        data = one(encoder, wide, settings).data
        assert cuda_codec.decode(data).report["integers"] == codec.decode(data).report["integers"]
