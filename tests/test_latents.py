"""Passes: encoder and decoder take the same steps, also where a pass depends on the symbols of earlier ones."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from sgacodec.bitstream import FormatError
from sgacodec.coding import passes
from sgacodec.coding.hyper_decoder import MU_BITS, Seen, hyper_decode
from sgacodec.coding.prior import ExactPrior, Pass
from sgacodec.coding.range_coder import bits_of
from sgacodec.latents import analyse, code_length, pack, quantize, unpack
from sgacodec.models.level import LevelModel

HEIGHT, WIDTH = 130, 200


def passes_with_context(prior: ExactPrior, k_z: Tensor, seen: Seen | None = None) -> Generator[Pass, Tensor, None]:
    """Groups of channels, each with parameters that depend on the symbols of the group before."""
    index, mu = hyper_decode(prior.h_s, prior.gains, k_z)
    context = torch.zeros_like(mu[:, :1])
    for first in range(0, mu.shape[1], 120):
        channels = slice(first, min(first + 120, mu.shape[1]))
        shifted = (index[:, channels].long() + context.abs()).clamp(max=63).to(torch.uint8)
        context = (
            (yield Pass(channels, None, shifted, mu[:, channels] + 300 * context)).sum(1, keepdim=True).clamp(-9, 9)
        )


@pytest.fixture(scope="module")
def encoded(lite_level: LevelModel, photograph: np.ndarray) -> tuple[Tensor, Tensor]:
    return analyse(lite_level, photograph[:HEIGHT, :WIDTH])


@pytest.mark.parametrize("context", [False, True])
def test_round_trip(
    lite_level: LevelModel, encoded: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, context: bool
) -> None:
    """Guards against a decoder that uses other entropy parameters than the encoder did."""
    plain = quantize(lite_level, *encoded)
    if context:
        monkeypatch.setattr(passes, "passes", passes_with_context)
    expected, payload = quantize(lite_level, *encoded), pack(lite_level, *encoded)
    found = unpack(lite_level, payload.z, payload.y, HEIGHT, WIDTH)
    for name in ("z", "y", "index", "mu"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert found.digest() == payload.digest == expected.digest()
    assert torch.equal(found.index, plain.index) != context
    again = pack(lite_level, *encoded, quantized=found)
    assert (again.z, again.y) == (payload.z, payload.y)
    with pytest.raises(ValueError, match="without passes"):
        pack(lite_level, *encoded, quantized=replace(found, passes=()))
    assert float((found.y_hat() - encoded[0]).abs().max()) <= 0.5
    tolerance = 0.02 if context else 0.01  # symbols that do not suit their tables escape, whose bits are estimated
    assert 8 * len(payload.z + payload.y) == pytest.approx(code_length(lite_level, found), rel=tolerance)


def test_bytes_after_the_last_pass_are_refused(
    lite_level: LevelModel, encoded: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a decoder that stops at the last pass without looking at what is left."""
    monkeypatch.setattr(passes, "passes", passes_with_context)
    payload = pack(lite_level, *encoded)
    with pytest.raises(FormatError, match="bytes are left"):
        unpack(lite_level, payload.z, payload.y + bytes(range(256)) * 4096, HEIGHT, WIDTH)  # zeros at the end were cut


def test_dead_zone(lite_level: LevelModel, encoded: tuple[Tensor, Tensor]) -> None:
    """Symbols of less than 1 become 0 where 0 is much cheaper than ±1; all others are the nearest integers."""
    y, z = encoded[0].clone(), encoded[1]
    found = quantize(lite_level, y, z, dead_zone=True)
    v = encoded[0] - found.mu.float() / 2**MU_BITS
    nearest = torch.round(v).to(torch.int32)
    zeroed = found.y != nearest
    assert 0.001 < float(zeroed.float().mean()) < 0.05
    assert not found.y[zeroed].any()
    assert float(v[zeroed].abs().max()) <= 1
    saved = torch.from_numpy(bits_of(1, lite_level.y_tables) - bits_of(0, lite_level.y_tables))[found.index.long()]
    assert float(v[zeroed & (saved < 2)].abs().max()) < 0.503
    assert not ((nearest.abs() == 1) & (v.abs() < 0.7) & (saved > 9) & ~zeroed).any()
    again = quantize(lite_level, y, z)
    for name in ("z", "y", "index", "mu"):
        assert torch.equal(getattr(again, name), getattr(found, name))
