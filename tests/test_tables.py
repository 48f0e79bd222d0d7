"""Integer probability tables: equal to the densities, up to errors that cost next to no rate."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from sgacodec.coding.range_coder import PRECISION, Tables, cost
from sgacodec.coding.tables import (
    SCALES,
    factorized_tables,
    gaussian_tables,
    scale_table,
    scale_thresholds,
    to_frequencies,
)
from sgacodec.density import FactorizedDensity, gaussian_bits


def probabilities(tables: Tables, t: int) -> np.ndarray:
    return tables.frequencies[tables.starts[t] : tables.starts[t + 1]] / 2**PRECISION


@given(npst.arrays(np.float64, st.integers(1, 300), elements=st.floats(0, 1)), st.floats(1e-9, 1))
def test_frequencies_sum_up_and_are_positive(mass: np.ndarray, outside: float) -> None:
    """Guards against tables that the range coder refuses or that cannot code a symbol."""
    counts = to_frequencies(mass, outside)
    assert counts.dtype == np.int32
    assert counts.min() >= 1
    assert counts.sum(dtype=np.int64) == 2**PRECISION
    share = np.append(mass, outside) / (mass.sum() + outside)
    assert np.abs(counts / 2**PRECISION - share).max() <= 2 * len(counts) / 2**PRECISION


def test_scales_and_thresholds() -> None:
    """Guards against thresholds that do not lie between the scales they separate."""
    scales, thresholds = scale_table(), scale_thresholds()
    assert (len(scales), len(thresholds)) == (SCALES, SCALES - 1)
    assert scales[0] == pytest.approx(0.11)
    assert scales[-1] == pytest.approx(256)
    logs = np.log(scales)
    assert ((logs[:-1] < thresholds) & (thresholds < logs[1:])).all()


def test_gaussian_tables_are_gaussians() -> None:
    """Guards against tables whose rate differs from the Gaussian density that refinement uses."""
    tables = gaussian_tables()
    for t, sigma in enumerate(scale_table()):
        p = probabilities(tables, t)
        inside = p[:-1]
        assert np.abs(inside - inside[::-1]).max() <= len(p) / 2**PRECISION
        assert int(tables.minimum[t]) == -(len(inside) // 2)
        v = torch.arange(len(inside), dtype=torch.float64) + int(tables.minimum[t])
        bits = gaussian_bits(v, torch.full_like(v, sigma)).numpy()
        assert float(inside @ (-np.log2(inside) - bits)) == pytest.approx(0, abs=0.001)  # mean excess in bits
        assert p[-1] < 4 * 2.0**-20


@given(st.integers(0, 2**32), st.floats(0.05, 300))
def test_nearest_table_costs_little(seed: int, sigma: float) -> None:
    """Guards against too few scales: the nearest table must cost hardly more than the exact σ."""
    t = int(np.searchsorted(scale_thresholds(), math.log(sigma)))
    symbols = np.rint(np.random.default_rng(seed).normal(size=2000) * sigma).astype(np.int32)
    tables = gaussian_tables()
    v = torch.from_numpy(symbols).double()
    ideal = float(gaussian_bits(v, torch.full_like(v, min(max(sigma, 0.11), 256.0))).sum())
    assert cost(symbols, np.full(2000, t), tables) <= 1.01 * ideal + 40


def density(seed: int, channels: int = 5) -> FactorizedDensity:
    torch.manual_seed(seed)
    model = FactorizedDensity(channels)
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    model.requires_grad_(False).update_median()
    return model


@given(st.integers(0, 2**32 - 1))
def test_tables_of_z_are_its_density(seed: int) -> None:
    """Guards against tables of z that differ from its density or cover too little of it."""
    model = density(seed)
    tables = factorized_tables(model)
    assert len(tables) == 5
    for t in range(5):
        p = probabilities(tables, t)
        symbols = torch.arange(len(p) - 1) + int(tables.minimum[t])
        values = (symbols + model.median[t]).expand(1, 5, 1, -1)
        mass = model.likelihood(values)[0, t, 0].numpy()
        assert np.abs(p[:-1] - mass).max() < 1e-4
        assert p[-1] < 1e-4
        assert tables.minimum[t] < 0 < tables.minimum[t] + len(p) - 1


@given(st.integers(0, 2**32 - 1))
def test_scaled_density(seed: int) -> None:
    """Guards against a wrong density of z at levels whose gain is not 1."""
    model, gained = density(seed), density(seed)
    gain = torch.exp(torch.linspace(-2, 2, 5))
    gained.scale_values(gain)
    column = gain[None, :, None, None]
    values = 10 * torch.randn(1, 5, 4, 4)
    expected = model.likelihood(values, 1 / column)
    assert torch.allclose(gained.likelihood(values * column), expected, rtol=1e-3, atol=1e-6)
    assert torch.allclose(gained.median, model.median * gain)
    found = gained.logits_cumulative(gained.median.view(-1, 1, 1))
    assert float(found.abs().max()) < 1e-3  # the median is where the cumulative distribution is one half


def test_absurdly_wide_density_is_bounded() -> None:
    """Guards against huge tables for a channel whose density is nearly flat."""
    model = density(0)
    model.scale_values(torch.tensor([1.0, 1e6, 1.0, 1.0, 1e-6]))
    tables = factorized_tables(model)
    assert np.diff(tables.starts).max() <= 2 * 2048 + 2
    tables.check()
