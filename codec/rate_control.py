"""λ for a wanted rate, size or quality.

Bytes and PSNR both rise with λ. Unrefined encodings, which are fast, bracket λ first; refined encodings then approach
the target by secants inside the bracket, and the best of them is the result.

A time limit holds for the whole search. The bracket takes at most a third of it; the rest is divided into equal parts
for a few refined encodings, so that all of them have about the same number of steps. Where no time is left for a
refined encoding that meets the target, bisection goes on, and the result is unrefined.

A picture may not have as many bits as `target_bpp` or `target_size` allow (a black one has hardly any): the best of the
encodings below is the result then, with a warning. All other targets that cannot be reached are errors.

Where the refinement itself steers λ to the target (`refine/steer.py`, `refine/steer_tiles.py`), one to four unrefined
encodings find the level, and one refined encoding is enough, up to three where it misses.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Generic

from .settings import LAMBDA_RANGE, Settings
from .targets import (
    CLOSE_PSNR,
    CLOSE_RATE,
    FAR_RATE,
    Figures,
    Result,
    TargetError,
    Trial,
    best_of,
    error_of,
    is_hit,
    leaves_room,
    shown,
    unreached,
)

_UNREFINED_TRIALS, _TRIALS, _STEERED_TRIALS = 7, 6, 3
_APPROACHES = 4  # most unrefined encodings before one that steers λ
_NEAR_RATE, _NEAR_PSNR = 0.08, 0.3  # errors at which they end earlier, in dB for PSNR
_PARTS = 3  # refined encodings that a time limit is planned for; most searches need no more
_NEAR_END = 0.7  # logarithm of the ratio of λ and an end of its range where neither bytes nor PSNR change much more
_GAIN_RATE, _GAIN_PSNR = 0.006, -0.85  # typical logarithm of the ratio of unrefined to refined bytes; PSNR in dB
_LOWER_RATE, _LOWER_PSNR = 0.19, 1.5  # slopes of these gains over log(λ / λ of the refined level)
_SLOPE_RATE, _SLOPE_PSNR = 0.65, 3.0  # typical d log(bytes) / d log λ, and dPSNR / d log λ in dB


def search(
    settings: Settings,
    encode: Callable[[Settings], Result],
    figures: Callable[[Result], Figures],
    clock: Callable[[], float] = time.monotonic,
    steered: bool = False,
) -> tuple[Result, str]:
    """Encode at the λ that meets the target.

    Parameters
    ----------
    settings : Settings
        With one target. `time_limit` is for the whole search: no refinement goes on after it.
    encode : callable
        Encodes the picture with settings that have a λ and no target; if `steered`, those of refined encodings have the
        target, too, and λ is where they begin.
    figures : callable
        The figures of a result.
    clock : callable
        Seconds since an arbitrary moment.

    Returns
    -------
    Result
        For `target_size` the largest that is not above it; for `target_psnr` the smallest that is not below it; for
        `target_bpp` the nearest, or the best below it where no λ comes near. It is unrefined where the time limit ends
        before a refined encoding meets the target.
    str
        One line if the result is far below a `target_bpp` or `target_size`; else empty.

    Raises
    ------
    TargetError
        When no λ meets it.
    """
    run = _Search(settings, encode, figures, clock, steered)
    (run.approach if steered else run.bracket)(run.limit / 3)
    if not leaves_room(settings, run.unrefined[0].figures):
        raise TargetError(unreached(settings, run.unrefined, ""))
    late = run.refine()
    best = best_of(settings, run.refined)
    if best is None and late:
        run.bracket(math.inf)
    if best is None:
        best = best_of(settings, run.unrefined)
    when = " within the time limit" if late else ""
    if best is not None and (settings.target_size is None or best.error >= -FAR_RATE):
        return best.result, ""
    trials = [*run.refined, *run.unrefined]
    below = [t for t in trials if t.error < 0]
    if settings.target_psnr is not None or not below:
        raise TargetError(unreached(settings, trials, when))
    best = max(below, key=lambda t: (t.figures.psnr, -t.figures.size))
    wanted = f"{settings.target_size} bytes" if settings.target_size else f"{settings.target_bpp:g} bits a pixel"
    return best.result, f"no λ gives {wanted}{when}; the best below is {shown(best.figures)}"


class _Search(Generic[Result]):
    """The encodings of one search, with the parameters of `search`."""

    def __init__(
        self,
        settings: Settings,
        encode: Callable[[Settings], Result],
        figures: Callable[[Result], Figures],
        clock: Callable[[], float],
        steered: bool,
    ) -> None:
        self.settings, self.encode, self.figures, self.clock, self.steered = settings, encode, figures, clock, steered
        self.begin, self.limit = clock(), math.inf if settings.time_limit is None else settings.time_limit
        self.plain = replace(settings, target_bpp=None, target_size=None, target_psnr=None)
        self.unrefined: list[Trial[Result]] = []
        self.refined: list[Trial[Result]] = []

    def bracket(self, seconds: float) -> None:
        """Bisect with unrefined encodings, at least one, until `seconds` after the beginning."""
        while self._goes_on(_UNREFINED_TRIALS, seconds):
            self._try_unrefined(_middle(self.settings, self.unrefined))

    def approach(self, seconds: float) -> None:
        """Secants with unrefined encodings, at least one, until the level is found, or `seconds` have passed."""
        near = _NEAR_PSNR if self.settings.target_psnr is not None else _NEAR_RATE
        position = math.log(self.settings.lmbda)
        while self._goes_on(_APPROACHES, seconds):
            self._try_unrefined(position)
            found = {_effective(trial) for trial in self.unrefined}
            last = self.unrefined[-1]
            if abs(last.error - _gain(self.settings, last)) < near or len(found) < len(self.unrefined):
                break
            position = _secant(self.settings, self.unrefined)

    def refine(self) -> bool:
        """Refined encodings until one is a hit; whether the time limit ended them."""
        parts, most = (1, _STEERED_TRIALS) if self.steered else (_PARTS, _TRIALS)
        settings, position = self.settings, self._first_position()
        part = (self.begin + self.limit - self.clock()) / parts
        while len(self.refined) < most:
            left = self.begin + self.limit - self.clock()
            if left <= 0 or left < part / 2:  # too few steps for an encoding that is compared with the others
                return True
            chosen = replace(settings if self.steered else self.plain, lmbda=math.exp(position))
            if settings.time_limit is not None:
                chosen = replace(chosen, time_limit=min(part, left))
            self.refined.append(self._attempt(chosen if settings.method != "none" else chosen.unrefined))
            position = _next(settings, self.refined)
            if is_hit(settings, self.refined[-1].error) or _is_at_the_end(self.refined[-1], position):
                break
        return False

    def _first_position(self) -> float:
        """log λ of the first refined encoding."""
        if self.steered:
            return _secant(self.settings, self.unrefined)
        if len(self.unrefined) < _UNREFINED_TRIALS:  # no time for more
            return _next(self.settings, self.unrefined)
        if len({trial.error > 0 for trial in self.unrefined}) == 1:
            # Unrefined encodings do not reach the target, as they do not change beyond the ladder: begin near its end.
            return math.log(min(self.unrefined, key=lambda trial: abs(trial.error)).lmbda)
        return _middle(self.settings, self.unrefined)

    def _goes_on(self, most: int, seconds: float) -> bool:
        trials = self.unrefined
        return len(trials) < most and (not trials or self.clock() - self.begin < seconds)

    def _try_unrefined(self, position: float) -> None:
        self.unrefined.append(self._attempt(replace(self.plain, lmbda=math.exp(position)).unrefined))

    def _attempt(self, chosen: Settings) -> Trial[Result]:
        result = self.encode(chosen)
        found = self.figures(result)
        return Trial(lmbda=chosen.lmbda, error=error_of(self.settings, found), figures=found, result=result)


def _middle(settings: Settings, trials: list[Trial[Result]]) -> float:
    """log λ halfway between the nearest trials on both sides of the target, or an end of the range; at first λ."""
    if not trials:
        return math.log(settings.lmbda)
    low = max((t.lmbda for t in trials if t.error <= 0), default=LAMBDA_RANGE[0])
    high = min((t.lmbda for t in trials if t.error > 0), default=LAMBDA_RANGE[1])
    return (math.log(low) + math.log(high)) / 2


def _is_at_the_end(trial: Trial[Result], position: float) -> bool:
    """Whether λ was steered to the end of its range that is nearest to the target, or the next trial is the same."""
    end = LAMBDA_RANGE[trial.error < 0]
    if trial.figures.final_lambda is not None:
        return abs(math.log(trial.figures.final_lambda / end)) < _NEAR_END
    return math.isclose(position, math.log(trial.lmbda), abs_tol=1e-9)


def _secant(settings: Settings, trials: list[Trial[Result]]) -> float:
    """log λ at which a line through the last two trials, or one of typical slope, meets the target."""
    last = trials[-1]
    slope = _SLOPE_PSNR if settings.target_psnr is not None else _SLOPE_RATE
    away = max(-10.0, min(10.0, last.error - _gain(settings, last)))  # the PSNR of a lossless picture is infinite
    if len(trials) > 1 and (ratio := _effective(last) / _effective(trials[-2])) != 1:
        found = (last.error - trials[-2].error) / math.log(ratio)
        slope = min(2 * slope, max(slope / 2, found))
    low, high = map(math.log, LAMBDA_RANGE)
    return min(high, max(low, math.log(_effective(last)) - away / slope))


def _effective(trial: Trial[Result]) -> float:
    """λ of the level of an unrefined encoding."""
    return trial.figures.level_lambda or trial.lmbda


def _gain(settings: Settings, trial: Trial[Result]) -> float:
    """The error of an unrefined encoding at the λ with which a refined one, at its level, meets the target."""
    lmbda = _effective(trial)
    lower = 0.0 if settings.level_lambda else math.log(lmbda / replace(settings, lmbda=lmbda).coding_lambda)
    return _GAIN_PSNR + _LOWER_PSNR * lower if settings.target_psnr is not None else _GAIN_RATE + _LOWER_RATE * lower


def _next(settings: Settings, trials: list[Trial[Result]]) -> float:
    """log λ of the next trial: between two neighbours on both sides of the target, or a step beyond the last.

    The aim is the middle of the interval that counts as a hit.
    """
    slope, aim = _SLOPE_RATE, 0.0
    if settings.target_size is not None:
        aim = -CLOSE_RATE / 2
    elif settings.target_psnr is not None:
        slope, aim = _SLOPE_PSNR, CLOSE_PSNR / 2
    neighbours = itertools.pairwise(sorted(trials, key=lambda t: t.lmbda))
    around = [(a, b) for a, b in neighbours if (a.error > aim) != (b.error > aim)]  # several where errors do not rise
    if around:
        a, b = min(around, key=lambda pair: abs(pair[1].error - pair[0].error))
        part = min(0.8, max(0.2, (aim - a.error) / (b.error - a.error)))
        return (1 - part) * math.log(a.lmbda) + part * math.log(b.lmbda)
    last = trials[-1]
    away = min(abs(last.error - aim), 1e3)  # the PSNR of a lossless picture is infinite
    step = min(2.0, max(0.03, 1.2 * away / slope) * 1.5 ** (len(trials) - 1))
    low, high = map(math.log, LAMBDA_RANGE)
    return min(high, max(low, math.log(last.lmbda) + (-step if last.error > aim else step)))
