"""Convolutions in integer arithmetic, identical on every device, and the proof that one cannot overflow.

    a ─► convolve: im2col + GEMM in float64 ─► + bias ─► LeakyReLU ─► rounding shift ─► clamp to 16 bits ─► a'

Activations and weights have 16 bits. A GEMM in float64 on integers is exact in any order of summation, on any device,
with any thread count, as long as no partial sum can reach 2⁵³; :func:`check_layer` proves that from the weights. All
other arithmetic is int64. `a` is an integer with a fixed number `bits` of fractional bits: it stands for a·2^−bits.

A layer with several inputs can take them concatenated along the channels. Where their kernels differ, it is the sum of
one :func:`convolve` each, passed to :func:`requantise`; its bound is then the sum of their :func:`sum_bound`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
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
        As in `nn.Conv2d` and `nn.ConvTranspose2d`; a convolution has stride 1 and keeps the size.
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


def per_channel(v: Tensor) -> Tensor:
    """(C,) → (1, C, 1, 1), which broadcasts over an activation."""
    return v[None, :, None, None]


def round_shift(value: Tensor, by: Tensor | int) -> Tensor:
    """(value + 2^(by−1)) >> by: division by 2^by, rounded half up; int64, by ≥ 1, in place."""
    by = torch.as_tensor(by, device=value.device)
    return value.add_(torch.ones_like(by) << (by - 1)).bitwise_right_shift_(by)


def convolve(layer: IntegerLayer, a: Tensor) -> Tensor:
    """Sums of weight times activation, (B, in, H, W) int64 → (B, out, H', W') int64, exact.

    One GEMM in float64 after an im2col, or before a col2im when transposed. No library convolution is used: cuDNN may
    choose Winograd or FFT algorithms, which round.
    """
    B, _, H, W = a.shape
    x = a.double()
    if layer.transposed:
        c_in, _, k, _ = layer.weight.shape
        columns = layer.weight.double().reshape(c_in, -1).T @ x.reshape(B, c_in, H * W)  # (B, out·k·k, HW)
        height, width = ((s - 1) * layer.stride - 2 * layer.padding + k + layer.output_padding for s in (H, W))
        sums = F.fold(columns, (height, width), k, padding=layer.padding, stride=layer.stride)
    else:
        c_out, _, k, _ = layer.weight.shape
        columns = x.reshape(B, -1, H * W) if k == 1 else F.unfold(x, k, padding=layer.padding)
        sums = (layer.weight.double().reshape(c_out, -1) @ columns).view(B, c_out, H, W)
    return sums.to(torch.int64)


def requantise(layer: IntegerLayer, sums: Tensor, clamp: bool = True) -> Tensor:
    """Bias, LeakyReLU and rounding shift of :func:`convolve`'s sums, in place."""
    sums = sums.add_(per_channel(layer.bias))
    if layer.slope:
        sums = torch.maximum(sums, (sums * layer.slope).bitwise_right_shift_(SLOPE_BITS))  # the slope is below 1
    a = round_shift(sums, per_channel(layer.shift))
    return a.clamp_(-ACTIVATION_MAX, ACTIVATION_MAX) if clamp else a


def run_layer(layer: IntegerLayer, a: Tensor, clamp: bool = True) -> Tensor:
    """One layer, (B, in, H, W) int64 → (B, out, H', W') int64; the last layer of a network is not clamped."""
    return requantise(layer, convolve(layer, a), clamp)


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
    bound = sum_bound(layer)
    if bound >= 2**53:
        raise ValueError("integer layer: a sum could reach 2^53")
    largest = bound + max(int(layer.bias.max()), -int(layer.bias.min()))
    if largest * max(2, layer.slope) >= 2**63:
        raise ValueError("integer layer: a product could reach 2^63")
    if int(layer.shift.min()) < 1 or int(layer.shift.max()) > 62 or not 0 <= layer.slope < 2**SLOPE_BITS:
        raise ValueError("integer layer: a shift or the slope is out of range")
