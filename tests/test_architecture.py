"""The record of an architecture: what it declares is measured on its networks."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sgacodec.networks import architecture as registry
from sgacodec.networks.architecture import ARCHITECTURES, FAMILIES, HYPER_STRIDE, STRIDE, Architecture, Reach
from sgacodec.networks.build import build

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by compressai

SMALL = {
    "lite": Architecture("lite", N=4, M=6, scale="exp", width=4, hidden=4, inner=4),
    "mshyper": Architecture("mshyper", N=4, M=6, scale="linear"),
    "bmshj": Architecture("bmshj", N=4, M=6, scale="linear"),
}
SIDE = 8 * HYPER_STRIDE


def farthest(network: Callable[[Tensor], Tensor], channels: int, stride_in: int, stride_out: int) -> int:
    """Pixels by which what an input changes lies outside the block of the coarser of the two.

    Parameters
    ----------
    network : callable
        (1, channels, SIDE / stride_in, …) → (1, C, SIDE / stride_out, …).
    """
    torch.manual_seed(0)
    v = torch.randn(1, channels, SIDE // stride_in, SIDE // stride_in, dtype=torch.float64)
    before = network(v)
    assert before.shape[2:] == (SIDE // stride_out, SIDE // stride_out)
    middle, found = SIDE // 2 // stride_in, -math.inf
    for phase in range(max(1, stride_out // stride_in)):  # positions of the input in the block of an output
        changed_at = middle + phase
        w = v.clone()
        w[..., changed_at, changed_at] += 10 * torch.rand(channels, dtype=torch.float64)
        changed = (network(w) != before).any(1)[0].nonzero()
        assert len(changed)
        for axis in (0, 1):
            first, last = int(changed[:, axis].min()), int(changed[:, axis].max())
            given = changed_at * stride_in, (changed_at + 1) * stride_in
            for at in (first, last):
                got = at * stride_out, (at + 1) * stride_out
                coarse, fine = (given, got) if stride_in >= stride_out else (got, given)
                found = max(found, coarse[0] - fine[0], fine[1] - coarse[1])
    return int(found)


@torch.no_grad()
def measured(architecture: Architecture) -> Reach:
    """The reach of networks with random weights, not rounded up."""
    torch.manual_seed(1)
    networks = build(architecture)
    for _, network in networks.items():
        network.double()
    M, N = architecture.M, architecture.N

    def picture_of(z: Tensor) -> Tensor:
        return networks.g_s(networks.h_s(z)[:, M:])

    return Reach(
        g_a=farthest(networks.g_a, 3, 1, STRIDE),
        h_a=farthest(networks.h_a, M, STRIDE, HYPER_STRIDE),
        g_s=farthest(networks.g_s, M, STRIDE, 1),
        h_s=max(farthest(networks.h_s, N, HYPER_STRIDE, STRIDE), farthest(picture_of, N, HYPER_STRIDE, 1)),
    )


def assert_reach_is_measured(architecture: Architecture) -> None:
    """Each declared reach is the measured one, rounded up to the grid it is cut on: no less, and no work in vain."""
    found, declared = measured(architecture), architecture.reach
    for name, grid in (("g_a", HYPER_STRIDE), ("h_a", HYPER_STRIDE), ("g_s", STRIDE), ("h_s", HYPER_STRIDE)):
        assert getattr(declared, name) == -(-getattr(found, name) // grid) * grid, name


@pytest.mark.parametrize("family", FAMILIES)
def test_declared_reach(family: str) -> None:
    """Guards against seams between tiles, and tiles whose bits are not those of the file."""
    assert_reach_is_measured(SMALL[family])


@pytest.mark.parametrize(
    ("family", "network", "grid"),
    [
        ("lite", "g_a", HYPER_STRIDE),
        ("lite", "h_a", HYPER_STRIDE),
        ("lite", "g_s", STRIDE),
        ("lite", "h_s", HYPER_STRIDE),
        ("bmshj", "g_s", STRIDE),
        ("bmshj", "h_s", HYPER_STRIDE),
    ],
)
def test_too_small_a_reach_is_noticed(family: str, network: str, grid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a measurement that passes whatever a new architecture declares."""
    reach = FAMILIES[family].reach
    less = replace(FAMILIES[family], reach=replace(reach, **{network: getattr(reach, network) - grid}))
    monkeypatch.setitem(registry.FAMILIES, family, less)
    with pytest.raises(AssertionError, match=network):
        assert_reach_is_measured(SMALL[family])


def test_every_architecture_has_a_family() -> None:
    assert {a.family for a in ARCHITECTURES.values()} <= set(SMALL) == set(FAMILIES)


def test_the_registry_needs_no_torch() -> None:
    """Guards against commands such as --help that take seconds to answer."""
    program = "import sys, sgacodec.networks.architecture as a; a.ARCHITECTURES['lite'].reach; "
    program += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"
