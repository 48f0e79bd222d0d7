"""The refinement loop: optimize the latents of images for a frozen decoder.

    unrefined y, z ─► [ relax ─► loss ─► gradient ─► Adam ] × steps ─► candidate of lowest true loss ─► last pass
                          temperature and learning rate fall

The unrefined latents are the first candidate, so the result never has a higher true loss. The last pass is coordinate
descent over single integers (`flips.py`). Large pictures are refined tile by tile (`tiles.py`); on CUDA a step is
captured as a graph (`steps.py`).
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..device import deterministic_convolutions
from ..memory import keep_freed_memory
from ..metrics import psnr_of_mse
from ..models.level import LevelModel
from ..settings import Settings
from .flips import polish
from .objective import Batch
from .problem import Candidate, Problem
from .steps import prepare, stepper

_CHECKS = (0.6, 0.75, 0.85, 0.93, 1.0)  # when the true loss is evaluated, as parts of the run
_SHORT = 150  # steps below which it is evaluated at the end only: each evaluation takes as long as one or two steps
_TIMED = 4  # steps that are timed before a run with a time limit


@dataclass(frozen=True)
class Progress:
    """State of a refinement.

    Attributes
    ----------
    step, steps : int
        Steps and rounds of the last pass, done and in all.
    bpp, psnr : float
        Of the best candidates (dB for PSNR), means over the images.
    images : int
        How many images are refined together.
    """

    step: int
    steps: int
    bpp: float
    psnr: float
    images: int = 1


@dataclass(frozen=True)
class TracePoint:
    """State of an image's latents after a step, which may be worse than those of the best candidate.

    Attributes
    ----------
    step : int
        0: before the first step.
    true_loss, bpp, psnr : float
        Of hard integers and 8-bit pixels.
    relaxed_loss : float, optional
        That of the step; None before the first step and after the last pass.
    """

    step: int
    true_loss: float
    relaxed_loss: float | None
    bpp: float
    psnr: float


@dataclass(frozen=True)
class Trace:
    """Call `record(image, point)` before the first step, every so many steps, and after the last pass."""

    every: int
    record: Callable[[int, TracePoint], None]


Report = Callable[[Progress], None]
Check = Callable[[float, Tensor, Tensor], None]


@keep_freed_memory()
@deterministic_convolutions()
def refine(
    level: LevelModel,
    problems: list[Problem],
    unrefined: list[Candidate],
    settings: Settings,
    progress: Report | None = None,
    trace: Trace | None = None,
) -> tuple[list[Candidate], int]:
    """Refine the latents of images of one padded shape as one batch.

    Parameters
    ----------
    unrefined : list of Candidate
        `start.starting_point` of each problem.
    progress : callable, optional
        Called before the first step, after every step and round, and at the end.
    trace : Trace, optional
        Evaluating the true loss takes about as long as a step.

    Returns
    -------
    list of Candidate, int
        The candidate of lowest true loss of each image, at most that of its unrefined one, and the number of steps.
    """
    until = settings.deadline(time.perf_counter())
    best = list(unrefined)
    prepared = prepare(level)
    batch = Batch.of(prepared, problems)
    y, z = batched([c.y for c in unrefined]), batched([c.z for c in unrefined])
    limit = settings.time_limit
    fitting = None if limit is None else steps_within(limit, prepared, batch, y, z, settings)
    steps, rounds = settings.steps_and_rounds(fitting)

    def check(part: float, y: Tensor, z: Tensor) -> None:
        for i, problem in enumerate(problems):
            candidate = problem.evaluate(of_image(y, i), of_image(z, i))
            if candidate.loss < best[i].loss:
                best[i] = candidate

    def report(step: int) -> None:
        if progress is not None:
            progress(state_of(best, problems, step, steps + rounds))

    def after(step: int, relaxed: Tensor) -> None:
        if step < steps + rounds:
            report(step)
        if trace is not None and step % trace.every == 0:
            now = [p.evaluate(of_image(y.detach(), i), of_image(z.detach(), i)) for i, p in enumerate(problems)]
            record(trace, step, problems, now, relaxed.tolist())

    def after_round(image: int, done: int) -> None:
        report(steps + (image * rounds + done) // len(problems))

    if steps or rounds:
        report(0)
    if trace is not None:
        record(trace, 0, problems, unrefined)
    anneal(prepared, batch, y, z, settings, steps, check, after)
    for i, problem in enumerate(problems):
        best[i] = polish(prepared, problem, best[i], rounds, until=until, report=functools.partial(after_round, i))
    report(steps + rounds)
    if trace is not None:
        record(trace, steps, problems, best)
    return best, steps


def state_of(best: list[Candidate], problems: list[Problem], step: int, steps: int) -> Progress:
    """`Progress` after a step, of the best candidate of each image."""
    bpp = sum(c.bits / p.pixels for c, p in zip(best, problems, strict=True)) / len(best)
    mse = sum(c.mse for c in best) / len(best)
    return Progress(step, steps, bpp, psnr_of(mse), len(best))


def record(
    trace: Trace, step: int, problems: list[Problem], now: list[Candidate], relaxed: list[float] | None = None
) -> None:
    """Record a point of the trace of every image."""
    for i, (problem, candidate) in enumerate(zip(problems, now, strict=True)):
        loss = None if relaxed is None else relaxed[i]
        point = TracePoint(step, candidate.loss, loss, candidate.bits / problem.pixels, psnr_of(candidate.mse))
        trace.record(i, point)


def psnr_of(mse: float) -> float:
    """PSNR in dB, at most 120, which is also that of a lossless picture."""
    return psnr_of_mse(max(mse, 1e-12))


def batched(latents: list[Tensor]) -> Tensor:
    """Latents (1, C, h, w) of several images → (B, h, w, C) contiguous, a copy."""
    return torch.cat(latents).permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)


def of_image(latents: Tensor, i: int) -> Tensor:
    """The latents of one image, (1, C, h, w), a copy."""
    return latents[i : i + 1].permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)


def steps_within(seconds: float, level: LevelModel, batch: Batch, y: Tensor, z: Tensor, settings: Settings) -> int:
    """How many steps fit into `seconds`, from timing a few steps on copies of the latents."""
    begun = time.perf_counter()
    stamps: list[float] = []

    def stamp(step: int, relaxed: Tensor) -> None:
        if level.device.type == "cuda":
            torch.cuda.synchronize(level.device)
        stamps.append(time.perf_counter())

    anneal(level, batch, y.clone(), z.clone(), settings, _TIMED, lambda *_: None, stamp)
    each = min(b - a for a, b in itertools.pairwise(stamps))
    start = max(0.0, stamps[0] - begun - each)  # on CUDA the capture of the step, which is done once more
    left = seconds - (time.perf_counter() - begun) - start
    return max(0, int(0.85 * left / each))  # the rest is for evaluating the true loss


def anneal(
    level: LevelModel,
    batch: Batch,
    y: Tensor,
    z: Tensor,
    settings: Settings,
    steps: int,
    check: Check,
    report: Callable[[int, Tensor], None],
    lmbda: Tensor | None = None,
    checks: Sequence[float] | None = None,
    first: int = 0,
) -> None:
    """Run an annealing of y (B, H/16, W/16, M) and z (B, H/64, W/64, N), in place, from step `first` on.

    Parameters
    ----------
    level : LevelModel
        From `steps.prepare`.
    check : callable
        `check(part, y, z)` is called after the steps that `checks` names, as parts of all steps. By default, there are
        five in the last part of an annealing, and one at the end of a short one.
    report : callable
        `report(step, relaxed)` is called after every step with its relaxed loss, (B,).
    lmbda : Tensor () float32, optional
        λ on the model's device, which `check` may change; None: that of the settings.
    """
    if checks is None:
        checks = _CHECKS if steps >= _SHORT else _CHECKS[-1:]
    checked = {max(1, round(part * steps)) for part in checks}
    step = stepper(level, batch, y, z, settings, steps, lmbda, first)
    for done in range(first + 1, steps + 1):
        relaxed = step()
        if done in checked:
            check(done / steps, y.detach(), z.detach())
        report(done, relaxed)
