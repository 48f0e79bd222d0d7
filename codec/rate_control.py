"""λ for a wanted rate, size or quality.

Bytes and PSNR both rise with λ. Unrefined encodings, which are cheap, bracket λ first; refined ones, which are what
will be written, then close in by secants inside the bracket.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from .settings import Settings

LAMBDA_MIN, LAMBDA_MAX = 1e-4, 1.0  # beyond the ladder only the refinement's λ changes
_CHEAP_TRIALS, _TRIALS = 7, 6
_CLOSE_RATE, _CLOSE_PSNR = 0.01, 0.05  # a hit: within 1 % of a rate (never above a size), 0.05 dB above a PSNR
_SLOPE_RATE, _SLOPE_PSNR = 0.65, 3.0  # about what log λ + 1 adds to the logarithm of the bytes, and in dB

Result = TypeVar("Result")


class TargetError(ValueError):
    """The target cannot be reached."""


@dataclass(frozen=True)
class Trial(Generic[Result]):
    """One encoding: what it was for, what came out, and `error`, the log or dB by which it is over the target."""

    lmbda: float
    error: float
    result: Result


def has_target(settings: Settings) -> bool:
    """Whether a target is asked for."""
    return any(t is not None for t in (settings.target_bpp, settings.target_size, settings.target_psnr))


def search(
    settings: Settings,
    encode: Callable[[Settings], Result],
    figures: Callable[[Result], tuple[int, float, float]],
) -> Result:
    """Encode at the λ that meets the target.

    Parameters
    ----------
    encode : callable
        Encodes the picture with settings that have a λ and no target.
    figures : callable
        Bytes, bits a pixel and PSNR (dB, inf when lossless) of a result.

    Returns
    -------
    Result
        For `target_size` the largest that is not above it; for `target_psnr` the smallest that is not below it; for
        `target_bpp` the nearest.

    Raises
    ------
    TargetError
        When no λ meets it.
    """
    plain = replace(settings, target_bpp=None, target_size=None, target_psnr=None)

    def attempt(lmbda: float, cheap: bool) -> Trial[Result]:
        chosen = replace(plain, lmbda=lmbda)
        result = encode(_unrefined(chosen) if cheap else chosen)
        return Trial(lmbda, _error(settings, *figures(result)), result)

    refined = settings.method != "none"
    low, high = math.log(LAMBDA_MIN), math.log(LAMBDA_MAX)
    middle = math.log(settings.lmbda)
    cheap: list[Trial[Result]] = []
    for _ in range(_CHEAP_TRIALS):
        cheap.append(attempt(math.exp(middle), True))
        low, high = (low, middle) if cheap[-1].error > 0 else (middle, high)
        middle = (low + high) / 2
    trials: list[Trial[Result]] = []
    position = middle
    if len({trial.error > 0 for trial in cheap}) == 1:
        # Unrefined encodings do not reach the target, as they do not change beyond the ladder: begin near its end.
        position = math.log(min(cheap, key=lambda trial: abs(trial.error)).lmbda)
    for _ in range(_TRIALS):
        trials.append(attempt(math.exp(position), not refined))
        if _is_hit(settings, trials[-1].error):
            break
        position = _next(settings, trials)
    return _best(settings, trials).result


def _unrefined(settings: Settings) -> Settings:
    return Settings(lmbda=settings.lmbda, level_lambda=settings.level_lambda, method="none")


def _error(settings: Settings, size: int, bpp: float, psnr: float) -> float:
    if settings.target_size is not None:
        return math.log(size / settings.target_size)
    if settings.target_bpp is not None:
        return math.log(bpp / settings.target_bpp)
    assert settings.target_psnr is not None
    return psnr - settings.target_psnr


def _is_hit(settings: Settings, error: float) -> bool:
    if settings.target_size is not None:
        return -_CLOSE_RATE <= error <= 0
    if settings.target_bpp is not None:
        return abs(error) <= _CLOSE_RATE
    return 0 <= error <= _CLOSE_PSNR


def _next(settings: Settings, trials: list[Trial[Result]]) -> float:
    """log λ of the next trial: between the nearest trials on both sides of the target, or a step beyond the last.

    It aims at the middle of what counts as a hit.
    """
    slope, aim = _SLOPE_RATE, 0.0
    if settings.target_size is not None:
        aim = -_CLOSE_RATE / 2
    elif settings.target_psnr is not None:
        slope, aim = _SLOPE_PSNR, _CLOSE_PSNR / 2
    over = [t for t in trials if t.error > aim]
    under = [t for t in trials if t.error <= aim]
    if over and under:
        above, below = min(over, key=lambda t: t.error), max(under, key=lambda t: t.error)
        a, b = math.log(above.lmbda), math.log(below.lmbda)
        part = min(0.8, max(0.2, (aim - below.error) / (above.error - below.error)))
        return b + part * (a - b)
    last = trials[-1]
    away = min(abs(last.error - aim), 1e3)  # the PSNR of a lossless picture is infinite
    step = min(2.0, max(0.03, 1.2 * away / slope) * 1.5 ** (len(trials) - 1))
    return math.log(last.lmbda) + (-step if over else step)


def _best(settings: Settings, trials: list[Trial[Result]]) -> Trial[Result]:
    if settings.target_bpp is not None:
        best = min(trials, key=lambda t: abs(t.error))
        if abs(best.error) > 0.2:
            raise TargetError(f"no λ gives {settings.target_bpp} bits a pixel; {_reached(best.error)}")
        return best
    if settings.target_size is not None:
        fitting = [t for t in trials if t.error <= 0]
        if not fitting:
            raise TargetError(f"no λ gives a file of at most {settings.target_size} bytes")
        return max(fitting, key=lambda t: t.error)
    fitting = [t for t in trials if t.error >= 0]
    if not fitting:
        raise TargetError(f"no λ gives {settings.target_psnr} dB")
    return min(fitting, key=lambda t: t.error)


def _reached(error: float) -> str:
    return f"the nearest is {100 * (math.exp(error) - 1):+.0f} %"
