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
from typing import Any

import torch
from torch import Tensor, nn

from .checkerboard import pick, place
from .density import SCALE_BOUND, FactorizedDensity
from .networks.architecture import Architecture
from .networks.build import build
from .networks.context import ContextModel, ContextPass, code_passes, last_layer
from .networks.gains import scale_input, scale_output, shift_output
from .networks.mshyper import freeze
from .networks.transforms import Networks
from .settings import ANCHORS, LEVELS, anchor_weights, level_lambda


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
        self.context: ContextModel | None = None
        if architecture.context is not None:
            last: Any = self.h_s[-1]
            self.context = ContextModel(architecture.context, last.in_channels, count)

    @property
    def networks(self) -> Networks:
        return Networks(g_a=self.g_a, h_a=self.h_a, h_s=self.h_s, g_s=self.g_s)

    def gains(self, lmbda: float) -> tuple[Tensor, Tensor, Tensor]:
        """g_y (M,), g_z (N,), d_y (M,) at λ, interpolated between the anchors, held constant outside them."""
        logs = self.log_gain_y, self.log_gain_z, self.log_gain_d
        g_y, g_z, d_y = (torch.exp(self._interpolated(log, lmbda)) for log in logs)
        return g_y, g_z, d_y

    def context_biases(self, lmbda: float) -> list[Tensor]:
        """Biases of the context model at λ, (halves, hidden) for each channel group, interpolated as the gains are."""
        if self.context is None:
            return []
        return [self._interpolated(group.bias_by_anchor, lmbda) for group in self.context.members]

    def _interpolated(self, anchored: Tensor, lmbda: float) -> Tensor:
        """Rows (A, …) of the anchors → the row at λ, linear in log λ."""
        i, j, t = anchor_weights(lmbda, self.anchors)
        return (1 - t) * anchored[i] + t * anchored[j]


@dataclass(frozen=True)
class Hyperprior:
    """An ordinary mean-scale hyperprior: the networks and the density of z at one λ.

    The outputs of `networks.h_s` are scales, log σ or σ as `architecture.scale` says, then means. `context`, if any,
    corrects them; its inputs are divided by `y_unit` (M,), the gain of y times the natural unit of each channel.
    """

    architecture: Architecture
    networks: Networks
    density: FactorizedDensity
    y_unit: Tensor
    context: ContextModel | None = None


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
    scale_gain = torch.ones_like(mean_gain) if model.architecture.scale == "exp" else mean_gain
    scale_output(networks.h_s, torch.cat([scale_gain, mean_gain]))
    if model.architecture.scale == "exp":
        shift_output(networks.h_s, torch.cat([torch.log(mean_gain), torch.zeros_like(mean_gain)]))
    scale_input(networks.g_s, d_y)
    for _, network in networks.items():
        freeze(network)
    context = copy.deepcopy(model.context)
    if context is not None:
        context.fold(model.context_biases(lmbda), scale_gain, mean_gain)
        context.requires_grad_(False)
    return Hyperprior(
        architecture=model.architecture,
        networks=networks,
        density=fold_density(model, lmbda),
        y_unit=mean_gain,
        context=context,
    )


@torch.no_grad()
def fold_density(model: GainedHyperprior, lmbda: float) -> FactorizedDensity:
    """The density of z with its gain at λ, a copy without gradients."""
    density = copy.deepcopy(model.density).requires_grad_(False)
    density.scale_values(model.gains(lmbda)[1])
    return density


@torch.no_grad()
def code_rounded(folded: Hyperprior, y: Tensor, z_hat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round y pass by pass with the float networks.

    Parameters
    ----------
    y, z_hat : Tensor (B, M, h, w), (B, N, h/4, w/4)
        Latents, and hyper-latents rounded on their grid.

    Returns
    -------
    v, sigma : Tensor (B, n)
        Symbols round(y − μ) of all passes, and their scales, bounded below.
    y_hat : Tensor (B, M, h, w)
    """
    features = folded.networks.h_s[:-1](z_hat).permute(0, 2, 3, 1)
    mixed = [] if folded.context is None else folded.context.mix_features(features)
    anchor = torch.zeros(1, dtype=torch.int64, device=y.device)
    y = y.permute(0, 2, 3, 1)
    y_hat = torch.empty_like(y)
    symbols, sigmas = [], []

    def code(current: ContextPass) -> Tensor:
        scale, mu = current.parameters.chunk(2, -1)
        sigmas.append((scale.exp() if folded.architecture.scale == "exp" else scale).clamp(min=SCALE_BOUND).flatten(1))
        v = torch.round(pick(y[..., current.channels], current.half) - mu)
        symbols.append(v.flatten(1))
        place(y_hat[..., current.channels], current.half, v + mu)
        return v + mu

    code_passes(folded.context, mixed, last_layer(folded.networks.h_s, features), folded.y_unit, anchor, code)
    return torch.cat(symbols, 1), torch.cat(sigmas, 1), y_hat.permute(0, 3, 1, 2)
