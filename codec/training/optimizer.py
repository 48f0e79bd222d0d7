"""The optimizers: parameter groups, learning rates, and running averages restored from a checkpoint."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..hyperprior import GainedHyperprior
from ..networks.lite import DepthwiseBranch
from .recipe import FROZEN, Recipe, TrainingError

Optimizers = dict[str, torch.optim.Optimizer]  # by name: "adam", "soap"

_RESIDUALS = ("g_a.residual.", "g_s.filter.", "g_s.pixels.")  # small layers of the transforms of `lite`
_MAX_DIM = 512  # of SOAP's preconditioners; longer dimensions have none
_SOAP = {
    "lr": 0.0,
    "betas": (0.95, 0.95),
    "weight_decay": 0.0,
    "precondition_frequency": 10,
    "max_precondition_dim": _MAX_DIM,
}


def freeze(model: GainedHyperprior, stage: str) -> None:
    """Enable the gradients of the parameters that a stage trains, disable those of the others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(FROZEN[stage]))


def build_optimizers(model: GainedHyperprior, recipe: Recipe) -> Optimizers:
    """The optimizers of all parameters that require a gradient.

    Adam trains the transforms but the residual layers and depthwise branches of `lite`; SOAP, or Adam where the recipe
    says so, trains the rest. In each group, "factor" scales the learning rate.

    Raises
    ------
    TrainingError
        When the recipe uses SOAP and the package pytorch-optimizer is not installed.
    """
    projections, *others = _groups(model, recipe)
    if recipe.optimizer == "adam":
        return {"adam": _adam([projections, *others])}
    merged = [part for group in others for part in _split_kernels(group)]
    optimizers: Optimizers = {"soap": soap_class()([group for group in merged if group["params"]], **_SOAP)}
    if projections["params"]:
        optimizers["adam"] = _adam([projections])
    return optimizers


def _groups(model: GainedHyperprior, recipe: Recipe) -> list[dict[str, Any]]:
    """The projections of the transforms, their residual layers, the rest, and the new modules of the recipe."""
    factors = {
        "projections": recipe.transforms,
        "residuals": recipe.transforms,
        "rest": recipe.rest,
        "new": recipe.new_factor,
    }
    groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in factors}
    branches = {id(p) for module in model.modules() if isinstance(module, DepthwiseBranch) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if any(f"{name}.".startswith(f"{module}.") for module in recipe.new):
            groups["new"].append(parameter)
        elif name.startswith(_RESIDUALS):
            groups["residuals"].append(parameter)
        elif name.startswith(("g_a.", "g_s.")) and id(parameter) not in branches:
            groups["projections"].append(parameter)
        else:
            groups["rest"].append(parameter)
    return [{"params": groups[kind], "factor": factor, "lr": 0.0} for kind, factor in factors.items()]


def _adam(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.Adam([group for group in groups if group["params"]], fused=True)


def soap_class() -> Any:
    """SOAP (Vyas et al. 2024, arXiv 2409.11321); its package takes seconds to import."""
    try:
        from pytorch_optimizer import SOAP
    except ImportError:
        raise TrainingError(
            "the optimizer soap needs the package pytorch-optimizer: pip install 'sgacodec[train]', or use "
            "--optimizer adam"
        ) from None
    return SOAP


def _split_kernels(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Kernels in which SOAP may merge the taps, 5×5 to 25, in a group of their own: that takes half of the time.

    SOAP merges dimensions from the first one on, as long as their product is at most `_MAX_DIM`. Kernels in which it
    would merge channels are left out: with preconditioners of output and input channels together the loss falls more
    slowly.
    """
    kernels = [p for p in group["params"] if p.dim() == 4 and _merges_taps_only(*p.shape)]
    chosen = {id(p) for p in kernels}
    others = [p for p in group["params"] if id(p) not in chosen]
    return [{**group, "params": kernels, "merge_dims": True}, {**group, "params": others}]


def _merges_taps_only(o: int, i: int, height: int, width: int) -> bool:
    return o * i > _MAX_DIM and (height * width == 1 or i * height > _MAX_DIM)


def update(optimizers: Optimizers, bf16: bool) -> None:
    """One step of each optimizer; with `bf16` SOAP projects gradients by matrix products in bfloat16."""
    before = torch.get_float32_matmul_precision()
    if bf16:
        torch.set_float32_matmul_precision("medium")
    try:
        for optimizer in optimizers.values():
            optimizer.step()
    finally:
        torch.set_float32_matmul_precision(before)


def set_learning_rate(optimizers: Optimizers, recipe: Recipe, step: int, progress: float) -> None:
    """Linear warm-up over `recipe.warmup` steps times cosine decay over the run (`progress` in 0..1)."""
    decay = 0.5 * (1 + math.cos(math.pi * progress))
    rate = recipe.lr_end + (recipe.lr - recipe.lr_end) * decay
    rate *= min(1.0, (step + 1) / max(1, recipe.warmup))
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]


def load_moments(optimizers: Optimizers, records: dict[str, dict[str, Any]]) -> None:
    """Load the running averages from a checkpoint; the settings of the groups stay as they are.

    Averages get the memory layout of their weights, which depends on the device: fused Adam on a CPU does not check it.
    """
    if set(optimizers) != set(records):
        raise ValueError(f"its optimizers are {', '.join(records)}")
    for name, optimizer in optimizers.items():
        groups = zip(records[name]["param_groups"], optimizer.param_groups, strict=True)
        for stored, current in groups:
            stored.update({key: value for key, value in current.items() if key != "params"})
        optimizer.load_state_dict(records[name])
        for parameter, averages in optimizer.state.items():
            for key, value in averages.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    averages[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
