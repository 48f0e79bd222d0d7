"""The bit-exact hyper-decoder: from the integers of z to table indexes and means, in integer arithmetic only.

    k (z symbols) ─►·1/g_z + median─► a₀ ─►[GEMM, bias, LeakyReLU, shift, clamp]─► … ─►[GEMM, bias]─► p
                                                                     p_scale ─►·g or +log g, thresholds─► index
                                                                     p_mean  ─►·g────────────────────────► μ

Activations have 16 bits and weights 16 bits. A layer is an explicit im2col + GEMM in float64, which is exact in any
order of summation on any device as long as no partial sum can reach 2⁵³: `check` proves that from the weights. All
else is int64. `a` always means an integer with `bits` fractional bits, a·2^−bits in natural units.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..memory import give_back
from .tables import SCALES, scale_thresholds

ACTIVATION_MAX = 2**15 - 1
WEIGHT_MAX = 2**15 - 1
SLOPE_BITS = 16  # fractional bits of LeakyReLU's slope
INPUT_BITS = 12  # fractional bits of the inverse gain of z beyond those of the first activation
SCALE_BITS = 16  # fractional bits of the scale output
MEAN_BITS = 16  # fractional bits of the mean output
GAIN_BITS = 20  # fractional bits of the gains of the outputs
MU_BITS = 10  # fractional bits of μ
_SYMBOL_MAX = 2**20  # z symbols beyond it saturate; so does everything after them
_STRIP = 2**13  # positions of y evaluated at once, 2 megapixels: their im2col takes 0.1 GB (lite) to 0.3 GB
_HALO = 2  # rows of z beyond its own that an output row can depend on: ±1.5 (lite), ±1.75 (mshyper)
_OUTPUT_MAX = 2**31  # what the last layer's outputs and all gains are bounded by


@dataclass(frozen=True)
class IntegerLayer:
    """One convolution of h_s on integers.

    Attributes
    ----------
    transposed : bool
    stride, padding, output_padding : int
    weight : Tensor int16, (out, in, k, k), or (in, out, k, k) when transposed
    bias : Tensor (out,) int64
    shift : Tensor (out,) int64
        Rounding right shift after bias and activation, at least 1.
    slope : int
        LeakyReLU's slope with 16 fractional bits; 0 means that there is no activation after this layer.
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
    def kernel(self) -> int:
        return self.weight.shape[-1]


@dataclass(frozen=True)
class IntegerGains:
    """The small integer vectors of one level.

    Attributes
    ----------
    z_scale, z_offset : Tensor (N,) int64
        a₀ = (k · z_scale + z_offset) >> INPUT_BITS.
    scale : Tensor (M,) int64
        log gain with SCALE_BITS ("exp"), or the gain with GAIN_BITS ("linear").
    mean : Tensor (M,) int64
        Gain of the mean, with GAIN_BITS.
    """

    z_scale: Tensor
    z_offset: Tensor
    scale: Tensor
    mean: Tensor


@dataclass(frozen=True)
class IntegerHyperDecoder:
    """h_s on integers. `kind` is "exp" or "linear", thresholds (63,) int64 with SCALE_BITS."""

    layers: tuple[IntegerLayer, ...]
    thresholds: Tensor
    kind: str

    def to(self, device: torch.device | str) -> IntegerHyperDecoder:
        layers = tuple(
            replace(
                layer,
                weight=layer.weight.to(device),
                bias=layer.bias.to(device),
                shift=layer.shift.to(device),
            )
            for layer in self.layers
        )
        return replace(self, layers=layers, thresholds=self.thresholds.to(device))


def _shift(value: Tensor, by: Tensor | int) -> Tensor:
    """Round-half-up division by 2^by of int64, by ≥ 1, in place."""
    by = torch.as_tensor(by, device=value.device)
    return value.add_(torch.ones_like(by) << (by - 1)).bitwise_right_shift_(by)


def convolve(layer: IntegerLayer, a: Tensor) -> Tensor:
    """The integer sums of one layer before its bias, (B, in, H, W) int64 → (B, out, H', W') int64.

    One GEMM in float64 around an im2col (or a col2im when transposed); nothing is rounded.
    """
    B, _, H, W = a.shape
    x = a.double()
    if layer.transposed:
        c_in, c_out, k, _ = layer.weight.shape
        columns = layer.weight.double().reshape(c_in, -1).T @ x.reshape(B, c_in, H * W)  # (B, out·k·k, HW)
        height, width = ((s - 1) * layer.stride - 2 * layer.padding + k + layer.output_padding for s in (H, W))
        sums = F.fold(columns, (height, width), k, padding=layer.padding, stride=layer.stride)
    else:
        c_out, _, k, _ = layer.weight.shape
        columns = x.reshape(B, -1, H * W) if k == 1 else F.unfold(x, k, padding=layer.padding)
        sums = (layer.weight.double().reshape(c_out, -1) @ columns).view(B, c_out, H, W)
    return sums.to(torch.int64)


def _column(v: Tensor) -> Tensor:
    return v[None, :, None, None]


def run_layer(layer: IntegerLayer, a: Tensor, last: bool) -> Tensor:
    """One layer: sums, bias, LeakyReLU, rounding shift; clamped to 16 bits unless it is the last."""
    sums = convolve(layer, a).add_(_column(layer.bias))
    if layer.slope:
        sums = torch.where(sums < 0, (sums * layer.slope) >> SLOPE_BITS, sums)
    out = _shift(sums, _column(layer.shift))
    return out if last else out.clamp_(-ACTIVATION_MAX, ACTIVATION_MAX)


def _decode_strip(
    h_s: IntegerHyperDecoder, gains: IntegerGains, k: Tensor, top: int, bottom: int
) -> tuple[Tensor, Tensor]:
    """Rows `top` to `bottom` of what `hyper_decode` gives for k."""
    k = k.to(torch.int64).clamp(-_SYMBOL_MAX, _SYMBOL_MAX)
    a = (k * _column(gains.z_scale) + _column(gains.z_offset)) >> INPUT_BITS
    a = a.clamp_(-ACTIVATION_MAX, ACTIVATION_MAX)
    for layer in h_s.layers[:-1]:
        a = run_layer(layer, a, last=False)
    last = h_s.layers[-1]  # the widest: it shall see no more rows than it needs
    first = max(0, top - last.padding)
    a = run_layer(last, a[:, :, first : bottom + last.padding], last=True)[:, :, top - first : bottom - first]
    scale, mean = a.clamp_(-_OUTPUT_MAX, _OUTPUT_MAX).chunk(2, 1)
    gain = _column(gains.scale)
    scale = scale + gain if h_s.kind == "exp" else _shift(scale * gain, GAIN_BITS)
    index = torch.bucketize(scale.contiguous(), h_s.thresholds).to(torch.uint8)
    mu = _shift(mean * _column(gains.mean), GAIN_BITS + MEAN_BITS - MU_BITS)
    return index, mu.clamp_(-(2**23), 2**23).to(torch.int32)


def hyper_decode(h_s: IntegerHyperDecoder, gains: IntegerGains, k: Tensor) -> tuple[Tensor, Tensor]:
    """Table indexes and means of y from the symbols of z.

    Parameters
    ----------
    k : Tensor (B, N, h, w) integer
        round(z − median).

    Returns
    -------
    index : Tensor (B, M, 4h, 4w) uint8
        Which of the 64 Gaussian tables codes each symbol of y.
    mu : Tensor (B, M, 4h, 4w) int32
        μ with MU_BITS fractional bits; `mu / 2**MU_BITS` is exact in float32.
    """
    B, _, h, w = k.shape
    rows = max(1, _STRIP // (16 * w * B))
    if rows >= h:
        return _decode_strip(h_s, gains, k, 0, 4 * h)
    shape = B, len(gains.mean), 4 * h, 4 * w
    index = torch.empty(shape, dtype=torch.uint8, device=k.device)
    mu = torch.empty(shape, dtype=torch.int32, device=k.device)
    for top in range(0, h, rows):
        bottom = min(top + rows, h)
        first, last = max(0, top - _HALO), min(h, bottom + _HALO)
        strips = _decode_strip(h_s, gains, k[:, :, first:last], 4 * (top - first), 4 * (bottom - first))
        for whole, strip in zip((index, mu), strips, strict=True):
            whole[:, :, 4 * top : 4 * bottom] = strip
        give_back()
    return index, mu


def check(h_s: IntegerHyperDecoder) -> None:
    """Prove that every sum is exact: activations are at most 2¹⁵ − 1, so |Σ w·a| ≤ (2¹⁵ − 1)·Σ|w| must be below 2⁵³.

    Any partial sum, in any order, of products w·a is bounded by the same number. After the GEMM, the int64 product
    with the slope must stay below 2⁶³.

    Raises
    ------
    ValueError
        When a bound does not hold or the layers do not fit together.
    """
    previous = None
    for layer in h_s.layers:
        if layer.weight.dtype != torch.int16 or layer.bias.dtype != torch.int64:
            raise ValueError("the integer hyper-decoder does not consist of integers")
        weight = layer.weight.to(torch.int64).abs()
        dims = (0, 2, 3) if layer.transposed else (1, 2, 3)
        c_in, c_out = (0, 1) if layer.transposed else (1, 0)
        fits = previous in (None, weight.shape[c_in])
        previous = weight.shape[c_out]
        if not fits or layer.bias.shape != (previous,) or layer.shift.shape != (previous,):
            raise ValueError("the layers of the integer hyper-decoder do not fit together")
        bound = int(weight.sum(dims).max()) * ACTIVATION_MAX
        if bound >= 2**53:
            raise ValueError("a sum of the integer hyper-decoder could reach 2^53")
        largest = bound + max(int(layer.bias.max()), -int(layer.bias.min()))
        if largest * max(2, layer.slope) >= 2**63:
            raise ValueError("a product of the integer hyper-decoder could reach 2^63")
        if int(layer.shift.min()) < 1 or int(layer.shift.max()) > 62 or not 0 <= layer.slope < 2**SLOPE_BITS:
            raise ValueError("a shift of the integer hyper-decoder is out of range")
    if h_s.thresholds.dtype != torch.int64 or h_s.thresholds.shape != (SCALES - 1,):
        raise ValueError("the thresholds of the scales are not 63 integers")
    if not bool((h_s.thresholds.diff() > 0).all()):
        raise ValueError("the thresholds of the scales do not ascend")


def check_gains(gains: IntegerGains, N: int, M: int) -> None:
    """Prove that no product with the gains of a level can reach 2⁶³.

    Raises
    ------
    ValueError
        When a gain is not an integer or too large, or their number is wrong.
    """
    bounds = {"z_scale": (N, 0, 2**31), "z_offset": (N, -(2**52), 2**52)}
    bounds |= {"scale": (M, -_OUTPUT_MAX, _OUTPUT_MAX), "mean": (M, 0, _OUTPUT_MAX)}
    for name, (channels, low, high) in bounds.items():
        value = getattr(gains, name)
        if value.dtype != torch.int64 or value.shape != (channels,):
            raise ValueError(f"the gains {name} are not {channels} integers")
        if int(value.min()) < low or int(value.max()) > high:
            raise ValueError(f"a gain {name} is out of range")


def fingerprint(h_s: IntegerHyperDecoder, gains: IntegerGains) -> str:
    """SHA-256 of indexes and means for a fixed input: the self-check of a device that is used for the first time.

    Some of the input is large enough to saturate activations: sums that need most of float64's 53 bits are tried too.
    """
    channels = len(gains.z_scale)
    count = np.arange(channels * 3 * 5, dtype=np.int64).reshape(1, channels, 3, 5)
    k = torch.from_numpy(((count * 7919 + 104729) % 31 - 15) * np.where(count % 17 == 0, 100, 1))
    index, mu = hyper_decode(h_s, gains, k.to(gains.z_scale.device))
    digest = hashlib.sha256(index.cpu().numpy().tobytes())
    digest.update(mu.cpu().numpy().astype("<i4").tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ quantisation


@torch.no_grad()
def quantise(h_s: nn.Sequential, peaks: list[float], kind: str) -> IntegerHyperDecoder:
    """Turn the float h_s into integers.

    Parameters
    ----------
    h_s : nn.Sequential
        (Transposed) convolutions and LeakyReLUs.
    peaks : list of float
        The largest absolute activation that is to be represented before each convolution; beyond it they saturate.
    kind : {"exp", "linear"}
        What the scale half of the output is.

    Raises
    ------
    ValueError
        When weights are too large for 16 bits beside these activations.
    """
    convolutions = [m for m in h_s if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    following = {id(m): n for m, n in zip(h_s, [*list(h_s)[1:], None], strict=True)}
    bits = [activation_bits(p) for p in peaks]
    layers = []
    for i, conv in enumerate(convolutions):
        transposed = isinstance(conv, nn.ConvTranspose2d)
        weight = conv.weight.double()
        channels = weight.shape[1 if transposed else 0]
        dims = (0, 2, 3) if transposed else (1, 2, 3)
        bias = torch.zeros(channels, dtype=torch.float64) if conv.bias is None else conv.bias.double()
        target = torch.full((channels,), float(bits[i + 1])) if i + 1 < len(convolutions) else _output_bits(channels)
        largest = weight.abs().amax(dims).clamp(min=1e-12)
        exponent = torch.floor(torch.log2(WEIGHT_MAX / largest))  # fractional bits of a channel's weights
        exponent = torch.minimum(exponent, target - bits[i] + 40)
        exponent = torch.maximum(exponent, target - bits[i] + 1)  # so that the shift is at least 1
        shape = (1, -1, 1, 1) if transposed else (-1, 1, 1, 1)
        integers = torch.round(weight * torch.exp2(exponent).view(shape))
        if float(integers.abs().max()) > WEIGHT_MAX:
            raise ValueError("the weights of the hyper-decoder are too large for its integers")
        activation = following[id(conv)]
        slope = round(activation.negative_slope * 2**SLOPE_BITS) if isinstance(activation, nn.LeakyReLU) else 0
        layers.append(
            IntegerLayer(
                transposed,
                conv.stride[0],
                int(conv.padding[0]),
                int(conv.output_padding[0]),
                integers.to(torch.int16),
                torch.round(bias * torch.exp2(exponent + bits[i])).to(torch.int64),
                (exponent + bits[i] - target).to(torch.int64),
                slope,
            )
        )
    result = IntegerHyperDecoder(tuple(layers), integer_thresholds(kind), kind)
    check(result)
    return result


def integer_thresholds(kind: str) -> Tensor:
    """Where log σ ("exp") or σ ("linear") passes from one table to the next, (63,) int64 with SCALE_BITS."""
    thresholds = scale_thresholds() if kind == "exp" else np.exp(scale_thresholds())
    return torch.from_numpy(np.round(thresholds * 2**SCALE_BITS).astype(np.int64))


def activation_bits(peak: float) -> int:
    """Fractional bits of an activation whose absolute value is to be represented up to `peak`."""
    return math.floor(math.log2(ACTIVATION_MAX / max(peak, 1e-3)))


def _output_bits(channels: int) -> Tensor:
    half = channels // 2
    return torch.cat([torch.full((half,), float(SCALE_BITS)), torch.full((half,), float(MEAN_BITS))])


@torch.no_grad()
def quantise_gains(
    kind: str, bits: int, gain_z: Tensor, median: Tensor, scale_gain: Tensor, mean_gain: Tensor
) -> IntegerGains:
    """The integer vectors of one level.

    Parameters
    ----------
    bits : int
        Fractional bits of the first activation.
    gain_z, median : Tensor (N,)
        Gain of z and the ungained median.
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
    mean = torch.round(mean_gain.double() * 2**GAIN_BITS)
    gains = IntegerGains(*(v.to(torch.int64) for v in (z_scale, z_offset, scale, mean)))
    check_gains(gains, len(gain_z), len(mean_gain))
    return gains
