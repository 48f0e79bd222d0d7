"""Refinement of large pictures: tile by tile, with halos, in bounded memory and without seams.

A tile's latents are refined while the loss is measured over the tile and a halo that is wider than the reach of its
latents: whatever the loss of that region gains, the loss of the picture gains. Latents in the halo stay rounded and
fixed, at their refined values where a neighbour has been done before.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..model_file import LevelModel
from ..networks import HYPER_STRIDE, STRIDE
from .flips import polish, rounds_after
from .loop import Progress, anneal, steps_within
from .objective import Batch, Candidate, Problem
from .settings import Settings
from .steps import prepared

TILE = 1024  # pixels a side at most, a multiple of 64
HALO = 128  # pixels around it: latents reach 30 pixels at most, hyper-latents 112 (lite) or, faintly, 142 (mshyper)


@dataclass(frozen=True)
class Region:
    """A tile (inner) and what is looked at for it (outer): top, left, bottom, right in the padded picture."""

    inner: tuple[int, int, int, int]
    outer: tuple[int, int, int, int]


def needs_tiles(problem: Problem) -> bool:
    """Whether a picture is refined in tiles: where it is larger than two of them."""
    return problem.x.shape[2] * problem.x.shape[3] > 2 * TILE**2


def regions(height: int, width: int) -> Iterator[Region]:
    """The tiles of a padded picture, row by row, of nearly one size: none is a sliver that MS-SSIM cannot measure."""
    for top, bottom in _spans(height):
        for left, right in _spans(width):
            outer = max(0, top - HALO), max(0, left - HALO), min(height, bottom + HALO), min(width, right + HALO)
            yield Region((top, left, bottom, right), outer)


def _spans(length: int) -> Iterator[tuple[int, int]]:
    blocks, parts = length // HYPER_STRIDE, -(-length // TILE)
    return itertools.pairwise(blocks * i // parts * HYPER_STRIDE for i in range(parts + 1))


def refine_tiles(
    level: LevelModel,
    problem: Problem,
    unrefined: Candidate,
    settings: Settings,
    progress: Callable[[Progress], None] | None = None,
) -> tuple[Candidate, int]:
    """Refine one large picture; see `loop.refine`."""
    until = math.inf if settings.time_limit is None else time.perf_counter() + settings.time_limit
    y = unrefined.y.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
    z = unrefined.z.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
    fast = prepared(level)
    todo = list(regions(*problem.x.shape[2:]))
    steps = settings.steps
    if settings.time_limit is not None:
        largest = max(todo, key=lambda region: _area(region.outer))
        batch = Batch.of(fast, [_part(problem, largest)])
        cut = _cut(y, largest, STRIDE), _cut(z, largest, HYPER_STRIDE)
        fitting = steps_within(settings.time_limit / len(todo), fast, batch, *cut, settings)
        steps = min(steps, fitting - rounds_after(fitting, settings))
    for number, region in enumerate(todo):
        part = _part(problem, region)
        batch = replace(
            Batch.of(fast, [part]),
            active_y=_mask(region, STRIDE).to(level.device),
            active_z=_mask(region, HYPER_STRIDE).to(level.device),
        )
        done = number * steps

        def report(step: int, done: int = done) -> None:
            if progress is not None:
                bpp = unrefined.bits / problem.pixels
                psnr = -10 * torch.log10(torch.tensor(max(unrefined.mse, 1e-12))).item()
                progress(Progress(done + step, steps * len(todo), bpp, psnr))

        _refine_region(fast, part, region, batch, y, z, settings, steps, report)
    for region in todo:  # once z is what it will be everywhere
        _polish_region(fast, _part(problem, region), region, y, z, rounds_after(steps, settings), until)
    refined = problem.evaluate(y.permute(0, 3, 1, 2), z.permute(0, 3, 1, 2))
    return (refined if refined.loss < unrefined.loss else unrefined), steps


def _refine_region(
    level: LevelModel,
    part: Problem,
    region: Region,
    batch: Batch,
    y: Tensor,
    z: Tensor,
    settings: Settings,
    steps: int,
    report: Callable[[int], None],
) -> None:
    """Anneal the latents of one tile and write the best ones into y and z (1, h, w, C)."""
    region_y, region_z = _cut(y, region, STRIDE), _cut(z, region, HYPER_STRIDE)
    best = part.evaluate(region_y.permute(0, 3, 1, 2), region_z.permute(0, 3, 1, 2))

    def check(candidate_y: Tensor, candidate_z: Tensor) -> None:
        nonlocal best
        candidate = part.evaluate(candidate_y.permute(0, 3, 1, 2).clone(), candidate_z.permute(0, 3, 1, 2).clone())
        if candidate.loss < best.loss:
            best = candidate

    anneal(level, batch, region_y.clone(), region_z.clone(), settings, steps, check, report)
    _write(best, region, y, z)


def _polish_region(
    level: LevelModel, part: Problem, region: Region, y: Tensor, z: Tensor, rounds: int, until: float
) -> None:
    """Change single integers of the y of one tile for the better."""
    start = part.evaluate(*(_cut(v, region, stride).permute(0, 3, 1, 2) for v, stride in _strides(y, z)))
    _write(polish(level, part, start, rounds, _mask(region, STRIDE).to(level.device), until), region, y, z)


def _strides(y: Tensor, z: Tensor) -> tuple[tuple[Tensor, int], tuple[Tensor, int]]:
    return (y, STRIDE), (z, HYPER_STRIDE)


def _write(best: Candidate, region: Region, y: Tensor, z: Tensor) -> None:
    """Write the latents of a tile into those of the picture."""
    for (whole, stride), found in zip(_strides(y, z), (best.y, best.z), strict=True):
        rows, cols = _slices(region.inner, (0, 0), stride)
        inner_rows, inner_cols = _slices(region.inner, region.outer[:2], stride)
        whole[:, rows, cols] = found.permute(0, 2, 3, 1)[:, inner_rows, inner_cols]


def _area(box: tuple[int, int, int, int]) -> int:
    top, left, bottom, right = box
    return (bottom - top) * (right - left)


def _slices(box: tuple[int, int, int, int], origin: tuple[int, ...], stride: int) -> tuple[slice, slice]:
    top, left, bottom, right = box
    rows = slice((top - origin[0]) // stride, (bottom - origin[0]) // stride)
    return rows, slice((left - origin[1]) // stride, (right - origin[1]) // stride)


def _cut(latents: Tensor, region: Region, stride: int) -> Tensor:
    """A copy of the latents (1, h, w, C) of a region."""
    rows, cols = _slices(region.outer, (0, 0), stride)
    return latents[:, rows, cols].detach().clone(memory_format=torch.contiguous_format)


def _mask(region: Region, stride: int) -> Tensor:
    """Which latents of a region belong to its tile, (1, h, w, 1) bool."""
    top, left, bottom, right = region.outer
    mask = torch.zeros(1, (bottom - top) // stride, (right - left) // stride, 1, dtype=torch.bool)
    rows, cols = _slices(region.inner, region.outer[:2], stride)
    mask[:, rows, cols] = True
    return mask


def _part(problem: Problem, region: Region) -> Problem:
    """The picture of a region as a problem of its own."""
    top, left, bottom, right = region.outer
    return replace(
        problem,
        x=problem.x[:, :, top:bottom, left:right],
        weight=problem.weight[:, :, top:bottom, left:right],
        original=problem.original[top:bottom, left:right],
        visible=problem.visible[top:bottom, left:right],
    )
