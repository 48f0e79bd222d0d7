"""Refinement as a user has it: never worse, better by a margin, and measured on the decoded file."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sgacodec import api, bitstream, metrics
from sgacodec.annealing import Annealing
from sgacodec.api import Codec, Encoded, Settings
from sgacodec.metrics import psnr
from sgacodec.models.level import LevelModel
from sgacodec.picture import ImageError, Picture
from sgacodec.refine import loop, steps
from sgacodec.refine.loop import Progress, Trace, TracePoint
from sgacodec.refine.objective import Batch
from sgacodec.refine.problem import MS_SSIM_SCALE, Problem
from sgacodec.rounding import METHODS, THREE_CLASS_METHODS

LMBDA = 0.0075
NONE = Settings(method="none")
ROUNDINGS = [(m, 2) for m in METHODS] + [(m, 3) for m in THREE_CLASS_METHODS]


@pytest.fixture(scope="module")
def crop(photograph: np.ndarray) -> Picture:
    return Picture(np.ascontiguousarray(photograph[184:248, 200:328]))


@pytest.fixture(scope="module")
def large(photograph: np.ndarray) -> Picture:
    """Large enough for MS-SSIM, and no multiple of 64."""
    return Picture(np.ascontiguousarray(photograph[100:263, 150:320]))


def one(codec: Codec, picture: Picture, settings: Settings, **options: Any) -> Encoded:
    return codec.encode([picture], settings, **options)[0]


def at_level(settings: Settings) -> Settings:
    """The settings at the level of λ, not at that of a refined file."""
    return replace(settings, level_lambda=settings.level_lambda or settings.lmbda)


@pytest.fixture(scope="module")
def codec() -> Codec:
    """The built-in model for refined files; the automatic choice would compare it with unrefined files of another."""
    return Codec("lite-refined", device="cpu")


def gain(codec: Codec, picture: Picture, settings: Settings) -> float:
    """By which part refinement at the level of λ lowers the true loss."""
    report = one(codec, picture, at_level(settings)).report
    return 1 - report["rd_loss"] / report["rd_loss_unrefined"]


# -------------------------------------------------------------------------------------------------- the promises


@pytest.mark.parametrize(("method", "classes"), ROUNDINGS)
def test_annealing_lowers_the_true_loss(codec: Codec, large: Picture, method: str, classes: int) -> None:
    """Guards against a method that does nothing: with a gradient of zero the gain is zero.

    The learning rate suits all methods at so few steps; the last pass is left out.
    """
    assert gain(codec, large, Settings(method=method, classes=classes, steps=20, lr=0.007, rounds=0)) > 0.001


def test_without_a_gradient_nothing_is_gained(codec: Codec, crop: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a gain in the tests above that does not come from the gradient."""

    def zero(loss: Tensor, y: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return torch.zeros_like(y), None if z is None else torch.zeros_like(z)

    monkeypatch.setattr(steps, "_gradients", zero)
    refined = one(codec, crop, at_level(Settings(steps=3, rounds=0)))
    assert refined.report["rd_loss"] == refined.report["rd_loss_unrefined"]
    assert refined.data == one(codec, crop, NONE).data


@pytest.mark.parametrize(("method", "classes"), ROUNDINGS)
def test_no_method_makes_a_file_worse(codec: Codec, crop: Picture, method: str, classes: int) -> None:
    """Guards against a refined file that is worse than an unrefined one, and a report of other settings."""
    report = one(codec, crop, Settings(method=method, classes=classes, steps=3)).report
    assert report["rd_loss"] <= report["rd_loss_unrefined"]
    assert (report["method"], report["classes"], report["steps"]) == (method, classes, 3)


@pytest.mark.parametrize("schedule", ["exp", "sga", "cold"])
def test_every_schedule_lowers_the_true_loss(codec: Codec, crop: Picture, schedule: str) -> None:
    """Guards against a schedule of the papers that cannot be reproduced."""
    assert gain(codec, crop, Settings(schedule=schedule, steps=60, tau_max=0.5, lr=0.01, rounds=0)) > 0.01


def test_the_defaults_gain_several_percent(codec: Codec, crop: Picture) -> None:
    """Guards against defaults (schedule, learning rate, last pass) that waste the time of refinement."""
    assert gain(codec, crop, Settings(steps=40)) > 0.05


def test_a_useless_learning_rate_returns_the_unrefined_file(codec: Codec, crop: Picture) -> None:
    """Guards against a file that is worse than without refinement where the annealing diverges."""
    unrefined = one(codec, crop, NONE)
    refined = one(codec, crop, at_level(Settings(steps=5, lr=30.0, rounds=0)))
    assert refined.data == unrefined.data
    assert refined.report["rd_loss"] == refined.report["rd_loss_unrefined"] == unrefined.report["rd_loss"]
    assert gain(codec, crop, Settings(steps=5, lr=30.0, rounds=3)) > 0.02  # by the last pass


def test_the_default_steps_are_those_of_the_picture(
    codec: Codec, crop: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a default of the settings that the codec does not use, with and without a target."""
    monkeypatch.setattr("sgacodec.settings.CPU_PIXELS", crop.pixels.shape[0] * crop.pixels.shape[1] // 25)
    monkeypatch.setattr("sgacodec.settings._CPU_LEAST", 1)
    for settings in (Settings(), Settings(target_bpp=0.5)):
        assert 1 <= one(codec, crop, settings).report["steps"] <= 4


def test_a_refined_file_has_the_level_of_a_lower_lambda(codec: Codec, crop: Picture) -> None:
    """Guards against a loss that is higher than with the level of λ in the mean, and a choice where λ is published."""
    level = one(codec, crop, NONE).report["level"]
    settings = Settings(steps=3)
    assert one(codec, crop, settings).report["level"] == level - 5
    for same in ({"schedule": "exp"}, {"steps": 0}, {"level_lambda": settings.lmbda}):
        assert one(codec, crop, replace(settings, **same)).report["level"] == level  # type: ignore[arg-type]


def test_the_loss_never_rises_above_that_of_the_level_of_lambda(
    codec: Codec, crop: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a promise that is kept for the unrefined latents of another level only."""
    monkeypatch.setattr("sgacodec.settings._REFINED_LEVEL", 5.0)
    unrefined, refined = one(codec, crop, NONE), one(codec, crop, Settings(steps=2, rounds=0, lr=1e-4))
    assert refined.data == unrefined.data
    for name in ("level", "rd_loss", "psnr"):
        assert refined.report[name] == unrefined.report[name]
    assert refined.report["rd_loss_unrefined"] == unrefined.report["rd_loss"]


@pytest.mark.parametrize("settings", [NONE, Settings(steps=10)])
def test_the_reported_loss_is_that_of_the_decoded_file(codec: Codec, large: Picture, settings: Settings) -> None:
    """Guards against a report that is an estimate and not a measurement."""
    encoded = one(codec, large, settings)
    decoded = codec.decode(encoded.data).picture.pixels
    error = decoded.astype(np.float64) - large.pixels.astype(np.float64)
    file = bitstream.read(encoded.data)
    bpp = 8 * (len(file.z) + len(file.y)) / (error.shape[0] * error.shape[1])
    loss = settings.lmbda * np.square(error).mean() + bpp
    assert encoded.report["rd_loss"] == pytest.approx(loss, rel=0.005)  # the coder's overhead over the code length
    assert encoded.report["psnr"] == pytest.approx(psnr(decoded, large.pixels), abs=1e-3)
    assert encoded.report["bytes"] == len(encoded.data)


def test_the_seed_alone_decides_the_bytes(codec: Codec, crop: Picture) -> None:
    """Guards against results that cannot be reproduced, and against a seed that is ignored."""
    first, again, other = (one(codec, crop, Settings(steps=8, seed=s)).data for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_no_steps_are_method_none(codec: Codec, crop: Picture) -> None:
    """Guards against a difference between `--effort 0` and `--method none`."""
    assert one(codec, crop, Settings(steps=0)).data == one(codec, crop, NONE).data


def test_grey_and_coloured_pictures_of_one_shape_can_be_given_together(codec: Codec, crop: Picture) -> None:
    """Guards against a batch that mixes pictures of one and three channels."""
    grey = Picture(np.repeat(crop.pixels[..., 1:2], 3, axis=2), grey=True)
    settings = Settings(steps=3)
    together = codec.encode([crop, grey, crop], settings)
    assert [bitstream.read(e.data).grey for e in together] == [False, True, False]
    assert together[1].data == one(codec, grey, settings).data


def test_batches_are_of_bounded_size(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a list of many pictures of one size that are all refined at once, in tens of gigabytes."""
    sizes: list[int] = []
    encode_batch = api.encode_batch
    monkeypatch.setattr(api, "encode_batch", lambda *args: sizes.append(len(args[1])) or encode_batch(*args))
    pictures = [Picture(np.full((64, 64, 3), level, np.uint8)) for level in range(19)]
    found = codec.encode(pictures, Settings(steps=1, rounds=0))
    assert sizes == [8, 8, 3]
    assert [encoded.report["psnr"] > 20 for encoded in found] == [True] * 19
    sizes.clear()
    codec.encode(pictures[:3], NONE)
    assert sizes == [1, 1, 1]


def test_a_batch_refines_its_pictures_as_if_alone(codec: Codec, photograph: np.ndarray) -> None:
    """Guards against pictures that influence each other; `danneal` has no noise."""
    pictures = [
        Picture(np.ascontiguousarray(photograph[top : top + 64, left : left + 128]))
        for top, left in ((184, 200), (0, 0))
    ]
    settings = Settings(method="danneal", steps=20)
    together = codec.encode(pictures, settings)
    for picture, in_batch in zip(pictures, together, strict=True):
        alone = one(codec, picture, settings).report
        assert alone["rd_loss"] < 0.995 * alone["rd_loss_unrefined"]
        assert in_batch.report["rd_loss"] == pytest.approx(alone["rd_loss"], rel=2e-3)
        assert in_batch.report["rd_loss_unrefined"] == pytest.approx(alone["rd_loss_unrefined"], rel=1e-3)


def test_pictures_of_one_padded_shape_keep_their_own_sizes(codec: Codec, photograph: np.ndarray) -> None:
    """Guards against a batch that gives all its pictures the size of the first."""
    pictures = [
        Picture(np.ascontiguousarray(photograph[100 : 100 + h, 200 : 200 + w])) for h, w in ((40, 128), (64, 65))
    ]
    for picture, encoded in zip(pictures, codec.encode(pictures, Settings(steps=6)), strict=True):
        assert codec.decode(encoded.data).picture.pixels.shape == picture.pixels.shape
        assert encoded.report["rd_loss"] <= encoded.report["rd_loss_unrefined"]


def test_an_interrupt_inside_progress_is_not_swallowed(codec: Codec, crop: Picture) -> None:
    """Guards against a refinement that Ctrl-C does not end."""

    def stop(progress: Progress) -> None:
        if progress.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one(codec, crop, Settings(steps=10), progress=stop)


def test_the_default_steps_are_those_of_the_device(
    codec: Codec, crop: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against an encoder that takes the steps of a GPU on a CPU."""
    monkeypatch.setattr("sgacodec.settings.CPU_STEPS", 3)
    assert one(codec, crop, Settings()).report["steps"] == 3


def test_progress_counts_to_the_end_and_reports_the_best(codec: Codec, crop: Picture) -> None:
    """Guards against a progress bar that stops early, and a last PSNR that is not that of the file."""
    reports: list[Progress] = []
    report = one(codec, crop, Settings(steps=10, rounds=3), progress=reports.append).report
    assert [p.step for p in reports] == list(range(14))
    assert {(p.steps, p.images) for p in reports} == {(13, 1)}
    assert reports[-1].psnr == pytest.approx(report["psnr"], abs=1e-6)


# ------------------------------------------------------------------------------------------------------ the steps


def test_a_trace_has_the_losses_of_the_steps_and_changes_nothing(codec: Codec, crop: Picture) -> None:
    """Guards against convergence plots of other latents than those of the run, and traces that change the file."""
    settings = at_level(Settings(steps=6, rounds=2, lr=0.02))
    points: list[TracePoint] = []
    traced = one(codec, crop, settings, trace=Trace(2, lambda image, point: points.append(point)))
    plain = one(codec, crop, settings)
    assert traced.data == plain.data
    assert [p.step for p in points] == [0, 2, 4, 6, 6]
    assert [p.relaxed_loss is None for p in points] == [True, False, False, False, True]
    assert plain.report["rd_loss"] < plain.report["rd_loss_unrefined"] < points[0].true_loss  # which has no dead zone
    assert points[-1].true_loss == plain.report["rd_loss"]
    assert points[-1].psnr == pytest.approx(plain.report["psnr"])
    for point in points:
        distortion = settings.lmbda * 255**2 * 10 ** (-point.psnr / 10)
        assert point.true_loss == pytest.approx(point.bpp + distortion)
        assert point.relaxed_loss is None or point.relaxed_loss == pytest.approx(point.true_loss, rel=0.2)
    assert len({p.true_loss for p in points}) == 5
    with pytest.raises(ValueError, match="a trace is of one picture"):
        codec.encode([crop, crop], settings, trace=Trace(2, lambda *_: None))


def test_z_is_rounded_after_its_steps_and_y_goes_on(lite_level: LevelModel, crop: Picture) -> None:
    """Guards against a z that keeps moving, or is left between the integers, after the steps that refine it."""
    level = steps.prepare(lite_level)
    problem = Problem.of(lite_level, crop, None, LMBDA, "mse")
    start = problem.start()
    y, z = (v.permute(0, 2, 3, 1).contiguous() for v in (start.y, start.z))
    step = steps.stepper(level, Batch.of(level, [problem]), y, z, Settings(), 10)
    history = []
    for _ in range(10):
        step()
        history.append((y.detach().clone(), z.detach().clone()))
    moved = [[not torch.equal(a[i], b[i]) for a, b in itertools.pairwise(history)] for i in (0, 1)]
    assert moved == [9 * [True], 4 * [True] + 5 * [False]]
    k = history[-1][1] - level.folded.density.median
    torch.testing.assert_close(k, k.round(), rtol=0, atol=1e-4)
    assert Annealing.published("ssl").steps_of_z(10) == 10


# ------------------------------------------------------------------------------------------------- the time limit


def test_a_time_limit_shortens_the_annealing(codec: Codec, crop: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a run that takes longer than its limit, or leaves most of it unused."""
    clock = itertools.count(0, 0.1)  # every reading of the clock takes a tenth of a second
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(clock))
    report = one(codec, crop, Settings(steps=500, time_limit=6.0)).report
    assert 20 < report["steps"] <= 60
    assert report["rd_loss"] <= report["rd_loss_unrefined"]


def test_a_time_limit_that_is_over_at_once_gives_the_unrefined_file(
    codec: Codec, crop: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against an error, or a long run, where the limit is shorter than a few steps."""
    clock = itertools.count(0, 10)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(clock))
    refined = one(codec, crop, at_level(Settings(steps=500, time_limit=1.0)))
    assert refined.report["steps"] == 0
    assert refined.data == one(codec, crop, NONE).data


def test_a_time_limit_is_for_each_picture(codec: Codec, crop: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against pictures of one size that share a limit."""
    clock = itertools.count(0, 0.1)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(clock))
    steps = [e.report["steps"] for e in codec.encode([crop] * 3, Settings(steps=500, time_limit=6.0))]
    assert min(steps) > 20


def test_a_generous_time_limit_changes_nothing(codec: Codec, crop: Picture) -> None:
    """Guards against timed steps that leave traces in the latents or in the noise."""
    limited, free = (one(codec, crop, Settings(steps=5, time_limit=t)) for t in (1e6, None))
    assert limited.data == free.data


# -------------------------------------------------------------------------------------------- distortion and levels


def test_colour_under_alpha_zero_costs_nothing(codec: Codec, lite_level: LevelModel, crop: Picture) -> None:
    """Guards against bits that are spent on invisible pixels."""
    alpha = np.full((64, 128), 255, np.uint8)
    alpha[:, :64] = 0
    noisy = crop.pixels.copy()
    noisy[:, :64] = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    problem = Problem.of(lite_level, Picture(noisy, alpha=alpha), None, LMBDA, "mse")
    assert not problem.weight[..., :64].any()
    assert float(problem.weight.sum()) == pytest.approx(64 * 64)
    plain, hidden = (one(codec, Picture(p, alpha=alpha), Settings(steps=3)) for p in (crop.pixels, noisy))
    assert hidden.data == plain.data
    assert hidden.report["rd_loss"] == plain.report["rd_loss"]


def test_a_weight_map_moves_quality_to_where_it_is_wanted(codec: Codec, crop: Picture) -> None:
    """Guards against a `--roi` that is ignored or inverted."""
    roi = np.full((64, 128), 0.2)
    roi[:, 80:] = 5.0
    decoded = [codec.decode(one(codec, crop, Settings(steps=25), rois=[r]).data).picture.pixels for r in (roi, None)]
    inside = [psnr(pixels[:, 96:], crop.pixels[:, 96:]) for pixels in decoded]
    outside = [psnr(pixels[:, :64], crop.pixels[:, :64]) for pixels in decoded]
    assert inside[0] > inside[1] + 0.1
    assert outside[0] < outside[1]


@pytest.mark.parametrize(
    ("roi", "message"),
    [
        (np.ones((128, 64)), "has 64x128 pixels, not 128x64"),
        (np.full((64, 128), -1.0), "at least 0"),
        (np.zeros((64, 128)), "one above 0"),
        (np.full((64, 128), np.nan), "finite"),
    ],
)
def test_a_wrong_weight_map_is_refused(codec: Codec, crop: Picture, roi: np.ndarray, message: str) -> None:
    """Guards against NaN latents, and a mask that is silently ignored."""
    with pytest.raises(ValueError, match=message):
        one(codec, crop, Settings(steps=1), rois=[roi])


def test_weight_maps_are_relative_and_one_for_each_picture(codec: Codec, crop: Picture) -> None:
    """Guards against tiny weights that count as 0, and against maps that are ignored."""
    settings = Settings(steps=1)
    assert one(codec, crop, settings, rois=[np.full((64, 128), 1e-38)]).data == one(codec, crop, settings).data
    for count in (0, 1, 3):
        with pytest.raises(ValueError, match=f"{count} weight maps for 2 pictures"):
            codec.encode([crop, crop], settings, rois=[None] * count)


def test_the_loss_is_that_of_ms_ssim_where_it_is_the_metric(codec: Codec, large: Picture) -> None:
    """Guards against `--metric ms-ssim` that minimizes the squared error."""

    def loss(encoded: Encoded) -> float:
        similarity = metrics.ms_ssim(codec.decode(encoded.data).picture.pixels, large.pixels)
        assert similarity is not None
        return Settings().lmbda * MS_SSIM_SCALE * (1 - similarity) + encoded.report["bpp"]

    unrefined, refined, other = (
        one(codec, large, settings)
        for settings in (replace(NONE, metric="ms-ssim"), Settings(steps=20, metric="ms-ssim"), Settings(steps=20))
    )
    assert refined.report["rd_loss"] < 0.99 * unrefined.report["rd_loss"]
    assert loss(refined) < min(loss(unrefined), loss(other))


def test_ms_ssim_of_a_small_picture_is_an_image_error(codec: Codec, crop: Picture) -> None:
    """Guards against a traceback from inside the metric."""
    with pytest.raises(ImageError, match="161 pixels"):
        one(codec, crop, Settings(steps=1, metric="ms-ssim"))


def test_level_and_lambda_are_apart_when_the_level_is_pinned(codec: Codec, crop: Picture) -> None:
    """Guards against `--level-lambda` that changes the loss, or `--lambda` that changes the level: semi-multi-rate."""
    rates = []
    level = one(codec, crop, NONE).report["level"]
    for lmbda in (0.004, 0.02):
        report = one(codec, crop, Settings(lmbda=lmbda, level_lambda=0.0075, steps=25)).report
        assert (report["level"], report["lambda"]) == (level, lmbda)
        rates.append((report["bpp"], report["psnr"]))
    assert rates[1][0] > 1.03 * rates[0][0]
    assert rates[1][1] > rates[0][1]


# ------------------------------------------------------------------------------------------------------------- CUDA


@pytest.fixture(scope="module")
def cuda_codec() -> Codec:
    return Codec("lite", device="cuda")


@pytest.mark.cuda
def test_the_graph_refines_as_the_eager_loop_does(
    cuda_codec: Codec, large: Picture, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards against a CUDA graph that computes something else, or is never captured. Needs a GPU."""
    settings = Settings(steps=150)
    graph = one(cuda_codec, large, settings).report
    assert "no CUDA graph" not in caplog.text
    assert graph["rd_loss"] < 0.985 * graph["rd_loss_unrefined"]
    monkeypatch.setattr(steps, "_captured", steps._eager)
    eager = one(cuda_codec, large, settings).report
    assert graph["rd_loss"] == pytest.approx(eager["rd_loss"], rel=0.005)


@pytest.mark.cuda
def test_a_graph_is_deterministic(cuda_codec: Codec, crop: Picture) -> None:
    """Guards against results on CUDA that cannot be reproduced. Needs a GPU."""
    first, again, other = (one(cuda_codec, crop, Settings(steps=30, seed=s)).data for s in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.cuda
def test_a_file_holds_the_same_integers_on_every_device(cuda_codec: Codec, codec: Codec, large: Picture) -> None:
    """Guards against files of a GPU that a CPU decodes to noise, and the reverse. Needs a GPU."""
    for encoder, settings in ((cuda_codec, Settings(steps=50)), (codec, Settings(steps=10))):
        data = one(encoder, large, settings).data
        assert cuda_codec.decode(data).report["integers"] == codec.decode(data).report["integers"]
