"""The search for λ: with an encoder and a clock that are formulas, and once for each target with the codec."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest

from sgacodec.api import Codec
from sgacodec.picture import Picture
from sgacodec.rate_control import TargetError, search
from sgacodec.settings import LADDER, LEVELS, Settings, level_lambda

PIXELS = 400_000
STEP, CODING = 0.1, 0.5  # seconds of a step of refinement, and of all else in an encoding
TARGETS = [{"target_size": 40_000}, {"target_bpp": 0.8}, {"target_psnr": 33.0}]


@dataclass(frozen=True)
class Result:
    settings: Settings
    steps: int
    size: int
    psnr: float


class Encoder:
    """Bytes and PSNR rise with λ; refinement lowers the bytes, and reaches rates between and beyond the 64 levels."""

    def __init__(self, step: float = STEP, coding: float = CODING, largest: float = math.inf) -> None:
        self.now = 1000.0
        self.step, self.coding, self.largest = step, coding, largest
        self.results: list[Result] = []

    def clock(self) -> float:
        return self.now

    def encode(self, settings: Settings) -> Result:
        settings.validate()
        steps = settings.annealing_steps
        if settings.time_limit is not None:
            steps = min(steps, int(settings.time_limit / self.step))
        self.now += self.coding + steps * self.step
        gain = 1 - math.exp(-steps / 60)
        lmbda = _level_lambda(settings.lmbda)
        if steps:
            lmbda *= (settings.lmbda / lmbda) ** 0.5
        size = 900_000 * lmbda**0.65 * (1 - 0.1 * gain)
        result = Result(settings, steps, round(min(size, self.largest)), 44 + 3 * math.log(lmbda) + 0.2 * gain)
        self.results.append(result)
        return result

    def search(self, settings: Settings) -> Result:
        def figures(result: Result) -> tuple[int, float, float]:
            return result.size, 8 * result.size / PIXELS, result.psnr

        return search(settings, self.encode, figures, self.clock)

    @property
    def refined(self) -> list[Result]:
        return [result for result in self.results if result.settings.method != "none"]


def _level_lambda(lmbda: float) -> float:
    """λ of the nearest level."""
    part = math.log(lmbda / LADDER[0]) / math.log(LADDER[1] / LADDER[0])
    return level_lambda(round((LEVELS - 1) * min(1.0, max(0.0, part))))


def meets(result: Result, settings: Settings, tolerance: float) -> bool:
    """Whether a result is at the target, on the right side of it; the tolerance is relative, or in units of 6 dB."""
    if settings.target_size is not None:
        return 1 - tolerance <= result.size / settings.target_size <= 1
    if settings.target_bpp is not None:
        return abs(8 * result.size / PIXELS / settings.target_bpp - 1) <= tolerance
    assert settings.target_psnr is not None
    return 0 <= result.psnr - settings.target_psnr <= 6 * tolerance


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("limit", "tolerance"), [(8.0, 0.06), (30.0, 0.02), (90.0, 0.02), (1000.0, 0.01)])
def test_a_time_limit_is_for_the_whole_search(target: dict[str, float], limit: float, tolerance: float) -> None:
    """Guards against a limit that each of up to six encodings uses up anew."""
    encoder = Encoder()
    settings = Settings(steps=500, time_limit=limit, **target)  # type: ignore[arg-type]
    found = encoder.search(settings)
    assert encoder.now - 1000 <= limit + CODING  # refinement ends in time, and its result has still to be coded
    assert meets(found, settings, tolerance)
    assert found.steps >= 0.2 * min(500.0, limit / STEP)
    spread = [result.steps for result in encoder.refined]
    assert max(spread) <= 2 * min(spread) + 10  # all are refined about as much, so that they can be compared


@pytest.mark.parametrize("target", TARGETS)
def test_where_no_time_is_left_the_result_is_unrefined(target: dict[str, float]) -> None:
    """Guards against an error, or a missed deadline, where a large picture takes longer to code than the limit."""
    encoder = Encoder(coding=20.0)
    settings = Settings(steps=500, time_limit=30.0, **target)  # type: ignore[arg-type]
    assert meets(encoder.search(settings), settings, tolerance=0.15)
    assert encoder.refined == encoder.results[1:2]  # one encoding of 10 s or so is refined …
    settings = Settings(steps=500, time_limit=10.0, **target)  # type: ignore[arg-type]
    encoder = Encoder(coding=20.0)
    found = encoder.search(settings)
    assert meets(found, settings, tolerance=0.06)
    assert (found.steps, encoder.refined) == (0, [])  # … or none
    assert len(encoder.results) == 7


@pytest.mark.parametrize("steps", [None, 10, 500])
@pytest.mark.parametrize("target", [*TARGETS, {"target_size": 20_000}, {"target_bpp": 2.0}, {"target_psnr": 26.0}])
def test_a_target_is_met(target: dict[str, float], steps: int | None) -> None:
    """Within 2 % by refinement, and within half the distance of two levels without."""
    encoder = Encoder()
    settings = searching(steps, **target)
    assert meets(encoder.search(settings), settings, tolerance=0.04 if steps is None else 0.02)
    assert {result.steps for result in encoder.refined} == ({steps} if steps else set())
    assert len(encoder.results) - len(encoder.refined) == (7 if steps else len(encoder.results))


@pytest.mark.parametrize("factor", [1.05, 1.2])
def test_a_target_beyond_the_ladder_is_met_by_refinement(factor: float) -> None:
    """Guards against giving up where unrefined encodings have no more levels."""
    most = Encoder().encode(Settings(lmbda=1.0, method="none")).size
    settings = searching(15, target_size=round(factor * most))
    assert meets(Encoder().search(settings), settings, tolerance=0.03)


@pytest.mark.parametrize("steps", [None, 2])
@pytest.mark.parametrize(
    "target", [{"target_size": 40}, {"target_bpp": 100.0}, {"target_bpp": 1e-3}, {"target_psnr": 80.0}]
)
def test_an_unreachable_target_is_an_error(target: dict[str, float], steps: int | None) -> None:
    """Guards against a file that is larger, or worse, than the user allows."""
    with pytest.raises(TargetError, match="no λ gives"):
        Encoder().search(searching(steps, **target))


def searching(steps: int | None, **target: float) -> Settings:
    if steps is None:
        return Settings(method="none", **target)  # type: ignore[arg-type]
    return Settings(steps=steps, **target)  # type: ignore[arg-type]


def test_an_unreachable_target_does_not_blame_the_time() -> None:
    """Guards against a user who waits longer for what no λ gives."""
    for limit in (None, 1e6):
        with pytest.raises(TargetError, match=r"no λ gives .* the nearest is -\d+ %$"):
            Encoder(largest=10_000).search(Settings(steps=500, time_limit=limit, target_bpp=1.0))
    with pytest.raises(TargetError, match=r"within the time limit$"):
        Encoder(largest=10_000).search(Settings(steps=500, time_limit=2.0, target_bpp=1.0))


@pytest.mark.parametrize("target", [{"target_size": 600}, {"target_bpp": 1.0}, {"target_psnr": 34.0}])
def test_the_codec_meets_a_target(photograph: np.ndarray, target: dict[str, float]) -> None:
    """Guards against a search that works with formulas only; and the report is that of the file."""
    crop = Picture(np.ascontiguousarray(photograph[120:184, 200:264]))
    settings = searching(10, **target)
    (encoded,) = Codec("lite", device="cpu").encode([crop], settings)
    report = encoded.report
    assert (report["bytes"], report["bpp"]) == (len(encoded.data), 8 * len(encoded.data) / 64**2)
    assert report["steps"] == 10
    if settings.target_size is not None:
        assert 0.97 * settings.target_size <= len(encoded.data) <= settings.target_size
    elif settings.target_bpp is not None:
        assert report["bpp"] == pytest.approx(settings.target_bpp, rel=0.02)
    else:
        assert settings.target_psnr is not None
        assert 0 <= report["psnr"] - settings.target_psnr <= 0.15
