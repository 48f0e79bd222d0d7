"""The CUDA branches of refinement and training on fake CUDA tensors, which have shapes and devices, but no values.

An operation that needs values on the host (`.item()`, shapes that depend on data), or mixes devices, raises. torch's
autograd needs a driver for CUDA tensors, so that gradients are made up; the backward of each autograd function of this
package is called right after its forward. What a GPU computes is tested by `-m cuda`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_training import TINY, TINY_MSHYPER
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from sgacodec.hyperprior import GainedHyperprior
from sgacodec.models.level import LevelModel, Model
from sgacodec.picture import Picture
from sgacodec.refine import steps as refinement
from sgacodec.refine.objective import Batch
from sgacodec.refine.problem import Problem
from sgacodec.rounding import METHODS
from sgacodec.settings import Settings
from sgacodec.training import crops as cropping
from sgacodec.training import loop, objective
from sgacodec.training import optimizer as training
from sgacodec.training.checkpoint import State
from sgacodec.training.crops import Crops
from sgacodec.training.optimizer import build_optimizers, freeze
from sgacodec.training.recipe import Recipe

CUDA = torch.device("cuda", 0)
pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="torch before 2.13 needs a CUDA driver for fake tensors",
)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """A mode to be entered when real tensors have been made; what replaces CUDA's driver is in place."""
    for module, name in ((torch.autograd.Function, "apply"), (torch.autograd, "grad"), (Tensor, "backward")):
        monkeypatch.setattr(module, name, {"apply": classmethod(apply), "grad": grad, "backward": lambda v: None}[name])
    monkeypatch.setattr(torch.amp.autocast_mode.torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(Tensor, "pin_memory", lambda v: v)
    objective._anchors.cache_clear()
    yield FakeTensorMode()
    objective._anchors.cache_clear()


def apply(function: type[torch.autograd.Function], *given: Any) -> Any:
    """The forward and the backward of an autograd function, with gradients without values."""
    ctx = SimpleNamespace(needs_input_grad=[isinstance(v, Tensor) and v.is_floating_point() for v in given])
    ctx.save_for_backward = lambda *saved: setattr(ctx, "saved_tensors", saved)
    ctx.mark_non_differentiable = lambda *outputs: None
    with torch.no_grad():
        out = function.forward(ctx, *given)
        outputs = out if isinstance(out, tuple) else (out,)
        found = function.backward(ctx, *(torch.empty_like(v) for v in outputs))
    for v, gradient in zip(given, found if isinstance(found, tuple) else (found,), strict=True):
        if gradient is not None:
            assert (gradient.shape, gradient.device) == (v.shape, v.device), function
    return out


def grad(loss: Tensor, inputs: Tensor | tuple[Tensor, ...], retain_graph: bool = False) -> tuple[Tensor, ...]:
    assert (loss.shape, loss.device) == ((), CUDA)
    return tuple(torch.empty_like(v) for v in ((inputs,) if isinstance(inputs, Tensor) else inputs))


def moved_to_cuda(mode: FakeTensorMode, v: Tensor) -> Tensor:
    fake = mode.from_tensor(v.detach())
    with mode:
        return fake.to(CUDA)


def on_cuda(mode: FakeTensorMode, module: nn.Module) -> nn.Module:
    """A copy with fake CUDA parameters and buffers."""
    moved = copy.deepcopy(module)
    for part in moved.modules():
        for name, value in part.named_parameters(recurse=False):
            other = moved_to_cuda(mode, value)
            part._parameters[name] = nn.Parameter(other, requires_grad=value.requires_grad)
        for name, value in part.named_buffers(recurse=False):
            part._buffers[name] = moved_to_cuda(mode, value)
    return moved


def test_a_host_sync_and_a_tensor_elsewhere_are_noticed(fake: FakeTensorMode) -> None:
    """The tests below depend on this."""
    with fake:
        v = torch.ones(3, device=CUDA)
        with pytest.raises(DataDependentOutputException):
            v.sum().item()
        with pytest.raises(RuntimeError, match="same device"):
            v + torch.ones(3)
        for copied in (lambda: torch.as_tensor(1.0, device=CUDA), lambda: v.new_tensor([1.0])):
            with pytest.raises(AssertionError), NoCopies():
                copied()


# -------------------------------------------------------------------------------------------------------- refinement


CASES = [("exp", method) for method in METHODS]
CASES += [(kind, "ssl") for kind in ("plain", "linear", "groups")]


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_refinement_steps(
    kind: str, method: str, tiny: Model, contexts: dict[str, Model], photograph: np.ndarray,
    fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Guards against a step that waits for the GPU or copies from the host, which a graph cannot capture."""
    size = 64
    level = (tiny if kind == "plain" else contexts[kind]).at(1)
    settings = Settings(method=method, steps=6)
    prepared = refinement.prepare(replace(level, device=CUDA))
    on_cpu = replace(prepared, device=torch.device("cpu"))
    problem = Problem.of(on_cpu, Picture(photograph[:size, :size]), None, settings.lmbda, "mse")
    batch = Batch.of(on_cpu, [problem, problem])
    batch = replace(batch, **{k: moved_to_cuda(fake, getattr(batch, k)) for k in ("x", "weight", "scale")})
    architecture, prepared = level.folded.architecture, on_cuda_level(fake, prepared)
    with fake:
        y = torch.randn(2, size // 16, size // 16, architecture.M, device=CUDA)
        z = torch.randn(2, size // 64, size // 64, architecture.N, device=CUDA)
        lmbda = torch.full((), settings.lmbda, device=CUDA)  # may change between steps
        bodies: list[Callable[[], None]] = []
        monkeypatch.setattr(refinement, "_Graph", lambda body, device: bodies.append(body) or captured(body))
        monkeypatch.setattr(torch.optim, "Adam", adam_with_rate)
        monkeypatch.setattr(torch, "Generator", lambda device: SimpleNamespace(manual_seed=lambda seed: None))
        step = refinement._captured(prepared, batch, y, z, settings, settings.steps, lmbda)
        results = [step() for _ in range(6)]
    assert len(bodies) == 2
    assert {(tuple(r.shape), r.device) for r in results} == {((2,), CUDA)}


@pytest.mark.parametrize("metric", ["mse", "ms-ssim"])
def test_without_a_graph_steps_are_eager(metric: str, tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a capture fails, the steps of its warm-up are undone; MS-SSIM, which copies from the host, has none."""
    y, z = torch.zeros(1, 4, 4, 24), torch.zeros(1, 1, 1, 8)

    def failed(level: LevelModel, batch: Any, y: Tensor, z: Tensor, *others: Any) -> None:
        assert metric == "mse"
        for v in (y, z):
            v.detach().fill_(1.0)
            v.grad = torch.ones_like(v)
        raise RuntimeError("operation not permitted when stream is capturing")

    for name in ("device", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(refinement, "_captured", failed)
    monkeypatch.setattr(refinement, "_eager", lambda level, batch, y, z, *others: (y, z))
    settings = Settings(steps=6, metric=metric)
    found: Any = refinement.stepper(replace(tiny.at(1), device=CUDA), None, y, z, settings, 6)  # type: ignore[arg-type]
    assert all(v.grad is None and not v.any() for v in found)


def captured(body: Callable[[], None]) -> Any:
    def checked() -> None:
        with NoCopies():
            body()

    checked()  # as the warm-up
    return SimpleNamespace(replay=checked)


class NoCopies(TorchFunctionMode):
    """Raises where data of the host would be copied to the GPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.device.type == "cuda":
            assert func not in (torch.tensor, torch.as_tensor, Tensor.new_tensor), func
            assert not (func in (Tensor.to, Tensor.cuda) and args[0].device.type == "cpu"), func
        return out


def adam_with_rate(parameters: list[Tensor], lr: Tensor, fused: bool, capturable: bool) -> torch.optim.Optimizer:
    """Adam as `steps` makes it; the fused one knows no fake tensors, and the rate is checked, but not in a step."""
    assert fused
    optimizer = ADAM(parameters, lr=0.0, foreach=True, capturable=capturable)
    optimizer.param_groups[0]["lr"] = lr
    return optimizer


ADAM = torch.optim.Adam


def on_cuda_level(mode: FakeTensorMode, level: LevelModel) -> LevelModel:
    folded = level.folded
    moved = {name: on_cuda(mode, network) for name, network in folded.networks.items()}
    context = None if folded.context is None else on_cuda(mode, folded.context)
    folded = replace(
        folded,
        networks=replace(folded.networks, **moved),
        density=on_cuda(mode, folded.density),
        y_unit=moved_to_cuda(mode, folded.y_unit),
        context=context,
    )
    return replace(level, folded=folded, device=CUDA)


# ---------------------------------------------------------------------------------------------------------- training

RECIPES = [
    Recipe("tiny", optimizer="soap"),
    Recipe("tiny", optimizer="adam"),
    Recipe("tiny", optimizer="adam", stage="prior"),
    Recipe("tiny", optimizer="soap", stage="decoder", refine_steps=2),
    Recipe("tiny-mshyper", optimizer="adam"),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.architecture}-{r.stage}-{r.optimizer}")
def test_training_steps(recipe: Recipe, fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against steps that wait for the GPU, whose host prepares the next step meanwhile."""
    recipe = replace(recipe, steps=100, batch=2, crop=64, bf16=True, compile=False)
    model = GainedHyperprior({"tiny": TINY, "tiny-mshyper": TINY_MSHYPER}[recipe.architecture])
    windows = [cropping._Window(0, 3, 5, 96, 7), cropping._Window(0, 0, 0, 64, 0)]
    monkeypatch.setattr(Crops, "_draw", lambda *given: windows)  # draws from a generator of the CPU
    monkeypatch.setitem(training._SOAP, "precondition_frequency", 2)  # the second step computes bases
    moved, ema = (on_cuda(fake, model) for _ in range(2))
    with fake:
        freeze(moved, recipe.stage)
        state = State(
            recipe=recipe,
            model=moved,
            ema=ema.requires_grad_(False),
            optimizers=build_optimizers(moved, recipe),
            data=torch.Generator(),
            noise=None,  # the device's own generator
            step=1,  # steps 0, 250, … update medians on the host
        )
        source = Crops([torch.zeros(3, 100, 120, dtype=torch.uint8)], CUDA)
        if recipe.stage == "prior":
            latents = torch.zeros(2, model.architecture.M, 4, 4, device=CUDA)
            source = SimpleNamespace(sample=lambda *given: latents)
        for p in moved.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None
        monkeypatch.setattr(moved, "zero_grad", lambda set_to_none: None)  # backward would fill them again
        for _ in range(3):
            results = loop.step(state, source, CUDA)
    assert state.step == 4
    assert {v.device for v in results} == {CUDA}
