"""A mean-scale hyperprior for all λ: one trunk, and per-channel gains that are folded into it for each level.

    x ─►g_a─► y₀ ─(·g_y)─► y ─► round(y − μ) + μ = ŷ ─(·d_y)─► g_s ─► x̂
               │                     ▲ σ, μ (·g_y)
               └►h_a─► z₀ ─(·g_z)─► z ─► ẑ ─(/g_z)─► h_s

Training learns log g_y, log g_z and log d_y (the decoder's inverse gain of y) at a few anchor λ; between anchors they
are interpolated linearly in log λ. `fold` multiplies the gains at one λ into the neighbouring convolutions, which gives
an ordinary mean-scale hyperprior.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .density import FactorizedDensity
from .networks.architecture import Architecture
from .networks.build import build
from .networks.gains import scale_input, scale_output, shift_output
from .networks.mshyper import freeze
from .networks.transforms import Networks
from .settings import ANCHORS, LEVELS, level_lambda


def level_lambdas(anchors: tuple[float, ...] = ANCHORS, levels: int = LEVELS) -> list[float]:
    """The λ ladder: `levels` values, geometric from the first anchor to the last."""
    return [level_lambda(level, (anchors[0], anchors[-1]), levels) for level in range(levels)]


class GainedHyperprior(nn.Module):
    """The trainable model: networks, density of z, and gains at the anchors.

    Attributes
    ----------
    log_gain_y, log_gain_z, log_gain_d : Parameter (A, M), (A, N), (A, M)
        Natural logarithms of the gains at the A anchors.
    y_unit : buffer (M,)
        Mean absolute value of each channel of y₀. h_a takes y₀ / y_unit; the outputs of h_s are in units of y_unit.
    """

    def __init__(self, architecture: Architecture, anchors: tuple[float, ...] = ANCHORS) -> None:
        super().__init__()
        if not all(0 < a < b < math.inf for a, b in zip((1e-9, *anchors), anchors, strict=False)):
            raise ValueError(f"the anchors are not ascending positive numbers: {anchors}")
        self.architecture = architecture
        self.anchors = anchors
        networks = build(architecture)
        self.g_a, self.h_a, self.h_s, self.g_s = networks.g_a, networks.h_a, networks.h_s, networks.g_s
        self.density = FactorizedDensity(architecture.N)
        count = len(anchors)
        self.log_gain_y = nn.Parameter(torch.zeros(count, architecture.M))
        self.log_gain_z = nn.Parameter(torch.zeros(count, architecture.N))
        self.log_gain_d = nn.Parameter(torch.zeros(count, architecture.M))
        self.register_buffer("y_unit", torch.ones(architecture.M))
        self.y_unit: Tensor

    @property
    def networks(self) -> Networks:
        return Networks(g_a=self.g_a, h_a=self.h_a, h_s=self.h_s, g_s=self.g_s)

    def gains(self, lmbda: float) -> tuple[Tensor, Tensor, Tensor]:
        """g_y (M,), g_z (N,), d_y (M,) at λ, interpolated between the anchors, held constant outside them."""
        logs = [math.log(a) for a in self.anchors]
        position = min(max(math.log(lmbda), logs[0]), logs[-1])
        i = max(k for k in range(len(logs)) if logs[k] <= position)
        j = min(i + 1, len(logs) - 1)
        t = 0.0 if i == j else (position - logs[i]) / (logs[j] - logs[i])
        g_y, g_z, d_y = (
            torch.exp((1 - t) * log[i] + t * log[j]) for log in (self.log_gain_y, self.log_gain_z, self.log_gain_d)
        )
        return g_y, g_z, d_y


@dataclass(frozen=True)
class Hyperprior:
    """An ordinary mean-scale hyperprior: the networks and the density of z at one λ.

    The outputs of `networks.h_s` are scales, log σ or σ as `architecture.scale` says, then means.
    """

    architecture: Architecture
    networks: Networks
    density: FactorizedDensity


@torch.no_grad()
def fold(model: GainedHyperprior, lmbda: float) -> Hyperprior:
    """Fold the gains at λ into a copy of the networks, without gradients."""
    g_y, g_z, d_y = model.gains(lmbda)
    networks = copy.deepcopy(model.networks)
    scale_output(networks.g_a, g_y)
    scale_input(networks.h_a, 1 / (g_y * model.y_unit))
    scale_output(networks.h_a, g_z)
    scale_input(networks.h_s, 1 / g_z)
    mean_gain = g_y * model.y_unit
    if model.architecture.scale == "exp":
        scale_output(networks.h_s, torch.cat([torch.ones_like(mean_gain), mean_gain]))
        shift_output(networks.h_s, torch.cat([torch.log(mean_gain), torch.zeros_like(mean_gain)]))
    else:
        scale_output(networks.h_s, torch.cat([mean_gain, mean_gain]))
    scale_input(networks.g_s, d_y)
    for _, network in networks.items():
        freeze(network)
    return Hyperprior(architecture=model.architecture, networks=networks, density=fold_density(model, lmbda))


@torch.no_grad()
def fold_density(model: GainedHyperprior, lmbda: float) -> FactorizedDensity:
    """The density of z with its gain at λ, a copy without gradients."""
    density = copy.deepcopy(model.density).requires_grad_(False)
    density.scale_values(model.gains(lmbda)[1])
    return density
