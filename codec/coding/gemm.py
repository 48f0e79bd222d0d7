"""Evaluation of integer layers by GEMMs in float64, channels-last, bit-exact.

    a (B, H, W, in) ─► im2col ─► GEMM with weight · 2^−shift ─► + bias · 2^−shift ─► LeakyReLU ─► + ½, floor ─► clamp

A power of two scales float64 exactly, so the GEMM may give sums in units of the output. A layer whose product with the
slope, or whose term for rounding, could need more than 53 bits takes the way of `integer_layers.requantize` in int64.

A transposed convolution of stride s is s² convolutions with smaller kernels, one for each phase of the output.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .integer_layers import ACTIVATION_MAX, SLOPE_BITS, IntegerLayer, requantize, sum_bound

_POSITIONS = 2**10  # evaluated at once on a CPU: few enough for its cache, enough for GEMMs
_POSITIONS_OF_DEVICES = 2**13  # on other devices


@dataclass(frozen=True)
class Kernel:
    """The taps of one phase of the output: the window of a position begins at `first` from it, in rows and columns.

    Attributes
    ----------
    phase, first, size : tuple of int
        Row and column each.
    weight : Tensor (taps · in, out) float64
        In units of the output, or integers in a `Matrix` that is not `scaled`.
    """

    phase: tuple[int, ...]
    first: tuple[int, ...]
    size: tuple[int, ...]
    weight: Tensor


@dataclass(frozen=True)
class Matrix:
    """An integer layer, prepared for :func:`run`.

    Attributes
    ----------
    layer : IntegerLayer
    bound : int
        What sums without the bias cannot exceed.
    scaled : bool
        Whether all is exact in float64.
    offset : Tensor (out,) float64
        The bias in units of the output, plus ½ where no LeakyReLU follows.
    kernels : tuple of Kernel
    """

    layer: IntegerLayer
    bound: int
    scaled: bool
    offset: Tensor
    kernels: tuple[Kernel, ...]

    @property
    def weight(self) -> Tensor:
        """That of the only kernel."""
        (kernel,) = self.kernels
        return kernel.weight


def matrix_of(layer: IntegerLayer) -> Matrix:
    """Prepare a layer."""
    bound = sum_bound(layer)
    scaled = _exact_in_float64(layer, bound)
    scale = torch.exp2(-layer.shift.double()) if scaled else torch.ones_like(layer.shift, dtype=torch.float64)
    kernels = []
    if layer.transposed:
        stride, padding, taps = layer.stride, layer.padding, layer.weight.permute(2, 3, 0, 1)  # (k, k, in, out)
        for phase in itertools.product(range(stride), repeat=2):
            u, v = (torch.arange((r + padding) % stride, len(taps), stride).flip(0) for r in phase)
            first = tuple((r + padding - int(t[0])) // stride for r, t in zip(phase, (u, v), strict=True))
            weight = (taps[u][:, v].double() * scale).flatten(0, 2)
            kernels.append(Kernel(phase=phase, first=first, size=(len(u), len(v)), weight=weight))
    else:
        taps = layer.weight.permute(2, 3, 1, 0)
        weight = (taps.double() * scale).flatten(0, 2)
        first = -layer.padding, -layer.padding
        kernels.append(Kernel(phase=(0, 0), first=first, size=(len(taps), len(taps)), weight=weight))
    return Matrix(layer=layer, bound=bound, scaled=scaled, offset=_offset(layer), kernels=tuple(kernels))


def with_bias(matrix: Matrix, bias: Tensor) -> Matrix:
    """The same layer with other biases (out,) int64."""
    layer = replace(matrix.layer, bias=bias)
    if matrix.scaled != _exact_in_float64(layer, matrix.bound):
        return matrix_of(layer)
    return replace(matrix, layer=layer, offset=_offset(layer))


def _exact_in_float64(layer: IntegerLayer, bound: int) -> bool:
    """Whether sums times the slope, and the term for rounding beside them, stay below 2⁵³; with a margin of two."""
    largest = (bound + layer.bias.abs().double()) * max(1, layer.slope)
    return bool((largest + torch.exp2(layer.shift.double() + SLOPE_BITS - 1)).max() < 2.0**52)


def _offset(layer: IntegerLayer) -> Tensor:
    offset = layer.bias.double() * torch.exp2(-layer.shift.double())
    return offset if layer.slope else offset + 0.5


def outputs_of(matrix: Matrix, rows: Tensor) -> Matrix:
    """The part of a convolution that gives some of its outputs, by their numbers (n,)."""
    layer = matrix.layer
    part = replace(layer, weight=layer.weight[rows], bias=layer.bias[rows], shift=layer.shift[rows])
    kernels = tuple(replace(kernel, weight=kernel.weight[:, rows]) for kernel in matrix.kernels)
    return replace(matrix, layer=part, offset=matrix.offset[rows], kernels=kernels)


def activations(matrix: Matrix, columns: Tensor, weight: Tensor, clamp: bool = True) -> Tensor:
    """What the layer gives for columns (n, K) of integers and their weights (K, out): (n, out) float64 integers."""
    if not matrix.scaled:
        return requantize(matrix.layer, (columns @ weight).to(torch.int64), clamp).double()
    a = torch.addmm(matrix.offset, columns, weight)
    if matrix.layer.slope:
        a = F.leaky_relu_(a, matrix.layer.slope / 2**SLOPE_BITS).add_(0.5)
    a.floor_()
    return a.clamp_(-ACTIVATION_MAX, ACTIVATION_MAX) if clamp else a


def run(matrix: Matrix, a: Tensor, clamp: bool = True) -> Tensor:
    """One layer, (B, H, W, in) → (B, H', W', out), float64 integers; the last layer of a network is not clamped."""
    B, H, W, _ = a.shape
    s = matrix.layer.stride
    out = a.new_empty(B, s * H, s * W, matrix.layer.out_channels)
    margin = max(max(kernel.size) for kernel in matrix.kernels) - 1
    padded = F.pad(a, (0, 0, margin, margin, margin, margin)) if margin else a
    for kernel in matrix.kernels:
        (row, col), (top, left), (height, width) = kernel.phase, kernel.first, kernel.size
        for first, end in row_blocks(H, B * W, a.device):
            rows = slice(margin + top + first, margin + top + end + height - 1)
            window = padded[:, rows, margin + left : margin + left + W + width - 1]
            columns = im2col(window, height, width).flatten(3).flatten(0, 2)
            found = activations(matrix, columns, kernel.weight, clamp)
            out[:, s * first + row : s * end : s, col::s] = found.view(B, end - first, W, -1)
    return out


def im2col(v: Tensor, height: int, width: int, step: int = 1) -> Tensor:
    """The windows of v (B, H, W, C), as a view (B, rows, columns, height, width, C)."""
    return v.unfold(1, height, step).unfold(2, width, step).permute(0, 1, 2, 4, 5, 3)


def blocks(rows: int, width: int, device: torch.device) -> Iterator[tuple[int, int, int, int]]:
    """Boxes (top, left, bottom, right) of as many positions as are evaluated at once, in an even number of rows."""
    columns = max(1, min(width, _positions(device) // 2))
    for top, bottom in row_blocks(rows, columns, device, multiple=2):
        for left in range(0, width, columns):
            yield top, left, bottom, min(left + columns, width)


def row_blocks(rows: int, width: int, device: torch.device, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges of rows, half open, of a number of positions that is evaluated at once."""
    step = max(multiple, _positions(device) // width // multiple * multiple)
    for first in range(0, rows, step):
        yield first, min(rows, first + step)


def _positions(device: torch.device) -> int:
    return _POSITIONS if device.type == "cpu" else _POSITIONS_OF_DEVICES
