"""Post-training quantization: the float hyper-decoder and its gains to integers at export, and back at load.

Each channel's weights are scaled by the largest power of two that keeps them within 16 bits, so that rescaling between
layers is a shift. Activations are scaled by a power of two for each layer, chosen from the range that was measured.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .hyper_decoder import (
    GAIN_BITS,
    INPUT_BITS,
    MEAN_BITS,
    SCALE_BITS,
    IntegerGains,
    IntegerHyperDecoder,
    check,
    check_gains,
)
from .integer_layers import ACTIVATION_MAX, SLOPE_BITS, WEIGHT_MAX, IntegerLayer
from .tables import scale_thresholds


def activation_bits(peak: float) -> int:
    """Fractional bits of an activation whose absolute value is to be represented up to `peak`."""
    return math.floor(math.log2(ACTIVATION_MAX / max(peak, 1e-3)))


@torch.no_grad()
def quantize_layer(
    weight: Tensor,
    bias: Tensor | None,
    bits: int,
    target: Tensor,
    *,
    padding: int,
    slope: float,
    transposed: bool = False,
    stride: int = 1,
    output_padding: int = 0,
) -> IntegerLayer:
    """Quantize one convolution and the LeakyReLU of `slope` after it (0: none).

    Parameters
    ----------
    weight, bias : Tensor
        As of `nn.Conv2d` or, `transposed`, of `nn.ConvTranspose2d`.
    bits : int
        Fractional bits of the input.
    target : Tensor (out,) float64
        Fractional bits of each output.

    Raises
    ------
    ValueError
        When a weight does not fit into 16 bits.
    """
    weight = weight.double()
    largest = weight.abs().amax((0, 2, 3) if transposed else (1, 2, 3)).clamp(min=1e-12)
    exponent = torch.floor(torch.log2(WEIGHT_MAX / largest))  # fractional bits of a channel's weights
    exponent = torch.minimum(exponent, target - bits + 40)
    exponent = torch.maximum(exponent, target - bits + 1)  # so that the shift is at least 1
    integers = torch.round(weight * torch.exp2(exponent).view((1, -1, 1, 1) if transposed else (-1, 1, 1, 1)))
    if float(integers.abs().max()) > WEIGHT_MAX:
        raise ValueError("weights are too large for 16 bits")
    bias = torch.zeros_like(exponent) if bias is None else bias.double()
    return IntegerLayer(
        transposed=transposed,
        stride=stride,
        padding=padding,
        output_padding=output_padding,
        weight=integers.to(torch.int16),
        bias=torch.round(bias * torch.exp2(exponent + bits)).to(torch.int64),
        shift=(exponent + bits - target).to(torch.int64),
        slope=round(slope * 2**SLOPE_BITS),
    )


@torch.no_grad()
def quantize_layers(network: nn.Sequential, peaks: list[float], output_bits: Tensor) -> tuple[IntegerLayer, ...]:
    """Quantize (transposed) convolutions, each with the LeakyReLU that may follow it.

    Parameters
    ----------
    peaks : list of float
        For each convolution, the largest absolute input that is to be represented; beyond it inputs saturate.
    output_bits : Tensor (out,) float64
        Fractional bits of the outputs of the last layer.

    Raises
    ------
    ValueError
        When a weight does not fit into 16 bits for these activations.
    """
    convolutions = [m for m in network if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    following = {id(m): n for m, n in zip(network, [*list(network)[1:], None], strict=True)}
    bits = [activation_bits(p) for p in peaks]
    layers = []
    for i, conv in enumerate(convolutions):
        activation = following[id(conv)]
        target = output_bits.double()
        if i + 1 < len(convolutions):
            target = torch.full((conv.out_channels,), float(bits[i + 1]), dtype=torch.float64)
        layers.append(
            quantize_layer(
                conv.weight,
                conv.bias,
                bits[i],
                target,
                padding=int(conv.padding[0]),
                slope=activation.negative_slope if isinstance(activation, nn.LeakyReLU) else 0.0,
                transposed=isinstance(conv, nn.ConvTranspose2d),
                stride=conv.stride[0],
                output_padding=int(conv.output_padding[0]),
            )
        )
    return tuple(layers)


def quantize_hyper_decoder(h_s: nn.Sequential, peaks: list[float], kind: str) -> IntegerHyperDecoder:
    """Quantize h_s; `peaks` as in :func:`quantize_layers`, `kind` as in `IntegerHyperDecoder`.

    Raises
    ------
    ValueError
        When a weight does not fit into 16 bits for these activations, or a sum could overflow.
    """
    last: Any = h_s[-1]
    M = last.out_channels // 2
    output_bits = torch.cat([torch.full((M,), float(SCALE_BITS)), torch.full((M,), float(MEAN_BITS))])
    layers = quantize_layers(h_s, peaks, output_bits)
    result = IntegerHyperDecoder(layers=layers, thresholds=integer_thresholds(kind), kind=kind)
    check(result)
    return result


def dequantize_hyper_decoder(h_s: IntegerHyperDecoder, bits: tuple[int, ...], network: nn.Sequential) -> None:
    """Set the weights and biases of the float `network`, in place, to the values of the integers.

    Parameters
    ----------
    bits : tuple of int
        Fractional bits of the input of each layer.
    """
    convolutions = [m for m in network if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    for i, (conv, layer) in enumerate(zip(convolutions, h_s.layers, strict=True)):
        target = bits[i + 1] if i + 1 < len(bits) else SCALE_BITS  # MEAN_BITS are as many
        exponent = layer.shift.double() + target - bits[i]  # fractional bits of a channel's weights
        shape = (1, -1, 1, 1) if layer.transposed else (-1, 1, 1, 1)
        conv.weight.data = (layer.weight.double() * torch.exp2(-exponent).view(shape)).float()
        assert conv.bias is not None
        conv.bias.data = (layer.bias.double() * torch.exp2(-exponent - bits[i])).float()


def integer_thresholds(kind: str) -> Tensor:
    """Boundaries between the Gaussian tables, of log σ ("exp") or σ ("linear"), (63,) int64 with SCALE_BITS."""
    thresholds = scale_thresholds() if kind == "exp" else np.exp(scale_thresholds())
    return torch.from_numpy(np.round(thresholds * 2**SCALE_BITS).astype(np.int64))


@torch.no_grad()
def quantize_gains(
    kind: str, bits: int, gain_z: Tensor, median: Tensor, scale_gain: Tensor, mean_gain: Tensor
) -> IntegerGains:
    """The gains of one level as integers.

    Parameters
    ----------
    bits : int
        Fractional bits of the first activation.
    gain_z, median : Tensor (N,)
        Gain of z, and median of z without gain.
    scale_gain, mean_gain : Tensor (M,)
        Gains of the outputs of h_s.

    Raises
    ------
    ValueError
        When a gain is too large (2048 and more for the outputs).
    """
    z_scale = torch.round(2.0 ** (bits + INPUT_BITS) / gain_z.double())
    z_offset = torch.round(median.double() * 2.0 ** (bits + INPUT_BITS)) + 2 ** (INPUT_BITS - 1)
    if kind == "exp":
        scale = torch.round(torch.log(scale_gain.double()) * 2**SCALE_BITS)
    else:
        scale = torch.round(scale_gain.double() * 2**GAIN_BITS)
    gains = IntegerGains(
        z_scale=z_scale.to(torch.int64),
        z_offset=z_offset.to(torch.int64),
        scale=scale.to(torch.int64),
        mean=torch.round(mean_gain.double() * 2**GAIN_BITS).to(torch.int64),
    )
    check_gains(gains, len(gain_z), len(mean_gain))
    return gains
