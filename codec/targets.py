"""What a target asks for, and how far encoded files are from it; the search is in `rate_control.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, TypeVar

from .settings import Settings

CLOSE_RATE, CLOSE_PSNR = 0.01, 0.05  # a hit: within 1 % of a rate (never above a size), 0.05 dB above a PSNR
FAR_RATE = 0.2  # logarithm of the ratio between rate and target above which the target is not met

Result = TypeVar("Result")


class TargetError(ValueError):
    """The target cannot be reached."""


@dataclass(frozen=True)
class Figures:
    """Figures of an encoded file.

    Attributes
    ----------
    size : int
        Bytes of the file.
    bpp : float
        Bits per pixel of the file.
    psnr : float
        dB; inf where it is lossless.
    metadata_bytes : int
        Bytes of metadata and alpha, which do not depend on λ.
    overhead_bytes : int
        Bytes of all but the latents: those and the header.
    level_lambda : float, optional
        λ of the level of an unrefined encoding; None where λ itself decides.
    final_lambda : float, optional
        λ at the end of an encoding that steered it.
    """

    size: int
    bpp: float
    psnr: float
    metadata_bytes: int = 0
    overhead_bytes: int = 0
    level_lambda: float | None = None
    final_lambda: float | None = None


@dataclass(frozen=True)
class Trial(Generic[Result]):
    """One encoding: its λ, its result, and `error`, by how much it is above the target (a logarithm, or dB)."""

    lmbda: float
    error: float
    figures: Figures
    result: Result


def has_target(settings: Settings) -> bool:
    """Whether a target is set."""
    return any(t is not None for t in (settings.target_bpp, settings.target_size, settings.target_psnr))


def error_of(settings: Settings, found: Figures) -> float:
    """By how much a result is above the target: the logarithm of the ratio for size and rate, dB for PSNR."""
    if settings.target_size is not None:
        return math.log(found.size / settings.target_size)
    if settings.target_bpp is not None:
        return math.log(found.bpp / settings.target_bpp)
    assert settings.target_psnr is not None
    return found.psnr - settings.target_psnr


def is_hit(settings: Settings, error: float) -> bool:
    """Whether a result is so close to the target that the search ends."""
    if settings.target_size is not None:
        return -CLOSE_RATE <= error <= 0
    if settings.target_bpp is not None:
        return abs(error) <= CLOSE_RATE
    return 0 <= error <= CLOSE_PSNR


def leaves_room(settings: Settings, found: Figures) -> bool:
    """Whether a file that meets the target can have bytes for latents."""
    if settings.target_size is not None:
        return settings.target_size > found.overhead_bytes
    if settings.target_bpp is not None:
        return settings.target_bpp / found.bpp * found.size * math.exp(FAR_RATE) > found.overhead_bytes
    return True


def best_of(settings: Settings, trials: list[Trial[Result]]) -> Trial[Result] | None:
    """The trial to choose; None if none meets the target."""
    if settings.target_bpp is not None:
        near = [t for t in trials if abs(t.error) <= FAR_RATE]
        return min(near, key=lambda t: abs(t.error), default=None)
    if settings.target_size is not None:
        return max((t for t in trials if t.error <= 0), key=lambda t: t.error, default=None)
    return min((t for t in trials if t.error >= 0), key=lambda t: t.error, default=None)


def unreached(settings: Settings, trials: list[Trial[Result]], when: str) -> str:
    """Why no trial was chosen, and the nearest one, in one line."""
    nearest = min(trials, key=lambda t: abs(t.error)).figures
    if settings.target_psnr is not None:
        return f"no λ gives {settings.target_psnr:g} dB{when}; the nearest is {nearest.psnr:.2f} dB"
    if settings.target_size is not None:
        return f"no λ gives a file of at most {settings.target_size} bytes{when}; the smallest is {shown(nearest)}"
    return f"no λ gives {settings.target_bpp:g} bits a pixel{when}; the nearest is {shown(nearest)}"


def shown(found: Figures) -> str:
    """Figures of a file, for messages."""
    beside = f", {found.metadata_bytes} of them metadata and alpha" if found.metadata_bytes else ""
    return f"{found.bpp:.4g} bits a pixel, {found.size} bytes{beside}"
