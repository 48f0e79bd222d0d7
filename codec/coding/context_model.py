"""The integer context model: entropy parameters of y from ẑ and from the symbols of earlier passes, bit-exact.

    features of h_s ──────────► mix ─► LeakyReLU ─► out ─► + last layer of h_s ─► index, μ of the pass
    earlier groups ─► past ───►  ▲
    first half of the group ─► near ┘

A pass is evaluated in blocks of rows, at the positions that it codes and no others, channels-last. The input of `past`
and `near` is the residual r = (ŷ − μ_h)/(g_y · y_unit) with RESIDUAL_BITS, clamped to 16 bits; μ_h is the mean without
context. Half of the positions that `near` could see have not been coded and are left out.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..checkerboard import place
from .context_layers import RESIDUAL_BITS, IntegerContextGroup
from .gemm import Matrix, activations, im2col, outputs_of, row_blocks, with_bias
from .hyper_decoder import GAIN_BITS, MU_BITS, OUTPUT_MAX, hyper_features, mu_of, tables_of
from .integer_layers import ACTIVATION_MAX
from .prior import ExactPrior, Pass

INVERSE_BITS = 16  # fractional bits of 1/(g_y · y_unit) beyond RESIDUAL_BITS − MU_BITS
_INVERSE_MAX = 2**31
_DIFFERENCE_MAX = 2**31  # |ŷ − μ_h| with MU_BITS saturates here


def context_passes(prior: ExactPrior, k_z: Tensor) -> Generator[Pass, Tensor, None]:
    """As `passes.passes`, for a prior with a context model: two passes a group, or one without a checkerboard."""
    gains = prior.gains
    features = _Grid.of(hyper_features(prior.h_s, gains, k_z), prior.h_s.layers[-1].padding)
    margin = max(layer.padding for group in prior.context for layer in group.layers().values())
    residuals = _Grid.of(features.inside.new_zeros(*features.inside.shape[:3], len(gains.mean)), margin)
    assert gains.context is not None
    done = 0
    for group, biases in zip(prior.context, gains.context, strict=True):
        channels = slice(done, done + group.channels)
        own = torch.arange(channels.start, channels.stop, device=k_z.device)
        last = outputs_of(prior.h_s.matrices[-1], torch.cat([own, own + len(gains.mean)]))
        for half in (None,) if group.near is None else (0, 1):
            mix = with_bias(group.matrices["mix"], biases[half or 0])
            evaluation = _Evaluation(prior, group, last, mix, features, residuals, channels, half)
            index, mu, mu_h = (v.permute(0, 3, 1, 2) for v in evaluation.all())
            symbols = yield Pass(channels, half, index, mu)
            if channels.stop == len(gains.mean) and half != 0:
                return  # nothing follows that would need the residuals
            found = residual(symbols, mu, mu_h, gains.mean[channels])
            place(residuals.inside[..., channels], half, found.permute(0, 2, 3, 1))
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
    inverse = inverse.clamp(max=_INVERSE_MAX).double() * 2.0**-INVERSE_BITS
    symbols, mu, mu_h = (v.permute(0, 2, 3, 1) for v in (symbols, mu, mu_h))
    difference = (mu - mu_h).double().add_(symbols, alpha=1 << MU_BITS)
    scaled = difference.clamp_(-_DIFFERENCE_MAX, _DIFFERENCE_MAX).mul_(inverse).floor_()  # exact, or clamped
    return scaled.clamp_(-ACTIVATION_MAX, ACTIVATION_MAX).to(torch.int16).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class _Grid:
    """Activations (1, h, w, C) int16 within a margin of zeros."""

    padded: Tensor
    margin: int

    @staticmethod
    def of(v: Tensor, margin: int) -> _Grid:
        return _Grid(pad(v, (0, 0, margin, margin, margin, margin)), margin)

    @property
    def inside(self) -> Tensor:
        m, (_, height, width, _) = self.margin, self.padded.shape
        return self.padded[:, m : height - m, m : width - m]

    def windows(
        self, channels: slice, k: int, half: int | None, top: int, bottom: int
    ) -> Iterator[tuple[slice, Tensor]]:
        """Windows (rows, w', k, k, C) around the positions of a half in rows `top` to `bottom` − 1, `top` even.

        The columns of a half alternate from row to row: even and odd rows are yielded one after the other, with the
        slice of rows that they are.
        """
        first = self.margin - k // 2
        v = self.padded[:, first + top : first + bottom + k - 1, first : self.padded.shape[2] - first, channels]
        if half is None:
            yield slice(None), im2col(v, k, k)[0]
            return
        for odd in (0, 1):
            yield slice(odd, None, 2), im2col(v[:, odd:, (half + odd) % 2 :], k, k, step=2)[0]


@dataclass(frozen=True)
class _Evaluation:
    """The evaluation of one pass."""

    prior: ExactPrior
    group: IntegerContextGroup
    last: Matrix  # of h_s, the outputs of this group
    mix: Matrix  # with the biases of the level and the half
    features: _Grid
    residuals: _Grid
    channels: slice
    half: int | None

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        """index (1, h, w', C) uint8, μ and μ_h (1, h, w', C) int32 with MU_BITS."""
        group, h_s, gains = self.group, self.prior.h_s, self.prior.gains
        _, h, w, _ = self.residuals.inside.shape
        w, device = w if self.half is None else w // 2, gains.mean.device
        index = torch.empty(1, h, w, group.channels, dtype=torch.uint8, device=device)
        mu, mu_h = (torch.empty(index.shape, dtype=torch.int32, device=device) for _ in range(2))
        scale_gain, mean_gain = gains.scale[self.channels], gains.mean[self.channels]
        for top, bottom in row_blocks(h, w, device, multiple=2):
            base, change = self.outputs(top, bottom, w)
            base.clamp_(-OUTPUT_MAX, OUTPUT_MAX)
            change.clamp_(-OUTPUT_MAX, OUTPUT_MAX).add_(base).clamp_(-OUTPUT_MAX, OUTPUT_MAX)
            (scale, mean), mean_h = change.chunk(2, -1), base[..., group.channels :]
            index[0, top:bottom] = tables_of(h_s, scale, scale_gain)
            mu[0, top:bottom] = mu_of(mean, mean_gain)
            mu_h[0, top:bottom] = mu_of(mean_h, mean_gain)
        return index, mu, mu_h

    def outputs(self, top: int, bottom: int, w: int) -> tuple[Tensor, Tensor]:
        """Scales and means of a block of rows without context, and what context adds, (rows, w', 2C) float64."""
        group, matrices, last, mix = self.group, self.group.matrices, self.last, self.mix
        ends = [last.layer.in_channels]
        inputs = torch.empty(bottom - top, w, mix.layer.in_channels, dtype=torch.float64, device=mix.offset.device)
        features = inputs[..., : ends[0]]
        for rows, window in self.features.windows(slice(None), 1, self.half, top, bottom):
            features[rows] = window[:, :, 0, 0]
        k = last.layer.weight.shape[-1]
        around = features if k == 1 else self.columns(self.features, slice(None), k, top, bottom, w)
        base = activations(last, around.flatten(0, 1), last.weight, clamp=False)
        if group.past is not None:
            before = slice(0, self.channels.start)
            columns = self.columns(self.residuals, before, group.past.weight.shape[-1], top, bottom, w)
            found = activations(matrices["past"], columns.flatten(0, 1), matrices["past"].weight)
            ends.append(ends[-1] + group.past.out_channels)
            inputs[..., ends[-2] : ends[-1]] = found.view(bottom - top, w, -1)
        if group.near is not None and self.half == 1:
            columns = self.columns_of_other_half(group.near.weight.shape[-1], top, bottom, w)
            found = activations(matrices["near"], columns.flatten(0, 1), group.near_weight)
            ends.append(ends[-1] + group.near.out_channels)
            inputs[..., ends[-2] : ends[-1]] = found.view(bottom - top, w, -1)
        hidden = activations(mix, inputs[..., : ends[-1]].flatten(0, 1), mix.weight[: ends[-1]])
        change = activations(matrices["out"], hidden, matrices["out"].weight, clamp=False)
        return base.view(bottom - top, w, -1), change.view(bottom - top, w, -1)

    def columns(self, grid: _Grid, channels: slice, k: int, top: int, bottom: int, w: int) -> Tensor:
        """im2col at the positions of this pass in a block of rows, (rows, w', k·k·C) float64."""
        C = len(range(grid.padded.shape[-1])[channels])
        columns = torch.empty(bottom - top, w, k, k, C, dtype=torch.float64, device=self.mix.offset.device)
        for rows, window in grid.windows(channels, k, self.half, top, bottom):
            columns[rows] = window
        return columns.flatten(2)

    def columns_of_other_half(self, k: int, top: int, bottom: int, w: int) -> Tensor:
        """The same of this group's residuals, only where they are of the other half: (rows, w', K) float64."""
        shapes = [(k - k // 2, k // 2, self.group.channels), (k // 2, k - k // 2, self.group.channels)]
        sizes = [math.prod(shape) for shape in shapes]
        columns = torch.empty(bottom - top, w, sum(sizes), dtype=torch.float64, device=self.mix.offset.device)
        first, second = (v.unflatten(-1, shape) for v, shape in zip(columns.split(sizes, -1), shapes, strict=True))
        for rows, window in self.residuals.windows(self.channels, k, self.half, top, bottom):
            first[rows] = window[:, :, 0::2, 1::2]
            second[rows] = window[:, :, 1::2, 0::2]
        return columns
