"""The search for λ: with an encoder and a clock that are formulas, and once for each target with the codec."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sgacodec import api, rate_control
from sgacodec.api import Codec
from sgacodec.picture import Picture
from sgacodec.rate_control import search
from sgacodec.settings import LADDER, LAMBDA_RANGE, LEVELS, Settings, level_lambda
from sgacodec.targets import Figures, TargetError, Trial

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

    def __init__(self, step: float = STEP, coding: float = CODING, largest: float = math.inf, beside: int = 0) -> None:
        self.now, self.beside = 1000.0, beside
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
        size = round(min(size, self.largest)) + self.beside
        result = Result(settings, steps, size, 44 + 3 * math.log(lmbda) + 0.2 * gain)
        self.results.append(result)
        return result

    def search(self, settings: Settings) -> Result:
        found, warning = self.search_with_warning(settings)
        assert not warning
        return found

    def search_with_warning(self, settings: Settings) -> tuple[Result, str]:
        def figures(result: Result) -> Figures:
            return Figures(result.size, 8 * result.size / PIXELS, result.psnr, self.beside)

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


@pytest.mark.parametrize("limit", [None, 20.0])
@pytest.mark.parametrize("target", [*TARGETS, {"target_size": 20_000}, {"target_psnr": 26.0}])
def test_one_refined_encoding_is_enough_where_it_is_steered(target: dict[str, float], limit: float | None) -> None:
    """Guards against a search that goes on after a hit, or that leaves most of the time limit unused."""
    encoder = Encoder()

    def encode(settings: Settings) -> Result:
        plain = replace(settings, target_size=None, target_bpp=None, target_psnr=None)
        result = encoder.encode(plain)
        if settings.method == "none":
            return result
        size = settings.target_size or 0.995 * (settings.target_bpp or 8 * result.size / PIXELS) * PIXELS / 8
        encoder.results[-1] = replace(result, size=int(size), psnr=(settings.target_psnr or result.psnr) + 1e-3)
        return encoder.results[-1]

    def figures(result: Result) -> Figures:
        unrefined = result.settings.method == "none"
        level = _level_lambda(result.settings.lmbda) if unrefined else None
        return Figures(result.size, 8 * result.size / PIXELS, result.psnr, level_lambda=level)

    settings = Settings(steps=100, time_limit=limit, **target)  # type: ignore[arg-type]
    found, warning = search(settings, encode, figures, encoder.clock, steered=True)
    assert not warning
    assert encoder.refined == [found]
    assert len(encoder.results) <= 5
    assert meets(found, settings, tolerance=0.01)
    needed = 100 if limit is None else 0.5 * limit / STEP
    assert found.steps >= min(100, needed)
    begins = encoder.encode(replace(found.settings, steps=100, time_limit=None))
    off = begins.psnr - settings.target_psnr if settings.target_psnr else math.log(begins.size / found.size) * 6
    assert abs(off) < 0.8  # λ begins where the target is nearly met


@pytest.mark.parametrize("factor", [1.05, 1.2])
def test_a_target_beyond_the_ladder_is_met_by_refinement(factor: float) -> None:
    """Guards against giving up where unrefined encodings have no more levels."""
    most = Encoder().encode(Settings(lmbda=1.0, method="none")).size
    settings = searching(15, target_size=round(factor * most))
    assert meets(Encoder().search(settings), settings, tolerance=0.03)


@pytest.mark.parametrize("steps", [None, 2])
@pytest.mark.parametrize(
    ("target", "nearest"),
    [
        ({"target_size": 40}, r"40 bytes; the smallest is 0\.\d+ bits a pixel, \d+ bytes$"),
        ({"target_bpp": 1e-3}, r"0\.001 bits a pixel; the nearest is 0\.\d+ bits a pixel, \d+ bytes$"),
        ({"target_psnr": 80.0}, r"80 dB; the nearest is \d\d\.\d\d dB$"),
    ],
)
def test_an_unreachable_target_is_an_error(target: dict[str, float], nearest: str, steps: int | None) -> None:
    """Guards against a file that is larger, or worse, than the user allows; the message says what can be had."""
    with pytest.raises(TargetError, match="no λ gives .*" + nearest):
        Encoder().search(searching(steps, **target))


@pytest.mark.parametrize("target", [{"target_size": 4000}, {"target_bpp": 0.05}])
def test_the_share_of_metadata_is_named(target: dict[str, float]) -> None:
    """Guards against a target that nobody can reach, as metadata and alpha alone take more."""
    with pytest.raises(TargetError, match=r"bytes, 30000 of them metadata and alpha$"):
        Encoder(beside=30_000).search(searching(2, **target))


@pytest.mark.parametrize("steps", [None, 2])
@pytest.mark.parametrize(
    ("target", "wanted"), [({"target_bpp": 100.0}, "100 bits a pixel"), ({"target_size": 5_000_000}, "5000000 bytes")]
)
def test_more_bits_than_a_picture_can_use(target: dict[str, float], wanted: str, steps: int | None) -> None:
    """Guards against an error for a black picture, and against a file far below the wanted size without a warning."""
    encoder = Encoder(largest=90_000)
    found, warning = encoder.search_with_warning(searching(steps, **target))
    assert found.size >= Encoder(largest=90_000).encode(Settings(lmbda=1.0, method="none")).size
    assert re.fullmatch(rf"no λ gives {wanted}; the best below is [\d.]+ bits a pixel, {found.size} bytes", warning)
    assert all(
        LAMBDA_RANGE[0] * 0.999 <= result.settings.lmbda <= LAMBDA_RANGE[1] * 1.001 for result in encoder.results
    )


@pytest.mark.parametrize("target", [{"target_size": 40_000}, {"target_bpp": 90.0}, {"target_psnr": 80.0}])
def test_an_unreachable_target_takes_one_refined_encoding(
    target: dict[str, float], photograph: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against six encodings at ever larger λ, 16 times the time of one, that change nothing."""
    refined = []
    encode = api.encode_to_target
    monkeypatch.setattr(api, "encode_to_target", lambda *args: refined.append(encode(*args)) or refined[-1])
    picture = Picture(np.ascontiguousarray(photograph[120:184, 200:264]))
    codec, settings = Codec("lite", device="cpu"), searching(10, **target)
    if settings.target_psnr is not None:
        with pytest.raises(TargetError, match="the nearest"):
            codec.encode([picture], settings)
    else:
        (warning,) = codec.encode([picture], settings)[0].warnings
        assert warning.startswith("no λ gives ")
    assert len(refined) == 1


def test_a_quality_of_a_weighted_picture(photograph: np.ndarray) -> None:
    """Guards against a file that is half as large again: changes for the weights do not lower the visible error."""
    picture = Picture(np.ascontiguousarray(photograph[80:208, 100:228]))
    weights = np.ones((128, 128))
    weights[:, 64:] = 0.08
    codec = Codec("lite", device="cpu")
    (plain,) = codec.encode([picture], Settings(lmbda=0.0032, steps=10), rois=[weights])
    (met,) = codec.encode([picture], Settings(target_psnr=plain.report["psnr"] - 0.03, steps=10), rois=[weights])
    assert 0 <= met.report["psnr"] - (plain.report["psnr"] - 0.03) <= 0.15
    assert len(met.data) <= 1.05 * len(plain.data)


def test_errors_that_do_not_rise_with_lambda_do_not_end_the_search() -> None:
    """Guards against the same λ twice, where of two refined encodings the one of the lower λ has the higher PSNR."""

    def trial(lmbda: float, psnr: float) -> Trial[None]:
        return Trial(lmbda=lmbda, error=psnr - 30, figures=Figures(1, 1.0, psnr), result=None)

    settings = Settings(target_psnr=30.0)
    trials = [trial(0.003, 29.745), trial(0.00355, 30.1)]
    again = rate_control._next(settings, trials)
    assert math.log(0.003) < rate_control._next(settings, [*trials, trial(math.exp(again), 30.156)]) < again - 0.01

    reversed_order = [trial(0.003, 30.1), trial(0.0031, 29.9)]
    first = rate_control._next(settings, reversed_order)
    assert math.log(0.003) < first < math.log(0.0031)
    assert rate_control._next(settings, [*reversed_order, trial(math.exp(first), 30.07)]) > first + 1e-3


def searching(steps: int | None, **target: float) -> Settings:
    if steps is None:
        return Settings(method="none", **target)  # type: ignore[arg-type]
    return Settings(steps=steps, **target)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", [{"target_size": 1000}, {"target_bpp": 0.02}])
def test_an_unrefined_file_below_a_target(target: dict[str, float]) -> None:
    """Where no refined encoding is below a size, the best unrefined one is, with a warning."""

    def encode(settings: Settings) -> int:
        return 3000 if settings.refines else 25 if settings.lmbda < 0.0075 else 5000

    def figures(size: int) -> Figures:
        return Figures(size, 8 * size / PIXELS, 30.0)

    found, warning = search(Settings(**target), encode, figures)  # type: ignore[arg-type]
    assert found == 25
    assert "the best below" in warning


def test_an_unreachable_target_does_not_blame_the_time() -> None:
    """Guards against a user who waits longer for what no λ gives."""
    for limit in (None, 1e6):
        settings = Settings(steps=500, time_limit=limit, target_bpp=1.0)
        assert "time" not in Encoder(largest=10_000).search_with_warning(settings)[1]
    settings = Settings(steps=500, time_limit=0.5, target_bpp=1.0)
    found, warning = Encoder(largest=10_000).search_with_warning(settings)
    assert found.size == 10_000
    assert "bits a pixel within the time limit; the best below is 0.2 bits a pixel" in warning


@pytest.mark.parametrize("target", [{"target_size": 400}, {"target_bpp": 0.7}, {"target_psnr": 34.0}])
def test_the_codec_meets_a_target(photograph: np.ndarray, target: dict[str, float]) -> None:
    """Guards against a search that works with formulas only; and the report is that of the file."""
    crop = Picture(np.ascontiguousarray(photograph[120:184, 200:264]))
    settings = searching(10, **target)
    (encoded,) = Codec("lite", device="cpu").encode([crop], settings)
    report = encoded.report
    assert (report["bytes"], report["bpp"]) == (len(encoded.data), 8 * len(encoded.data) / 64**2)
    assert report["steps"] == 10
    if settings.target_size is not None:
        assert 0.99 * settings.target_size <= len(encoded.data) <= settings.target_size
    elif settings.target_bpp is not None:
        assert report["bpp"] == pytest.approx(settings.target_bpp, rel=0.01)
    else:
        assert settings.target_psnr is not None
        assert 0 <= report["psnr"] - settings.target_psnr <= 0.05


def test_a_black_picture_has_few_bits() -> None:
    """Guards against a failure where the best file is smaller than the target."""
    black = Picture(np.zeros((64, 64, 3), np.uint8))
    (encoded,) = Codec("lite", device="cpu").encode([black], searching(None, target_bpp=1.0))
    assert encoded.report["bpp"] < 1
    assert encoded.report["psnr"] is None or encoded.report["psnr"] > 45
    (warning,) = encoded.warnings
    assert warning.startswith("no λ gives 1 bits a pixel; the best below is ")


@pytest.mark.parametrize("target", [{"target_size": 160}, {"target_bpp": 0.3}])
def test_a_dithered_picture_can_be_small(target: dict[str, float]) -> None:
    """Guards against low targets that no λ reaches, as the latents of such pictures took 11 bits a pixel at any λ."""
    gradient = np.tile(np.linspace(0, 255, 64), (64, 1)).astype(np.uint8)
    picture = Picture(np.array(Image.fromarray(gradient).convert("1").convert("RGB")))
    (encoded,) = Codec("lite", device="cpu").encode([picture], searching(None, **target))
    assert len(encoded.data) <= target.get("target_size", 1.2 * 0.3 * 64**2 / 8)


def test_the_codec_names_the_share_of_alpha(photograph: np.ndarray, tiny_path: Path) -> None:
    """The message is true of the file: EXIF and alpha of noise take most of it."""
    alpha = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    picture = Picture(photograph[:32, :32], alpha=alpha, exif=b"II*\0\x08\0\0\0\0\0")
    with pytest.raises(TargetError, match=r"the smallest is .* bytes, 1\d\d\d of them metadata and alpha$"):
        Codec(str(tiny_path), device="cpu").encode([picture], searching(None, target_size=500))


@pytest.mark.parametrize("target", [{"target_size": 12}, {"target_bpp": 1e-3}])
def test_a_target_below_the_header_is_not_refined_for(
    target: dict[str, float], photograph: np.ndarray, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a search by many refined encodings for a size that no file has."""
    calls: list[Settings] = []
    original = api.encode_batch

    def counted(*given: Any, **options: Any) -> Any:
        calls.append(given[3])
        return original(*given, **options)

    monkeypatch.setattr(api, "encode_batch", counted)
    with pytest.raises(TargetError, match=r"the (smallest|nearest) is"):
        Codec(str(tiny_path), device="cpu").encode([Picture(photograph[:32, :32])], searching(5, **target))
    assert {settings.method for settings in calls} == {"none"}
    assert len(calls) <= 4
