"""Refinement of large pictures: tile by tile, with halos, in bounded memory and without seams.

    ┌──────────────────────┐
    │ wide   y, z and bits │   + 256 pixels (`lite`): latents whose entropy parameters depend on the y and z of the tile
    │   ┌──────────────┐   │
    │   │ outer pixels │   │   + 96 pixels (`lite`): pixels that depend on the y of the tile, and as many beyond them
    │   │   ┌──────┐   │   │
    │   │   │inner │   │   │   the tile: the latents that are refined

A step computes the rate over `wide`, which is cheap, and pixels over `outer` only. Of several candidates for a tile the
one with the lowest true loss over `wide` is kept; nearly all that the tile's latents influence lies in there, and the
true loss of the whole picture decides in the end. Latents around the tile are rounded and constant; in tiles that have
been refined before they have their refined values.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..device import deterministic_convolutions, reduced_precision
from ..memory import keep_freed_memory, release_free_memory
from ..models.level import LevelModel
from ..networks.architecture import HYPER_STRIDE, STRIDE, Reach
from ..settings import Settings
from ..tiling import Box, cut, slices, with_halo
from .aim import Aim
from .flips import polish
from .loop import Progress, anneal, psnr_of, steps_within
from .objective import Batch, frozen_context, rounded_figures
from .problem import Candidate, Problem
from .start import starting_point
from .steps import prepare

_STEERED = (0.3, 0.5, 0.7, 0.9, 1.0)  # when λ is steered, as parts of the steps of a tile
TILE = 1024  # largest side of a tile in pixels, a multiple of 64


@dataclass(frozen=True)
class Region:
    """A tile (`inner`) and the boxes over which a step computes pixels (`outer`) and rate (`wide`)."""

    inner: Box
    outer: Box
    wide: Box


def needs_tiles(height: int, width: int) -> bool:
    """Whether a padded picture is refined in tiles: above 1.25 times the area of the largest tile."""
    return height * width > 1.25 * TILE**2


def regions(height: int, width: int, reach: Reach) -> Iterator[Region]:
    """The tiles of a padded picture, row by row, of nearly one size, so that none is too narrow for MS-SSIM."""
    for top, bottom in _spans(height):
        for left, right in _spans(width):
            inner = top, left, bottom, right
            outer = with_halo(inner, 2 * reach.g_s, height, width)
            yield Region(inner, outer, with_halo(inner, reach.h_s + _context_halo(reach), height, width))


def tiles_of(problem: Problem) -> list[Region]:
    """The tiles of a picture."""
    return list(regions(*problem.shape, problem.level.folded.architecture.reach))


def _context_halo(reach: Reach) -> int:
    """Pixels around `inner` for the context model: the influence of a latent fades within a few passes."""
    return min(HYPER_STRIDE, reach.context + -reach.context % HYPER_STRIDE)


def _spans(length: int) -> Iterator[tuple[int, int]]:
    blocks, parts = length // HYPER_STRIDE, -(-length // TILE)
    return itertools.pairwise(blocks * i // parts * HYPER_STRIDE for i in range(parts + 1))


def refine_tiles(
    level: LevelModel,
    problem: Problem,
    start: Candidate,
    settings: Settings,
    progress: Callable[[Progress], None] | None = None,
) -> tuple[Candidate, int]:
    """Refine one large picture tile by tile.

    Parameters
    ----------
    start : Candidate
        `start.starting_point` of the problem. Its tensors are changed in place.

    Returns
    -------
    Candidate, int
        As `loop.refine`: with a true loss at most that of the unrefined latents, and the number of steps of each tile.
    """
    until = settings.deadline(time.perf_counter())
    prepared = prepare(level)
    y, z = start.y, start.z
    tiles = tiles_of(problem)
    steps, rounds = steps_of_tiles(prepared, problem, tiles, y, z, settings)
    state = RunningState(problem, start, (steps + rounds) * len(tiles), progress)
    for region in tiles if steps else ():
        state.add(steps, *refine_region(prepared, problem, region, y, z, settings, steps, state.report))
    for region in tiles if rounds else ():  # after all annealing: a change of z in a tile changes μ in its neighbours
        state.add(rounds, *polish_region(prepared, problem, region, y, z, rounds, until, state.report))
        state.report(0)
    refined = problem.evaluate(y, z)
    return (refined if refined.loss <= start.loss else starting_point(problem)), steps


class RunningState:
    """The bits and the squared error of a picture while its tiles change, and its progress.

    Parameters
    ----------
    steps : int
        Steps and rounds of all tiles.
    """

    def __init__(
        self, problem: Problem, start: Candidate, steps: int, progress: Callable[[Progress], None] | None
    ) -> None:
        self.problem, self.done, self.steps, self.progress = problem, 0, steps, progress
        self.visible = problem.visible_pixels
        self.bits, self.squares = start.bits, start.mse * self.visible

    def add(self, steps: int, more_bits: float, more_squares: float) -> None:
        """A tile has been changed in so many steps."""
        self.done, self.bits, self.squares = self.done + steps, self.bits + more_bits, self.squares + more_squares

    def report(self, step: int, more_bits: float = 0.0, more_squares: float = 0.0) -> None:
        """So many steps of the present tile are done, with these changes."""
        if self.progress is not None:
            psnr = psnr_of((self.squares + more_squares) / max(1, self.visible))
            rate = (self.bits + more_bits) / self.problem.pixels
            self.progress(Progress(self.done + step, self.steps, rate, psnr))


def steps_of_tiles(
    level: LevelModel, problem: Problem, tiles: list[Region], y: Tensor, z: Tensor, settings: Settings
) -> tuple[int, int]:
    """The steps and rounds of each tile: those of the settings, or as many as fit into their time limit."""
    if settings.time_limit is None:
        return settings.steps_and_rounds()
    largest = max(tiles, key=lambda region: area(region.outer))
    latents = _channels_last(y, largest, STRIDE), _channels_last(z, largest, HYPER_STRIDE)
    seconds = settings.time_limit / len(tiles)
    return settings.steps_and_rounds(steps_within(seconds, level, _batch(level, problem, largest), *latents, settings))


@keep_freed_memory()
@deterministic_convolutions()
def refine_region(
    level: LevelModel,
    problem: Problem,
    region: Region,
    y: Tensor,
    z: Tensor,
    settings: Settings,
    steps: int,
    report: Callable[[int, float, float], None],
    steer: Callable[[float, float, float], float] | None = None,
) -> tuple[float, float]:
    """Anneal the latents of one tile, and write those of lowest true loss into y and z (1, C, h, w).

    `report(step, bits, squares)` is called after every step, with the changes so far as they are returned. `steer(part,
    bits, squares)` returns λ for the steps after a part of them, which have made these changes of the rounded latents.

    Returns
    -------
    float, float
        The changes of the bits and of the squared error of the picture.
    """
    part = problem.part(region.wide)
    visible = part.visible_pixels
    first = best = part.evaluate(cut(y, region.wide, STRIDE), cut(z, region.wide, HYPER_STRIDE))
    release_free_memory()
    batch = _batch(level, problem, region)
    latents = _channels_last(y, region, STRIDE), _channels_last(z, region, HYPER_STRIDE)
    lmbda = torch.full((), problem.lmbda, device=level.device)
    bf16 = reduced_precision(level.device)
    context = None if steer is None else frozen_context(level, bf16)

    def rounded(y: Tensor, z: Tensor) -> tuple[float, float]:
        bits, squares = rounded_figures(level, batch, y, z, bf16, context)
        return float(bits), float(squares)

    before = (0.0, 0.0) if steer is None else rounded(*latents)

    def check(part_done: float, y: Tensor, z: Tensor) -> None:
        nonlocal best
        if steer is not None and part_done < 1:
            more_bits, more_squares = (now - then for now, then in zip(rounded(y, z), before, strict=True))
            lmbda.fill_(steer(part_done, more_bits, more_squares))
            return
        candidate = part.evaluate(*(v.permute(0, 3, 1, 2).clone() for v in (y, z)))
        if candidate.loss < best.loss:
            best = candidate
        release_free_memory()

    def changes() -> tuple[float, float]:
        return best.bits - first.bits, (best.mse - first.mse) * visible

    anneal(
        level,
        batch,
        *latents,
        settings,
        steps,
        check,
        lambda step, relaxed: report(step, *changes()),
        None if steer is None else lmbda,
        None if steer is None else _STEERED,
    )
    _write(best.y, y, region, STRIDE)
    _write(best.z, z, region, HYPER_STRIDE)
    return changes()


@keep_freed_memory()
@deterministic_convolutions()
def polish_region(
    level: LevelModel,
    problem: Problem,
    region: Region,
    y: Tensor,
    z: Tensor,
    rounds: int,
    until: float,
    report: Callable[[int], None] | None = None,
    aim_of: Callable[[Problem, Candidate], Aim] | None = None,
) -> tuple[float, float]:
    """The last pass (`flips.polish`) over one tile, in place in y (1, M, h, w); returns as `refine_region`.

    `aim_of` returns the aim for `wide`, from its part of the problem and its latents.
    """
    part = problem.part(region.wide)
    annealed = part.evaluate(cut(y, region.wide, STRIDE), cut(z, region.wide, HYPER_STRIDE))
    aim = None if aim_of is None else aim_of(part, annealed)
    release_free_memory()
    polished = polish(level, part, annealed, rounds, lambda level: _batch(level, problem, region), until, aim, report)
    _write(polished.y, y, region, STRIDE)
    return polished.bits - annealed.bits, (polished.mse - annealed.mse) * part.visible_pixels


def _write(found: Tensor, whole: Tensor, region: Region, stride: int) -> None:
    """Copy the tile's part of the latents `found`, which cover `wide`, into the latents of the picture."""
    cut(whole, region.inner, stride)[:] = cut(found, region.inner, stride, region.wide)


def _batch(level: LevelModel, problem: Problem, region: Region) -> Batch:
    """The batch of one tile: latents of `wide`, pixels of `outer`; weight 0 where no y of the tile has an influence."""
    part = problem.part(region.outer)
    rows, cols = slices(with_halo(region.inner, level.folded.architecture.reach.g_s, *problem.shape), 1, region.outer)
    weights = np.zeros(part.original.shape[:2], np.float32)
    weights[rows, cols] = 1 if part.weights is None else part.weights[rows, cols]
    return replace(
        Batch.of(level, [replace(part, weights=weights)]),
        window=slices(region.outer, STRIDE, region.wide),
        active_y=_mask(region, STRIDE).to(level.device),
        active_z=_mask(region, HYPER_STRIDE).to(level.device),
    )


def area(box: Box) -> int:
    top, left, bottom, right = box
    return (bottom - top) * (right - left)


def _channels_last(latents: Tensor, region: Region, stride: int) -> Tensor:
    """A copy of the latents of `wide`, (1, h, w, C)."""
    return cut(latents, region.wide, stride).permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)


def _mask(region: Region, stride: int) -> Tensor:
    """The latents of `wide` that belong to the tile, (1, h, w, 1) bool."""
    top, left, bottom, right = region.wide
    mask = torch.zeros(1, 1, (bottom - top) // stride, (right - left) // stride, dtype=torch.bool)
    cut(mask, region.inner, stride, region.wide)[:] = True
    return mask.permute(0, 2, 3, 1)
