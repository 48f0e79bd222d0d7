"""The state of a training run, from its recipe to its random generators, and the checkpoint that holds it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..atomic import atomic_file
from ..hyperprior import GainedHyperprior
from ..models.file import read_model
from ..networks.architecture import ARCHITECTURES
from ..settings import ANCHORS
from .crops import Crops
from .model import initial_model


class TrainingError(ValueError):
    """Training cannot start or go on: a foreign checkpoint, say."""


@dataclass(frozen=True)
class Recipe:
    """What decides the outcome of a training run.

    `steps` or `minutes` ends the run and is the horizon of the cosine decay; both may be extended on resume.
    Learning rates are `lr` times a factor: `transforms` for g_a and g_s, `rest` for everything else.
    From progress `final_from` on, crops have `final_crop` pixels a side (0: as before) and a batch half the images.
    `init` is the id of the model whose weights the run began with, if it was one.
    """

    architecture: str = "lite"
    steps: int | None = None
    minutes: float | None = None
    batch: int = 8
    crop: int = 256
    lr: float = 1e-3
    lr_end: float = 2e-5
    transforms: float = 0.3
    rest: float = 1.0
    warmup: int = 600
    clip: float = 1.0
    ema: float = 0.999
    bf16: bool = False
    seed: int = 0
    final_crop: int = 0
    final_from: float = 0.85
    compile: bool = False
    init: str = ""


@dataclass
class State:
    """All that a checkpoint holds; `data` draws crops and anchors on the CPU, `noise` lives on the device."""

    recipe: Recipe
    model: GainedHyperprior
    ema: GainedHyperprior
    optimizer: torch.optim.Optimizer
    data: torch.Generator
    noise: torch.Generator
    step: int = 0
    seconds: float = 0.0
    crops: int = 0


def standard_recipe(architecture: str, **changed: Any) -> Recipe:
    """The recipe an architecture is trained with, but for what the user wants changed.

    Raises
    ------
    TrainingError
        When the architecture is unknown.
    """
    if architecture not in ARCHITECTURES:
        raise TrainingError(f"unknown architecture {architecture!r}; known: {', '.join(ARCHITECTURES)}")
    return Recipe(architecture, **{**asdict(ARCHITECTURES[architecture].training), **changed})


def _optimizer(model: GainedHyperprior, recipe: Recipe) -> torch.optim.Optimizer:
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


def _on_device(model: GainedHyperprior, device: torch.device) -> GainedHyperprior:
    """Move a model; on a GPU the weights of convolutions become channels-last."""
    model.to(device)
    if device.type == "cuda":
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                module.to(memory_format=torch.channels_last)
    return model


def trainable(path: Path) -> tuple[str, str, GainedHyperprior]:
    """A model file to train on from: the name of its architecture, its id, and its weights, which may be changed.

    Raises
    ------
    ModelError
        When it is not a sound model file.
    TrainingError
        When it is not like the models that are trained here: an imported one, say.
    """
    model = read_model(path)
    gained = model.gained
    names = [name for name, architecture in ARCHITECTURES.items() if architecture == gained.architecture]
    if not names or gained.anchors != ANCHORS:
        raise TrainingError(f"{path}: its architecture or its rates are not those of `train`: it cannot be trained on")
    return names[0], model.id, gained.requires_grad_(True)


def start(recipe: Recipe, crops: Crops, device: torch.device, gained: GainedHyperprior | None = None) -> State:
    """A fresh state on `device`: of new weights, or of those of an earlier model.

    Raises
    ------
    TrainingError
        When the architecture is unknown.
    """
    architecture = ARCHITECTURES[standard_recipe(recipe.architecture).architecture]
    torch.manual_seed(recipe.seed)
    data = torch.Generator().manual_seed(recipe.seed)
    if gained is None:
        gained = initial_model(architecture, crops.sample(96, 256, data).cpu())
    model = _on_device(gained, device)
    ema = _on_device(GainedHyperprior(architecture), device)
    ema.load_state_dict(model.state_dict())
    noise = torch.Generator(device=device).manual_seed(recipe.seed)
    return State(recipe, model, ema, _optimizer(model, recipe), data, noise)


def save_checkpoint(state: State, path: Path) -> None:
    """Write a checkpoint beside `path` and rename it: a full disk or an interruption leaves the last one intact.

    Raises
    ------
    TrainingError
        When it cannot be written.
    """
    record = {
        "recipe": asdict(state.recipe),
        "model": state.model.state_dict(),
        "ema": state.ema.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "data": state.data.get_state(),
        "noise": state.noise.get_state(),
        "step": state.step,
        "seconds": state.seconds,
        "crops": state.crops,
    }
    try:
        with atomic_file(path, sync=True) as file:
            torch.save(record, file)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        kept = "; the last one is intact" if path.exists() else ""
        raise TrainingError(f"{path}: the checkpoint could not be written ({reason}){kept}") from None


def load_checkpoint(path: Path, device: torch.device, **changed: Any) -> State:
    """Read a checkpoint; `changed` replaces fields of its recipe (steps, minutes, batch, …) but not the architecture.

    Raises
    ------
    TrainingError
        When the file is not a checkpoint of this program or its tensors have other shapes.
    """
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
        recipe = Recipe(**{**record["recipe"], **changed})
        architecture = ARCHITECTURES[record["recipe"]["architecture"]]
        if recipe.architecture != record["recipe"]["architecture"]:
            raise ValueError(f"it is of architecture {record['recipe']['architecture']}")
        model, ema = GainedHyperprior(architecture), GainedHyperprior(architecture)
        model.load_state_dict(record["model"])
        ema.load_state_dict(record["ema"])
        model, ema = _on_device(model, device), _on_device(ema, device)
        optimizer = _optimizer(model, recipe)
        groups = zip(record["optimizer"]["param_groups"], optimizer.param_groups, strict=True)
        for stored, ours in groups:  # how the sums are computed, and the rates, are ours; the sums are the file's
            stored.update({key: value for key, value in ours.items() if key != "params"})
        optimizer.load_state_dict(record["optimizer"])
        data, noise = torch.Generator(), torch.Generator(device=device)
        data.set_state(record["data"])
        if len(record["noise"]) == len(noise.get_state()):
            noise.set_state(record["noise"])
        else:  # the state of another kind of device
            noise.manual_seed(recipe.seed + record["step"])
        step, seconds = int(record["step"]), float(record["seconds"])
        crops = int(record.get("crops", step * record["recipe"]["batch"]))
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror or error}") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise TrainingError(f"{path}: not a checkpoint that can be resumed ({reason})") from None
    return State(recipe, model, ema, optimizer, data, noise, step, seconds, crops)
