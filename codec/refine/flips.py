"""The last pass of a refinement: single integers of y change by one where that lowers the true loss.

    integers ─► x̂ ─► the true loss ─► its gradient ─► the best change at each position of y ─► integers … × rounds

Annealing ends at integers that are good together, but thousands of them would be better one up or one down. With z
fixed, what a change costs in bits is known exactly: two entries of a table. What it does to the squared error is
predicted from the gradient at the integers and the curvature, which is nearly the same for all symbols of a channel.
A round costs one pass of g_s forward and back, about as much as a step of the annealing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..coding.range_coder import Tables
from ..device import reduced_precision
from ..latents import Latents, quantize
from ..memory import give_back
from ..models.level import LevelModel
from .fused import weighted_squares
from .objective import Batch, synthesise
from .problem import Candidate, Problem

_MARGIN = 0.05  # of the curvature: a change is made where it is predicted to gain more than this
_PROBES = 2  # random directions that the curvature is measured with


@torch.no_grad()
def polish(
    level: LevelModel,
    problem: Problem,
    candidate: Candidate,
    rounds: int,
    batch_of: Callable[[LevelModel], Batch] | None = None,
    until: float = math.inf,
) -> Candidate:
    """Change single integers of y by one, at most one at each position in each round, and keep the best round.

    Parameters
    ----------
    level : LevelModel
        The problem's, or `steps.prepared` of it.
    batch_of : callable, optional
        The pixels to look at and the positions of y whose integers may change, for a level; None: all of the problem's.
    until : float
        Seconds of `time.perf_counter` after which no round begins.

    Returns
    -------
    Candidate
        Never worse than the given one, which comes back when nothing helps.
    """
    if rounds == 0 or time.perf_counter() > until:
        return candidate
    begun = time.perf_counter()
    if reduced_precision(level.device):  # a change gains less than bfloat16 can tell
        level = problem.level
    loss = _Loss(level, Batch.of(level, [problem]) if batch_of is None else batch_of(level), problem.lmbda)
    latents = quantize(level, candidate.y, candidate.z)
    y_hat, entry = latents.y_hat(), entries(latents, level.y_tables)
    del latents
    give_back()
    unpolished = best = y_hat
    least, gradient = loss.at(y_hat, entry)
    give_back()
    curvature = loss.curvature(y_hat)
    give_back()
    for _ in range(rounds):
        took, begun = time.perf_counter() - begun, time.perf_counter()
        if begun + 2 * took > until:  # a round and the evaluation
            break
        move = loss.best_moves(entry, gradient, curvature)
        y_hat, entry, before = y_hat + move, entry + move.long(), gradient
        bits, gradient = loss.at(y_hat, entry)
        if bits < least:
            least, best = bits, y_hat
        seen = ((gradient - before) * move).clamp_(min=0)
        curvature = torch.where(move != 0, (curvature + seen) / 2, curvature)
    if best is unpolished:
        return candidate
    give_back()
    polished = problem.evaluate(best, candidate.z)
    return polished if polished.loss < candidate.loss else candidate


class _Loss:
    """What a picture costs in bits, its squared error weighed by λ included, as a function of y.

    Below, ŷ is (1, M, H/16, W/16) float32, and so are the gradient, the curvature and the moves; `entry` is as
    :func:`entries` gives it.
    """

    def __init__(self, level: LevelModel, batch: Batch, lmbda: float) -> None:
        self.level, self.batch = level, batch
        self.x, self.weight = batch.x, (lmbda * 255**2 / 3) * batch.weight
        self.price, self.lower, self.higher = (v.to(level.device) for v in prices(level.y_tables))

    def synthesise(self, y_hat: Tensor) -> Tensor:
        """x̂, held as in a `Batch`."""
        return synthesise(self.level, self.batch, y_hat.permute(0, 2, 3, 1))

    def at(self, y_hat: Tensor, entry: Tensor) -> tuple[float, Tensor]:
        """The loss, of the 8-bit picture, and the gradient of its squared error before the rounding to 8 bits."""
        with torch.enable_grad():
            y_hat = y_hat.detach().requires_grad_()
            x_hat = self.synthesise(y_hat).clamp(0, 1)
            squares = weighted_squares(x_hat, self.x, self.weight)
        (gradient,) = torch.autograd.grad(squares, y_hat)
        error = x_hat.detach().mul_(255).round_().div_(255).sub_(self.x)
        spent = self.price[entry].sum(dtype=torch.float64)
        return float(error.square_().mul_(self.weight).sum(dtype=torch.float64) + spent), gradient

    def curvature(self, y_hat: Tensor) -> Tensor:
        """The second derivative of the squared error by each symbol, estimated as channel × position.

        Random signs through the transposed Jacobian have the squared norms of its columns as their mean square
        (Hutchinson); a column depends on its channel and on the weights of the pixels around its position.
        """
        with torch.enable_grad():
            y_hat = y_hat.detach().requires_grad_()
            x_hat = self.synthesise(y_hat)
        squares = torch.zeros_like(y_hat)
        for seed in range(_PROBES):
            signs = torch.randint(0, 2, x_hat.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
            probe = (2 * signs - 1).to(x_hat) * self.weight.sqrt()
            (through,) = torch.autograd.grad(x_hat, y_hat, probe, retain_graph=seed < _PROBES - 1)
            squares += through.square_()
        channel, position = squares.mean(dim=(2, 3), keepdim=True), squares.mean(dim=1, keepdim=True)
        return (2 / _PROBES) * channel * position / squares.mean().clamp(min=1e-30)

    def best_moves(self, entry: Tensor, gradient: Tensor, curvature: Tensor) -> Tensor:
        """The change, −1, 0 or 1, of each symbol; at most one symbol of a position changes."""
        down, up = self.lower[entry].sub_(gradient), self.higher[entry].add_(gradient)
        gain, channel = torch.minimum(down, up).add_(curvature, alpha=0.5).min(dim=1, keepdim=True)
        worth = gain < -_MARGIN * curvature.gather(1, channel)
        if self.batch.active_y is not None:
            worth &= self.batch.active_y.permute(0, 3, 1, 2)
        sign = torch.where(up.gather(1, channel) < down.gather(1, channel), 1.0, -1.0)
        return torch.zeros_like(gradient).scatter_(1, channel, sign * worth)


def prices(tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
    """What the symbol at each entry of all tables costs, and what it costs more when it is one lower and one higher.

    Returns
    -------
    price, lower, higher : Tensor (total,) float32
        In bits. A change from the escape or into it costs ∞.
    """
    price = tables.bits()
    first, escape = tables.starts[:-1], tables.starts[1:] - 1
    higher = np.append(np.diff(price), np.inf)
    lower = -np.roll(higher, 1)
    lower[first] = lower[escape] = np.inf
    higher[escape - 1] = higher[escape] = np.inf
    return torch.from_numpy(price).float(), torch.from_numpy(lower).float(), torch.from_numpy(higher).float()


def entries(latents: Latents, tables: Tables) -> Tensor:
    """Where each symbol of y stands among the entries of all tables, int64; at the escape where it is outside."""
    first, escape, minimum = (
        torch.from_numpy(v).to(latents.index.device)[latents.index.long()]
        for v in (tables.starts[:-1], tables.starts[1:] - 1, tables.minimum)
    )
    entry = first + latents.y - minimum
    return torch.where((entry >= first) & (entry < escape), entry, escape)
