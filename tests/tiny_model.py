"""Makes the small model of the golden files, with random weights that give latents of a useful range."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sgacodec.hyperprior import GainedHyperprior
from sgacodec.models.export import export
from sgacodec.models.file import write_model
from sgacodec.models.level import Model
from sgacodec.networks.architecture import Architecture, Context
from sgacodec.networks.build import start_transforms
from sgacodec.pixels import to_tensor

ARCHITECTURE = Architecture("lite", N=8, M=16, scale="exp", width=12, hidden=8, inner=8)
CONTEXT = Context((2, 4, 6), past=5, near=3, hidden=8)
ANCHORS = (0.0016, 0.0075, 0.045)


def untrained(architecture: Architecture, photograph: np.ndarray, seed: int = 0) -> GainedHyperprior:
    """A hyperprior with DCT transforms and a random rest, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GainedHyperprior(architecture, ANCHORS)
        crops = to_tensor(photograph)[:, :, :256, :512]
        unit = start_transforms(architecture, model.networks, crops)
        if unit is not None:
            model.y_unit.copy_(unit)
        for i, start in enumerate((12.0, 25.0, 60.0)):
            model.log_gain_y.data[i] = math.log(start) + 0.1 * torch.randn(architecture.M)
            model.log_gain_z.data[i] = math.log(2.0 + i) + 0.1 * torch.randn(architecture.N)
            model.log_gain_d.data[i] = -model.log_gain_y.data[i]
        model.h_a[-1].weight.data *= 8
        model.h_s[-1].weight.data *= 4
        model.density.scale_values(torch.linspace(0.01, 0.15, architecture.N))
        with torch.no_grad():
            z = model.h_a(model.g_a(crops) / model.y_unit[None, :, None, None])
        model.density.biases[0].data -= torch.nn.functional.softplus(model.density.matrices[0].data) * z.mean(
            dim=(0, 2, 3)
        ).view(-1, 1, 1)
        model.density.update_median()
        for group in [] if model.context is None else model.context.members:
            torch.nn.init.normal_(group.out.weight, std=0.3)  # zero before training
            torch.nn.init.normal_(group.bias_by_anchor, std=0.3)
    return model


def exported(model: GainedHyperprior, photograph: np.ndarray, levels: int = 3, name: str = "tiny") -> Model:
    """The exported model, calibrated on the photograph."""
    with torch.no_grad():
        crops = to_tensor(photograph)[:, :, :256, :512]
        y = model.g_a(crops)
        z = model.h_a(y / model.y_unit[None, :, None, None])
    return export(model, name, {"licence": "MIT"}, [z], levels, y_samples=[y])


def write(path: Path, photograph: np.ndarray) -> None:
    write_model(exported(untrained(ARCHITECTURE, photograph), photograph), path)


def with_context(family: str, photograph: np.ndarray, checkerboard: bool = True, levels: int = 2) -> Model:
    """A small exported model with a context model, of family lite (σ as its logarithm) or mshyper (σ itself)."""
    sizes = {"width": 12, "hidden": 4, "inner": 4} if family == "lite" else {}
    architecture = Architecture(
        family,
        N=4,
        M=sum(CONTEXT.groups),
        scale="exp" if family == "lite" else "linear",
        context=replace(CONTEXT, checkerboard=checkerboard),
        **sizes,
    )
    return exported(untrained(architecture, photograph), photograph, levels, name="context")
