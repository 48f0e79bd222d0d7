"""ŷ and the rate of y as functions of its symbols, for fixed z: what coordinate descent over the symbols evaluates.

Without a context model μ and the tables are constants. With one, μ and σ of a pass depend on the symbols of earlier
passes: the float networks compute them here, and the gradient by a symbol has its effect on later bits through σ. That
through μ is left out: a change by one is too large for its linearization, and later symbols can follow μ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..coding.hyper_decoder import MU_BITS, SCALE_BITS
from ..coding.range_coder import Tables
from ..latents import Latents
from ..models.level import LevelModel
from .context import coded_passes, group_inputs
from .frozen_context import freeze_context


@dataclass(frozen=True)
class Coded:
    """Results of symbols.

    Attributes
    ----------
    y_hat : Tensor (1, M, h, w) float32
        Symbols plus μ.
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
    last: Any = folded.networks.h_s[-1]
    frozen = freeze_context(context, last, folded.y_unit, bf16=False)
    z_hat = latents.z.float() + folded.density.median[None, :, None, None]
    given = frozen.parameters(folded.networks.h_s[:-1](z_hat).permute(0, 2, 3, 1))
    inputs = group_inputs(frozen, *given)
    thresholds = level.exact.h_s.thresholds.to(level.device).float() / 2**SCALE_BITS
    log_scale = folded.architecture.scale == "exp"

    def coder(symbols: Tensor) -> Coded:
        y_hat, bits, scale = coded_passes(symbols.permute(0, 2, 3, 1), *given, frozen, inputs, log_scale)
        index = torch.bucketize(scale, thresholds).permute(0, 3, 1, 2)
        entry = table_entries(symbols.detach(), index, level.y_tables)
        return Coded(y_hat=y_hat.permute(0, 3, 1, 2), entry=entry, later_bits=bits.sum())

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
