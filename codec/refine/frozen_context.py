"""The context model with frozen weights, as matrices for `context.py`.

Positions are rows: those of half 0 of the checkerboard of all images, then those of half 1. A layer with a kernel
gathers the rows of its neighbours (im2col by a table of row numbers) and is a matrix then; so is its gradient, with the
same neighbours and the flipped kernel. `near` sees the other half only, so that only every other tap counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..checkerboard import place
from ..networks.context import ContextGroup, ContextModel


@dataclass(frozen=True)
class Layer:
    """`past` or `near` of a group.

    Attributes
    ----------
    kernel : int
    weight, bias : Tensor (taps · in, out), (out,)
    flipped : Tensor (taps · out, in)
        For the gradient.
    mix : Tensor (out, hidden)
        The columns of `mix` that belong to the layer.
    """

    kernel: int
    weight: Tensor
    bias: Tensor
    flipped: Tensor
    mix: Tensor


@dataclass(frozen=True)
class Group:
    """The layers of one channel group.

    Attributes
    ----------
    channels : slice
        Channels of y.
    past, near : Layer or None
    mix_bias : Tensor (halves, 1, hidden)
    out : Tensor (hidden, 2C)
        Without its bias, which `FrozenContext.last_bias` holds.
    inverse_unit, origin : Tensor (C,) float32
        The residual is (ŷ − m) · inverse_unit + origin, where m is the mean of h_s plus the bias of `out`.
    """

    channels: slice
    past: Layer | None
    near: Layer | None
    mix_bias: Tensor
    out: Tensor
    inverse_unit: Tensor
    origin: Tensor


@dataclass(frozen=True)
class RowNumbers:
    """Row numbers for grids of one shape, int64; n positions in all, n' in a half.

    Attributes
    ----------
    order, inverse : Tensor (n,)
        Position of each row, and row of each position.
    around : Tensor (9n,)
        Rows of the 3 × 3 neighbours of each row; n outside the picture.
    to_second, to_first : dict of Tensor (taps · n',)
        For each kernel of `near`: the rows of half 0 around each row of half 1, n outside the picture; and the rows of
        half 1, counted from its first one, around each row of half 0, n' outside.
    """

    order: Tensor
    inverse: Tensor
    around: Tensor
    to_second: dict[int, Tensor]
    to_first: dict[int, Tensor]


@dataclass(frozen=True)
class FrozenContext:
    """A context model at one rate level.

    Attributes
    ----------
    groups : tuple of Group
    features : Tensor (groups · hidden, F)
        The columns of all `mix` that belong to the features of h_s.
    last, last_bias : Tensor (2M, F, k, k), (2M,) float32
        The last layer of h_s, plus the biases of all `out`: scales and means of the first group, of the second …
    halves : int
        2 with a checkerboard, 1 without.
    """

    groups: tuple[Group, ...]
    features: Tensor
    last: Tensor
    last_bias: Tensor
    halves: int
    _tables: dict[tuple[int, int, int], RowNumbers] = field(default_factory=dict, repr=False, compare=False)

    def tables(self, B: int, h: int, w: int) -> RowNumbers:
        """The tables of grids (B, h, w), which are kept."""
        if (B, h, w) not in self._tables:
            kernels = {group.near.kernel for group in self.groups if group.near is not None}
            self._tables[B, h, w] = _row_numbers(B, h, w, self.halves, kernels, self.features.device)
        return self._tables[B, h, w]

    def parameters(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """From the features of h_s (B, h, w, F), differentiable, in the order of rows.

        Returns
        -------
        Tensor (n, 2M) float32
            Scales and means of the first group, of the second …, from `last`.
        Tensor (n, groups · hidden)
            Features for all `mix`.
        """
        B, h, w, F_ = features.shape
        tables = self.tables(B, h, w)
        rows = _Rows.apply(features.reshape(-1, F_), tables)
        mixed = F.linear(rows, self.features)
        with torch.autocast(features.device.type, enabled=False):  # σ and μ need float32
            if self.last.shape[2:] == (1, 1):
                return F.linear(rows.float(), self.last.flatten(1), self.last_bias), mixed
            padding = self.last.shape[-1] // 2
            grid = F.conv2d(features.float().permute(0, 3, 1, 2), self.last, self.last_bias, padding=padding)
            return _Rows.apply(grid.permute(0, 2, 3, 1).reshape(B * h * w, -1), tables), mixed


class _Rows(torch.autograd.Function):
    """Positions (n, C) in the order of rows."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, tables: RowNumbers) -> Tensor:
        ctx.tables = tables
        return v.index_select(0, tables.order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(0, ctx.tables.inverse), None


@torch.no_grad()
def freeze_context(context: ContextModel, last: nn.Conv2d, unit: Tensor, bf16: bool) -> FrozenContext:
    """Prepare a folded context model, whose residuals are divided by `unit` (M,).

    Parameters
    ----------
    last : nn.Conv2d
        The last layer of h_s.
    bf16 : bool
        Whether weights are bfloat16, but those of `last`: what context adds to its outputs needs no float32.
    """
    assert last.bias is not None
    groups, done, order, M = [], 0, [], len(unit)
    for member, own in zip(context.members, context.context.groups, strict=True):
        channels = torch.arange(done, done + own)
        groups.append(_group(member, slice(done, done + own), unit, torch.bfloat16 if bf16 else torch.float32))
        order += [channels, channels + M]
        done += own
    numbers = torch.cat(order)
    features = torch.cat([member.mix.weight[:, : member.ends[0]] for member in context.members])
    return FrozenContext(
        groups=tuple(groups),
        features=features.to(groups[0].out.dtype),
        last=last.weight[numbers].float(),
        last_bias=last.bias[numbers].float() + torch.cat([member.out.bias for member in context.members]),
        halves=2 if context.context.checkerboard else 1,
    )


def _group(member: ContextGroup, channels: slice, unit: Tensor, dtype: torch.dtype) -> Group:
    first, second = member.ends
    mix = member.mix.weight.t()
    inverse_unit = 1 / unit[channels]
    return Group(
        channels=channels,
        past=None if member.past is None else _layer(member.past, mix[first:second], False, dtype),
        near=None if member.near is None else _layer(member.near, mix[second:], True, dtype),
        mix_bias=member.bias_by_anchor[0][:, None].to(dtype),
        out=member.out.weight.t().to(dtype).contiguous(),
        inverse_unit=inverse_unit,
        origin=member.out.bias[len(inverse_unit) :] * inverse_unit,
    )


def _layer(conv: nn.Conv2d, mix: Tensor, other_half: bool, dtype: torch.dtype) -> Layer:
    assert conv.bias is not None
    taps = conv.weight.to(dtype).permute(2, 3, 1, 0)  # (k, k, in, out)
    chosen = _odd(len(taps)) if other_half else slice(None)
    weight, flipped = (t.flatten(0, 1)[chosen].flatten(0, 1) for t in (taps, taps.flip(0, 1).transpose(2, 3)))
    return Layer(
        kernel=len(taps),
        weight=weight.contiguous(),
        bias=conv.bias.to(dtype),
        flipped=flipped.contiguous(),
        mix=mix.to(dtype).contiguous(),
    )


def _odd(k: int) -> Tensor:
    """The numbers of the taps of a k × k kernel between the halves."""
    return torch.arange(1, k * k, 2)  # k is odd


def _row_numbers(B: int, h: int, w: int, halves: int, kernels: set[int], device: torch.device) -> RowNumbers:
    n = B * h * w
    rows = torch.arange(n).view(halves, B, h, w // halves, 1)
    inverse = torch.empty(B, h, w, 1, dtype=torch.int64)
    for half in range(halves):
        place(inverse, half if halves == 2 else None, rows[half])
    order = torch.argsort(inverse.flatten())

    def around(k: int) -> Tensor:
        """Rows of the k × k neighbours of each row, (n, k·k)."""
        padded = F.pad(inverse[..., 0], (k // 2,) * 4, value=n)
        windows: Tensor = padded.unfold(1, k, 1).unfold(2, k, 1)
        return windows.reshape(n, k * k)[order]

    middle = n // 2
    to_second = {k: around(k)[middle:, _odd(k)].flatten() for k in kernels}
    to_first = {k: around(k)[:middle, _odd(k)].flatten() - middle for k in kernels}
    return RowNumbers(
        order=order.to(device),
        inverse=inverse.flatten().to(device),
        around=around(3).flatten().to(device),
        to_second={k: v.to(device) for k, v in to_second.items()},
        to_first={k: v.to(device) for k, v in to_first.items()},
    )
