"""The layers that refinement substitutes have the values and gradients of the model's."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgacodec.networks.architecture import Architecture
from sgacodec.networks.build import build
from sgacodec.networks.mshyper import FrozenGDN, freeze
from sgacodec.networks.transforms import Networks
from sgacodec.refine.layers import BlockwiseGDN, FrozenConv, FrozenConvTranspose, replace_layers, subpixel

FAMILIES = [
    Architecture("lite", N=8, M=24, scale="exp", width=12, hidden=16),
    Architecture("mshyper", N=8, M=12, scale="linear"),
    Architecture("bmshj", N=8, M=12, scale="linear"),
]


def frozen(architecture: Architecture) -> Networks:
    """Random networks with biases and GDN parameters that matter."""
    torch.manual_seed(3)
    networks = build(architecture)
    for _, network in networks.items():
        for name, parameter in network.named_parameters():
            if name.endswith("gamma"):
                parameter.data += 0.3 * torch.rand_like(parameter)
            elif parameter.dim() == 1:
                parameter.data += torch.rand_like(parameter)
        freeze(network)
    return networks


def with_gradient(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = network(x)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    return out.detach(), torch.autograd.grad((out * weight).sum(), x)[0]


def agree(theirs: nn.Module, ours: nn.Module, x: Tensor) -> None:
    for expected, found in zip(with_gradient(theirs, x), with_gradient(ours, x), strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("architecture", FAMILIES, ids=lambda a: a.family)
def test_replaced_layers_change_nothing(architecture: Architecture) -> None:
    """Guards against faster layers with other values or gradients, and layers that are not replaced at all."""
    networks = frozen(architecture)
    inputs = {
        "g_a": torch.rand(2, 3, 64, 64),
        "h_a": torch.randn(2, architecture.M, 4, 4),
        "h_s": torch.randn(2, architecture.N, 2, 3),
        "g_s": 3 * torch.randn(2, architecture.M, 5, 3),
    }
    found = set()
    for name, network in networks.items():
        fast = subpixel(copy.deepcopy(network)) if name == "g_s" else copy.deepcopy(network)
        replace_layers(fast)
        found |= {type(layer) for layer in fast.modules()}
        agree(network, fast, inputs[name].contiguous(memory_format=torch.channels_last))
        agree(network, fast, inputs[name])
    assert FrozenConv in found
    assert FrozenConvTranspose in found
    normalized = any(isinstance(layer, FrozenGDN) for _, network in networks.items() for layer in network.modules())
    assert (BlockwiseGDN in found) == normalized == (architecture is not FAMILIES[0])


def test_a_large_picture_takes_several_blocks_of_gdn() -> None:
    """Guards against errors at the ends of blocks, which small pictures do not have."""
    layer = next(m for m in frozen(FAMILIES[1]).g_s.modules() if hasattr(m, "gamma"))
    holder = nn.Sequential(layer)
    replace_layers(holder)
    assert isinstance(holder[0], BlockwiseGDN)
    agree(layer, holder, torch.randn(2, 8, 37, 41))


def test_the_last_layer_can_be_had_before_its_pixel_shuffle() -> None:
    """Guards against a sub-pixel convolution that differs from the transposed convolution it replaces."""
    g_s = frozen(FAMILIES[1]).g_s
    ours = subpixel(g_s)
    y_hat = torch.randn(2, 12, 3, 5)
    assert ours.shuffle == 2
    torch.testing.assert_close(ours.unshuffled(y_hat), F.pixel_unshuffle(g_s(y_hat), 2), rtol=1e-4, atol=1e-5)
    agree(g_s, ours, y_hat)


def test_other_ends_are_left_alone() -> None:
    """Guards against a sub-pixel convolution for a layer that it does not equal."""
    lite = frozen(FAMILIES[0]).g_s
    assert subpixel(lite) is lite
    odd = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ConvTranspose2d(3, 3, 4, stride=2, padding=1))
    assert subpixel(odd) is odd
