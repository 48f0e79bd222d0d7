"""The hyperprior: folding of gains, their interpolation, and the networks of `lite`."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import tiny_model
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sgacodec.hyperprior import GainedHyperprior, fold, level_lambdas
from sgacodec.metrics import psnr
from sgacodec.models.level import Model
from sgacodec.networks.architecture import ARCHITECTURES, Architecture, architecture_from_dict
from sgacodec.networks.build import build
from sgacodec.networks.lite import BlockTranspose, dct_basis, start_as_dct, unit_ycbcr
from sgacodec.pixels import to_tensor
from sgacodec.settings import ANCHORS

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by compressai
MSHYPER = Architecture("mshyper", N=6, M=10, scale="linear")


# ------------------------------------------------------------------------------------------------ folding of gains


@pytest.mark.parametrize("architecture", [tiny_model.ARCHITECTURE, MSHYPER], ids=["lite", "mshyper"])
@torch.no_grad()
def test_folded_equals_gained(architecture: Architecture, photograph: np.ndarray) -> None:
    """Folded networks compute what was trained, at every level and not only at gain 1."""
    model = tiny_model.untrained(architecture, photograph)
    model.y_unit.mul_(torch.linspace(0.5, 2, architecture.M))
    x = to_tensor(photograph)[:, :, :128, :192]
    unit = model.y_unit[None, :, None, None]
    for lmbda in (0.0016, 0.005, 0.045):
        g_y, g_z, d_y = (g[None, :, None, None] for g in model.gains(lmbda))
        folded = fold(model, lmbda)
        y0 = model.g_a(x)
        z0 = model.h_a(y0 / unit)
        y, z = folded.networks.g_a(x), folded.networks.h_a(folded.networks.g_a(x))
        close(y, y0 * g_y)
        close(z, z0 * g_z)
        scale, mean = folded.networks.h_s(z).chunk(2, 1)
        scale0, mean0 = model.h_s(z0).chunk(2, 1)
        gain = g_y * unit
        close(scale, scale0 + torch.log(gain) if architecture.scale == "exp" else scale0 * gain)
        close(mean, mean0 * gain)
        close(folded.networks.g_s(y), model.g_s(y0 * g_y * d_y))
        assert torch.allclose(folded.density.median, model.density.median * g_z.flatten())


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= 2e-4 * float(b.abs().max()) + 1e-6


def test_folding_leaves_the_model_alone(tiny: Model) -> None:
    """Guards against folding in place: a second level would have the product of two gains."""
    before = {key: value.clone() for key, value in tiny.gained.state_dict().items()}
    fold(tiny.gained, 0.01)
    assert all(torch.equal(before[key], value) for key, value in tiny.gained.state_dict().items())


def test_gains_between_anchors() -> None:
    """Gains are interpolated linearly in log λ between the anchors, and constant outside."""
    model = GainedHyperprior(tiny_model.ARCHITECTURE, (0.001, 0.004, 0.1))
    model.log_gain_y.data = torch.tensor([0.0, 1.0, 5.0])[:, None].expand(3, 16).clone()
    model.log_gain_d.data = -model.log_gain_y.data
    for lmbda, log in ((0.001, 0), (0.002, 0.5), (0.004, 1), (0.02, 3), (0.1, 5), (0.0001, 0), (7.0, 5)):
        g_y, g_z, d_y = model.gains(lmbda)
        assert torch.allclose(g_y, torch.full((16,), math.exp(log)), rtol=1e-4)
        assert torch.allclose(d_y, torch.full((16,), math.exp(-log)), rtol=1e-4)
        assert torch.allclose(g_z, torch.ones(8))


@pytest.mark.parametrize("anchors", [(0.0,), (-1.0, 1.0), (0.1, 0.1), (0.2, 0.1), (math.nan,), (0.1, math.inf)])
def test_anchors_that_make_no_sense(anchors: tuple[float, ...]) -> None:
    """Guards against tracebacks from anchors of a damaged model file."""
    with pytest.raises(ValueError, match="anchors"):
        GainedHyperprior(tiny_model.ARCHITECTURE, anchors)


def test_level_ladder(lite: Model) -> None:
    """The level byte of a file means the λ that the documentation gives."""
    ladder = level_lambdas()
    assert len(ladder) == 64
    assert ladder[0] == pytest.approx(ANCHORS[0])
    assert ladder[-1] == pytest.approx(ANCHORS[-1])
    ratios = np.diff(np.log(ladder))
    assert np.allclose(ratios, ratios[0])
    assert level_lambdas((0.01,), 1) == [0.01]
    assert lite.lambdas == ladder
    for lmbda in (0.0001, 0.0016, 0.0075, 0.02, 0.045, 3.0):
        nearest = min(range(64), key=lambda i: abs(math.log(ladder[i] / lmbda)))
        assert lite.level_for(lmbda) == nearest


# -------------------------------------------------------------------------------------------------------- networks


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(1, 2))
@torch.no_grad()
def test_block_transpose_is_a_transposed_convolution(c_in: int, c_out: int, h: int, w: int, batch: int) -> None:
    """`BlockTranspose` equals torch's transposed convolution at any size."""
    torch.manual_seed(c_in)
    layer = BlockTranspose(c_in, c_out)
    layer.bias.data.normal_()
    x = torch.randn(batch, c_in, h, w)
    expected = F.conv_transpose2d(x, layer.weight.permute(0, 3, 1, 2), layer.bias, stride=8, padding=2)
    found = layer(x)
    assert found.shape == expected.shape == (batch, c_out, 8 * h, 8 * w)
    assert torch.allclose(found, expected, atol=1e-5)


def test_block_transpose_gradients() -> None:
    """Guards against wrong gradients in training and refinement."""
    torch.manual_seed(0)
    layer = BlockTranspose(2, 3).double()
    x = torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))

    def of_parameters(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x.detach()[:1, :, :1, :2],))

    weight, bias = layer.weight.detach().requires_grad_(), layer.bias.detach().requires_grad_()
    assert torch.autograd.gradcheck(of_parameters, (weight, bias))


def test_folded_synthesis_keeps_its_matrix(tiny: Model) -> None:
    """Guards against copies of megabytes in every forward pass: in channels-last the matrix would be rearranged."""
    level = tiny.at(0)
    assert level.folded.networks.g_s.blocks.weight.is_contiguous()


def test_transform_bases_are_orthonormal() -> None:
    """An error of the initial coefficients of `lite` has the same norm in pixels."""
    basis = dct_basis().reshape(256, 256)
    assert torch.allclose(basis @ basis.T, torch.eye(256, dtype=torch.float64))
    assert torch.allclose(unit_ycbcr().norm(dim=1), torch.ones(3, dtype=torch.float64))


@torch.no_grad()
def test_start_as_dct(photograph: np.ndarray) -> None:
    """Guards against training of `lite` from random transforms, which would take days."""
    networks = build(replace(ARCHITECTURES["lite"], M=448))
    x = to_tensor(photograph)[:, :, :320, :576]
    unit = start_as_dct(networks, x)
    y = networks.g_a(x)
    assert torch.allclose(y.abs().mean(dim=(0, 2, 3)), unit, rtol=1e-4, atol=1e-6)
    pixels = (networks.g_s(y)[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert psnr(pixels, photograph[:320, :576]) > 40


@pytest.mark.parametrize("architecture", [ARCHITECTURES["lite"], MSHYPER], ids=["lite", "mshyper"])
@torch.no_grad()
def test_shapes(architecture: Architecture) -> None:
    """Guards against payloads with another number of symbols than the header implies."""
    networks = build(architecture)
    y = networks.g_a(torch.rand(2, 3, 64, 128))
    z = networks.h_a(y)
    assert y.shape == (2, architecture.M, 4, 8)
    assert z.shape == (2, architecture.N, 1, 2)
    assert networks.h_s(z).shape == (2, 2 * architecture.M, 4, 8)
    assert networks.g_s(y).shape == (2, 3, 64, 128)


@pytest.mark.parametrize(
    "change",
    [
        {"family": "vvc"},
        {"family": None},
        {"scale": "log"},
        {"N": 0},
        {"M": -1},
        {"N": True},
        {"N": 8.0},
        {"M": 2**40},
        {"width": 0},
        {"inner": 0},
        {"unknown": 1},
    ],
)
def test_architectures_that_make_no_sense(change: dict) -> None:
    """Guards against crafted model files that build networks of any size."""
    record = {"family": "lite", "N": 8, "M": 16, "scale": "exp", "width": 12, "hidden": 8}
    assert architecture_from_dict(record).inner == 128
    with pytest.raises(ValueError, match="not an architecture"):
        architecture_from_dict({**record, **change})
