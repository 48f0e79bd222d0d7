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

from sgacodec.checkerboard import pick, place
from sgacodec.networks import architecture as registry
from sgacodec.networks.architecture import ARCHITECTURES, FAMILIES, HYPER_STRIDE, STRIDE, Architecture, Context, Reach
from sgacodec.networks.build import build
from sgacodec.networks.context import ContextModel, ContextPass, code_passes
from sgacodec.networks.lite import DepthwiseBranch

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by compressai

LITE = Architecture("lite", N=4, M=6, scale="exp", width=4, hidden=4, inner=4)
SMALL = {
    "lite": LITE,
    "mshyper": Architecture("mshyper", N=4, M=6, scale="linear"),
    "bmshj": Architecture("bmshj", N=4, M=6, scale="linear"),
}
BLOCKS = [
    replace(LITE, deep_width=4, deep_blocks=deep, body_width=4, body_blocks=body) for deep, body in ((1, 1), (3, 2))
]
CONTEXTS = [
    Context((1, 2, 3), past=3, near=3, hidden=4),
    Context((1, 70), past=3, near=3, hidden=4),  # a smaller kernel in the widest group
    Context((1, 2, 3, 4), checkerboard=False, past=3, near=3, hidden=4),
]
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
        for branch in (m for m in network.modules() if isinstance(m, DepthwiseBranch)):
            torch.nn.init.normal_(branch[-1].weight)  # zero before training
    M, N = architecture.M, architecture.N

    def picture_of(z: Tensor) -> Tensor:
        return networks.g_s(networks.h_s(z)[:, M:])

    return Reach(
        g_a=farthest(networks.g_a, 3, 1, STRIDE),
        h_a=farthest(networks.h_a, M, STRIDE, HYPER_STRIDE),
        g_s=farthest(networks.g_s, M, STRIDE, 1),
        h_s=max(farthest(networks.h_s, N, HYPER_STRIDE, STRIDE), farthest(picture_of, N, HYPER_STRIDE, 1)),
    )


def parameters_of(architecture: Architecture) -> Callable[[Tensor], Tensor]:
    """The entropy parameters (1, 2M, h, w) of all passes as a function of the symbols of y (1, M, h, w)."""
    assert architecture.context is not None
    M = architecture.M
    model = ContextModel(architecture.context, 5, 1)
    for group in model.members:
        torch.nn.init.normal_(group.out.weight)  # zero before training

    def parameters(symbols: Tensor) -> Tensor:
        y = symbols.float().permute(0, 2, 3, 1)
        found = torch.empty(*y.shape[:3], 2 * M)

        def code(current: ContextPass) -> Tensor:
            own = current.channels
            for v, start in zip(current.parameters.chunk(2, -1), (0, M), strict=True):
                place(found[..., start + own.start : start + own.stop], current.half, v)
            return pick(y[..., own], current.half) + current.parameters.chunk(2, -1)[1]

        base = torch.zeros_like(found)
        mixed = model.mix_features(torch.zeros(*y.shape[:3], 5))
        code_passes(model, mixed, base, torch.ones(M), torch.zeros(1, dtype=torch.int64), code)
        return found.permute(0, 3, 1, 2)

    return parameters


GRIDS = {"g_a": HYPER_STRIDE, "h_a": HYPER_STRIDE, "g_s": STRIDE, "h_s": HYPER_STRIDE}


def assert_reach_is_measured(architecture: Architecture, declared: Reach | None = None) -> None:
    """Each declared reach is the measured one, rounded up to the grid it is cut on: no less, and no work in vain."""
    found, declared = measured(architecture), declared or architecture.reach
    for name, grid in GRIDS.items():
        assert getattr(declared, name) == -(-getattr(found, name) // grid) * grid, name


@pytest.mark.parametrize("family", FAMILIES)
def test_declared_reach(family: str) -> None:
    """Guards against seams between tiles, and tiles whose bits are not those of the file."""
    assert_reach_is_measured(SMALL[family])


@pytest.mark.parametrize("architecture", BLOCKS, ids=["few blocks", "many blocks"])
def test_declared_reach_with_blocks_at_stride_16(architecture: Architecture) -> None:
    """Guards against the same where g_a and g_s have residual branches, which see further."""
    assert_reach_is_measured(architecture)


@pytest.mark.parametrize("context", CONTEXTS, ids=["checkerboard", "small kernel", "groups only"])
def test_declared_reach_of_the_context_model(context: Context) -> None:
    """Guards against tiles of refinement that are too narrow for the passes of y."""
    architecture = replace(LITE, M=sum(context.groups), context=context)
    found = farthest(parameters_of(architecture), architecture.M, STRIDE, STRIDE)
    assert found == architecture.reach.context
    shorter = replace(context, groups=context.groups[1:])
    assert found > replace(architecture, context=shorter).reach.context


@pytest.mark.parametrize(("field", "network"), [("deep_blocks", "g_a"), ("body_blocks", "g_s")])
def test_a_reach_for_too_few_blocks_is_noticed(field: str, network: str) -> None:
    """Guards against a measurement of networks whose branches give zero."""
    declared = replace(BLOCKS[1], **{field: 1}).reach
    with pytest.raises(AssertionError, match=network):
        assert_reach_is_measured(BLOCKS[1], declared)


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
