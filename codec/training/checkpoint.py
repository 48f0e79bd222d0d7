"""The state of a training run and the checkpoint file that stores it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..atomic import atomic_file
from ..hyperprior import GainedHyperprior
from ..networks.architecture import ARCHITECTURES
from .crops import Crops
from .initial import carry_over, initial_model
from .initial_weights import InitialWeights, load_record
from .optimizer import Optimizers, build_optimizers, freeze, load_moments
from .recipe import Recipe, TrainingError, standard_recipe
from .refined import RefinedPool

_INITIAL_CROPS = (96, 256)  # number and side of the crops on which the scales of a new model are measured


@dataclass
class State:
    """The complete state of a training run.

    Attributes
    ----------
    model, ema : GainedHyperprior
        The weights that are optimized, and their exponential moving average.
    data, noise : torch.Generator
        Random generators of the crops and anchors (on the CPU), and of the additive noise (on the device).
    step, crops : int
        Optimization steps and training crops so far.
    seconds : float
        Training time so far, interruptions excluded.
    history : list of dict
        Records of the earlier runs that led to the initial weights, as in `InitialWeights`.
    name, licence : str
        Of the model that is exported; without a name, that of its file.
    photographs : str
        Digest of the names of the training photographs, in order.
    pool : RefinedPool
        Refined crops of stage "decoder". It is not in checkpoints: a resumed run fills it anew.
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
    history: list[dict[str, Any]] = field(default_factory=list)
    name: str = ""
    licence: str = "not stated"
    photographs: str = ""
    pool: RefinedPool = field(default_factory=RefinedPool)


def _on_device(model: GainedHyperprior, device: torch.device) -> GainedHyperprior:
    """Move a model; on a GPU the weights of convolutions are converted to channels-last."""
    model.to(device)
    if device.type == "cuda":
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                module.to(memory_format=torch.channels_last)
    return model


def start(recipe: Recipe, crops: Crops, device: torch.device, initial: InitialWeights | None = None) -> State:
    """The initial state of a run on `device`, with new weights or with those of `initial`.

    Raises
    ------
    TrainingError
        When the architecture is unknown, or the package of an optimizer is not installed.
    """
    architecture = ARCHITECTURES[standard_recipe(recipe.architecture).architecture]
    torch.manual_seed(recipe.seed)
    data = torch.Generator().manual_seed(recipe.seed)
    if initial is None:
        model = initial_model(architecture, crops.sample(*_INITIAL_CROPS, data).cpu())
    else:
        model = GainedHyperprior(architecture)
        carry_over(model, initial.tensors)
    model = _on_device(model, device)
    ema = _on_device(GainedHyperprior(architecture), device)
    ema.load_state_dict(model.state_dict())
    freeze(model, recipe.stage)
    return State(
        recipe=recipe,
        model=model,
        ema=ema.requires_grad_(False),
        optimizers=build_optimizers(model, recipe),
        data=data,
        noise=torch.Generator(device=device).manual_seed(recipe.seed),
        history=[] if initial is None else initial.history,
    )


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
        "history": state.history,
        "name": state.name,
        "licence": state.licence,
        "photographs": state.photographs,
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
    record = load_record(path)
    try:
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
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise TrainingError(f"{path}: not a checkpoint that can be resumed ({reason})") from None
    return State(
        recipe=recipe,
        model=model,
        ema=ema.requires_grad_(False),
        optimizers=optimizers,
        data=data,
        noise=noise,
        step=step,
        seconds=seconds,
        crops=crops,
        history=record.get("history", []),
        **{key: record[key] for key in ("name", "licence", "photographs") if key in record},
    )
