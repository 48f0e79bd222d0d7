"""Refinement of large pictures to a wanted rate or quality: λ is steered from tile to tile.

What a tile gains, relative to its unrefined bits or squared error, predicts the gain of the tiles that follow. λ of
the next tile is the one at which they are predicted to meet the aim. In the end, single integers of a few tiles are
changed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from ..memory import release_free_memory
from ..models.level import LevelModel
from ..networks.architecture import HYPER_STRIDE, STRIDE
from ..settings import Settings
from ..tiling import cut
from .aim import LEVEL_SLOPE, Aim, followed, in_range, leading
from .loop import Progress
from .problem import Candidate, Problem
from .steer import SLOPE, MissedLevelError
from .steps import prepare
from .tiles import Region, RunningState, area, polish_region, refine_region, steps_of_tiles, tiles_of

_FARTHEST = 0.5  # most difference of log λ of a tile to that of the first one
_FAR = 0.25  # correction of log λ in the first tile from which on another level is taken
_ASSUMED = 0.25  # weight of the gain that the search has assumed, as a part of the picture
_MOST_CHANGE = 0.025  # most relative change of a tile by single integers
_ATTEMPTS = 2  # passes over all tiles to meet the aim


def refine_tiles_to(
    level: LevelModel,
    problem: Problem,
    start: Candidate,
    settings: Settings,
    aim: Aim,
    progress: Callable[[Progress], None] | None = None,
    has_other_level: Callable[[float], bool] | None = None,
) -> tuple[Candidate, int, float]:
    """Refine the latents of one large picture to an aim; `problem.lmbda` is that of the first tile.

    Parameters
    ----------
    start : Candidate
        `start.starting_point` of the problem. Its tensors are changed in place.

    Returns
    -------
    Candidate, int, float
        As `steer.refine_to`; λ is the geometric mean of those of the tiles, weighted by bits or squared error.

    Raises
    ------
    MissedLevelError
        In the first tile, where the aim is far from what this level gives, and there is a better one.
    """
    until = settings.deadline(time.perf_counter())
    prepared = prepare(level)
    y, z = start.y, start.z
    tiles = tiles_of(problem)
    steps, _ = steps_of_tiles(prepared, problem, tiles, y, z, settings)
    plan = _Plan(problem, aim, _amount(aim, problem, start), [_unrefined(aim, problem, r, y, z) for r in tiles])
    state = RunningState(problem, start, steps * len(tiles), progress)

    def steer(part: float, more_bits: float, more_squares: float) -> float:
        at_first = state.done == plan.part == 0
        lmbda = plan.steer(part, more_bits, more_squares)
        if at_first and abs(plan.correction) > _FAR and has_other_level is not None:
            other = in_range(problem.lmbda * math.exp(plan.correction * LEVEL_SLOPE / SLOPE))
            if has_other_level(other):
                raise MissedLevelError(other, None)
        return lmbda

    for region in tiles:
        now = replace(problem, lmbda=plan.begin())
        more_bits, more_squares = refine_region(prepared, now, region, y, z, settings, steps, state.report, steer)
        plan.end(more_bits, more_squares)
        state.add(steps, more_bits, more_squares)
    problem = replace(problem, lmbda=plan.mean_lambda())
    return meet_aim_in_tiles(level, problem, problem.evaluate(y, z), aim, until), steps, problem.lmbda


class _Plan:
    """λ of the tiles, from the amounts (bits or squared errors) before and after their refinement.

    Parameters
    ----------
    total : float
        The amount of the unrefined picture.
    unrefined : list of float
        That of each tile.
    """

    def __init__(self, problem: Problem, aim: Aim, total: float, unrefined: list[float]) -> None:
        self.aim, self.first, self.total, self.unrefined = aim, math.log(problem.lmbda), total, unrefined
        self.wanted = _wanted(aim, problem)
        # Of the tiles that are done, at the first λ, and of a tile that stands for what the search has assumed.
        self.before, self.after = _ASSUMED * total, _ASSUMED * self.wanted
        self.reached: list[float] = []  # log of the λ that suits each tile
        self.lmbda, self.part = problem.lmbda, 0.0  # of the present tile; the part of its steps that is done
        self.correction = 0.0  # of the first log λ, for all that is not done

    def begin(self) -> float:
        """λ at which the next tile begins."""
        tile, rest = self.unrefined[len(self.reached)], sum(self.unrefined[len(self.reached) + 1 :])
        growth = self.after / max(1e-9, self.before)
        self.reached.append(self._suitable(tile, rest, growth * tile, growth))
        self.lmbda, self.part = in_range(math.exp(self.reached[-1])), 0.0
        return self.lmbda

    def steer(self, part: float, more_bits: float, more_squares: float) -> float:
        """λ for the rest of the present tile, which has these changes after a part of its steps."""
        tile, rest = self.unrefined[len(self.reached) - 1], sum(self.unrefined[len(self.reached) :])
        refined = self._refined(part, more_bits, more_squares)
        growth = (self.after + refined) / max(1e-9, self.before + tile)
        self.lmbda = leading(self.reached[-1], self._suitable(tile, rest, refined, growth), part)
        return self.lmbda

    def end(self, more_bits: float, more_squares: float) -> None:
        """The present tile is refined, with these changes."""
        self.after += self._refined(1.0, more_bits, more_squares)
        self.before += self.unrefined[len(self.reached) - 1]
        self.total += self._change(more_bits, more_squares)

    def mean_lambda(self) -> float:
        """The geometric mean of the λ that suit the tiles, weighted by their unrefined amounts."""
        weights = [max(1e-9, amount) for amount in self.unrefined]
        logs = (weight * reached for weight, reached in zip(weights, self.reached, strict=True))
        return math.exp(sum(logs) / sum(weights))

    def _change(self, more_bits: float, more_squares: float) -> float:
        return more_bits if self.aim.bits is not None else more_squares

    def _refined(self, part: float, more_bits: float, more_squares: float) -> float:
        """The predicted amount of the present tile, if it had the first λ."""
        self.reached[-1] = followed(self.reached[-1], self.lmbda, part - self.part)
        self.part = part
        tile = self.unrefined[len(self.reached) - 1]
        now = max(0.1 * tile, tile + self._change(more_bits, more_squares))
        return now * math.exp(-self.aim.fall(part) - self.aim.slope * (self.reached[-1] - self.first))

    def _suitable(self, tile: float, rest: float, refined: float, growth: float) -> float:
        """log λ at which the picture meets the aim, with amounts at the first λ: `refined`, and growth times `rest`."""
        room = max(self.wanted - (self.total - tile - rest), 0.1 * (tile + rest))
        self.correction = math.log(max(1e-9, room) / max(1e-9, refined + growth * rest)) / self.aim.slope
        return self.first + min(_FARTHEST, max(-_FARTHEST, self.correction))


def meet_aim_in_tiles(
    level: LevelModel, problem: Problem, candidate: Candidate, aim: Aim, until: float = math.inf
) -> Candidate:
    """Change integers of one tile after the other until the aim is met, by a few percent of each tile, in place.

    As `steer.meet_aim`, for large pictures.
    """
    prepared, tiles = prepare(level), tiles_of(problem)
    y, z = candidate.y, candidate.z
    evaluated = True
    for region in tiles * _ATTEMPTS:
        excess = aim.excess(candidate.bits, candidate.mse)
        if not evaluated and aim.is_met(excess):
            candidate, evaluated = problem.evaluate(y, z), True
            excess = aim.excess(candidate.bits, candidate.mse)
        if aim.is_met(excess) or abs(excess) > _ATTEMPTS * _MOST_CHANGE or time.perf_counter() > until:
            break
        missing = _wanted(aim, problem) - _amount(aim, problem, candidate)

        def aim_of(part: Problem, annealed: Candidate, region: Region = region, missing: float = missing) -> Aim:
            amount = _amount(aim, part, annealed)
            most = _MOST_CHANGE * amount * area(region.inner) / area(region.wide)
            return _aim_at(aim, part, amount + min(most, max(-most, missing)))

        more_bits, more_squares = polish_region(prepared, problem, region, y, z, 1, until, aim_of=aim_of)
        more_mse = more_squares / max(1, problem.visible_pixels)
        candidate = replace(candidate, bits=candidate.bits + more_bits, mse=candidate.mse + more_mse)
        evaluated = False
    return candidate if evaluated else problem.evaluate(y, z)


def _unrefined(aim: Aim, problem: Problem, region: Region, y: Tensor, z: Tensor) -> float:
    """The bits of a tile, or its squared error, without its neighbours."""
    part = problem.part(region.inner)
    amount = _amount(aim, part, part.evaluate(cut(y, region.inner, STRIDE), cut(z, region.inner, HYPER_STRIDE)))
    release_free_memory()
    return amount


def _amount(aim: Aim, problem: Problem, candidate: Candidate) -> float:
    """What an aim limits, as a sum over the picture."""
    return candidate.bits if aim.bits is not None else candidate.mse * problem.visible_pixels


def _wanted(aim: Aim, problem: Problem) -> float:
    """The amount in the middle of the slack of an aim."""
    limit = aim.bits if aim.bits is not None else (aim.mse or 0.0) * problem.visible_pixels
    return limit * math.exp(-aim.slack / 2)


def _aim_at(aim: Aim, part: Problem, amount: float) -> Aim:
    """The aim for a part of the picture that has `amount` in the middle of its slack."""
    limit = max(1e-9, amount) * math.exp(aim.slack / 2)
    return Aim(bits=limit) if aim.bits is not None else Aim(mse=limit / max(1, part.visible_pixels))
