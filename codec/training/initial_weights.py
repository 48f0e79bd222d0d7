"""Weights that a run starts from: those of a model file or of a checkpoint, of the same or an older architecture."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..hyperprior import GainedHyperprior
from ..models.catalogue import ModelError
from ..models.file import read_model
from ..networks.architecture import ARCHITECTURES, Architecture
from ..settings import ANCHORS
from .recipe import TrainingError


@dataclass(frozen=True)
class InitialWeights:
    """Weights to start from, and where they come from.

    Attributes
    ----------
    architecture : str
        Name of the architecture that is trained.
    source : str
        Id of the model, or name and step of the checkpoint.
    tensors : dict
        The tensors whose names and shapes are those of the architecture.
    new : tuple of str
        Modules that are trained as new ones: those without weights in the file, and those that were new in a run of
        stage "prior" that the file comes from.
    unused : tuple of str
        Tensors of the file that the architecture does not have.
    history : list of dict
        Records of the runs that led to these weights: recipe, steps, seconds, crops.
    """

    architecture: str
    source: str
    tensors: dict[str, Tensor]
    new: tuple[str, ...]
    unused: tuple[str, ...]
    history: list[dict[str, Any]]


def read_initial(path: Path, architecture: str | None = None) -> InitialWeights:
    """Read initial weights from a model file or from a checkpoint (.ckpt), of which the averaged weights are taken.

    Parameters
    ----------
    architecture : str, optional
        The architecture to train; None: that of the file, or one with the same latents.

    Raises
    ------
    ModelError
        When it is not a valid model file.
    ModuleNotFoundError
        When it has networks of CompressAI, and compressai is not installed.
    TrainingError
        When it is not a valid checkpoint, or its anchors or latents are not those of the architecture.
    """
    try:
        return _read_initial(path, architecture)
    except (ModelError, TrainingError, ModuleNotFoundError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise TrainingError(f"{path}: not weights that can be trained further ({reason})") from None


def _read_initial(path: Path, architecture: str | None) -> InitialWeights:
    source, tensors, names, history = _read_checkpoint(path) if path.suffix == ".ckpt" else _read_model(path)
    if not names:
        raise TrainingError(f"{path}: not an architecture and anchors of `train`; it cannot be trained further")
    if architecture is not None and architecture not in names:
        raise TrainingError(f"{path}: not weights for {architecture}; they suit {', '.join(names)}")
    name = architecture or names[0]
    with torch.random.fork_rng(devices=[]):  # the weights of this model are not used
        model = GainedHyperprior(ARCHITECTURES[name])
    expected = model.state_dict()
    fitting = {key: value for key, value in tensors.items() if key in expected and value.shape == expected[key].shape}
    if not all(torch.is_floating_point(v) and bool(torch.isfinite(v).all()) for v in fitting.values()):
        raise TrainingError(f"{path}: not weights that can be trained further (a weight is not a finite number)")
    new = _modules((key for key, _ in model.named_parameters() if key not in fitting), fitting)
    last = history[-1]["recipe"] if history else {}
    if last.get("stage") == "prior":
        new = tuple(dict.fromkeys((*last["new"], *new)))
    return InitialWeights(
        architecture=name,
        source=source,
        tensors=fitting,
        new=new,
        unused=tuple(key for key in tensors if key not in fitting),
        history=history,
    )


def _modules(missing: Iterable[str], found: Iterable[str]) -> tuple[str, ...]:
    """The largest modules of which no parameter was found, for the names of parameters that are missing."""
    filled = {name.rsplit(".", k)[0] for name in found for k in range(name.count(".") + 1)}
    modules = []
    for name in missing:
        parts = name.split(".")
        prefixes = (".".join(parts[:k]) for k in range(1, len(parts) + 1))
        modules.append(next(prefix for prefix in prefixes if prefix not in filled))
    return tuple(dict.fromkeys(modules))


def load_record(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, not checked.

    Raises
    ------
    TrainingError
        When it cannot be read, or holds other objects than tensors and plain values.
    """
    try:
        record: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # the message of an UnpicklingError advises to load the file without protection
        reason = "" if isinstance(error, pickle.UnpicklingError) else f" ({' '.join(str(error).split())[:200]})"
        raise TrainingError(f"{path}: not a checkpoint{reason}") from None
    return record


_Source = tuple[str, dict[str, Tensor], list[str], list[dict[str, Any]]]


def _read_checkpoint(path: Path) -> _Source:
    record = load_record(path)
    try:
        run = {"recipe": record["recipe"], "steps": record["step"], "seconds": round(record["seconds"])}
        names = _suitable(ARCHITECTURES[run["recipe"]["architecture"]])
        history = [*record.get("history", []), {**run, "crops": record.get("crops")}]
        return f"{path.name}, step {record['step']}", dict(record["ema"]), names, history
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise TrainingError(f"{path}: not a checkpoint ({reason})") from None


def _read_model(path: Path) -> _Source:
    model = read_model(path)
    names = _suitable(model.gained.architecture) if model.gained.anchors == ANCHORS else []
    run = model.metadata.get("training", {})
    kept = {key: run[key] for key in ("recipe", "steps", "seconds", "crops") if key in run}
    history = [*run.get("history", []), kept] if "recipe" in kept else []
    return model.id, model.gained.state_dict(), names, history


def _suitable(architecture: Architecture) -> list[str]:
    """Names of the architectures with the same latents; the same architecture comes first."""
    latents = architecture.family, architecture.N, architecture.M, architecture.scale
    names = [name for name, a in ARCHITECTURES.items() if (a.family, a.N, a.M, a.scale) == latents]
    return sorted(names, key=lambda name: ARCHITECTURES[name] != architecture)
