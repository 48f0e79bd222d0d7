"""Refinement of large pictures in tiles, with tiles of 64 or 128 pixels in place of 1024."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import tiny_model

from sgacodec import latents, metrics
from sgacodec.models.level import LevelModel
from sgacodec.networks.architecture import Architecture
from sgacodec.picture import Picture
from sgacodec.refine import loop, tiles
from sgacodec.refine.loop import Progress, refine
from sgacodec.refine.problem import Candidate, Problem
from sgacodec.settings import Settings

LMBDA = 0.0075
REACH = Architecture("lite", N=8, M=16, scale="exp", width=12, hidden=8).reach  # without context model


@pytest.mark.parametrize(
    ("size", "count", "apart"),
    [
        ((128, 192), 16, 0.3),  # dB; borders this short differ by 0.1 dB from noise alone
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
    """Guards against seams, a smaller gain than without tiles, and a progress that does not add up."""
    picture = Picture(np.ascontiguousarray(photograph[-size[0] :, -size[1] :]))
    settings = Settings(steps=count)
    problem = Problem.of(lite_level, picture, None, LMBDA, "mse")
    start = problem.start()
    (whole,), _ = refine(lite_level, [problem], [start], settings)
    monkeypatch.setattr(tiles, "TILE", 128)
    assert tiles.needs_tiles(*problem.shape)
    reports: list[Progress] = []
    tiled, done = tiles.refine_tiles(lite_level, problem, start, settings, reports.append)
    assert done == count
    regions = list(tiles.regions(*problem.shape, lite_level.folded.architecture.reach))
    assert len(regions) > 1
    assert reports[-1].step == reports[-1].steps == (count + settings.rounds_after(count)) * len(regions)
    assert_progress_is_of(reports[-1], tiled, problem)
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
    """Guards against halos that are too small for mshyper, whose receptive fields are larger and pass through GDN.

    The weights are random, so there is little to gain.
    """
    gained = tiny_model.untrained(Architecture("mshyper", N=8, M=12, scale="linear"), photograph)
    level = tiny_model.exported(gained, photograph, levels=1).at(0)
    problem = Problem.of(level, Picture(np.ascontiguousarray(photograph[:100, :190])), None, LMBDA, "mse")
    start = problem.start()
    before = start.loss
    monkeypatch.setattr(tiles, "TILE", 128)
    reports: list[Progress] = []
    tiled, _ = tiles.refine_tiles(level, problem, start, Settings(steps=10), reports.append)
    assert tiled.loss < before
    assert_progress_is_of(reports[-1], tiled, problem)


def assert_progress_is_of(progress: Progress, candidate: Candidate, problem: Problem) -> None:
    """The sums of the changes of the tiles are the rate and PSNR of the picture."""
    assert progress.bpp == pytest.approx(candidate.bits / problem.pixels, rel=2e-3)
    assert progress.psnr == pytest.approx(-10 * math.log10(candidate.mse), abs=0.01)


def squares(level: LevelModel, candidate: Candidate, picture: Picture) -> np.ndarray:
    """Squared error of each pixel of the decoded picture, (h, w)."""
    quantized = latents.quantize(level, candidate.y, candidate.z)
    decoded = latents.render(level, quantized, *picture.pixels.shape[:2])
    return np.square(decoded.astype(float) - picture.pixels).mean(axis=2)


@pytest.mark.parametrize("tile", [64, 128, 1024])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (1088, 2112), (192, 3200)])
def test_tiles_cover_a_picture_once(height: int, width: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against latents that are never refined, or twice, and against halos that are cut off."""
    monkeypatch.setattr(tiles, "TILE", tile)
    covered = np.zeros((height // 64, width // 64), int)
    for region in tiles.regions(height, width, REACH):
        top, left, bottom, right = (v // 64 for v in region.inner)
        assert all(v % 64 == 0 for v in (*region.inner, *region.wide))
        assert max(bottom - top, right - left) * 64 <= tile
        covered[top:bottom, left:right] += 1
        for box, halo in ((region.outer, 32), (region.wide, 128)):
            assert box[0] == max(0, top * 64 - halo)
            assert box[3] == min(width, right * 64 + halo)
    assert (covered == 1).all()


def test_no_tile_is_too_small_for_ms_ssim() -> None:
    """Guards against a tile of fewer pixels than MS-SSIM needs: a picture of 1025 pixels once ended in one."""
    for width in range(2048 + 64, 5000, 64):
        for region in tiles.regions(1088, width, REACH):
            top, left, bottom, right = region.outer
            assert min(bottom - top, right - left) - 63 >= metrics.MS_SSIM_MIN_SIDE


def test_tiles_keep_a_time_limit(
    lite_level: LevelModel, photograph: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a time limit that each tile uses up anew."""
    problem = Problem.of(lite_level, Picture(photograph[:64, :128]), None, LMBDA, "mse")
    monkeypatch.setattr(tiles, "TILE", 64)
    clock = itertools.count(0, 0.1)  # every reading of the clock takes a tenth of a second
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(clock))
    _, done = tiles.refine_tiles(lite_level, problem, problem.start(), Settings(steps=500, time_limit=9.0))
    assert 20 < done <= 45
