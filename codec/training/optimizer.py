"""The optimiser: its parameter groups and its learning rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..hyperprior import GainedHyperprior
from .recipe import Recipe


def build_optimizer(model: GainedHyperprior, recipe: Recipe) -> torch.optim.Optimizer:
    """Adam with two parameter groups, the transforms and the rest; "factor" scales the learning rate of a group."""
    transforms = [*model.g_a.parameters(), *model.g_s.parameters()]
    chosen = {id(p) for p in transforms}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return torch.optim.Adam(
        [
            {"params": transforms, "factor": recipe.transforms, "lr": 0.0},
            {"params": rest, "factor": recipe.rest, "lr": 0.0},
        ],
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, step: int, progress: float) -> None:
    """Linear warm-up over `recipe.warmup` steps times cosine decay over the run (`progress` in 0..1)."""
    decay = 0.5 * (1 + math.cos(math.pi * progress))
    rate = recipe.lr_end + (recipe.lr - recipe.lr_end) * decay
    rate *= min(1.0, (step + 1) / max(1, recipe.warmup))
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def load_moments(optimizer: torch.optim.Optimizer, record: dict[str, Any]) -> None:
    """Load the optimiser's running averages from a checkpoint; all settings of the groups stay as they are."""
    groups = zip(record["param_groups"], optimizer.param_groups, strict=True)
    for stored, current in groups:
        stored.update({key: value for key, value in current.items() if key != "params"})
    optimizer.load_state_dict(record)
