"""Refinement of large pictures: tile by tile, with halos, in bounded memory and without seams.

    ┌──────────────────────┐
    │ wide   y, z and bits │   + 128 or 192 pixels: hyper-latents reach that far
    │   ┌──────────────┐   │
    │   │ outer pixels │   │   + 32 or 64 pixels: latents reach half as far
    │   │   ┌──────┐   │   │
    │   │   │inner │   │   │   the tile: the latents that change

Bits cost little time and pixels much, so a step looks at few pixels around the tile: only where its y reach. What is
kept is decided by the true loss of all of `wide`: whatever that gains, the picture gains. Latents around the tile stay
rounded and fixed, at their refined values where a neighbour has been done before.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..memory import freed_memory_kept, give_back
from ..models.level import LevelModel
from ..networks.architecture import HYPER_STRIDE, STRIDE, Reach
from ..settings import Settings
from ..tiling import Box, cut, slices, with_halo
from .flips import polish
from .loop import Progress, anneal, psnr_of, steps_within
from .objective import Batch
from .problem import Candidate, Problem
from .steps import prepared

TILE = 1024  # pixels a side at most, a multiple of 64


@dataclass(frozen=True)
class Region:
    """A tile (inner), where a step looks at pixels (outer) and where it looks at bits (wide)."""

    inner: Box
    outer: Box
    wide: Box


def needs_tiles(height: int, width: int) -> bool:
    """Whether a padded picture is refined in tiles: where it is a good deal larger than one."""
    return height * width > 1.25 * TILE**2


def regions(height: int, width: int, reach: Reach) -> Iterator[Region]:
    """The tiles of a padded picture, row by row, of nearly one size: none is a sliver that MS-SSIM cannot measure."""
    for top, bottom in _spans(height):
        for left, right in _spans(width):
            inner = top, left, bottom, right
            outer = with_halo(inner, 2 * reach.g_s, height, width)
            yield Region(inner, outer, with_halo(inner, reach.h_s, height, width))


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
    """Refine one large picture, in place: the tensors of `start` are changed. Else as `loop.refine`."""
    until = math.inf if settings.time_limit is None else time.perf_counter() + settings.time_limit
    fast = prepared(level)
    y, z = start.y, start.z
    todo = list(regions(*problem.shape, level.folded.architecture.reach))
    steps, rounds = settings.steps, settings.rounds_after(settings.steps)
    if settings.time_limit is not None:
        largest = max(todo, key=lambda region: _area(region.outer))
        batch = _batch(fast, problem, largest)
        latents = _channels_last(y, largest, STRIDE), _channels_last(z, largest, HYPER_STRIDE)
        seconds = settings.time_limit / len(todo)
        steps, rounds = settings.shared_out(steps_within(seconds, fast, batch, *latents, settings))
    total = (steps + rounds) * len(todo)
    seen = problem.visible_pixels
    done, bits, squares = 0, start.bits, start.mse * seen  # of the picture as it is

    def report(step: int, more_bits: float, more_squares: float) -> None:
        if progress is not None:
            mse = (squares + more_squares) / max(1, seen)
            progress(Progress(done + step, total, (bits + more_bits) / problem.pixels, psnr_of(mse)))

    for region in todo if steps else ():
        more_bits, more_squares = _refine_region(fast, problem, region, y, z, settings, steps, report)
        done, bits, squares = done + steps, bits + more_bits, squares + more_squares
    for region in todo if rounds else ():  # once z is what it will be everywhere
        more_bits, more_squares = _polish_region(fast, problem, region, y, z, rounds, until)
        done, bits, squares = done + rounds, bits + more_bits, squares + more_squares
        report(0, 0.0, 0.0)
    refined = problem.evaluate(y, z)
    return (refined if refined.loss <= start.loss else problem.start()), steps


@freed_memory_kept()
def _refine_region(
    level: LevelModel,
    problem: Problem,
    region: Region,
    y: Tensor,
    z: Tensor,
    settings: Settings,
    steps: int,
    report: Callable[[int, float, float], None],
) -> tuple[float, float]:
    """Anneal the latents of one tile and write the best ones into y and z (1, C, h, w).

    Returns
    -------
    float, float
        What the tile has added to the bits and to the squared error of the picture; `report` is told the same.
    """
    part = problem.part(region.wide)
    seen = part.visible_pixels
    first = best = part.evaluate(cut(y, region.wide, STRIDE), cut(z, region.wide, HYPER_STRIDE))
    give_back()

    def check(y: Tensor, z: Tensor) -> None:
        nonlocal best
        candidate = part.evaluate(*(v.permute(0, 3, 1, 2).clone() for v in (y, z)))
        if candidate.loss < best.loss:
            best = candidate
        give_back()

    def added() -> tuple[float, float]:
        return best.bits - first.bits, (best.mse - first.mse) * seen

    anneal(
        level,
        _batch(level, problem, region),
        _channels_last(y, region, STRIDE),
        _channels_last(z, region, HYPER_STRIDE),
        settings,
        steps,
        check,
        lambda step: report(step, *added()),
    )
    _write(best.y, y, region, STRIDE)
    _write(best.z, z, region, HYPER_STRIDE)
    return added()


@freed_memory_kept()
def _polish_region(
    level: LevelModel, problem: Problem, region: Region, y: Tensor, z: Tensor, rounds: int, until: float
) -> tuple[float, float]:
    """Change single integers of the y of one tile for the better, in y (1, M, h, w); returns as `_refine_region`."""
    part = problem.part(region.wide)
    annealed = part.evaluate(cut(y, region.wide, STRIDE), cut(z, region.wide, HYPER_STRIDE))
    give_back()
    polished = polish(level, part, annealed, rounds, lambda level: _batch(level, problem, region), until)
    _write(polished.y, y, region, STRIDE)
    return polished.bits - annealed.bits, (polished.mse - annealed.mse) * part.visible_pixels


def _write(found: Tensor, whole: Tensor, region: Region, stride: int) -> None:
    """Put the latents found for a tile, of all of `wide`, where they belong in those of the picture."""
    cut(whole, region.inner, stride)[:] = cut(found, region.inner, stride, region.wide)


def _batch(level: LevelModel, problem: Problem, region: Region) -> Batch:
    """The pixels of `outer`, those that the tile reaches weighed, and which of the latents of `wide` may change."""
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


def _area(box: Box) -> int:
    top, left, bottom, right = box
    return (bottom - top) * (right - left)


def _channels_last(latents: Tensor, region: Region, stride: int) -> Tensor:
    """A copy of the latents of a region, (1, h, w, C)."""
    return cut(latents, region.wide, stride).permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)


def _mask(region: Region, stride: int) -> Tensor:
    """Which latents of a region belong to its tile, (1, h, w, 1) bool."""
    top, left, bottom, right = region.wide
    mask = torch.zeros(1, 1, (bottom - top) // stride, (right - left) // stride, dtype=torch.bool)
    cut(mask, region.inner, stride, region.wide)[:] = True
    return mask.permute(0, 2, 3, 1)
