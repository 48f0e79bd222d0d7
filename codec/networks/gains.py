"""Fold per-channel gains into the first or the last layer of a network, in place."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .lite import LiteAnalysis, LiteSynthesis


def scale_input(network: nn.Module, gain: Tensor) -> None:
    """Multiply the input channels of a network by `gain` (C,)."""
    if isinstance(network, LiteSynthesis):
        network.scale_input(gain)
        return
    layer: Any = next(child for child in network.children() if hasattr(child, "weight"))
    if isinstance(layer, nn.ConvTranspose2d):
        layer.weight.data *= gain.view(-1, 1, 1, 1)  # (in, …)
    else:
        layer.weight.data *= gain.view(1, -1, 1, 1)  # (out, in, k, k)


def scale_output(network: nn.Module, gain: Tensor) -> None:
    """Multiply the output channels of a network by `gain` (C,); g_a of `lite` is a sum of two layers."""
    layers: list[Any] = list(network.children())[-1:]
    if isinstance(network, LiteAnalysis):
        layers = network.last_layers()
    for layer in layers:
        layer.weight.data *= gain.view(-1, 1, 1, 1)  # (out, in, k, k)
        if layer.bias is not None:
            layer.bias.data *= gain


def shift_output(network: nn.Sequential, offset: Tensor) -> None:
    """Add `offset` (C,) to the output channels of a network."""
    layer: Any = network[-1]
    layer.bias.data += offset
