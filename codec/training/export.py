"""From a trained model to a model file."""

from __future__ import annotations

import copy
import datetime
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..density import SCALE_BOUND, bits, gaussian_bits
from ..hyperprior import GainedHyperprior, Hyperprior
from ..metrics import psnr_of_mse
from ..models.export import export
from ..models.level import Model
from ..networks.architecture import HYPER_STRIDE
from ..pixels import pad
from ..settings import LEVELS
from .checkpoint import State

_SAMPLES = 24  # photographs on which the range of the hyper-decoder's activations is measured


@torch.no_grad()
def estimate(model: Hyperprior, image: Tensor) -> tuple[float, float]:
    """Estimated bpp and PSNR (dB) of the float model with hard rounding.

    Parameters
    ----------
    image : Tensor (3, H, W) uint8
        Cropped to multiples of 64; at least 64×64.
    """
    height, width = image.shape[1] // 64 * 64, image.shape[2] // 64 * 64
    x = image[None, :, :height, :width].float() / 255
    networks, density = model.networks, model.density
    y = networks.g_a(x)
    median = density.median[None, :, None, None]
    z_hat = torch.round(networks.h_a(y) - median) + median
    scale, mu = networks.h_s(z_hat).chunk(2, 1)
    sigma = (scale.exp() if model.architecture.scale == "exp" else scale).clamp(min=SCALE_BOUND)
    v = torch.round(y - mu)
    rate = bits(density.likelihood(z_hat)).sum() + gaussian_bits(v, sigma).sum()
    x_hat = (networks.g_s(v + mu).clamp(0, 1) * 255).round() / 255
    mse = (x - x_hat).square().mean()
    return float(rate) / (height * width), psnr_of_mse(float(mse))


@torch.no_grad()
def hyper_latents(gained: GainedHyperprior, photographs: list[Tensor]) -> list[Tensor]:
    """Ungained z (1, N, h, w) of photographs (3, H, W) uint8, not rounded."""
    unit = gained.y_unit[None, :, None, None]
    samples = []
    for image in photographs:
        x = pad(image[None].float() / 255, HYPER_STRIDE)
        samples.append(gained.h_a(gained.g_a(x) / unit))
    return samples


def export_checkpoint(state: State, name: str, photographs: list[Tensor], record: dict[str, Any]) -> Model:
    """Make a model of the EMA weights of a training run, which stays as it is.

    Parameters
    ----------
    name : str
        What the model is to be called.
    photographs : list of Tensor (3, H, W) uint8
        Some of them, evenly spread, say how large the activations of the hyper-decoder get.
    record : dict
        Licence and training record (`training_record`), for the metadata.
    """
    gained = copy.deepcopy(state.ema).cpu().float().requires_grad_(False)
    chosen = photographs[:: max(1, len(photographs) // _SAMPLES)][:_SAMPLES]
    return export(gained, name, record, hyper_latents(gained, chosen), LEVELS)


def training_record(
    state: State, device: torch.device, licence: str, sources: list[str], photographs: int, held_out: list[str]
) -> dict[str, Any]:
    """What a model says of its making: recipe, effort, data, machine."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "licence": licence,
        "training": {
            "recipe": asdict(state.recipe),
            "steps": state.step,
            "seconds": round(state.seconds),
            "crops": state.crops,
            "data": sources,
            "photographs": photographs,
            "held_out": held_out,
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "device": machine,
        },
    }
