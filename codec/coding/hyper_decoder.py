"""The integer hyper-decoder: symbols of z to entropy parameters of y (table indexes and means), bit-exact everywhere.

    k (symbols of z) ─►·1/g_z + median─► a₀ ─►[integer layers]─► scale ─►·g or + log g, thresholds─► index
                                                                 mean  ─►·g────────────────────────► μ

Only integer arithmetic: see integer_layers.py. The gains of a level enter as integer vectors, so that the layers are
stored once for all levels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..memory import release_free_memory
from .integer_layers import ACTIVATION_MAX, IntegerLayer, check_layer, input_rows, per_channel, round_shift, run_layer
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
_STRIP = 2**13  # positions of y evaluated at once, 2 megapixels: their im2col takes 0.1 GB (lite) to 0.3 GB


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

    def to(self, device: torch.device | str) -> IntegerHyperDecoder:
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


def hyper_decode(h_s: IntegerHyperDecoder, gains: IntegerGains, k: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy parameters of y from the symbols of z.

    Parameters
    ----------
    k : Tensor (B, N, h, w) integer
        round(z − median), on the device of `h_s` and `gains`.

    Returns
    -------
    index : Tensor (B, M, 4h, 4w) uint8
        Which of the 64 Gaussian tables codes each symbol of y.
    mu : Tensor (B, M, 4h, 4w) int32
        μ with MU_BITS fractional bits; `mu / 2**MU_BITS` is exact in float32.
    """
    B, _, h, w = k.shape
    rows = max(1, _STRIP // (UPSAMPLING**2 * w * B))
    if rows >= h:
        return _decode_strip(h_s, gains, k, 0, h)
    shape = B, len(gains.mean), UPSAMPLING * h, UPSAMPLING * w
    index = torch.empty(shape, dtype=torch.uint8, device=k.device)
    mu = torch.empty(shape, dtype=torch.int32, device=k.device)
    for top in range(0, h, rows):
        bottom = min(top + rows, h)
        strip = slice(UPSAMPLING * top, UPSAMPLING * bottom)
        index[:, :, strip], mu[:, :, strip] = _decode_strip(h_s, gains, k, top, bottom)
        release_free_memory()
    return index, mu


def _decode_strip(
    h_s: IntegerHyperDecoder, gains: IntegerGains, k: Tensor, top: int, bottom: int
) -> tuple[Tensor, Tensor]:
    """The entropy parameters that belong to rows `top` to `bottom` − 1 of k (B, N, h, w)."""
    first, end = UPSAMPLING * top, UPSAMPLING * bottom
    for layer in reversed(h_s.layers):
        first, end = input_rows(layer, first, end)
    first, end = max(0, first), min(k.shape[2], end)
    top, bottom = UPSAMPLING * (top - first), UPSAMPLING * (bottom - first)  # rows of y in this strip

    a = _inner_layers(h_s, gains, k[:, :, first:end])
    last = h_s.layers[-1]  # the most channels: evaluated on the strip's own rows only
    first = max(0, top - last.padding)
    a = run_layer(last, a[:, :, first : bottom + last.padding], clamp=False)[:, :, top - first : bottom - first]
    scale, mean = a.clamp_(-OUTPUT_MAX, OUTPUT_MAX).chunk(2, 1)
    return tables_of(h_s, scale, per_channel(gains.scale)), mu_of(mean, per_channel(gains.mean))


def _inner_layers(h_s: IntegerHyperDecoder, gains: IntegerGains, k: Tensor) -> Tensor:
    """All layers but the last, (B, N, h, w) → (B, F, 4h, 4w) int64 of 16 bits."""
    k = k.to(torch.int64).clamp(-_SYMBOL_MAX, _SYMBOL_MAX)
    a = (k * per_channel(gains.z_scale) + per_channel(gains.z_offset)) >> INPUT_BITS
    a = a.clamp_(-ACTIVATION_MAX, ACTIVATION_MAX)
    for layer in h_s.layers[:-1]:
        a = run_layer(layer, a)
    return a


def tables_of(h_s: IntegerHyperDecoder, scale: Tensor, gain: Tensor) -> Tensor:
    """Table indexes, uint8, of scale outputs and their gains, int64 tensors that broadcast."""
    scale = scale + gain if h_s.kind == "exp" else round_shift(scale * gain, GAIN_BITS)
    return torch.bucketize(scale.contiguous(), h_s.thresholds).to(torch.uint8)


def mu_of(mean: Tensor, gain: Tensor) -> Tensor:
    """μ with MU_BITS, int32, of mean outputs and their gains, int64 tensors that broadcast."""
    mu = round_shift(mean * gain, GAIN_BITS + MEAN_BITS - MU_BITS)
    return mu.clamp_(-(2**23), 2**23).to(torch.int32)


def hyper_features(h_s: IntegerHyperDecoder, gains: IntegerGains, k: Tensor) -> Tensor:
    """The input of the last layer, for the context model: (1, N, h, w) integer → (1, F, 4h, 4w) int16."""
    _, _, h, w = k.shape
    rows = max(1, _STRIP // (UPSAMPLING**2 * w))
    if rows >= h:
        return _inner_layers(h_s, gains, k).to(torch.int16)
    channels = h_s.layers[-1].in_channels
    features = torch.empty(1, channels, UPSAMPLING * h, UPSAMPLING * w, dtype=torch.int16, device=k.device)
    for top in range(0, h, rows):
        bottom = min(top + rows, h)
        first, end = UPSAMPLING * top, UPSAMPLING * bottom
        for layer in reversed(h_s.layers[:-1]):
            first, end = input_rows(layer, first, end)
        first, end = max(0, first), min(h, end)
        strip = _inner_layers(h_s, gains, k[:, :, first:end])
        strip = strip[:, :, UPSAMPLING * (top - first) : UPSAMPLING * (bottom - first)]
        features[:, :, UPSAMPLING * top : UPSAMPLING * bottom] = strip
        release_free_memory()
    return features


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
    if not bool((h_s.thresholds.diff() > 0).all()):
        raise ValueError("the scale thresholds are not strictly ascending")


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
