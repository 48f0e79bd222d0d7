"""Initial weights of a new training run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..hyperprior import GainedHyperprior
from ..networks.architecture import Architecture
from ..networks.build import start_transforms
from ..settings import ANCHORS
from .objective import LAMBDA_REFERENCE

_START_STD = 2.0  # of mshyper's gained latents at the reference λ: a few bits per pixel, which training soon lowers


@torch.no_grad()
def initial_model(architecture: Architecture, crops: Tensor) -> GainedHyperprior:
    """A new model with its scales measured on `crops`; the transforms of `lite` start as a DCT.

    Parameters
    ----------
    crops : Tensor (B, 3, H, W) float32
        Photographs in 0..1, H and W multiples of 64; about a hundred crops of 256×256 suffice.
    """
    model = GainedHyperprior(architecture)
    slope = torch.log(torch.tensor(ANCHORS) / LAMBDA_REFERENCE)[:, None]
    last: Any = model.h_s[-1]
    last.weight.mul_(0.1)
    last.bias.zero_()
    unit = start_transforms(architecture, model.networks, crops)
    if unit is not None:
        model.y_unit.copy_(unit)
        start = float(torch.log(torch.tensor(255 / 40)))
    else:
        start = _center(model, crops)
        last.bias[: architecture.M] = 1.0  # σ = y_unit · gain, as measured
    model.log_gain_y.add_(start + 0.5 * slope)
    model.log_gain_d.add_(-start - 0.5 * slope)
    model.log_gain_z.add_(1.4 + slope / 6)
    return model


def carry_over(model: GainedHyperprior, tensors: dict[str, Tensor]) -> None:
    """Load what older weights have; branches and context, of which they have nothing, add zero to the output."""
    model.load_state_dict(tensors, strict=False)
    if "g_s.unit" not in tensors and "g_s.unit" in model.state_dict():
        unit: Any = model.g_s.unit
        unit.copy_(model.y_unit)


def _center(model: GainedHyperprior, crops: Tensor) -> float:
    """Center latents and reconstructions by the last biases of g_a and g_s, and set y_unit.

    Returns the log-gain of y at the reference λ for which the gained latents have the standard deviation `_START_STD`.
    """
    y = torch.cat([model.g_a(x) for x in crops.split(8)])
    mean = y.mean(dim=(0, 2, 3))
    centered = y - mean[None, :, None, None]
    last: Any = list(model.g_a.children())[-1]
    last.bias.sub_(mean)
    last = list(model.g_s.children())[-1]
    last.bias.add_((crops[:8] - model.g_s(centered[:8])).mean(dim=(0, 2, 3)))
    model.y_unit.copy_(centered.abs().mean(dim=(0, 2, 3)).clamp(min=1e-4))
    return float(torch.log(_START_STD / centered.std()))
