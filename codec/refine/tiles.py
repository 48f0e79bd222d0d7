"""Refinement of large pictures: tile by tile, with halos, in bounded memory and without seams.

    ┌──────────────────────┐
    │ wide   y, z and bits │   + 128 pixels: hyper-latents reach that far
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from ..latents import Box, cut, slices, with_halo
from ..model_file import LevelModel
from ..networks import HYPER_STRIDE, STRIDE
from .loop import Progress, anneal, steps_within
from .objective import Batch, Candidate, Problem
from .settings import Settings

TILE = 1024  # pixels a side at most, a multiple of 64
WIDE = 128  # pixels around it: hyper-latents reach 112 (lite) or, faintly, 142 (mshyper)


@dataclass(frozen=True)
class Region:
    """A tile (inner), where a step looks at pixels (outer) and where it looks at bits (wide)."""

    inner: Box
    outer: Box
    wide: Box


def needs_tiles(height: int, width: int) -> bool:
    """Whether a padded picture is refined in tiles: where it is larger than two of them."""
    return height * width > 2 * TILE**2


def reach(level: LevelModel) -> int:
    """How far beyond its own block, or less, a y changes the picture: pixels, rounded up to a multiple of 16."""
    return 16 if level.plain.architecture.family == "lite" else 32  # 10 and 30


def regions(height: int, width: int, reach: int) -> Iterator[Region]:
    """The tiles of a padded picture, row by row, of nearly one size: none is a sliver that MS-SSIM cannot measure."""
    for top, bottom in _spans(height):
        for left, right in _spans(width):
            inner = top, left, bottom, right
            yield Region(inner, with_halo(inner, 2 * reach, height, width), with_halo(inner, WIDE, height, width))


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
    todo = list(regions(*problem.shape, reach(level)))
    steps = settings.steps
    if settings.time_limit is not None:
        largest = max(todo, key=lambda region: _area(region.outer))
        y, z = _channels_last(start.y, largest, STRIDE), _channels_last(start.z, largest, HYPER_STRIDE)
        seconds = settings.time_limit / len(todo)
        steps = min(steps, steps_within(seconds, *_prepared(level, problem, largest), y, z, settings))
    seen = problem.seen
    done, bits, squares = 0, start.bits, start.mse * seen  # of the picture as it is

    def report(step: int, more_bits: float, more_squares: float) -> None:
        if progress is not None:
            mse = (squares + more_squares) / max(1, seen)
            psnr = -10 * math.log10(max(mse, 1e-12))
            progress(Progress(done + step, steps * len(todo), (bits + more_bits) / problem.pixels, psnr))

    for region in todo:
        more_bits, more_squares = _refine_region(level, problem, region, start.y, start.z, settings, steps, report)
        done, bits, squares = done + steps, bits + more_bits, squares + more_squares
    refined = problem.evaluate(start.y, start.z)
    return (refined if refined.loss <= start.loss else problem.start()), steps


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
    seen = part.seen
    first = best = part.evaluate(cut(y, region.wide, STRIDE), cut(z, region.wide, HYPER_STRIDE))

    def check(y: Tensor, z: Tensor) -> None:
        nonlocal best
        candidate = part.evaluate(*(v.permute(0, 3, 1, 2).clone() for v in (y, z)))
        if candidate.loss < best.loss:
            best = candidate

    def added() -> tuple[float, float]:
        return best.bits - first.bits, (best.mse - first.mse) * seen

    anneal(
        *_prepared(level, problem, region),
        _channels_last(y, region, STRIDE),
        _channels_last(z, region, HYPER_STRIDE),
        settings,
        steps,
        check,
        lambda step: report(step, *added()),
    )
    for whole, found, stride in ((y, best.y, STRIDE), (z, best.z, HYPER_STRIDE)):
        cut(whole, region.inner, stride)[:] = cut(found, region.inner, stride, region.wide)
    return added()


class _PartialSynthesis(nn.Module):
    """g_s of a part of the latents it is given; pixels come unshuffled, as in `Batch`."""

    def __init__(self, g_s: nn.Module, rows: slice, cols: slice) -> None:
        super().__init__()
        self.g_s, self.rows, self.cols = g_s, rows, cols
        self.shuffle = getattr(g_s, "shuffle", 1)

    def forward(self, y_hat: Tensor) -> Tensor:
        network: nn.Module = getattr(self.g_s, "unshuffled", self.g_s)
        part = y_hat.permute(0, 2, 3, 1)[:, self.rows, self.cols]  # the gradient is channels last as its argument is
        pixels: Tensor = network(part.permute(0, 3, 1, 2))
        return pixels


def _prepared(level: LevelModel, problem: Problem, region: Region) -> tuple[LevelModel, Batch]:
    """A model whose g_s turns the y of `wide` into the pixels of `outer`, and the batch of a tile."""
    networks = level.plain.networks
    g_s = _PartialSynthesis(networks.g_s, *slices(region.outer, STRIDE, region.wide))
    part = problem.part(region.outer)
    rows, cols = slices(with_halo(region.inner, reach(level), *problem.shape), 1, region.outer)
    weights = np.zeros(part.original.shape[:2], np.float32)
    weights[rows, cols] = 1 if part.weights is None else part.weights[rows, cols]
    batch = replace(
        Batch.of(level, [replace(part, weights=weights)]),
        active_y=_mask(region, STRIDE).to(level.device),
        active_z=_mask(region, HYPER_STRIDE).to(level.device),
    )
    return replace(level, plain=replace(level.plain, networks=replace(networks, g_s=g_s))), batch


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
