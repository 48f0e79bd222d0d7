"""The networks of CompressAI's hyperpriors, and its GDN with the parameters computed once.

`mshyper` is `MeanScaleHyperprior` (Minnen et al. 2018, arXiv 1809.02736). `bmshj` is `ScaleHyperprior` (Ballé et al.
2018, arXiv 1802.01436), for imported weights only.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .architecture import Architecture
from .transforms import Networks


def _compressai() -> Any:
    """`compressai.models`, imported on first use, as that takes seconds; its deprecation warnings are hidden."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from compressai import models
    return models


def build_mshyper(a: Architecture) -> Networks:
    model = _compressai().MeanScaleHyperprior(a.N, a.M)
    return Networks(g_a=model.g_a, h_a=model.h_a, h_s=model.h_s, g_s=model.g_s)


class FrozenGDN(nn.Module):
    """Generalized divisive normalization (Ballé et al. 2016, arXiv 1511.06281) with fixed parameters, for inference.

    x / √(β + Γx²), or x · √(β + Γx²) when `inverse`, with Γ `gamma` (C, C, 1, 1) and β (C,).
    """

    def __init__(self, gamma: Tensor, beta: Tensor, inverse: bool) -> None:
        super().__init__()
        self.register_buffer("gamma", gamma)
        self.register_buffer("beta", beta)
        self.inverse = inverse
        self.gamma: Tensor
        self.beta: Tensor

    def forward(self, x: Tensor) -> Tensor:
        norm = F.conv2d(x * x, self.gamma, self.beta)
        return x * (torch.sqrt(norm) if self.inverse else torch.rsqrt(norm))


@torch.no_grad()
def freeze(network: nn.Module) -> None:
    """Make a network ready for inference, in place: no gradients to weights, every GDN a `FrozenGDN`."""
    network.requires_grad_(False)
    layer: Any
    for name, layer in list(network.named_children()):
        if hasattr(layer, "gamma_reparam"):  # CompressAI's GDN
            gamma = layer.gamma_reparam(layer.gamma)[:, :, None, None].detach()
            setattr(network, name, FrozenGDN(gamma, layer.beta_reparam(layer.beta).detach(), layer.inverse))
        else:
            freeze(layer)


class Absolute(nn.Module):
    """|x|, the first layer of the scale hyperprior's h_a."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


def build_bmshj(a: Architecture) -> Networks:
    """A scale hyperprior as a mean-scale one: h_s has M more outputs for the means, which an import sets to zero.

    The ReLUs of h_s become LeakyReLUs with the smallest slope of the integer layers, 2⁻¹⁶. The last one is left out:
    scales are bounded below by the probability tables.
    """
    model = _compressai().ScaleHyperprior(a.N, a.M)
    up, up_again, conv = model.h_s[0], model.h_s[2], nn.Conv2d(a.N, 2 * a.M, 3, padding=1)
    h_s = nn.Sequential(up, nn.LeakyReLU(2**-16), up_again, nn.LeakyReLU(2**-16), conv)
    return Networks(g_a=model.g_a, h_a=nn.Sequential(Absolute(), *model.h_a), h_s=h_s, g_s=model.g_s)
