"""Integer layers in numpy: sums as GEMMs in float64, everything else in int64. docs/format.md is the specification.

    a ─► sums of weight · activation ─► + bias ─► LeakyReLU ─► rounding shift ─► clamp to 16 bits ─► a'

Activations and weights are 16-bit integers. A GEMM in float64 on integers is exact, in any order of summation and with
any number of threads, where no partial sum can reach 2⁵³; `check_layer` proves that from the weights, and that the rest
stays below 2⁶³. Arrays are channels-last.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ACTIVATION_MAX = 2**15 - 1
OUTPUT_MAX = 2**31  # of the last layer of a network
BIAS_MAX = 2**48  # of the biases that depend on the level
SLOPE_BITS = 16  # fractional bits of a slope


@dataclass(frozen=True)
class Layer:
    """A convolution that keeps the size, or a transposed one of stride 2, and its activation.

    Attributes
    ----------
    weight : ndarray float64
        Integers: (k, k, in, out) of a convolution, (in, k, k, out) of a transposed one.
    bias, shift : ndarray (out,) int64
    slope : int
        Of the LeakyReLU, with SLOPE_BITS; 0: none, and no clamp to 16 bits.
    transposed : bool
    """

    weight: np.ndarray
    bias: np.ndarray
    shift: np.ndarray
    slope: int
    transposed: bool = False

    @property
    def side(self) -> int:
        """Of the kernel, k."""
        return int(self.weight.shape[1])

    @property
    def inputs(self) -> int:
        return int(self.weight.shape[0 if self.transposed else 2])

    @property
    def outputs(self) -> int:
        return int(self.weight.shape[3])


def layer_of(weight: np.ndarray, bias: np.ndarray, shift: np.ndarray, slope: int, transposed: bool = False) -> Layer:
    """A layer of a model file, proved to be exact; weight is (in, out, k, k) if transposed, else (out, in, k, k).

    Raises
    ------
    ValueError
        When a bound does not hold, or types or sizes are wrong.
    """
    if weight.dtype != np.int16 or bias.dtype != np.int64 or shift.dtype != np.uint8 or weight.ndim != 4:
        raise ValueError("integer layer: the types are not those of the format")
    axes = (0, 2, 3, 1) if transposed else (2, 3, 1, 0)
    layer = Layer(
        weight=np.ascontiguousarray(weight.transpose(axes), np.float64),
        bias=bias,
        shift=shift.astype(np.int64),
        slope=slope,
        transposed=transposed,
    )
    check_layer(layer)
    return layer


def check_layer(layer: Layer, bias_max: int | None = None) -> None:
    """Prove that sums stay below 2⁵³ and products with the slope below 2⁶³.

    Parameters
    ----------
    bias_max : int, optional
        Bound of the biases, where they are not those of the layer.

    Raises
    ------
    ValueError
    """
    axes = (0, 1, 2)
    if layer.bias.shape != (layer.outputs,) or layer.shift.shape != (layer.outputs,):
        raise ValueError("integer layer: the numbers of channels do not match")
    if layer.weight.shape[2 if layer.transposed else 0] != layer.side or layer.side % 2 == 0:
        raise ValueError("integer layer: the kernel is not square, or of even size")
    bound = int(np.abs(layer.weight).sum(axes).max()) * ACTIVATION_MAX  # the sum of weights is below 2⁴⁰: exact
    if bound >= 2**53:
        raise ValueError("integer layer: a sum could reach 2^53")
    largest = max(int(layer.bias.max()), -int(layer.bias.min())) if bias_max is None else bias_max
    if (bound + largest) * max(2, layer.slope) >= 2**63:
        raise ValueError("integer layer: a product could reach 2^63")
    if layer.shift.min() < 1 or layer.shift.max() > 62 or not 0 <= layer.slope < 2**SLOPE_BITS:
        raise ValueError("integer layer: a shift or the slope is out of range")


def finished(layer: Layer, sums: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """Bias, LeakyReLU, rounding shift and clamp of sums (…, out) float64 integers; int64.

    Without a slope the result is clamped to ±OUTPUT_MAX, not to 16 bits; `bias` replaces that of the layer.
    """
    a = sums.astype(np.int64)
    a += layer.bias if bias is None else bias
    if layer.slope:
        np.maximum(a, (a * layer.slope) >> SLOPE_BITS, out=a)  # the slope is below 1
    a += np.int64(1) << (layer.shift - 1)
    a >>= layer.shift
    limit = ACTIVATION_MAX if layer.slope else OUTPUT_MAX
    return np.clip(a, -limit, limit, out=a)


def multiplied(v: np.ndarray, gain: np.ndarray, bits: int) -> np.ndarray:
    """v · gain · 2^−bits, rounded half up, of int64 up to 2³¹ each."""
    product: np.ndarray = (v * gain + (1 << (bits - 1))) >> bits
    return product


def upsampled(layer: Layer, a: np.ndarray) -> np.ndarray:
    """A transposed convolution of stride 2: (H, W, in) float64 integers → (2H, 2W, out) int64.

    One GEMM gives what each input adds to the k × k outputs around it; these overlap, and are summed.
    """
    H, W, _ = a.shape
    k, out = layer.side, layer.outputs
    margin = k // 2
    parts = (a.reshape(H * W, -1) @ layer.weight.reshape(layer.inputs, -1)).reshape(H, W, k, k, out)
    sums = np.zeros((2 * H + k - 2, 2 * W + k - 2, out))
    for u in range(k):
        for v in range(k):
            sums[u : u + 2 * H - 1 : 2, v : v + 2 * W - 1 : 2] += parts[:, :, u, v]
    return finished(layer, sums[margin : margin + 2 * H, margin : margin + 2 * W])
