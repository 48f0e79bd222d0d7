"""The state of a training run and the checkpoint file that stores it."""

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
from .initial import initial_model
from .optimizer import Optimizers, build_optimizers, freeze, load_moments
from .recipe import Recipe, TrainingError, standard_recipe

_INITIAL_CROPS = (96, 256)  # number and side of the crops on which the scales of a new model are measured


@dataclass
class State:
    """The complete state of a training run.

    Attributes
    ----------
    model, ema : GainedHyperprior
        The weights that are optimised, and their exponential moving average.
    data, noise : torch.Generator
        Random generators of the crops and anchors (on the CPU), and of the additive noise (on the device).
    step, crops : int
        Optimisation steps and training crops so far.
    seconds : float
        Training time so far, interruptions excluded.
    """

    recipe: Recipe
    model: GainedHyperprior
    ema: GainedHyperprior
    optimizers: Optimizers
    data: torch.Generator
    noise: torch.Generator
    step: int = 0
    seconds: float = 0.0
    crops: int = 0


def _on_device(model: GainedHyperprior, device: torch.device) -> GainedHyperprior:
    """Move a model; on a GPU the weights of convolutions are converted to channels-last."""
    model.to(device)
    if device.type == "cuda":
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                module.to(memory_format=torch.channels_last)
    return model


def read_initial(path: Path) -> tuple[str, str, GainedHyperprior]:
    """Read the weights of a model file as initial weights of a run.

    Returns
    -------
    architecture, id : str
        Name of the architecture, and id of the model.
    gained : GainedHyperprior
        Float weights with gradients enabled.

    Raises
    ------
    ModelError
        When it is not a valid model file.
    TrainingError
        When the architecture or the anchors are not those of `train`; imported models, for example.
    """
    model = read_model(path)
    gained = model.gained
    names = [name for name, architecture in ARCHITECTURES.items() if architecture == gained.architecture]
    if not names or gained.anchors != ANCHORS:
        raise TrainingError(f"{path}: not an architecture and anchors of `train`; it cannot be trained further")
    return names[0], model.id, gained.requires_grad_(True)


def start(recipe: Recipe, crops: Crops, device: torch.device, gained: GainedHyperprior | None = None) -> State:
    """The initial state of a run on `device`, with new weights or with those of `gained`.

    Raises
    ------
    TrainingError
        When the architecture is unknown.
    """
    architecture = ARCHITECTURES[standard_recipe(recipe.architecture).architecture]
    torch.manual_seed(recipe.seed)
    data = torch.Generator().manual_seed(recipe.seed)
    if gained is None:
        gained = initial_model(architecture, crops.sample(*_INITIAL_CROPS, data).cpu())
    model = _on_device(gained, device)
    ema = _on_device(GainedHyperprior(architecture), device)
    ema.load_state_dict(model.state_dict())
    freeze(model, recipe.stage)
    noise = torch.Generator(device=device).manual_seed(recipe.seed)
    return State(recipe, model, ema, build_optimizers(model, recipe), data, noise)


def save_checkpoint(state: State, path: Path) -> None:
    """Write a checkpoint atomically: after a full disk or an interruption the previous one is still there.

    Raises
    ------
    TrainingError
        When it cannot be written.
    """
    record = {
        "recipe": asdict(state.recipe),
        "model": state.model.state_dict(),
        "ema": state.ema.state_dict(),
        "optimizers": {name: optimizer.state_dict() for name, optimizer in state.optimizers.items()},
        "data": state.data.get_state(),
        "noise": state.noise.get_state(),
        "step": state.step,
        "seconds": state.seconds,
        "crops": state.crops,
    }
    try:
        with atomic_file(path) as file:
            torch.save(record, file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        kept = "; the previous one is intact" if path.exists() else ""
        raise TrainingError(f"{path}: the checkpoint could not be written ({reason}){kept}") from None


def load_checkpoint(path: Path, device: torch.device, **changed: Any) -> State:
    """Read a checkpoint.

    Parameters
    ----------
    changed
        Fields of the recipe to replace (steps, minutes, batch, …); the architecture cannot change.

    Raises
    ------
    TrainingError
        When the file is not a checkpoint of this program, or its tensors have unexpected shapes.
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
        freeze(model, recipe.stage)
        optimizers = build_optimizers(model, recipe)
        load_moments(optimizers, record["optimizers"] if "optimizers" in record else {"adam": record["optimizer"]})
        data, noise = torch.Generator(), torch.Generator(device=device)
        data.set_state(record["data"])
        if len(record["noise"]) == len(noise.get_state()):
            noise.set_state(record["noise"])
        else:  # the checkpoint is from another type of device
            noise.manual_seed(recipe.seed + record["step"])
        step, seconds = int(record["step"]), float(record["seconds"])
        crops = int(record.get("crops", step * record["recipe"]["batch"]))
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror or error}") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise TrainingError(f"{path}: not a checkpoint that can be resumed ({reason})") from None
    return State(recipe, model, ema, optimizers, data, noise, step, seconds, crops)
