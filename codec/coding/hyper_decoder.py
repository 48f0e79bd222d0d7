"""The integer hyper-decoder: symbols of z to entropy parameters of y (table indexes and means), bit-exact everywhere.

    k (symbols of z) ─►·1/g_z + median─► a₀ ─►[integer layers]─► scale ─►·g or + log g, thresholds─► index
                                                                 mean  ─►·g────────────────────────► μ

Only integer arithmetic: see integer_layers.py. The gains of a level enter as integer vectors, so that the layers are
stored once for all levels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..memory import release_free_memory
from .gemm import Matrix, matrix_of, run
from .integer_layers import ACTIVATION_MAX, IntegerLayer, check_layer, input_rows
from .scale_index import MAX_THRESHOLD, ScaleIndex, scale_index
from .tables import SCALES

UPSAMPLING = 4  # positions of y per position of z, along each axis
INPUT_BITS = 12  # fractional bits of the inverse gain of z beyond those of the first activation
SCALE_BITS = 16  # fractional bits of the scale output
MEAN_BITS = 16  # fractional bits of the mean output
GAIN_BITS = 20  # fractional bits of the gains of the outputs
MU_BITS = 10  # fractional bits of μ
BIAS_MAX = 2**48  # of the context model's biases
INTEGERS = torch.int32, torch.int64  # types of gains
_SYMBOL_MAX = 2**20  # symbols of z saturate here
OUTPUT_MAX = 2**31  # bound of the last layer's outputs and of all gains
_TILE = 2**13  # positions of y evaluated at once, 2 megapixels: their im2col takes 0.1 GB (lite) to 0.3 GB

Box = tuple[int, int, int, int]  # top, left, bottom, right, in positions of y; half open
Seen = Callable[[Tensor], None]  # receives the indexes (uint8, any shape) of a part of y when they have been evaluated


@dataclass(frozen=True)
class IntegerHyperDecoder:
    """The layers of h_s on integers, shared by all levels.

    Attributes
    ----------
    layers : tuple of IntegerLayer
        The last one has 2M outputs, scales then means, with SCALE_BITS and MEAN_BITS.
    thresholds : Tensor (63,) int64
        Boundaries between the Gaussian tables, of log σ ("exp") or σ ("linear"), with SCALE_BITS.
    kind : {"exp", "linear"}
        Whether the scale output is log σ or σ.
    """

    layers: tuple[IntegerLayer, ...]
    thresholds: Tensor
    kind: str

    @functools.cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """The layers, prepared for evaluation."""
        return tuple(matrix_of(layer) for layer in self.layers)

    @functools.cached_property
    def index(self) -> ScaleIndex:
        """The thresholds, prepared for look-up."""
        return scale_index(self.thresholds)

    def to(self, device: torch.device | str) -> IntegerHyperDecoder:
        """On a device; itself where it is there, so that levels share `matrices`."""
        if self.thresholds.device == torch.device(device):
            return self
        layers = tuple(layer.to(device) for layer in self.layers)
        return replace(self, layers=layers, thresholds=self.thresholds.to(device))


@dataclass(frozen=True)
class IntegerGains:
    """The gains of one level, int64; in a model file and in `Model.gains` int32 where they fit.

    Attributes
    ----------
    z_scale, z_offset : Tensor (N,)
        a₀ = (k · z_scale + z_offset) >> INPUT_BITS.
    scale : Tensor (M,)
        Log gain with SCALE_BITS ("exp"), or gain with GAIN_BITS ("linear"), of the scale output.
    mean : Tensor (M,)
        Gain of the mean output, with GAIN_BITS.
    context : Tensor (groups, halves, hidden), optional
        Biases of the first activation of the context model, in units of its sums.
    """

    z_scale: Tensor
    z_offset: Tensor
    scale: Tensor
    mean: Tensor
    context: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The attributes that are not None."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in named.items() if value is not None}

    def to(self, to: torch.device | str | torch.dtype) -> IntegerGains:
        return IntegerGains(**{name: value.to(to) for name, value in self.tensors().items()})


def hyper_decode(
    h_s: IntegerHyperDecoder, gains: IntegerGains, k: Tensor, seen: Seen | None = None
) -> tuple[Tensor, Tensor]:
    """Entropy parameters of y from the symbols of z.

    Parameters
    ----------
    k : Tensor (B, N, h, w) integer
        round(z − median), on the device of `h_s` and `gains`.
    seen : callable, optional
        Called with the indexes of each tile; what it raises ends the evaluation.

    Returns
    -------
    index : Tensor (B, M, 4h, 4w) uint8
        Which of the 64 Gaussian tables codes each symbol of y.
    mu : Tensor (B, M, 4h, 4w) int32
        μ with MU_BITS fractional bits; `mu / 2**MU_BITS` is exact in float32.
    """
    B, _, h, w = k.shape
    shape = B, UPSAMPLING * h, UPSAMPLING * w, len(gains.mean)
    index = torch.empty(shape, dtype=torch.uint8, device=k.device)
    mu = torch.empty(shape, dtype=torch.int32, device=k.device)
    for box in _tiles(k):
        part = _decode_tile(h_s, gains, k, box)
        if seen is not None:
            seen(part[0])
        if box[2:] == shape[1:3] and box[:2] == (0, 0):
            index, mu = part
        else:
            rows, columns = slice(box[0], box[2]), slice(box[1], box[3])
            index[:, rows, columns], mu[:, rows, columns] = part
            release_free_memory()
    return index.permute(0, 3, 1, 2), mu.permute(0, 3, 1, 2)


def feature_tiles(h_s: IntegerHyperDecoder, gains: IntegerGains, k: Tensor) -> Iterator[tuple[Box, Tensor]]:
    """The input of the last layer, for the context model, tile by tile in the order of rows, then columns.

    Yields
    ------
    box, features : Box, Tensor (1, rows, columns, F) float64
        Integers of 16 bits.
    """
    for box in _tiles(k):
        yield box, _features(h_s, gains, k, box)
        release_free_memory()


def _tiles(k: Tensor) -> Iterator[Box]:
    """Tiles of at most _TILE positions: strips of whole rows of z, or parts of a row where it is longer than that."""
    B, _, h, w = k.shape
    positions = max(1, _TILE // (UPSAMPLING**2 * B))  # of z
    columns = min(w, positions)
    rows = positions // columns
    for top in range(0, h, rows):
        for left in range(0, w, columns):
            box = top, left, min(top + rows, h), min(left + columns, w)
            yield tuple(UPSAMPLING * v for v in box)  # type: ignore[misc]


def _decode_tile(h_s: IntegerHyperDecoder, gains: IntegerGains, k: Tensor, box: Box) -> tuple[Tensor, Tensor]:
    """The entropy parameters, channels last, of a box of y that belong to k (B, N, h, w)."""
    margin, (height, width) = h_s.layers[-1].padding, (UPSAMPLING * side for side in k.shape[2:])
    top, left = max(0, box[0] - margin), max(0, box[1] - margin)
    around = top, left, min(height, box[2] + margin), min(width, box[3] + margin)
    a = run(h_s.matrices[-1], _features(h_s, gains, k, around), clamp=False)  # edges of the tile are wrong
    a = a[:, box[0] - top : box[2] - top, box[1] - left : box[3] - left]
    scale, mean = a.clamp_(-OUTPUT_MAX, OUTPUT_MAX).chunk(2, -1)
    return tables_of(h_s, scale, gains.scale), mu_of(mean, gains.mean)


def _features(h_s: IntegerHyperDecoder, gains: IntegerGains, k: Tensor, box: Box) -> Tensor:
    """A box of the input of the last layer, (B, rows, columns, F) float64 integers of 16 bits."""
    rows, columns = (box[0], box[2]), (box[1], box[3])
    for layer in reversed(h_s.layers[:-1]):
        rows, columns = input_rows(layer, *rows), input_rows(layer, *columns)
    (top, bottom), (left, right) = (
        (max(0, first), min(side, end)) for (first, end), side in zip((rows, columns), k.shape[2:], strict=True)
    )
    k = k[:, :, top:bottom, left:right].permute(0, 2, 3, 1).to(torch.int64).clamp(-_SYMBOL_MAX, _SYMBOL_MAX)
    a = (k * gains.z_scale + gains.z_offset) >> INPUT_BITS
    a = a.clamp_(-ACTIVATION_MAX, ACTIVATION_MAX).double()
    for matrix in h_s.matrices[:-1]:
        a = run(matrix, a)
    stretch = a.shape[1] // (bottom - top)
    top, left = stretch * top, stretch * left
    return a[:, box[0] - top : box[2] - top, box[1] - left : box[3] - left]


def tables_of(h_s: IntegerHyperDecoder, scale: Tensor, gain: Tensor) -> Tensor:
    """Table indexes, uint8, of scale outputs (…, C), float64 integers, and their gains (C,) int64."""
    if h_s.kind == "exp":
        return h_s.index(scale + gain)
    return h_s.index(multiplied(scale, gain, GAIN_BITS))


def multiplied(v: Tensor, gain: Tensor, bits: int) -> Tensor:
    """v · gain · 2^−bits, rounded half up, of float64 integers v (…, C) and gains (C,) with fractional bits.

    Exact where |v · gain| < 2^53 − 2^bits; beyond, the result is inexact, but not less than 2^(52 − bits).
    """
    return (v * (gain.double() * 2.0**-bits)).add_(0.5).floor_()


def mu_of(mean: Tensor, gain: Tensor) -> Tensor:
    """μ with MU_BITS, int32, of mean outputs (…, C), float64 integers, and their gains (C,) int64."""
    mu = multiplied(mean, gain, GAIN_BITS + MEAN_BITS - MU_BITS)  # inexact only where it is clamped
    return mu.clamp_(-(2.0**23), 2.0**23).to(torch.int32)


def check(h_s: IntegerHyperDecoder) -> None:
    """Prove that the hyper-decoder cannot overflow: each layer by `check_layer`, and that they fit together.

    Raises
    ------
    ValueError
        When a bound does not hold, or types or sizes are wrong.
    """
    channels = None
    for layer in h_s.layers:
        check_layer(layer, channels)
        channels = layer.out_channels
    if h_s.thresholds.dtype != torch.int64 or h_s.thresholds.shape != (SCALES - 1,):
        raise ValueError(f"the scale thresholds are not {SCALES - 1} int64 numbers")
    if not bool((h_s.thresholds[1:] > h_s.thresholds[:-1]).all()):  # differences could wrap
        raise ValueError("the scale thresholds are not strictly ascending")
    if max(-int(h_s.thresholds[0]), int(h_s.thresholds[-1])) > MAX_THRESHOLD:
        raise ValueError("the scale thresholds are out of range")


def check_gains(gains: IntegerGains, N: int, M: int) -> None:
    """Prove that no product with the gains of a level can reach 2⁶³.

    Raises
    ------
    ValueError
        When a gain is out of range, or types or sizes are wrong.
    """
    bounds = {"z_scale": (N, 0, 2**31), "z_offset": (N, -(2**52), 2**52)}
    bounds |= {"scale": (M, -OUTPUT_MAX, OUTPUT_MAX), "mean": (M, 0, OUTPUT_MAX)}
    for name, (channels, low, high) in bounds.items():
        value = getattr(gains, name)
        if value.dtype not in INTEGERS or value.shape != (channels,):
            raise ValueError(f"integer gain {name}: not {channels} int32 or int64 numbers")
        if int(value.min()) < low or int(value.max()) > high:
            raise ValueError(f"integer gain {name}: out of range")
