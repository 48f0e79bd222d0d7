"""Post-training quantization of the context model, once, when a model is exported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .context_layers import CONTEXT_SLOPE, RESIDUAL_BITS, IntegerContextGroup, check_context
from .hyper_decoder import MEAN_BITS, SCALE_BITS, IntegerHyperDecoder
from .integer_layers import SLOPE_BITS, IntegerLayer
from .quantize import quantize_layer


def _layer(weight: Tensor, bias: Tensor | None, bits: int, target: Tensor | int, slope: int) -> IntegerLayer:
    if not isinstance(target, Tensor):
        target = torch.full((weight.shape[0],), float(target), dtype=torch.float64)
    return quantize_layer(weight, bias, bits, target, padding=weight.shape[-1] // 2, slope=slope / 2**SLOPE_BITS)


@torch.no_grad()
def quantize_context(
    context: Any, feature_bits: int, hidden_bits: tuple[int, ...], h_s: IntegerHyperDecoder
) -> tuple[IntegerContextGroup, ...]:
    """Quantize a `networks.context.ContextModel`.

    Parameters
    ----------
    feature_bits : int
        Fractional bits of the features of h_s, which the outputs of `past` and `near` get, too.
    hidden_bits : tuple of int
        Of the input of each group's last layer.

    Raises
    ------
    ValueError
        When a weight does not fit into 16 bits for these activations, or a sum could overflow.
    """
    groups = []
    for group, hidden in zip(context.groups, hidden_bits, strict=True):
        past, near = (
            None if conv is None else _layer(conv.weight, conv.bias, RESIDUAL_BITS, feature_bits, CONTEXT_SLOPE)
            for conv in (group.past, group.near)
        )
        own = group.out.out_features // 2
        output = torch.cat([torch.full((own,), float(SCALE_BITS)), torch.full((own,), float(MEAN_BITS))]).double()
        mix = _layer(group.mix.weight[:, :, None, None], None, feature_bits, hidden, CONTEXT_SLOPE)
        out = _layer(group.out.weight[:, :, None, None], group.out.bias, hidden, output, 0)
        groups.append(IntegerContextGroup(past=past, near=near, mix=mix, out=out))
    result = tuple(groups)
    check_context(result, h_s, sum(group.channels for group in result))
    return result


def mix_bits(mix: IntegerLayer, hidden_bits: int) -> Tensor:
    """Fractional bits of the sums of `mix`, (hidden,) float64."""
    return mix.shift.double() + hidden_bits


@torch.no_grad()
def quantize_context_biases(
    groups: tuple[IntegerContextGroup, ...], hidden_bits: tuple[int, ...], biases: list[Tensor]
) -> Tensor:
    """The biases of a level, (groups, halves, hidden) int64, from those of each group, (halves, hidden)."""
    rows = []
    for group, hidden, bias in zip(groups, hidden_bits, biases, strict=True):
        rows.append(torch.round(bias.double() * torch.exp2(mix_bits(group.mix, hidden))).to(torch.int64))
    return torch.stack(rows)


@torch.no_grad()
def dequantize_context(
    context: Any, groups: tuple[IntegerContextGroup, ...], feature_bits: int, hidden_bits: tuple[int, ...]
) -> None:
    """Set the weights of a float `ContextModel`, but not its biases by anchor, to the values of the integers."""
    for group, integers, hidden in zip(context.groups, groups, hidden_bits, strict=True):
        for conv, layer in ((group.past, integers.past), (group.near, integers.near)):
            if conv is not None and layer is not None:
                conv.weight.data, conv.bias.data = _floats(layer, RESIDUAL_BITS, feature_bits)
        group.mix.weight.data = _floats(integers.mix, feature_bits, hidden)[0].flatten(1)
        weight, group.out.bias.data = _floats(integers.out, hidden, SCALE_BITS)
        group.out.weight.data = weight.flatten(1)


def _floats(layer: IntegerLayer, bits: int, target: int) -> tuple[Tensor, Tensor]:
    exponent = layer.shift.double() + target - bits
    weight = layer.weight.double() * torch.exp2(-exponent).view(-1, 1, 1, 1)
    return weight.float(), (layer.bias.double() * torch.exp2(-exponent - bits)).float()
