"""Layers in integer arithmetic, identical on every device, and the proof that one cannot overflow.

    a ─► sums of weight · activation ─► + bias ─► LeakyReLU ─► rounding shift ─► clamp to 16 bits ─► a'

Activations and weights have 16 bits. A GEMM in float64 on integers is exact in any order of summation, on any device,
with any thread count, as long as no partial sum can reach 2⁵³; :func:`check_layer` proves that from the weights. All
other arithmetic is exact in int64; gemm.py has the evaluation. `a` is an integer with a fixed number `bits` of
fractional bits: it stands for a·2^−bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

ACTIVATION_MAX = 2**15 - 1
WEIGHT_MAX = 2**15 - 1
SLOPE_BITS = 16  # fractional bits of LeakyReLU's slope


@dataclass(frozen=True)
class IntegerLayer:
    """One (transposed) convolution with its activation.

    Attributes
    ----------
    transposed : bool
    stride, padding, output_padding : int
        As in `nn.Conv2d` and `nn.ConvTranspose2d`. A convolution has stride 1 and keeps the size; a transposed one
        multiplies it by the stride.
    weight : Tensor int16, (out, in, k, k), or (in, out, k, k) when transposed
    bias : Tensor (out,) int64
        In units of weight times activation.
    shift : Tensor (out,) int64
        Rounding right shift after bias and activation, 1 to 62.
    slope : int
        LeakyReLU's slope with SLOPE_BITS; 0: no activation.
    """

    transposed: bool
    stride: int
    padding: int
    output_padding: int
    weight: Tensor
    bias: Tensor
    shift: Tensor
    slope: int

    @property
    def in_channels(self) -> int:
        return self.weight.shape[0 if self.transposed else 1]

    @property
    def out_channels(self) -> int:
        return self.weight.shape[1 if self.transposed else 0]

    def to(self, device: torch.device | str) -> IntegerLayer:
        weight, bias, shift = (v.to(device) for v in (self.weight, self.bias, self.shift))
        return replace(self, weight=weight, bias=bias, shift=shift)


def requantize(layer: IntegerLayer, sums: Tensor, clamp: bool = True) -> Tensor:
    """Bias, LeakyReLU and rounding shift of sums of weight times activation (n, out) int64, in place."""
    sums = sums.add_(layer.bias)
    if layer.slope:
        sums = torch.maximum(sums, (sums * layer.slope).bitwise_right_shift_(SLOPE_BITS))  # the slope is below 1
    a = sums.add_(torch.ones_like(layer.shift) << (layer.shift - 1)).bitwise_right_shift_(layer.shift)
    return a.clamp_(-ACTIVATION_MAX, ACTIVATION_MAX) if clamp else a


def input_rows(layer: IntegerLayer, first: int, end: int) -> tuple[int, int]:
    """The rows of the input that rows `first` to `end` − 1 of the output depend on, half open; may be outside it."""
    k = layer.weight.shape[-1]
    if layer.transposed:  # row i of the input reaches rows i·stride − padding + (0 … k − 1)
        return -((k - 1 - layer.padding - first) // layer.stride), (end - 1 + layer.padding) // layer.stride + 1
    return first - layer.padding, end - layer.padding + k - 1


def sum_bound(layer: IntegerLayer) -> int:
    """What |Σ weight·activation| and all its partial sums, in any order, cannot exceed."""
    weight = layer.weight.to(torch.int64).abs()
    return int(weight.sum((0, 2, 3) if layer.transposed else (1, 2, 3)).max()) * ACTIVATION_MAX


def check_layer(layer: IntegerLayer, in_channels: int | None = None) -> None:
    """Prove that a layer is exact: sums stay below 2⁵³ in float64, products with the slope below 2⁶³ in int64.

    Raises
    ------
    ValueError
        When a bound does not hold, or types or sizes are wrong; `in_channels` is what the layer before it gives.
    """
    if layer.weight.dtype != torch.int16 or layer.bias.dtype != torch.int64:
        raise ValueError("integer layer: the weights are not int16 or the biases not int64")
    size = (layer.out_channels,)
    if in_channels not in (None, layer.in_channels) or layer.bias.shape != size or layer.shift.shape != size:
        raise ValueError("integer layer: the numbers of channels do not match")
    if layer.weight.shape[-1] + layer.output_padding != layer.stride + 2 * layer.padding:
        raise ValueError("integer layer: padding and kernel do not keep the size, times the stride")
    bound = sum_bound(layer)
    if bound >= 2**53:
        raise ValueError("integer layer: a sum could reach 2^53")
    largest = bound + max(int(layer.bias.max()), -int(layer.bias.min()))
    if largest * max(2, layer.slope) >= 2**63:
        raise ValueError("integer layer: a product could reach 2^63")
    if int(layer.shift.min()) < 1 or int(layer.shift.max()) > 62 or not 0 <= layer.slope < 2**SLOPE_BITS:
        raise ValueError("integer layer: a shift or the slope is out of range")
