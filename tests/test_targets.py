"""Refinement to a wanted rate or quality: the aim, λ steered by it, and whether the last pass lands on it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from sgacodec import bitstream, encoding
from sgacodec.api import Codec
from sgacodec.device import reduced_precision
from sgacodec.models.level import LevelModel
from sgacodec.picture import Picture
from sgacodec.rate_control import search
from sgacodec.refine import flips, steer, steer_tiles, tiles
from sgacodec.refine.aim import Aim, followed
from sgacodec.refine.loop import batched, refine
from sgacodec.refine.objective import Batch, frozen_context, rounded_figures
from sgacodec.refine.problem import Problem, with_lambda_of
from sgacodec.refine.steer import MissedLevelError, refine_to
from sgacodec.refine.steps import prepare
from sgacodec.settings import LAMBDA_RANGE, Settings
from sgacodec.targets import is_hit


@pytest.fixture(scope="module")
def picture(photograph: np.ndarray) -> Picture:
    return Picture(np.ascontiguousarray(photograph[120:248, 200:328]))


def test_an_aim_is_never_exceeded() -> None:
    """Guards against a file of more than the bytes that a user allows, and against one of far fewer."""
    rate, quality = Aim(bits=1000.0), Aim(mse=1e-3)
    met = [False, True, True, False]
    assert [rate.is_met(rate.excess(bits, 1.0)) for bits in (1000.1, 1000.0, 992.0, 990.0)] == met
    above = [quality.excess(1.0, 1e-3 * 10 ** (-decibels / 10)) for decibels in (-0.001, 0.001, 0.049, 0.051)]
    assert list(map(quality.is_met, above)) == met
    distances = [rate.distance(rate.excess(bits, 1.0)) for bits in (995, 985, 900, 1001, 1100)]
    assert distances == sorted(distances)
    assert distances[0] == 0


@pytest.mark.parametrize("wanted", [1000.99, 1169.7, 40000.5])
def test_what_meets_the_aim_is_a_hit_of_the_search(wanted: float) -> None:
    """Guards against a second refined encoding, for a size that the first one met before it was rounded down."""
    least = math.ceil(int(wanted) * math.exp(-Aim(bits=1.0).slack))
    assert is_hit(Settings(target_bpp=1.0), math.log(least / wanted))


def test_lambda_is_steered_against_the_excess() -> None:
    """Guards against a control of the wrong sign, for rate and for quality, or without limits."""
    for aim, sign in ((Aim(bits=1000.0), -1), (Aim(mse=1e-3), 1)):
        assert (aim.steered(0.01, 0.1, 1.0) - 0.01) * sign > 0
        assert (aim.steered(0.01, -0.1, 1.0) - 0.01) * sign < 0
        assert aim.steered(0.01, -aim.slack / 2, 5.0) == pytest.approx(0.01)
        assert LAMBDA_RANGE[0] <= aim.steered(0.01, 50.0, 50.0) <= LAMBDA_RANGE[1]


def test_a_quality_beyond_all_numbers(lite_level: LevelModel, picture: Picture) -> None:
    """Guards against a division by an MSE of 10^(−4000)."""
    settings = Settings(target_psnr=40000.0, steps=8)
    _, refinement = encoding.encode_to_target(lite_level, picture, None, settings, None, None)
    assert refinement.lmbda > settings.lmbda


@pytest.mark.parametrize("factor", [0.85, 1.15])
def test_one_annealing_meets_an_aim(lite_level: LevelModel, picture: Picture, factor: float) -> None:
    """Guards against a target that costs several refinements, or that the last pass alone must reach."""
    problem = Problem.of(lite_level, picture, None, 0.0075, "mse")
    start = problem.start()
    for aim in (Aim(bits=0.93 * factor * start.bits), Aim(mse=start.mse / factor)):
        found, steps, lmbda = refine_to(lite_level, problem, start, Settings(steps=20), aim)
        assert aim.is_met(aim.excess(found.bits, found.mse))
        assert steps == 20
        assert (lmbda > problem.lmbda) == (factor > 1)
        now = replace(problem, lmbda=lmbda)
        start_now = with_lambda_of(start, problem, now)
        (plain,), _ = refine(lite_level, [now], [start_now], Settings(lmbda=lmbda, steps=20))
        assert found.loss < 1.03 * plain.loss


def test_the_last_pass_ends_when_a_round_has_met_the_aim(
    lite_level: LevelModel, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against further rounds, of which the best is known, because the last one has gone beyond the aim."""
    problem = Problem.of(lite_level, picture, None, 0.0075, "mse")
    start = problem.start()
    aim = Aim(mse=start.mse * math.exp(-0.02))
    evaluations = []
    at = flips._Loss.at
    monkeypatch.setattr(flips._Loss, "at", lambda self, symbols: evaluations.append(1) or at(self, symbols))
    found = flips.polish(lite_level, problem, start, 14, aim=aim)
    assert aim.is_met(aim.excess(found.bits, found.mse))
    assert len(evaluations) == 1 + 14


def test_a_file_has_no_byte_more_than_its_target(photograph: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a size without the second byte of the length of z, or with one that an empty section has."""
    codec = Codec("lite", device="cpu")
    picture, settings = Picture(photograph), Settings(lmbda=0.03, level_lambda=0.03)
    (plain,) = codec.encode([picture], replace(settings, method="none"))
    assert len(bitstream.read(plain.data).z) >= 128
    level = codec.levels.for_encoding(settings)
    start = Problem.of(level, picture, None, 0.03, "mse").start()
    monkeypatch.setattr(encoding, "refine_to", lambda *_: (start, 0, 0.03))
    wanted = len(plain.data) - 1
    data, _ = encoding.encode_to_target(level, picture, None, replace(settings, target_size=wanted), None, None)
    assert 0.99 * wanted <= len(data) <= wanted


def test_an_annealing_goes_on_at_another_level(picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against steps that are made twice, and against latents that keep the gain of the level before."""
    monkeypatch.setattr(steer, "_FAR", {"bits": 0.0, "mse": 0.0})
    levels = Codec("lite", device="cpu").levels
    settings = Settings(steps=steer._FEW)
    first = Problem.of(levels.for_encoding(replace(settings, level_lambda=0.004)), picture, None, 0.005, "mse")
    aim = Aim(bits=1.5 * first.start().bits)
    with pytest.raises(MissedLevelError) as missed:
        refine_to(first.level, first, first.start(), settings, aim, has_other_level=lambda lmbda: True)
    begun, lmbda = missed.value.begun, missed.value.lmbda
    assert begun is not None
    assert lmbda > 0.005
    second = replace(first, level=levels.for_encoding(replace(settings, level_lambda=lmbda)), lmbda=lmbda)
    shown: list[int] = []
    found, steps, _ = refine_to(
        second.level, second, second.start(), settings, aim, lambda p: shown.append(p.step), begun=begun
    )
    assert shown[0] == round(begun.part * steps) > 0
    assert aim.is_met(aim.excess(found.bits, found.mse))
    whole, _, _ = refine_to(second.level, second, second.start(), settings, aim)
    assert found.mse < 1.03 * whole.mse


@pytest.mark.parametrize("aim", [Aim(bits=8e4), Aim(mse=1e-3)])
@pytest.mark.parametrize("gain", [0.9, 1.12])
@pytest.mark.parametrize("count", [2, 9])
def test_tiles_make_up_for_each_other(
    lite_level: LevelModel, picture: Picture, count: int, gain: float, aim: Aim
) -> None:
    """Guards against a large picture that misses its target, as its first tiles gain more or less than was assumed."""
    problem = Problem.of(lite_level, picture, None, 0.0075, "mse")
    limit = aim.bits or 1e-3 * problem.visible_pixels
    unrefined = [(1 + k % 3) * limit / count for k in range(count)]
    plan = steer_tiles._Plan(problem, aim, sum(unrefined), unrefined)
    growth = gain * limit / sum(unrefined) * math.exp(-aim.slack / 2)

    def changes(tile: float, part: float) -> tuple[float, float]:
        suited = followed(plan.reached[-1], plan.lmbda, part)
        change = aim.fall(part) + aim.slope * (suited - math.log(problem.lmbda))
        refined = growth * tile * math.exp(change)
        return refined - tile, refined - tile

    for tile in unrefined:
        plan.begin()
        plan.steer(0.0, *changes(tile, 0.0))
        plan.end(*changes(tile, 1.0))
    assert plan.total == pytest.approx(limit, rel=0.02)
    assert (plan.mean_lambda() < problem.lmbda) == ((gain > 1) == (aim.bits is not None))


def test_tiles_of_a_wrong_level_begin_anew(
    lite_level: LevelModel, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against tiles whose λ is far from the level, which costs quality, and against a wrong direction."""
    monkeypatch.setattr(tiles, "TILE", 64)
    problem = Problem.of(lite_level, picture, None, 0.0075, "mse")
    for factor in (0.5, 2.0):
        aim = Aim(bits=factor * problem.start().bits)
        with pytest.raises(steer.MissedLevelError) as missed:
            steer_tiles.refine_tiles_to(
                lite_level, problem, problem.start(), Settings(steps=10), aim, has_other_level=lambda lmbda: True
            )
        assert (missed.value.lmbda > problem.lmbda) == (factor > 1)


@pytest.mark.parametrize("grey", [False, True])
def test_float_figures_are_those_of_the_true_loss(lite_level: LevelModel, picture: Picture, grey: bool) -> None:
    """Guards against λ that is steered by figures of another quantity: weights, alpha, colors, 8-bit pixels."""
    pixels, alpha = picture.pixels, np.full(picture.pixels.shape[:2], 255, np.uint8)
    alpha[:50, 30:] = 0
    if grey:
        pixels = np.repeat(pixels[:, :, :1], 3, axis=2)
    problem = Problem.of(lite_level, replace(picture, pixels=pixels, grey=grey, alpha=alpha), None, 0.0075, "mse")
    expected = problem.start()
    prepared = prepare(lite_level)
    batch, y, z = Batch.of(prepared, [problem]), batched([expected.y]), batched([expected.z])
    bf16 = reduced_precision(prepared.device)
    bits, squares = rounded_figures(prepared, batch, y, z, bf16, frozen_context(prepared, bf16))
    assert float(bits) == pytest.approx(expected.bits, rel=0.01)
    assert float(squares) / problem.visible_pixels == pytest.approx(expected.mse, rel=0.02)


@pytest.mark.parametrize("tile", [64, 1024])
@pytest.mark.parametrize("target", [{"target_size": 900}, {"target_bpp": 0.6}, {"target_psnr": 31.0}])
def test_a_target_takes_one_refined_encoding(
    picture: Picture, target: dict[str, float], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a wanted size that costs several encodings, and against a report that is not that of the file."""
    monkeypatch.setattr(tiles, "TILE", tile)
    refined: list[Settings] = []

    def counted(settings: Settings, encode, figures, **options):  # type: ignore[no-untyped-def]
        def noted(chosen: Settings):  # type: ignore[no-untyped-def]
            if chosen.method != "none":
                refined.append(chosen)
            return encode(chosen)

        return search(settings, noted, figures, **options)

    monkeypatch.setattr("sgacodec.api.search", counted)
    settings = Settings(steps=20, **target)  # type: ignore[arg-type]
    codec = Codec(device="cpu")
    (encoded,) = codec.encode([picture], settings)
    few = 2 if tile == 64 and settings.target_psnr else 1  # 4×4 latents predict the error of the next tile badly
    assert 1 <= len(refined) <= few
    report = encoded.report
    assert report["bytes"] == len(encoded.data)
    pixels = codec.decode(encoded.data).picture.pixels
    mse = np.square(pixels.astype(float) - picture.pixels).mean()
    assert report["psnr"] == pytest.approx(10 * math.log10(255**2 / mse), abs=1e-6)
    if settings.target_psnr is not None:
        assert 0 <= report["psnr"] - settings.target_psnr <= 0.05
    else:
        size = settings.target_size or 0.6 * 128 * 128 / 8
        assert 0.99 * size <= report["bytes"] <= size
