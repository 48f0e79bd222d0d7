"""The last pass of a refinement ("rounds"): coordinate descent over the integers of y, in steps of ±1, with z fixed.

    integers ─► true loss and gradient of the squared error ─► best change at each position of y ─► integers … × rounds

After annealing, the loss still falls when certain single symbols of y are raised or lowered by one. The change in bits
is exact: the difference of two entries of a probability table. The change in squared error is predicted to second
order, from the gradient at the integers and an estimate of the diagonal of the Hessian. All positions change at once,
one channel each, so a round is a Jacobi step of coordinate descent; the round with the lowest true loss is kept. A
round runs g_s forward and backward once, in float32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..coding.range_coder import Tables
from ..device import reduced_precision
from ..latents import quantize
from ..memory import release_free_memory
from ..models.level import LevelModel
from .aim import Aim
from .fused import weighted_squares
from .objective import Batch, squared_jacobian, synthesize
from .problem import Candidate, Problem
from .steps import prepare
from .symbols import Coded, symbol_coder

_MARGIN = 0.05  # a symbol is changed where the loss is predicted to fall by more than this part of the curvature
_SHARE = 0.4  # with a context model, the share of the predicted changes that a round makes: those that gain most
_LEAST_SHARE, _SHARE_OF_EXCESS = 0.05, 15.0  # with an aim: bounds this share, below, and above for each unit of excess
_LATER = 0.5  # weight of the gradient of later bits, which overestimates the effect of a change by one
_LANDING = 16  # with an aim: further rounds until it is met
_FARTHEST, _HALVINGS = 1.0, 8  # with an aim: interval of log λ to both sides in which a round's λ is; its halvings


@torch.no_grad()
def polish(
    level: LevelModel,
    problem: Problem,
    candidate: Candidate,
    rounds: int,
    batch_of: Callable[[LevelModel], Batch] | None = None,
    until: float = math.inf,
    aim: Aim | None = None,
    report: Callable[[int], None] | None = None,
) -> Candidate:
    """Change symbols of y by one, at most one channel at each position in each round, and keep the best round.

    Parameters
    ----------
    level : LevelModel
        The level of the problem, or `steps.prepare` of it.
    rounds : int
        How many rounds are made; 0 returns the candidate.
    batch_of : callable, optional
        Returns, for a level, the batch that the loss is computed on, with the positions of y that may change. None: the
        whole problem.
    until : float
        Value of `time.perf_counter` after which no round begins, in seconds.
    aim : Aim, optional
        What the result should have: the changes of a round are those of the λ at which they are predicted to meet the
        aim, corrected by the error of the last prediction. The best round that meets the aim, or the nearest, is kept.
    report : callable, optional
        Called after every round but the last with the number of rounds done.

    Returns
    -------
    Candidate
        With the same z. Without an aim, its true loss is at most that of `candidate`, which is returned where no round
        lowers it.
    """
    if rounds == 0 or time.perf_counter() > until:
        return candidate
    begun = time.perf_counter()
    if reduced_precision(level.device):  # bfloat16 is too coarse for the gain of single changes
        level = prepare(problem.level, bf16=False)
    batch = Batch.of(level, [problem]) if batch_of is None else batch_of(level)
    latents = candidate.quantized or quantize(level, candidate.y, candidate.z)
    loss = _Loss(level, batch, symbol_coder(level, latents))
    symbols = latents.y.float()
    release_free_memory()
    first = best = found = loss.at(symbols)
    landing = None if aim is None else _Landing(aim, problem, candidate, first)

    def rank(found: _Found) -> tuple[float, float]:
        """Smaller is better: how far a round is from the aim, then its loss."""
        distance = 0.0 if landing is None else landing.aim.distance(landing.excess(found))
        return distance, problem.lmbda * found.distortion + found.bits

    release_free_memory()
    curvature = loss.curvature(found.y_hat)
    release_free_memory()
    for done in range(rounds if aim is None else rounds + _LANDING):
        if done >= rounds and rank(best)[0] == 0:
            break
        took, begun = time.perf_counter() - begun, time.perf_counter()
        if begun + 2 * took > until:  # time for one more round and the evaluation after the last
            break
        before, choice = found, (problem.lmbda, _SHARE)
        if landing is not None:
            choice = landing.choice(loss, found, curvature)
        moves = loss.best_moves(found, curvature, *choice)
        symbols = symbols + moves.symbols
        found = loss.at(symbols)
        if landing is not None:
            landing.learn(before, moves, found)
        if rank(found) < rank(best):
            best = found
        secant = ((found.gradient - before.gradient) * moves.symbols).clamp_(min=0)
        curvature = torch.where(moves.symbols != 0, (curvature + secant) / 2, curvature)
        if report is not None and done + 1 < rounds:
            report(done + 1)
    if best is first:
        return candidate
    release_free_memory()
    polished = problem.evaluate(best.y_hat, candidate.z)
    return polished if aim is not None or polished.loss < candidate.loss else candidate


@dataclass(frozen=True)
class _Found:
    """Figures of symbols, with 8-bit pixels; the tensors are (1, M, H/16, W/16).

    Attributes
    ----------
    bits : float
        Of y.
    distortion : float
        255²·(squared error), weighted as in the loss; its product with λ and `bits` add up to the loss in bits.
    squares : float
        Squared error of the visible pixels, which are in 0..1, mean of the colours.
    gradient, later : Tensor
        Derivatives by the symbols: of `distortion`, and of the bits of later symbols.
    y_hat, entry : Tensor
        ŷ, and `symbols.Coded.entry`.
    """

    bits: float
    distortion: float
    squares: float
    gradient: Tensor
    later: Tensor | None
    y_hat: Tensor
    entry: Tensor


@dataclass(frozen=True)
class _Moves:
    """Changes of symbols, −1, 0 or 1, (1, M, H/16, W/16), and the changes of `bits` and `distortion` they predict."""

    symbols: Tensor
    bits: float
    distortion: float


class _Loss:
    """Bits of y and squared error as functions of the symbols of y, for fixed z.

    Symbols, the curvature and the changes of symbols ("moves") are (1, M, H/16, W/16) float32.
    """

    def __init__(self, level: LevelModel, batch: Batch, code: Callable[[Tensor], Coded]) -> None:
        self.level, self.batch, self.code = level, batch, code
        self.x, self.weight = batch.x, (255**2 / 3) * batch.weight
        self.bits, self.lower, self.higher = (v.to(level.device) for v in bit_costs(level.y_tables))

    def synthesize(self, y_hat: Tensor) -> Tensor:
        """x̂, in the layout of `Batch.x`."""
        return synthesize(self.level, self.batch, y_hat.permute(0, 2, 3, 1))

    def at(self, symbols: Tensor) -> _Found:
        with torch.enable_grad():
            symbols = symbols.detach().requires_grad_()
            coded = self.code(symbols)
            y_hat = coded.y_hat.detach().requires_grad_()
            x_hat = self.synthesize(y_hat).clamp(0, 1)
            smooth = weighted_squares(x_hat, self.x, self.weight)
        (gradient,) = torch.autograd.grad(smooth, y_hat)  # that by the symbols
        later = torch.autograd.grad(coded.later_bits, symbols)[0] if coded.later_bits.requires_grad else None
        error = x_hat.detach().mul_(255).round_().div_(255).sub_(self.x).square_()
        squares = float(error.mul(self.batch.weight > 0).sum(dtype=torch.float64)) / self.batch.colours
        return _Found(
            bits=float(self.bits[coded.entry].sum(dtype=torch.float64)),
            distortion=float(error.mul_(self.weight).sum(dtype=torch.float64)),
            squares=squares,
            gradient=gradient,
            later=later,
            y_hat=y_hat.detach(),
            entry=coded.entry,
        )

    def curvature(self, y_hat: Tensor) -> Tensor:
        """Estimate of the second derivative of the squared error by each symbol.

        The variance of `squared_jacobian` is reduced by a rank-one model: a factor of the channel times one of the
        position.
        """
        squares = squared_jacobian(self.level, self.batch, y_hat.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        channel, position = squares.mean(dim=(2, 3), keepdim=True), squares.mean(dim=1, keepdim=True)
        return 2 * channel * position / squares.mean().clamp(min=1e-30)

    def best_moves(self, found: _Found, curvature: Tensor, lmbda: float, share: float = _SHARE) -> _Moves:
        """The changes that lower the loss at λ most, of at most one channel at each position."""
        gradient = lmbda * found.gradient
        if found.later is not None:
            gradient.add_(found.later, alpha=_LATER)
        down, up = self.lower[found.entry].sub_(gradient), self.higher[found.entry].add_(gradient)
        gain, channel = torch.minimum(down, up).add_(curvature, alpha=lmbda / 2).min(dim=1, keepdim=True)
        bend = curvature.gather(1, channel)
        worth = gain < -_MARGIN * lmbda * bend
        if self.batch.active_y is not None:
            worth &= self.batch.active_y.permute(0, 3, 1, 2)
        if self.level.folded.context is not None:  # neighbours that change at once spoil each other's prediction
            count = max(1, int(share * int(worth.sum())))
            worth &= gain <= gain.where(worth, torch.inf).flatten().kthvalue(min(count, gain.numel())).values
        change = torch.where(up.gather(1, channel) < down.gather(1, channel), 1.0, -1.0) * worth
        distortion = found.gradient.gather(1, channel) * change + bend / 2 * worth
        return _Moves(
            symbols=torch.zeros_like(gradient).scatter_(1, channel, change),
            bits=float((gain.where(worth, 0.0) - lmbda * distortion).sum(dtype=torch.float64)),
            distortion=float(distortion.sum(dtype=torch.float64)),
        )


class _Landing:
    """λ of each round, and the share of the changes it makes, so that an aim is met.

    Parameters
    ----------
    candidate : Candidate
        With the figures of `first`.
    """

    def __init__(self, aim: Aim, problem: Problem, candidate: Candidate, first: _Found) -> None:
        self.aim, self.problem, self.candidate, self.first = aim, problem, candidate, first
        self.bias = 0.0  # of the last prediction

    def excess(self, found: _Found) -> float:
        squares = (found.squares - self.first.squares) / max(1, self.problem.visible_pixels)
        return self.aim.excess(self.candidate.bits + found.bits - self.first.bits, self.candidate.mse + squares)

    def choice(self, loss: _Loss, found: _Found, curvature: Tensor) -> tuple[float, float]:
        """λ, by bisection, and the share of the next round."""
        wanted = -self.aim.slack / 2 - self.excess(found)
        share = min(_SHARE, max(_LEAST_SHARE, _SHARE_OF_EXCESS * abs(wanted)))
        middle = math.log(self.problem.lmbda)
        low, high = middle - _FARTHEST, middle + _FARTHEST
        for _ in range(_HALVINGS):
            change = self._predicted(found, loss.best_moves(found, curvature, math.exp(middle), share))
            if (self.aim.bits is None) != (change < wanted - self.bias):  # bits rise with λ, the squared error falls
                low = middle
            else:
                high = middle
            middle = (low + high) / 2
        return math.exp(middle), share

    def learn(self, before: _Found, moves: _Moves, found: _Found) -> None:
        """Compare the prediction of a round with what has become of it."""
        self.bias = self.excess(found) - self.excess(before) - self._predicted(before, moves)

    def _predicted(self, found: _Found, moves: _Moves) -> float:
        """Change of the excess by moves."""
        value, change = (found.bits, moves.bits) if self.aim.bits is not None else (found.distortion, moves.distortion)
        return math.log(max(1e-9, 1 + change / max(value, 1e-9)))


def bit_costs(tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
    """Bits of the symbol at each entry of all tables, and the change in bits for the symbols below and above it.

    Returns
    -------
    bits, lower, higher : Tensor (total,) float32
        ∞ for a change to or from the escape.
    """
    bits = tables.bits()
    first, escape = tables.starts[:-1], tables.starts[1:] - 1
    higher = np.append(np.diff(bits), np.inf)
    lower = -np.roll(higher, 1)
    lower[first] = lower[escape] = np.inf
    higher[escape - 1] = higher[escape] = np.inf
    return torch.from_numpy(bits).float(), torch.from_numpy(lower).float(), torch.from_numpy(higher).float()
