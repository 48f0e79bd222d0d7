"""Export a trained GainedHyperprior as a Model: rounded weights, integer h_s, probability tables, fingerprint, id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from ..coding.context_layers import IntegerContextGroup, check_context_biases
from ..coding.hyper_decoder import IntegerGains
from ..coding.passes import fingerprint
from ..coding.quantize import activation_bits, dequantize_hyper_decoder, quantize_gains, quantize_hyper_decoder
from ..coding.quantize_context import dequantize_context, quantize_context, quantize_context_biases
from ..coding.tables import factorized_tables, gaussian_tables
from ..hyperprior import GainedHyperprior, fold_density, level_lambdas
from .catalogue import FORMAT
from .file import encoder_digest, model_id, tensors_of
from .level import Model
from .ranges import measure_ranges


@torch.no_grad()
def export(
    gained: GainedHyperprior,
    name: str,
    record: dict[str, Any],
    z_samples: list[Tensor],
    levels: int,
    as_is: bool = False,
    y_samples: Sequence[Tensor] = (),
) -> Model:
    """Export a hyperprior on the CPU; its weights are changed to those of the model.

    Parameters
    ----------
    record : dict
        Licence and training record, for the metadata.
    z_samples : list of Tensor (B, N, h, w)
        ẑ of photographs, without gain, to calibrate the range of h_s's activations.
    levels : int
        64 for a ladder of λ, 1 for a model of one λ.
    as_is : bool
        Keep the float32 weights of g_a, h_a and g_s and the medians of z. By default weights are rounded to float16
        and the medians computed from the density.
    y_samples : sequence of Tensor (B, M, 4h, 4w)
        y without gain that belong to `z_samples`, to calibrate the context model where there is one.

    Raises
    ------
    ValueError
        When a weight is not finite, or a weight or a gain of the integer networks is too large.
    """
    if not all(bool(torch.isfinite(v).all()) for v in gained.state_dict().values()):
        raise ValueError("a weight is not finite")
    if not as_is:
        for module in (gained.g_a, gained.h_a, gained.g_s):
            for p in module.parameters():
                p.data = p.data.half().float()
        gained.density.update_median()
    ranges = measure_ranges(gained, z_samples, y_samples)
    h_s = quantize_hyper_decoder(gained.h_s, ranges.h_s, gained.architecture.scale)
    bits = tuple(activation_bits(p) for p in ranges.h_s)
    dequantize_hyper_decoder(h_s, bits, gained.h_s)
    context: tuple[IntegerContextGroup, ...] = ()
    context_bits = tuple(activation_bits(p) for p in ranges.hidden)
    if gained.context is not None:
        context = quantize_context(gained.context, bits[-1], context_bits, h_s)
        dequantize_context(gained.context, context, bits[-1], context_bits)
    lambdas = level_lambdas(gained.anchors, levels)
    draft = Model(
        name=name,
        id="",
        gained=gained,
        h_s=h_s,
        gains=_narrowed([level_gains(gained, h_s.kind, bits[0], context, context_bits, lmbda) for lmbda in lambdas]),
        context=context,
        y_tables=gaussian_tables(),
        z_tables=tuple(factorized_tables(fold_density(gained, lmbda)) for lmbda in lambdas),
        bits=bits,
        context_bits=context_bits,
        fingerprint="",
        metadata={},
    )
    metadata = {
        "format": FORMAT,
        "name": name,
        "architecture": asdict(gained.architecture),
        "anchors": list(gained.anchors),
        "levels": levels,
        "bits": list(bits),
        "context_bits": list(context_bits),
        "slopes": [layer.slope for layer in h_s.layers],
        "fingerprint": fingerprint(draft.prior(0)),
        **record,
    }
    tensors = tensors_of(draft)
    metadata["id"] = model_id(tensors, metadata)
    metadata["encoder"] = encoder_digest(tensors, metadata)
    return replace(draft, id=metadata["id"], fingerprint=metadata["fingerprint"], metadata=metadata)


def level_gains(
    gained: GainedHyperprior,
    kind: str,
    bits: int,
    context: tuple[IntegerContextGroup, ...],
    context_bits: tuple[int, ...],
    lmbda: float,
) -> IntegerGains:
    """The integer gains at λ, int64.

    Parameters
    ----------
    kind : {"exp", "linear"}
        Of the scale output of h_s.
    bits : int
        Fractional bits of the input of h_s.
    context, context_bits
        As in `Model`.

    Raises
    ------
    ValueError
        When a gain is too large.
    """
    g_y, g_z, _ = gained.gains(lmbda)
    gain = g_y * gained.y_unit
    gains = quantize_gains(kind, bits, g_z, gained.density.median, gain, gain)
    if context:
        gains = replace(gains, context=quantize_context_biases(context, context_bits, gained.context_biases(lmbda)))
        check_context_biases(context, gains)
    return gains


def _narrowed(levels: list[IntegerGains]) -> tuple[IntegerGains, ...]:
    """The same in int32, but those tensors of which a level does not fit."""
    rows = [level.tensors() for level in levels]
    for name in rows[0]:
        if max(int(row[name].abs().max()) for row in rows) < 2**31:
            for row in rows:
                row[name] = row[name].to(torch.int32)
    return tuple(IntegerGains(**row) for row in rows)
