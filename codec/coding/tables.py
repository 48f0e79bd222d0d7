"""Integer probability tables of the float densities, computed once at export and stored in the model file."""

from __future__ import annotations

import math

import numpy as np
import torch

from ..density import FactorizedDensity, double
from .range_coder import PRECISION, Tables

SCALES = 64
SCALE_MIN, SCALE_MAX = 0.11, 256.0
_TAIL = 2.0**-20  # largest probability outside a table on one side; such symbols are escaped
_MAX_HALF_WIDTH = 2048


def scale_table() -> np.ndarray:
    """The 64 log-spaced standard deviations of the Gaussian tables, (64,) float64."""
    return np.exp(np.linspace(math.log(SCALE_MIN), math.log(SCALE_MAX), SCALES))


def scale_thresholds() -> np.ndarray:
    """Boundaries between the tables: log σ halfway between neighbours, (63,) float64."""
    logs = np.log(scale_table())
    return (logs[1:] + logs[:-1]) / 2


def to_frequencies(mass: np.ndarray, outside: float) -> np.ndarray:
    """Positive int32 that sum up to 2²⁴, nearly proportional to the probabilities `mass` and, last, `outside`."""
    weights = np.maximum(np.append(mass, outside), 0)
    free = (1 << PRECISION) - len(weights)
    counts = np.floor(weights / weights.sum() * free).astype(np.int64) + 1
    counts[np.argmax(counts)] += (1 << PRECISION) - counts.sum()
    return counts.astype(np.int32)


def gaussian_tables() -> Tables:
    """Tables of N(0, σ²) convolved with U(−½, ½) for each σ of `scale_table`."""
    frequencies, minimum = [], []
    for sigma in scale_table():
        half = max(2, math.ceil(4.9 * sigma))  # Φ(−4.9) < 2⁻²⁰
        edges = (np.arange(-half, half + 2) - 0.5) / (sigma * math.sqrt(2))
        cumulative = np.array([0.5 * math.erfc(-e) for e in edges])
        mirrored = np.diff(cumulative)
        mass = np.minimum(mirrored, mirrored[::-1])  # erfc is precise in its small tail only
        frequencies.append(to_frequencies(mass, 2 * cumulative[0]))
        minimum.append(-half)
    return _join(frequencies, minimum)


def factorized_tables(density: FactorizedDensity) -> Tables:
    """One table per channel for round(z − median) under a folded density."""
    density = double(density)
    tail = math.log(_TAIL / (1 - _TAIL))
    median = density.median.numpy()
    low = np.floor(density.quantile(tail).numpy() - median).clip(-_MAX_HALF_WIDTH, -1).astype(np.int64)
    high = np.ceil(density.quantile(-tail).numpy() - median).clip(1, _MAX_HALF_WIDTH).astype(np.int64)
    widest = int(max(-low.min(), high.max()))
    symbols = torch.arange(-widest, widest + 1, dtype=torch.float64)
    with torch.no_grad():
        values = symbols[None, None, None, :] + density.median[None, :, None, None]
        mass = density.likelihood(values)[0, :, 0].numpy()  # (C, 2·widest + 1)
    frequencies = []
    for channel, (first, last) in enumerate(zip(low, high, strict=True)):
        inside = mass[channel, widest + first : widest + last + 1]
        frequencies.append(to_frequencies(inside, max(0.0, 1 - inside.sum())))
    return _join(frequencies, list(low))


def _join(frequencies: list[np.ndarray], minimum: list[int]) -> Tables:
    starts = np.concatenate([[0], np.cumsum([len(f) for f in frequencies])]).astype(np.int64)
    tables = Tables(np.concatenate(frequencies), starts, np.asarray(minimum, dtype=np.int64))
    tables.check()
    return tables
