"""Export of a training run's averaged weights as a model file."""

from __future__ import annotations

import copy
import datetime
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..hyperprior import GainedHyperprior
from ..models.export import export
from ..models.level import Model
from ..settings import LEVELS
from .checkpoint import State
from .data import evenly_spaced
from .validation import central_part

_SAMPLES = 24  # photographs for measuring the range of the hyper-decoder's activations


@torch.no_grad()
def latents_of(gained: GainedHyperprior, photographs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """y₀ (1, M, h, w) and z₀ (1, N, h/4, w/4) of photographs (3, 16h, 16w) uint8, without gains and not rounded."""
    unit = gained.y_unit[None, :, None, None]
    y = [gained.g_a(image[None].float() / 255) for image in photographs]
    return y, [gained.h_a(v / unit) for v in y]


def export_checkpoint(state: State, name: str, photographs: list[Tensor], record: dict[str, Any]) -> Model:
    """Build a model from the averaged (EMA) weights of a training run; `state` is not changed.

    Parameters
    ----------
    name : str
        Name of the model.
    photographs : list of Tensor (3, H, W) uint8
        The central parts of an evenly spaced subset calibrate the ranges of the integer networks' activations.
    record : dict
        Licence and training record (see `training_record`) for the metadata.
    """
    gained = copy.deepcopy(state.ema).cpu().float().requires_grad_(False)
    chosen = [central_part(image) for image in evenly_spaced(photographs, _SAMPLES)]
    y_samples, z_samples = latents_of(gained, chosen)
    return export(gained, name, record, z_samples, LEVELS, y_samples=y_samples)


def training_record(
    state: State, device: torch.device, sources: list[str], photographs: int, held_out: list[str]
) -> dict[str, Any]:
    """Metadata of a model: licence, recipe, length of the run and of earlier ones, data and hardware."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "licence": state.licence,
        "training": {
            "recipe": asdict(state.recipe),
            "steps": state.step,
            "seconds": round(state.seconds),
            "crops": state.crops,
            "history": state.history,
            "data": sources,
            "photographs": photographs,
            "held_out": held_out,
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "device": machine,
        },
    }
