"""The look-up of table indexes: the number of thresholds below a scale, for any thresholds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sgacodec.coding.quantize import integer_thresholds
from sgacodec.coding.scale_index import scale_index


def assert_counts(thresholds: np.ndarray, scales: np.ndarray) -> None:
    index = scale_index(torch.from_numpy(thresholds))(torch.from_numpy(scales.astype(np.float64)))
    assert index.dtype == torch.uint8
    assert np.array_equal(index.numpy(), np.searchsorted(thresholds, scales))


@given(st.integers(0, 2**32), st.sampled_from([1, 3, 100, 8064, 2**20]), st.sampled_from([1, 2, 50]))
def test_it_counts_the_thresholds_below(seed: int, gap: int, spread: int) -> None:
    """Guards against another table beside a threshold, between thresholds that are not evenly spaced, and far away."""
    rng = np.random.default_rng(seed)
    thresholds = np.cumsum(rng.integers(gap, spread * gap, 63, endpoint=True)) + rng.integers(-(2**30), 2**30)
    beside = (thresholds[:, None] + np.array([-1, 0, 1])).ravel()
    anywhere = rng.integers(thresholds[0] - 9 * gap, thresholds[-1] + 9 * gap, 200)
    far = np.array([-(2**44), -(2**33), 2**33, 2**44])
    assert_counts(thresholds, np.concatenate([beside, anywhere, far]))


@pytest.mark.parametrize("thresholds", [np.append(np.arange(62), 2**60), np.arange(63) * 2**40 - 2**45])
def test_thresholds_that_no_model_has(thresholds: np.ndarray) -> None:
    """Guards against a table of cells as large as a model file wants it."""
    prepared = scale_index(torch.from_numpy(thresholds))
    assert len(prepared.below) == 0
    assert_counts(thresholds, np.clip(thresholds, -(2**50), 2**50))


@pytest.mark.parametrize("kind", ["exp", "linear"])
def test_thresholds_of_models_are_looked_up(kind: str) -> None:
    """Guards against a slow search for the thresholds that models have."""
    thresholds = integer_thresholds(kind)
    assert len(scale_index(thresholds).below) > 0
    assert_counts(thresholds.numpy(), np.random.default_rng(0).integers(-(2**20), 2**25, (50, 7)))
