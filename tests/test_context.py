"""The checkerboard, and the float context model: it is the integer one up to quantization."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_model
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sgacodec import latents
from sgacodec.checkerboard import halves, merge, pick, place
from sgacodec.coding.hyper_decoder import MU_BITS
from sgacodec.coding.range_coder import cost
from sgacodec.coding.tables import scale_thresholds
from sgacodec.hyperprior import code_rounded, fold
from sgacodec.models.level import Model
from sgacodec.networks.architecture import Architecture
from sgacodec.networks.context import ContextModel, ContextPass, code_passes, last_layer

KINDS = ("exp", "linear", "groups")  # the models of the fixture `contexts`


# -------------------------------------------------------------------------------------------------- the checkerboard


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_halves_of_a_checkerboard(B: int, rows: int, columns: int, C: int) -> None:
    """Guards against a latent in the wrong half, or at another position of it than the specification says."""
    h, w = 2 * rows, 2 * columns
    grid = torch.arange(B * h * w * C).view(B, h, w, C)
    even = torch.tensor([[(i + j) % 2 == 0 for j in range(w)] for i in range(h)])
    for half, where in ((0, even), (1, ~even)):
        expected = torch.stack([grid[:, i, where[i]] for i in range(h)], 1)
        assert torch.equal(pick(grid, half), expected)
        assert torch.equal(halves(grid)[half], expected)
        placed = torch.full_like(grid, -1)
        place(placed, half, expected)
        assert torch.equal(placed, torch.where(where[None, :, :, None], grid, -1))
    assert torch.equal(merge(*halves(grid)), grid)
    assert pick(grid, None) is grid
    whole = torch.zeros_like(grid)
    place(whole, None, grid)
    assert torch.equal(whole, grid)


def test_gradients_of_halves_and_merge() -> None:
    """Guards against gradients of refinement and training that reach other latents than those of the half."""
    torch.manual_seed(0)
    grid = torch.randn(2, 4, 6, 3, dtype=torch.float64, requires_grad=True)
    first, second = (torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(halves, grid)
    assert torch.autograd.gradcheck(merge, (first, second))
    (gradient,) = torch.autograd.grad(halves(grid)[1].sum(), grid)  # the first half is not used
    assert torch.equal(gradient, merge(torch.zeros_like(first), torch.ones_like(second)))


# ------------------------------------------------------------------------------------------------ float and integers


def parameters_of(
    h_s: nn.Sequential, context: ContextModel, z: Tensor, y_hat: Tensor, unit: Tensor, anchor: int = 0
) -> tuple[Tensor, Tensor]:
    """Scales and means of all passes, (1, h, w, M), where ŷ is coded."""
    features = h_s[:-1](z).permute(0, 2, 3, 1)
    scale, mean = torch.zeros_like(y_hat), torch.zeros_like(y_hat)

    def code(current: ContextPass) -> Tensor:
        for whole, part in zip((scale, mean), current.parameters.chunk(2, -1), strict=True):
            place(whole[..., current.channels], current.half, part)
        return pick(y_hat[..., current.channels], current.half)

    base, mixed = last_layer(h_s, features), context.mix_features(features)
    code_passes(context, mixed, base, unit, torch.tensor([anchor]), code)
    return scale, mean


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_float_parameters_are_the_integer_ones(contexts: dict[str, Model], kind: str, photograph: np.ndarray) -> None:
    """Guards against refinement with the gradients of another context model than the one that codes."""
    for at in (0, 1):
        level = contexts[kind].at(at)
        found = latents.quantize(level, *latents.analyse(level, photograph[:256, :256]))
        folded = level.folded
        z_hat = found.z + folded.density.median[None, :, None, None]
        given = found.y_hat().permute(0, 2, 3, 1)
        scale, mean = (
            v.permute(0, 3, 1, 2)
            for v in parameters_of(folded.networks.h_s, folded.context, z_hat, given, folded.y_unit)
        )
        error = (mean - found.mu / 2**MU_BITS).abs() / folded.y_unit[None, :, None, None]
        assert float(error.max()) < 0.01  # in natural units; residuals have 11 fractional bits
        assert float(error.square().mean().sqrt()) < 0.002
        log_scale = scale if kind != "linear" else scale.clamp(min=1e-9).log()
        index = torch.bucketize(log_scale.double().contiguous(), torch.from_numpy(scale_thresholds()))
        differs = (index - found.index.long()).abs()
        assert int(differs.max()) <= 1
        assert float(differs.double().mean()) < 0.01


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_float_rate_is_the_integer_one(contexts: dict[str, Model], kind: str, photograph: np.ndarray) -> None:
    """Guards against a rate that validation reports and no file has: both run through all passes on their own."""
    level = contexts[kind].at(0)
    y, z = latents.analyse(level, photograph[:256, :256])
    found = latents.quantize(level, y, z)
    z_hat = found.z + level.folded.density.median[None, :, None, None]
    symbols, sigma, y_hat = code_rounded(level.folded, y, z_hat)
    index = torch.bucketize(sigma.log().double(), torch.from_numpy(scale_thresholds()))
    bits = cost(symbols[0].to(torch.int32).numpy(), index[0].numpy(), level.y_tables)
    expected = cost(found.y.flatten().numpy(), found.index.flatten().numpy(), level.y_tables)
    assert bits == pytest.approx(expected, rel=0.003)
    assert float((y_hat - y).abs().max()) <= 0.501


@torch.no_grad()
def test_folding_a_level_is_the_unfolded_model_times_the_gains(photograph: np.ndarray) -> None:
    """Guards against levels whose context model is not the one that was trained."""
    architecture = Architecture("lite", N=4, M=12, scale="exp", width=12, hidden=4, inner=4, context=tiny_model.CONTEXT)
    model = tiny_model.untrained(architecture, photograph)
    assert model.context is not None
    torch.manual_seed(1)
    natural, z = torch.randn(1, 8, 8, 12), 3 * torch.randn(1, 4, 2, 2)
    for i, lmbda in enumerate(model.anchors):
        g_y, g_z, _ = model.gains(lmbda)
        gain = g_y * model.y_unit
        folded = fold(model, lmbda)
        assert folded.context is not None
        scale, mean = parameters_of(model.h_s, model.context, z, natural, torch.ones(12), i)
        z_scaled = z * g_z[None, :, None, None]
        found = parameters_of(folded.networks.h_s, folded.context, z_scaled, natural * gain, folded.y_unit)
        torch.testing.assert_close(found[0], scale + torch.log(gain), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(found[1] / gain, mean, rtol=1e-4, atol=1e-3)
