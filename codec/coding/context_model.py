"""The integer context model: entropy parameters of y from ẑ and from the symbols of earlier passes, bit-exact.

    features of h_s ──────────► mix ─► LeakyReLU ─► out ─► + last layer of h_s ─► index, μ of the pass
    earlier groups ─► past ───►  ▲
    first half of the group ─► near ┘

A pass is evaluated in blocks, at the positions that it codes and no others, channels-last; the features of h_s are
evaluated as far as the first pass has come. The input of `past` and `near` is the residual r = (ŷ − μ_h)/(g_y · y_unit)
with RESIDUAL_BITS, clamped to 16 bits; μ_h is the mean without context. Half of the positions that `near` could see
have not been coded and are left out.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkerboard import place
from .context_layers import RESIDUAL_BITS, IntegerContextGroup
from .gemm import Matrix, activations, blocks, im2col, outputs_of, with_bias
from .hyper_decoder import GAIN_BITS, MU_BITS, OUTPUT_MAX, UPSAMPLING, Box, Seen, feature_tiles, mu_of, tables_of
from .integer_layers import ACTIVATION_MAX
from .prior import ExactPrior, Pass

INVERSE_BITS = 16  # fractional bits of 1/(g_y · y_unit) beyond RESIDUAL_BITS − MU_BITS
_INVERSE_MAX = 2**31
_DIFFERENCE_MAX = 2**31  # |ŷ − μ_h| with MU_BITS saturates here


def context_passes(prior: ExactPrior, k_z: Tensor, seen: Seen | None) -> Generator[Pass, Tensor, None]:
    """As `passes.passes`, for a prior with a context model: two passes a group, or one without a checkerboard."""
    gains, (h, w) = prior.gains, (UPSAMPLING * side for side in k_z.shape[2:])
    features = _Features.of(prior, k_z)
    margin = max(layer.padding for group in prior.context for layer in group.layers().values())
    residuals: _Grid | None = None  # as large as several bytes a pixel: not before the first symbols have come
    assert gains.context is not None
    done = 0
    for group, biases in zip(prior.context, gains.context, strict=True):
        channels = slice(done, done + group.channels)
        own = torch.arange(channels.start, channels.stop, device=k_z.device)
        last = outputs_of(prior.h_s.matrices[-1], torch.cat([own, own + len(gains.mean)]))
        for half in (None,) if group.near is None else (0, 1):
            mix = with_bias(group.matrices["mix"], biases[half or 0])
            evaluation = _Evaluation(prior, group, last, mix, features, residuals, channels, half)
            index, mu, mu_h = (v.permute(0, 3, 1, 2) for v in evaluation.all(seen))
            symbols = yield Pass(channels, half, index, mu)
            if channels.stop == len(gains.mean) and half != 0:
                return  # nothing follows that would need the residuals
            found = residual(symbols, mu, mu_h, gains.mean[channels])
            if residuals is None:
                residuals = _Grid.zeros((1, h, w, len(gains.mean)), margin, k_z.device)
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
    def zeros(shape: tuple[int, int, int, int], margin: int, device: torch.device) -> _Grid:
        B, h, w, C = shape
        padded = torch.zeros(B, h + 2 * margin, w + 2 * margin, C, dtype=torch.int16, device=device)
        return _Grid(padded, margin)

    @property
    def inside(self) -> Tensor:
        m, (_, height, width, _) = self.margin, self.padded.shape
        return self.padded[:, m : height - m, m : width - m]

    def windows(self, channels: slice, k: int, half: int | None, box: Box) -> Iterator[tuple[slice, Tensor]]:
        """Windows (rows, w', k, k, C) around the positions of a half in a box, which begins at even rows and columns.

        The columns of a half alternate from row to row: even and odd rows are yielded one after the other, with the
        slice of rows that they are.
        """
        first = self.margin - k // 2
        rows, columns = slice(first + box[0], first + box[2] + k - 1), slice(first + box[1], first + box[3] + k - 1)
        v = self.padded[:, rows, columns, channels]
        if half is None:
            yield slice(None), im2col(v, k, k)[0]
            return
        for odd in (0, 1):
            yield slice(odd, None, 2), im2col(v[:, odd:, (half + odd) % 2 :], k, k, step=2)[0]


@dataclass
class _Features:
    """The input of the last layer of h_s, evaluated tile by tile as it is asked for.

    Memory that no tile has filled is not written, either, but for the margin.
    """

    grid: _Grid
    tiles: Iterator[tuple[Box, Tensor]]
    last: Box = (0, 0, 0, 0)  # the tile that was evaluated last

    @staticmethod
    def of(prior: ExactPrior, k_z: Tensor) -> _Features:
        last, (h, w) = prior.h_s.layers[-1], (UPSAMPLING * side for side in k_z.shape[2:])
        m = last.padding
        shape = 1, h + 2 * m, w + 2 * m, last.in_channels
        padded = torch.empty(shape, dtype=torch.int16, device=k_z.device)
        for edge in (padded[:, :m], padded[:, m + h :], padded[:, :, :m], padded[:, :, m + w :]):
            edge.zero_()
        return _Features(_Grid(padded, m), feature_tiles(prior.h_s, prior.gains, k_z))

    def reach(self, bottom: int, right: int) -> None:
        """Evaluate all tiles that rows before `bottom` and columns before `right` depend on, and those before them."""
        _, h, w, _ = self.grid.inside.shape
        bottom, right = min(h, bottom + self.grid.margin), min(w, right + self.grid.margin)
        while self.last[0] < bottom and (self.last[2] < bottom or self.last[3] < right):
            self.last, found = next(self.tiles)
            top, left, end, edge = self.last
            self.grid.inside[:, top:end, left:edge] = found


@dataclass(frozen=True)
class _Evaluation:
    """The evaluation of one pass."""

    prior: ExactPrior
    group: IntegerContextGroup
    last: Matrix  # of h_s, the outputs of this group
    mix: Matrix  # with the biases of the level and the half
    features: _Features
    residuals: _Grid | None
    channels: slice
    half: int | None

    def all(self, seen: Seen | None) -> tuple[Tensor, Tensor, Tensor]:
        """index (1, h, w', C) uint8, μ and μ_h (1, h, w', C) int32 with MU_BITS."""
        group, h_s, gains = self.group, self.prior.h_s, self.prior.gains
        _, h, w, _ = self.features.grid.inside.shape
        step, device = 1 if self.half is None else 2, gains.mean.device
        index = torch.empty(1, h, w // step, group.channels, dtype=torch.uint8, device=device)
        mu, mu_h = (torch.empty(index.shape, dtype=torch.int32, device=device) for _ in range(2))
        scale_gain, mean_gain = gains.scale[self.channels], gains.mean[self.channels]
        for top, left, bottom, right in blocks(h, w // step, device):
            rows, columns = slice(top, bottom), slice(left, right)
            self.features.reach(bottom, step * right)
            base, change = self.outputs((top, step * left, bottom, step * right), right - left)
            base.clamp_(-OUTPUT_MAX, OUTPUT_MAX)
            change.clamp_(-OUTPUT_MAX, OUTPUT_MAX).add_(base).clamp_(-OUTPUT_MAX, OUTPUT_MAX)
            (scale, mean), mean_h = change.chunk(2, -1), base[..., group.channels :]
            index[0, rows, columns] = tables_of(h_s, scale, scale_gain)
            mu[0, rows, columns] = mu_of(mean, mean_gain)
            mu_h[0, rows, columns] = mu_of(mean_h, mean_gain)
            if seen is not None:
                seen(index[0, rows, columns])
        return index, mu, mu_h

    def outputs(self, box: Box, w: int) -> tuple[Tensor, Tensor]:
        """Scales and means of a box without context, and what context adds, (rows, w', 2C) float64."""
        group, matrices, last, mix = self.group, self.group.matrices, self.last, self.mix
        ends, features = [last.layer.in_channels], self.features.grid
        inputs = torch.empty(box[2] - box[0], w, mix.layer.in_channels, dtype=torch.float64, device=mix.offset.device)
        for rows, window in features.windows(slice(None), 1, self.half, box):
            inputs[rows, :, : ends[0]] = window[:, :, 0, 0]
        k = last.layer.weight.shape[-1]
        around = inputs[..., : ends[0]] if k == 1 else self.columns(features, slice(None), k, box, w)
        base = activations(last, around.flatten(0, 1), last.weight, clamp=False)
        if group.past is not None and self.residuals is not None:
            before = slice(0, self.channels.start)
            columns = self.columns(self.residuals, before, group.past.weight.shape[-1], box, w)
            found = activations(matrices["past"], columns.flatten(0, 1), matrices["past"].weight)
            ends.append(ends[-1] + group.past.out_channels)
            inputs[..., ends[-2] : ends[-1]] = found.view(len(inputs), w, -1)
        if group.near is not None and self.residuals is not None and self.half == 1:
            columns = self.columns_of_other_half(self.residuals, group.near.weight.shape[-1], box, w)
            found = activations(matrices["near"], columns.flatten(0, 1), group.near_weight)
            ends.append(ends[-1] + group.near.out_channels)
            inputs[..., ends[-2] : ends[-1]] = found.view(len(inputs), w, -1)
        hidden = activations(mix, inputs[..., : ends[-1]].flatten(0, 1), mix.weight[: ends[-1]])
        change = activations(matrices["out"], hidden, matrices["out"].weight, clamp=False)
        return base.view(len(inputs), w, -1), change.view(len(inputs), w, -1)

    def columns(self, grid: _Grid, channels: slice, k: int, box: Box, w: int) -> Tensor:
        """im2col at the positions of this pass in a box, (rows, w', k·k·C) float64."""
        C = len(range(grid.padded.shape[-1])[channels])
        columns = torch.empty(box[2] - box[0], w, k, k, C, dtype=torch.float64, device=self.mix.offset.device)
        for rows, window in grid.windows(channels, k, self.half, box):
            columns[rows] = window
        return columns.flatten(2)

    def columns_of_other_half(self, residuals: _Grid, k: int, box: Box, w: int) -> Tensor:
        """The same of this group's residuals, only where they are of the other half: (rows, w', K) float64."""
        shapes = [(k - k // 2, k // 2, self.group.channels), (k // 2, k - k // 2, self.group.channels)]
        sizes = [math.prod(shape) for shape in shapes]
        columns = torch.empty(box[2] - box[0], w, sum(sizes), dtype=torch.float64, device=self.mix.offset.device)
        first, second = (v.unflatten(-1, shape) for v, shape in zip(columns.split(sizes, -1), shapes, strict=True))
        for rows, window in residuals.windows(self.channels, k, self.half, box):
            first[rows] = window[:, :, 0::2, 1::2]
            second[rows] = window[:, :, 1::2, 0::2]
        return columns
