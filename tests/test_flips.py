"""The last pass, a coordinate descent over single integers: its predictions, its gain, and what it may change."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from sgacodec.latents import Latents, code_length, quantize
from sgacodec.models.level import LevelModel
from sgacodec.picture import Picture
from sgacodec.refine import flips
from sgacodec.refine.flips import bit_costs, polish
from sgacodec.refine.loop import refine
from sgacodec.refine.objective import Batch
from sgacodec.refine.problem import Candidate, Problem
from sgacodec.refine.symbols import symbol_coder, table_entries
from sgacodec.settings import Settings

LMBDA = 0.0075


@pytest.fixture(scope="module")
def problem(lite_level: LevelModel, photograph: np.ndarray) -> Problem:
    """A picture that is no multiple of 64 and whose right half weighs more."""
    pixels = np.ascontiguousarray(photograph[120:240, 200:328])
    roi = np.where(np.arange(128) < 64, 0.5, 1.0)[None].repeat(120, 0)
    return Problem.of(lite_level, Picture(pixels), roi, LMBDA, "mse")


@pytest.fixture(scope="module")
def annealed(lite_level: LevelModel, problem: Problem) -> Candidate:
    (candidate,), _ = refine(lite_level, [problem], [problem.start()], Settings(steps=60, rounds=0, schedule="exp"))
    return candidate


@pytest.fixture(scope="module")
def coded(lite_level: LevelModel, annealed: Candidate) -> Latents:
    return quantize(lite_level, annealed.y, annealed.z)


def test_the_bits_of_a_change_are_exact(lite_level: LevelModel, coded: Latents) -> None:
    """Guards against changes that are chosen by wrong rates."""
    _, lower, higher = bit_costs(lite_level.y_tables)
    entry = table_entries(coded.y, coded.index, lite_level.y_tables).flatten()
    before = code_length(lite_level, coded)
    busy = torch.nonzero(coded.y.flatten().abs() > 1).flatten()[::40]
    quiet = torch.nonzero(coded.y.flatten() == 0).flatten()[::4000]
    for at in torch.cat([busy, quiet]).tolist():
        for step, costs in ((-1, lower), (1, higher)):
            other = coded.y.clone(memory_format=torch.contiguous_format)
            other.view(-1)[at] += step
            after = code_length(lite_level, replace(coded, y=other))
            assert float(costs[entry[at]]) == pytest.approx(after - before, abs=1e-5)


def test_the_ends_of_a_table_are_never_crossed(lite_level: LevelModel, coded: Latents) -> None:
    """Guards against changes to or from an escape, and against entries of a neighbouring table."""
    tables = lite_level.y_tables
    _, lower, higher = bit_costs(tables)
    first, escape = tables.starts[:-1], tables.starts[1:] - 1
    assert torch.isinf(lower).sum() == torch.isinf(higher).sum() == 2 * len(tables)
    assert all(torch.isinf(v).all() for v in (lower[first], lower[escape], higher[escape - 1], higher[escape]))
    for far in (-(10**6), 10**6):
        outside = replace(coded, y=torch.full_like(coded.y, far))
        assert (table_entries(outside.y, outside.index, tables) == torch.from_numpy(escape)[coded.index.long()]).all()


def test_the_loss_of_a_round_is_the_true_one(
    lite_level: LevelModel, problem: Problem, annealed: Candidate, coded: Latents
) -> None:
    """Guards against rounds that are compared by another loss than that of the file."""
    loss = flips._Loss(lite_level, Batch.of(lite_level, [problem]), symbol_coder(lite_level, coded))
    found = loss.at(coded.y.float())
    assert found.squares / problem.pixels == pytest.approx(annealed.mse, rel=1e-2)  # μ is of float networks
    bits = LMBDA * found.distortion + found.bits
    z_bits = code_length(lite_level, replace(coded, y=coded.y[:, :0], index=coded.index[:, :0]))
    assert (bits + z_bits) / problem.pixels == pytest.approx(annealed.loss, rel=3e-3)  # μ and σ are floats


def test_gradient_and_curvature_predict_the_squared_error(
    lite_level: LevelModel, problem: Problem, coded: Latents
) -> None:
    """Guards against a wrong prediction of what a change does to the squared error, checked by finite differences."""
    loss = flips._Loss(lite_level, Batch.of(lite_level, [problem]), symbol_coder(lite_level, coded))
    found = loss.at(coded.y.float())
    y_hat, gradient = found.y_hat, found.gradient  # μ is that of float networks
    curvature = loss.curvature(y_hat)

    def squares(move: torch.Tensor) -> float:
        error = loss.synthesize(y_hat + move).clamp(0, 1) - loss.x
        return float((error.square() * loss.weight).sum(dtype=torch.float64))

    slopes, bends = [], []
    for channel, (row, column) in itertools.product((0, 5, 40, 160), ((2, 2), (3, 6), (5, 3), (6, 5))):
        move = torch.zeros_like(y_hat)
        move[0, channel, row, column] = 1
        up, middle, down = squares(move), squares(0 * move), squares(-move)
        slopes.append((float(gradient[0, channel, row, column]), (up - down) / 2))
        bends.append(float(curvature[0, channel, row, column]) / (up + down - 2 * middle))
    assert np.corrcoef(np.array(slopes).T)[0, 1] > 0.93
    assert np.mean(np.log(bends)) == pytest.approx(0, abs=0.25)
    assert np.std(np.log(bends)) < 0.6  # Hutchinson's estimate with two vectors


def test_the_pass_lowers_the_true_loss(lite_level: LevelModel, problem: Problem, annealed: Candidate) -> None:
    """Guards against a pass that gains nothing, changes z, or is not deterministic."""
    better = polish(lite_level, problem, annealed, 10)
    assert better.loss < 0.999 * annealed.loss
    assert problem.evaluate(better.y, better.z).loss == better.loss
    assert torch.equal(better.z, annealed.z)
    assert torch.equal(polish(lite_level, problem, annealed, 10).y, better.y)


def test_a_round_changes_an_integer_of_a_position_by_one(lite_level: LevelModel, problem: Problem) -> None:
    """Guards against several changes at one position, whose effects on the pixels would not be independent."""
    start = problem.start()
    better = polish(lite_level, problem, start, 1)
    change = quantize(lite_level, better.y, better.z).y - quantize(lite_level, start.y, start.z).y
    assert change.abs().sum(dim=1).max() == 1
    assert better.loss < start.loss


def test_what_is_not_active_stays(lite_level: LevelModel, problem: Problem) -> None:
    """Guards against changes of latents of a neighbouring tile."""
    start = problem.start()
    active = torch.zeros(1, 8, 8, 1, dtype=torch.bool)
    active[:, 2:6, 4:] = True
    batch = replace(Batch.of(lite_level, [problem]), active_y=active)
    better = polish(lite_level, problem, start, 6, lambda _: batch)
    before, after = (quantize(lite_level, c.y, c.z).y for c in (start, better))
    changed = (after != before).any(dim=1)[..., None]
    assert changed.any()
    assert not (changed & ~active).any()
    assert better.loss < start.loss


@pytest.mark.parametrize("rounds", [1, 2, 5])
@pytest.mark.parametrize("kind", ["grey", "alpha", "invisible"])
def test_it_is_never_worse(lite_level: LevelModel, photograph: np.ndarray, kind: str, rounds: int) -> None:
    """Guards against a loss that ignores grey files or transparency."""
    pixels = np.ascontiguousarray(photograph[100:170, 150:250])
    alpha = None
    if kind == "grey":
        pixels = pixels[..., :1].repeat(3, axis=2)
    else:
        alpha = np.zeros(pixels.shape[:2], np.uint8)
        alpha[:, :40] = 255 * (kind == "alpha")
    problem = Problem.of(lite_level, Picture(pixels, alpha=alpha, grey=kind == "grey"), None, LMBDA, "mse")
    start = problem.start()
    better = polish(lite_level, problem, start, rounds)
    assert better.loss <= start.loss
    assert problem.evaluate(better.y, better.z).loss == better.loss


def test_without_rounds_or_time_nothing_changes(lite_level: LevelModel, problem: Problem, annealed: Candidate) -> None:
    """Guards against a pass that runs where it is switched off, or after the time limit."""
    assert polish(lite_level, problem, annealed, 3, until=0.0) is annealed
    assert polish(lite_level, problem, annealed, 0) is annealed


def test_it_ends_in_time(
    lite_level: LevelModel, problem: Problem, annealed: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a pass that exceeds the time limit."""
    clock = itertools.count(0.0, 1.0)
    monkeypatch.setattr(flips.time, "perf_counter", lambda: next(clock))
    polish(lite_level, problem, annealed, 100, until=20.0)
    assert next(clock) <= 21


def test_little_time_is_enough_to_gain_something(lite_level: LevelModel, problem: Problem) -> None:
    """Guards against a short time limit that is spent on too short an annealing, without a gain."""
    start = problem.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sgacodec.refine.loop.steps_within", lambda *_: 8)
        (candidate,), steps = refine(lite_level, [problem], [start], Settings(time_limit=60.0))
    assert steps == 8
    assert candidate.loss < 0.98 * start.loss
