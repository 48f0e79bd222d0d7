"""ŷ and the rate of y as functions of its symbols, for fixed z: what coordinate descent over the symbols evaluates.

Without a context model μ and the tables are constants. With one, μ and σ of a pass depend on the symbols of earlier
passes: the float networks compute them here, and the gradient by a symbol has its effect on later bits through σ. That
through μ is left out: a change by one is too large for its linearisation, and later symbols can follow μ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkerboard import place
from ..coding.hyper_decoder import MU_BITS, SCALE_BITS
from ..coding.range_coder import Tables
from ..density import SCALE_BOUND, gaussian_bits
from ..latents import Latents
from ..models.level import LevelModel
from ..networks.context import ContextPass, code_passes, last_layer, parts_of, whole_grid


@dataclass(frozen=True)
class Coded:
    """Results of symbols.

    Attributes
    ----------
    y_hat : Tensor (1, M, h, w) float32
        Differentiable by the symbols, each by its own.
    entry : Tensor (1, M, h, w) int64
        Index of each symbol into the entries of all tables, as `table_entries` returns it.
    later_bits : Tensor ()
        Bits of all symbols, differentiable through the σ that depend on earlier symbols; 0 without a context model.
    """

    y_hat: Tensor
    entry: Tensor
    later_bits: Tensor


def symbol_coder(level: LevelModel, latents: Latents) -> Callable[[Tensor], Coded]:
    """A function from symbols of y (1, M, h, w) float32 to `Coded`, for the z of `latents`."""
    folded, context = level.folded, level.folded.context
    if context is None:
        return lambda symbols: _constant(level, latents, symbols)
    z_hat = latents.z.float() + folded.density.median[None, :, None, None]
    features = folded.networks.h_s[:-1](z_hat).permute(0, 2, 3, 1)
    base = last_layer(folded.networks.h_s, features)
    mixed = context.mix_features(features)
    thresholds = level.exact.h_s.thresholds.to(level.device).float() / 2**SCALE_BITS
    anchor = torch.zeros(1, dtype=torch.int64, device=level.device)
    log_scale = folded.architecture.scale == "exp"

    def coder(symbols: Tensor) -> Coded:
        parts: list[Tensor] = []
        bits: list[Tensor] = []
        sources = parts_of(symbols.permute(0, 2, 3, 1), context.context)
        index = torch.empty(1, *base.shape[1:3], base.shape[3] // 2, dtype=torch.int64, device=level.device)

        def code(current: ContextPass) -> Tensor:
            scale, mu = current.parameters.chunk(2, -1)
            own = sources[len(parts)]
            place(index[..., current.channels], current.half, torch.bucketize(scale.detach().contiguous(), thresholds))
            sigma = (scale.exp() if log_scale else scale).clamp(min=SCALE_BOUND)
            bits.append(gaussian_bits(own.detach(), sigma).sum())
            parts.append(own + mu.detach())
            return parts[-1]

        code_passes(context, mixed, base, folded.y_unit, anchor, code)
        y_hat = whole_grid(parts, context.context).permute(0, 3, 1, 2)
        entry = table_entries(symbols.detach(), index.permute(0, 3, 1, 2), level.y_tables)
        return Coded(y_hat=y_hat, entry=entry, later_bits=torch.stack(bits).sum())

    return coder


def _constant(level: LevelModel, latents: Latents, symbols: Tensor) -> Coded:
    y_hat = symbols + latents.mu.float() / 2**MU_BITS
    entry = table_entries(symbols.detach(), latents.index, level.y_tables)
    return Coded(y_hat=y_hat, entry=entry, later_bits=symbols.new_zeros(()))


def table_entries(symbols: Tensor, index: Tensor, tables: Tables) -> Tensor:
    """Index of each symbol of y into the entries of all tables, int64; that of the escape for symbols outside.

    `symbols` are integers of any dtype, `index` is the table of each.
    """
    first, escape, minimum = (
        torch.from_numpy(v).to(index.device)[index.long()]
        for v in (tables.starts[:-1], tables.starts[1:] - 1, tables.minimum)
    )
    entry = first + symbols.long() - minimum
    return torch.where((entry >= first) & (entry < escape), entry, escape)
