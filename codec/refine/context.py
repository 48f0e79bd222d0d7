"""The rate of relaxed y under the context model: all passes and their gradients in closed form, without autograd.

    y of a pass ─► relax(y − μ) + μ = ŷ ─► r = (ŷ − μ_h)/unit, clamped ─► `past` of later groups, `near` of half 1
                          ▲                                                      │
                        σ, μ ◄─ h_s + out(LeakyReLU(h)) ◄── h = mix(features, past, near)

Autograd would need thousands of small operations in every step. The backward pass runs the passes in reverse and adds
up the gradient by r from all layers that see it. The rate, which no later pass depends on, is computed once for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..networks.context import LIMIT
from .frozen_context import FrozenContext, RowNumbers
from .fused import Relaxation, rate_of, relaxed_into

_SLOPE = 0.01  # of the LeakyReLUs

_leaky_relu_backward: Any = torch.ops.aten.leaky_relu_backward.grad_input
_hardtanh_backward: Any = torch.ops.aten.hardtanh_backward

Halves = Sequence[Tensor]  # of all positions, one for each half of the checkerboard


@dataclass(frozen=True)
class GroupInputs:
    """Inputs of the passes of a group that depend on ẑ only, in the order of rows (see frozen_context.py).

    Attributes
    ----------
    mixed : Tensor (n, hidden)
        With the bias of `mix`.
    scale, mean : halves of Tensor (n, C) float32
        Of h_s, plus the bias of `out`.
    origin : halves of Tensor (n, C) float32
        The residual of ŷ = 0.
    """

    mixed: Tensor
    scale: Halves
    mean: Halves
    origin: Halves


def group_inputs(context: FrozenContext, parameters: Tensor, mixed: Tensor) -> list[GroupInputs]:
    """The inputs of all groups, from `FrozenContext.parameters`."""
    found = []
    sizes = [group.inverse_unit.shape[0] for group in context.groups for _ in range(2)]
    outputs = parameters.split(sizes, 1)
    for group, scale, mean, h in zip(
        context.groups, outputs[::2], outputs[1::2], mixed.chunk(len(context.groups), 1), strict=True
    ):
        biased = h.unflatten(0, (context.halves, -1)) + group.mix_bias
        origin = torch.addcmul(group.origin, mean, group.inverse_unit, value=-1)
        halves = (v.chunk(context.halves) for v in (scale, mean, origin))
        found.append(GroupInputs(biased.flatten(0, 1), *halves))
    return found


def relaxed_passes(
    y: Tensor,
    parameters: Tensor,
    mixed: Tensor,
    context: FrozenContext,
    inputs: list[GroupInputs] | None,
    relaxation: Relaxation,
    log_scale: bool,
) -> tuple[Tensor, Tensor]:
    """ŷ (B, h, w, M) and its bits (B,), differentiable once by y, parameters and mixed.

    Parameters
    ----------
    parameters, mixed : Tensor
        From `FrozenContext.parameters`.
    inputs : list of GroupInputs, optional
        `group_inputs` of these, where they are constant; None: computed here.
    relaxation : Relaxation
        As in `fused.coded_latents`, but the positions of its noise are in the order of rows.
    log_scale : bool
        Whether scales are log σ; otherwise they are σ.
    """
    y_hat, bits, _ = _Passes.apply(y, parameters, mixed, context, inputs, relaxation, log_scale)
    return y_hat, bits


def coded_passes(
    symbols: Tensor,
    parameters: Tensor,
    mixed: Tensor,
    context: FrozenContext,
    inputs: list[GroupInputs],
    log_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """ŷ (B, h, w, M), its bits (B,) and the scales (B, h, w, M) for symbols of y (B, h, w, M) float32.

    ŷ and bits are differentiable by the symbols where μ is taken as constant: ŷ each by its own, and bits through the
    scales of later symbols. The other arguments are those of `relaxed_passes`.
    """
    y_hat, bits, scale = _Passes.apply(symbols, parameters, mixed, context, inputs, None, log_scale)
    inverse = context.tables(*symbols.shape[:3]).inverse
    return y_hat, bits, scale.index_select(0, inverse).view(symbols.shape)


@dataclass(frozen=True)
class _Saved:
    """Tensors of a group that its backward pass needs."""

    seen: Tensor  # (n + 1, C), the residuals, clamped
    past: Tensor | None  # (n, out)
    near: Tensor | None  # (n', out)
    hidden: Halves  # (n', hidden), before LeakyReLU
    slope: Halves  # (n', C), of v̂ by v


class _Passes(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        parameters: Tensor,
        mixed: Tensor,
        context: FrozenContext,
        inputs: list[GroupInputs] | None,
        relaxation: Relaxation | None,
        log_scale: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, h, w, M = y.shape
        n, tables = B * h * w, context.tables(B, h, w)
        part = n // context.halves
        rows_of_y = y.reshape(n, M).index_select(0, tables.order)
        value, scale, y_hat = (torch.empty_like(rows_of_y) for _ in range(3))
        pieces = [_pieces(v, context) for v in (rows_of_y, value, scale, y_hat)]
        flat = None if relaxation is None else relaxation.flat(y.shape)
        if flat is not None and flat.active is not None:
            flat = replace(flat, active=flat.active.index_select(0, tables.order))
        residuals: list[Tensor] = []  # with a row of zeros for neighbours outside the picture
        ctx.saved = []
        for k, given in enumerate(inputs or group_inputs(context, parameters, mixed)):
            group, hidden_here, past, near = context.groups[k], given.mixed, None, None
            if group.past is not None:
                columns = torch.cat(residuals, 1).index_select(0, tables.around).view(n, -1)
                past = F.leaky_relu_(torch.addmm(group.past.bias, columns, group.past.weight), _SLOPE)
                hidden_here = torch.addmm(hidden_here, past, group.past.mix)
            hidden, slopes = list(hidden_here.chunk(context.halves)), []
            seen = _with_zeros(n, group.inverse_unit.shape[0], hidden_here)
            for half in range(context.halves):
                rows = slice(half * part, (half + 1) * part)
                y_here, value_here, scale_here, y_hat_here = (v[half][k] for v in pieces)
                if group.near is not None and half == 1:
                    columns = seen.index_select(0, tables.to_second[group.near.kernel]).view(part, -1)
                    near = F.leaky_relu_(torch.addmm(group.near.bias, columns, group.near.weight), _SLOPE)
                    hidden[1] = torch.addmm(hidden[1], near, group.near.mix)
                added = (F.leaky_relu(hidden[half], _SLOPE) @ group.out).chunk(2, 1)
                torch.add(given.scale[half], added[0], out=scale_here)
                mu = given.mean[half] + added[1]
                if flat is None:  # y are symbols
                    slope = torch.ones_like(value_here.copy_(y_here))
                else:
                    slope = relaxed_into(value_here, y_here - mu, flat.part(rows, group.channels))
                torch.add(value_here, mu, out=y_hat_here)
                residual = torch.addcmul(given.origin[half], y_hat_here, group.inverse_unit)
                seen[rows] = residual.clamp_(-LIMIT, LIMIT)
                slopes.append(slope)
            residuals.append(seen)
            ctx.saved.append(_Saved(seen=seen, past=past, near=near, hidden=hidden, slope=slopes))
        curvature = None if relaxation is None else relaxation.curvature
        bits, by_v, by_scale = rate_of(value, scale, log_scale, curvature)
        ctx.context, ctx.tables, ctx.rate = context, tables, (by_v if flat else by_v.zero_(), by_scale)
        ctx.mark_non_differentiable(scale)
        y_hat = y_hat.index_select(0, tables.inverse).view(y.shape)
        return y_hat, bits.view(-1, B, part // B).sum((0, 2)), scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        context: FrozenContext = ctx.context
        tables: RowNumbers = ctx.tables
        by_v, by_scale = ctx.rate
        B, h, w, M = grads[0].shape
        n, by_z = B * h * w, ctx.needs_input_grad[1]
        part = n // context.halves
        weight = grads[1][None, :, None].expand(context.halves, B, part // B).reshape(n, 1)
        grad = grads[0].reshape(n, M).index_select(0, tables.order)  # by ŷ
        total = torch.addcmul(grad, by_v, weight)  # with that of the own bits
        by_scale = by_scale * weight
        grad_y = torch.empty_like(grad)
        pieces = [_pieces(v, context) for v in (grad, total, by_scale, grad_y)]
        grad_parameters = grad.new_empty(n, 2 * M) if by_z else None
        grad_mixed: list[Tensor] = []
        grad_seen: Tensor | None = None  # by r of all channels before the current group, from `past` of later ones
        for k, saved in reversed(list(enumerate(ctx.saved))):
            group, C = context.groups[k], saved.seen.shape[1]
            grad_hidden = saved.seen.new_empty(n, group.out.shape[0])
            grad_near: Tensor | None = None  # by r of half 0
            for half in reversed(range(context.halves)):
                rows = slice(half * part, (half + 1) * part)
                grad_here, total_here, scale_here, y_here = (v[half][k] for v in pieces)
                grad_residual = None if grad_seen is None else grad_seen[rows, group.channels]
                if grad_near is not None:
                    grad_residual = grad_near if grad_residual is None else grad_near.add_(grad_residual)
                if grad_residual is not None:
                    grad_residual = _hardtanh_backward(grad_residual, saved.seen[rows], -LIMIT, LIMIT)
                    grad_residual = grad_residual * group.inverse_unit
                    grad_here, total_here = grad_here + grad_residual, total_here + grad_residual
                torch.mul(total_here, saved.slope[half], out=y_here)
                grad_mu = grad_here - y_here
                if grad_parameters is not None:
                    found = grad_parameters[rows, 2 * group.channels.start : 2 * group.channels.stop]
                    found[:, :C] = scale_here
                    found[:, C:] = grad_mu if grad_residual is None else grad_mu - grad_residual
                if half == k == 0 and not by_z:
                    break  # the first pass depends on ẑ only
                grad_out = grad_hidden.new_empty(part, 2 * C)
                grad_out[:, :C] = scale_here
                grad_out[:, C:] = grad_mu
                grad_hidden_here = grad_hidden[rows]
                _through_leaky_relu(grad_out @ group.out.t(), saved.hidden[half], False, grad_hidden_here)
                if group.near is not None and saved.near is not None and half == 1:
                    columns = _with_zeros(part, saved.near.shape[1], grad_hidden)
                    _through_leaky_relu(grad_hidden_here @ group.near.mix.t(), saved.near, True, columns[:part])
                    columns = columns.index_select(0, tables.to_first[group.near.kernel])
                    grad_near = columns.view(part, -1) @ group.near.flipped
            grad_mixed.append(grad_hidden)
            if group.past is not None and saved.past is not None:
                columns = _with_zeros(n, saved.past.shape[1], grad_hidden)
                _through_leaky_relu(grad_hidden @ group.past.mix.t(), saved.past, True, columns[:n])
                found = columns.index_select(0, tables.around).view(n, -1) @ group.past.flipped
                grad_seen = found if grad_seen is None else found.add_(grad_seen[:, : group.channels.start])
        grad_y = grad_y.index_select(0, tables.inverse).view(B, h, w, M)
        by_mixed = torch.cat(grad_mixed[::-1], 1) if by_z else None
        return grad_y, grad_parameters, by_mixed, *[None] * 4


def _pieces(v: Tensor, context: FrozenContext) -> list[list[Tensor]]:
    """Views of the rows (…, n, M) of each half, and of the channels of each group."""
    channels = [group.inverse_unit.shape[0] for group in context.groups]
    return [list(half.split(channels, -1)) for half in v.chunk(context.halves, -2)]


def _with_zeros(rows: int, channels: int, like: Tensor) -> Tensor:
    """Space for rows (n, C), and a row of zeros for neighbours outside the picture."""
    v = like.new_empty(rows + 1, channels)
    v[rows] = 0
    return v


def _through_leaky_relu(grad: Tensor, v: Tensor, is_result: bool, out: Tensor) -> None:
    _leaky_relu_backward(grad, v, _SLOPE, is_result, grad_input=out)
