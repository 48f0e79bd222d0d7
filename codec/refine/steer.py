"""Refinement to a wanted rate or quality: λ is steered within one annealing, and the last pass lands on the target.

    unrefined y, z ─► [ step ] × … ─► true bits and MSE of the rounded latents ─► λ ─► [ step ] × … ─► last pass
                         ▲                                                        │
                         └────────────────────────────────────────────────────────┘

From 15 % of the annealing on, the rate of the rounded latents is that of the final ones within about a percent, and the
factor by which their squared error still falls is nearly the same for all pictures, so both can be predicted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..device import deterministic_convolutions, reduced_precision
from ..memory import keep_freed_memory
from ..models.level import LevelModel
from ..settings import Settings
from .aim import Aim, followed, leading
from .flips import polish
from .loop import Report, anneal, batched, of_image, state_of, steps_within
from .objective import Batch, frozen_context, rounded_figures
from .problem import Candidate, Problem, with_lambda_of
from .steps import prepare

CHECKS = (0.15, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)  # when λ is steered, as parts of the annealing
SLOPE = 0.65  # d log(bits) / d log λ, and −d log(squared error) / d log λ, of refined latents
_FAR = {"bits": 0.035, "mse": 0.05}  # excess at the first check from which on another level is taken
_FEW = 50  # steps of an annealing whose first check says little
_ATTEMPTS = 3
_OUT_OF_REACH = 0.25  # excess that single integers do not change in a few rounds


@dataclass(frozen=True)
class PartialAnnealing:
    """An annealing that goes on at another level.

    Attributes
    ----------
    y : Tensor (1, M, H/16, W/16) float32
        Latents in natural units, without a gain.
    part : float
        The part of the steps that is done.
    """

    y: Tensor
    part: float


class MissedLevelError(Exception):
    """The aim needs the level of another λ, where the annealing goes on, or begins anew without a partial one."""

    def __init__(self, lmbda: float, begun: PartialAnnealing | None) -> None:
        self.lmbda, self.begun = lmbda, begun


@keep_freed_memory()
@deterministic_convolutions()
def refine_to(
    level: LevelModel,
    problem: Problem,
    unrefined: Candidate,
    settings: Settings,
    aim: Aim,
    progress: Report | None = None,
    has_other_level: Callable[[float], bool] | None = None,
    begun: PartialAnnealing | None = None,
) -> tuple[Candidate, int, float]:
    """Refine the latents of one image to an aim; `problem.lmbda` is where λ begins.

    Parameters
    ----------
    has_other_level : callable, optional
        Whether the model has a level that is nearer to a λ. None: this level is kept.
    begun : PartialAnnealing, optional
        What has been done at another level.

    Returns
    -------
    Candidate, int, float
        The result, which may miss the aim; the number of steps; and the λ that they suit, which weighs the
        loss of the result.

    Raises
    ------
    MissedLevelError
        At the first check, where the aim is far from what this level gives, and there is a better one.
    """
    until = settings.deadline(time.perf_counter())
    prepared, bf16 = prepare(level), reduced_precision(level.device)
    batch, context = Batch.of(prepared, [problem]), frozen_context(prepared, bf16)
    y = batched([unrefined.y if begun is None else begun.y * _unit(level)])
    z = batched([unrefined.z])  # of `begun`, too: h_a does not suit latents in the middle of an annealing
    limit = settings.time_limit
    fitting = None if limit is None else steps_within(limit, prepared, batch, y, z, settings)
    steps, rounds = settings.steps_and_rounds(fitting)
    lmbda = torch.full((), problem.lmbda, device=level.device)
    first = max(1, round(CHECKS[0] * steps)) / max(1, steps)
    checked = 0.0 if begun is None else begun.part
    latest, reached = unrefined, math.log(problem.lmbda)  # log of the λ that suits the latents

    def check(part: float, y: Tensor, z: Tensor) -> None:
        nonlocal latest, reached, checked
        if part == 1:
            latest = problem.evaluate(of_image(y, 0), of_image(z, 0))
        else:
            bits, squares = rounded_figures(prepared, batch, y, z, bf16, context)
            latest = replace(latest, bits=float(bits), mse=float(squares) / max(1, problem.visible_pixels))
        reached = followed(reached, float(lmbda), part - checked)
        checked = part
        excess = aim.excess(latest.bits, latest.mse) - aim.fall(part)
        if part == first and steps >= _FEW and abs(excess) > _FAR["mse" if aim.bits is None else "bits"]:
            other = aim.steered(math.exp(reached), excess, 1 / SLOPE)
            if has_other_level and has_other_level(other):
                raise MissedLevelError(other, PartialAnnealing(of_image(y, 0) / _unit(level), part))
        if part < 1:
            lmbda.fill_(leading(reached, reached - (excess + aim.slack / 2) / aim.slope, part))

    def report(step: int) -> None:
        if progress is not None:
            progress(state_of([latest], [problem], step, steps + rounds))

    done = round(checked * steps)
    report(done)
    anneal(prepared, batch, y, z, settings, steps, check, lambda step, _: report(step), lmbda, CHECKS, done)
    problem, before = replace(problem, lmbda=math.exp(reached)), problem
    start = min((with_lambda_of(c, before, problem) for c in (unrefined, latest)), key=lambda c: c.loss)
    found = latest = polish(
        prepared, problem, start, rounds, until=until, aim=aim, report=lambda done: report(steps + done)
    )
    latest = found = meet_aim(prepared, problem, found, aim, until)
    report(steps + rounds)
    return found, steps, problem.lmbda


def _unit(level: LevelModel) -> Tensor:
    """The natural unit of each channel of y at a level, (1, M, 1, 1)."""
    return level.folded.y_unit[None, :, None, None]


def meet_aim(level: LevelModel, problem: Problem, candidate: Candidate, aim: Aim, until: float = math.inf) -> Candidate:
    """Change integers until the aim is met, if it is near enough for a few rounds; else the nearest candidate."""
    for _ in range(_ATTEMPTS):
        excess = aim.excess(candidate.bits, candidate.mse)
        if aim.is_met(excess) or abs(excess) > _OUT_OF_REACH:
            break
        candidate = polish(level, problem, candidate, 1, until=until, aim=aim)
    return candidate
