"""The integer context model: entropy parameters of y from ẑ and from the symbols of earlier passes, bit-exact.

    features of h_s ──────────► mix ─► LeakyReLU ─► out ─► + last layer of h_s ─► index, μ of the pass
    earlier groups ─► past ───►  ▲
    first half of the group ─► near ┘

A pass is evaluated in strips of rows, at the positions that it codes and no others. The input of `past` and `near`
is the residual r = (ŷ − μ_h)/(g_y · y_unit) with RESIDUAL_BITS, clamped to 16 bits; μ_h is the mean without context.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkerboard import place
from ..memory import release_free_memory
from .context_layers import RESIDUAL_BITS, IntegerContextGroup
from .hyper_decoder import (
    GAIN_BITS,
    MU_BITS,
    OUTPUT_MAX,
    IntegerGains,
    IntegerHyperDecoder,
    hyper_features,
    mu_of,
    tables_of,
)
from .integer_layers import ACTIVATION_MAX, IntegerLayer, requantise
from .prior import ExactPrior, Pass

INVERSE_BITS = 16  # fractional bits of 1/(g_y · y_unit) beyond RESIDUAL_BITS − MU_BITS
_INVERSE_MAX = 2**31
_DIFFERENCE_MAX = 2**31  # |ŷ − μ_h| with MU_BITS saturates here
_STRIP = 2**12  # positions evaluated at once: their im2col takes 40 MB (lite) to 150 MB

Taps = list[tuple[int, int]]  # offsets of rows and columns


def context_passes(prior: ExactPrior, k_z: Tensor) -> Generator[Pass, Tensor, None]:
    """As `passes.passes`, for a prior with a context model: two passes a group, or one without a checkerboard."""
    gains = prior.gains
    features = hyper_features(prior.h_s, gains, k_z)  # (1, F, h, w) int16
    _, _, h, w = features.shape
    residuals = torch.zeros(1, len(gains.mean), h, w, dtype=torch.int16, device=features.device)
    assert gains.context is not None
    done = 0
    for group, biases in zip(prior.context, gains.context, strict=True):
        channels = slice(done, done + group.channels)
        for half in (None,) if group.near is None else (0, 1):
            evaluate = _Strips(prior.h_s, gains, group, biases[half or 0], features, residuals, channels, half)
            index, mu, mu_h = evaluate.all()
            symbols = yield Pass(channels, half, index, mu)
            if channels.stop == len(gains.mean) and half != 0:
                return  # nothing follows that would need the residuals
            own = residuals[:, channels].permute(0, 2, 3, 1)
            place(own, half, residual(symbols, mu, mu_h, gains.mean[channels]).permute(0, 2, 3, 1))
        done += group.channels


def residual(symbols: Tensor, mu: Tensor, mu_h: Tensor, gain: Tensor) -> Tensor:
    """What the context model sees of coded symbols: (ŷ − μ_h)/(g_y · y_unit) with RESIDUAL_BITS, int16.

    Parameters
    ----------
    symbols, mu, mu_h : Tensor (1, C, h, w) int32
        Symbols of y, their means with context and without it, with MU_BITS.
    gain : Tensor (C,) int64
        g_y · y_unit with GAIN_BITS.
    """
    inverse = (1 << (GAIN_BITS + INVERSE_BITS + RESIDUAL_BITS - MU_BITS)) // gain.clamp(min=1)
    inverse = inverse.clamp(max=_INVERSE_MAX)[None, :, None, None]
    difference = (symbols.to(torch.int64) << MU_BITS) + (mu - mu_h)
    scaled = (difference.clamp_(-_DIFFERENCE_MAX, _DIFFERENCE_MAX) * inverse) >> INVERSE_BITS
    return scaled.clamp_(-ACTIVATION_MAX, ACTIVATION_MAX).to(torch.int16)


@dataclass(frozen=True)
class _Strips:
    """The evaluation of one pass."""

    h_s: IntegerHyperDecoder
    gains: IntegerGains
    group: IntegerContextGroup
    bias: Tensor  # (hidden,) int64
    features: Tensor  # (1, F, h, w) int16
    residuals: Tensor  # (1, M, h, w) int16
    channels: slice
    half: int | None

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        """index (1, C, h, w') uint8, μ and μ_h (1, C, h, w') int32 with MU_BITS."""
        _, _, h, w = self.features.shape
        shape = 1, self.group.channels, h, w if self.half is None else w // 2
        device = self.features.device
        index = torch.empty(shape, dtype=torch.uint8, device=device)
        mu, mu_h = (torch.empty(shape, dtype=torch.int32, device=device) for _ in range(2))
        rows = max(2, _STRIP // w // 2 * 2)
        for top in range(0, h, rows):
            bottom = min(top + rows, h)
            found = self.strip(top, bottom)
            for whole, part in zip((index, mu, mu_h), found, strict=True):
                whole[0, :, top:bottom] = part.view(shape[1], bottom - top, shape[3])
            if rows < h:
                release_free_memory()
        return index, mu, mu_h

    def strip(self, top: int, bottom: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same for rows `top` to `bottom` − 1, (C, n) each."""
        group, first = self.group, self.channels.start
        features = self.columns(self.features, _taps(1), top, bottom)  # (F, n) float64
        last = self.h_s.layers[-1]
        around = features if last.padding == 0 else self.columns(self.features, _taps_of(last), top, bottom)
        base_scale, base_mean = (self.last_layer(around, part) for part in (0, 1))
        mix = group.mix.weight.double().flatten(1)  # (hidden, F + past + near)
        sums, used = mix[:, : len(features)] @ features, len(features)
        for layer, source in ((group.past, self.residuals[:, :first]), (group.near, self.residuals[:, self.channels])):
            if layer is None:
                continue
            width = layer.out_channels
            if layer is group.past or self.half == 1:
                taps = _taps_of(layer) if layer is group.past else _odd(_taps_of(layer))
                activation = _requantised(layer, _matrix(layer, taps) @ self.columns(source, taps, top, bottom))
                sums += mix[:, used : used + width] @ activation.double()
            used += width
        hidden = _requantised(replace(group.mix, bias=self.bias), sums)  # in int64: float64 could round sum + bias
        out = group.out.weight.double().flatten(1) @ hidden.double()
        scale, mean = _requantised(group.out, out, clamp=False).clamp_(-OUTPUT_MAX, OUTPUT_MAX).chunk(2)
        scale = (base_scale + scale).clamp_(-OUTPUT_MAX, OUTPUT_MAX)
        mean = (base_mean + mean).clamp_(-OUTPUT_MAX, OUTPUT_MAX)
        index = tables_of(self.h_s, scale, self.gains.scale[self.channels, None])
        gain = self.gains.mean[self.channels, None]
        return index, mu_of(mean, gain), mu_of(base_mean, gain)

    def last_layer(self, features: Tensor, part: int) -> Tensor:
        """Scales (part 0) or means (1) of this group without context, (C, n) int64."""
        last, M = self.h_s.layers[-1], len(self.gains.mean)
        rows = slice(part * M + self.channels.start, part * M + self.channels.stop)
        layer = IntegerLayer(
            transposed=False,
            stride=1,
            padding=last.padding,
            output_padding=0,
            weight=last.weight[rows],
            bias=last.bias[rows],
            shift=last.shift[rows],
            slope=last.slope,
        )
        sums = _matrix(layer, _taps_of(last)) @ features
        return _requantised(layer, sums, clamp=False).clamp_(-OUTPUT_MAX, OUTPUT_MAX)

    def columns(self, v: Tensor, taps: Taps, top: int, bottom: int) -> Tensor:
        """im2col of v (1, C, h, w) int16 at the positions of this pass in a strip: (taps · C, n) float64."""
        _, C, h, w = v.shape
        pad, rows = max(abs(i) for tap in taps for i in tap), bottom - top
        first, end = max(0, top - pad), min(h, bottom + pad)
        x = F.pad(v[0, :, first:end], (pad, pad, pad - (top - first), pad - (end - bottom)))
        columns = x.new_empty(len(taps), C, rows, w if self.half is None else w // 2, dtype=torch.float64)
        for found, (i, j) in zip(columns, taps, strict=True):
            moved = x[:, pad + i : pad + i + rows, pad + j : pad + j + w]
            if self.half is None:
                found.copy_(moved)
            else:
                found[:, 0::2] = moved[:, 0::2, self.half :: 2]
                found[:, 1::2] = moved[:, 1::2, 1 - self.half :: 2]
        return columns.view(len(taps) * C, -1)


def _taps(k: int) -> Taps:
    """The offsets (rows, columns) of the taps of a k × k kernel."""
    return [(i, j) for i in range(-(k // 2), k // 2 + 1) for j in range(-(k // 2), k // 2 + 1)]


def _taps_of(layer: IntegerLayer) -> Taps:
    return _taps(layer.weight.shape[-1])


def _odd(taps: Taps) -> Taps:
    """Those between the halves of the checkerboard; the others see zeros."""
    return [(i, j) for i, j in taps if (i + j) % 2]


def _matrix(layer: IntegerLayer, taps: Taps) -> Tensor:
    """The weights of some taps, (out, taps · in) float64."""
    middle = layer.padding
    return torch.cat([layer.weight[:, :, middle + i, middle + j] for i, j in taps], 1).double()


def _requantised(layer: IntegerLayer, sums: Tensor, clamp: bool = True) -> Tensor:
    """`integer_layers.requantise` of exact sums (C, n) float64, (C, n) int64."""
    return requantise(layer, sums.to(torch.int64)[None, :, None], clamp)[0, :, 0]
