"""From a trained GainedHyperprior to a Model: weights rounded, h_s on integers, tables, fingerprint, id."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..coding.hyper_decoder import IntegerGains, fingerprint
from ..coding.quantise import activation_bits, quantise_gains, quantise_hyper_decoder
from ..coding.tables import factorized_tables, gaussian_tables
from ..hyperprior import GainedHyperprior, fold_density, level_lambdas
from .catalogue import FORMAT
from .file import dequantise, model_id, tensors_of
from .level import Model

_PEAK_MARGIN = 4.0  # room above the largest activation seen when h_s is quantised


@torch.no_grad()
def export(
    gained: GainedHyperprior,
    name: str,
    record: dict[str, Any],
    z_samples: list[Tensor],
    levels: int,
    as_is: bool = False,
) -> Model:
    """Make a model of a trained GainedHyperprior (on the CPU): round, quantise, tabulate, fingerprint.

    Parameters
    ----------
    record : dict
        The training record and the licence, for the metadata.
    z_samples : list of Tensor (B, N, h, w)
        Ungained ẑ of photographs, on which the range of h_s's activations is measured.
    levels : int
        64 for a ladder, 1 for a model of a single λ.
    as_is : bool
        Keep the weights in fp32 and the stored medians of z: an imported model shall code as the original does.
    """
    if not as_is:
        for module in (gained.g_a, gained.h_a, gained.g_s):
            for p in module.parameters():
                p.data = p.data.half().float()
        gained.density.update_median()
    peaks = [0.0] * sum(isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) for m in gained.h_s)
    for z in z_samples:
        i, a = 0, z
        for layer in gained.h_s:
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                peaks[i] = max(peaks[i], _PEAK_MARGIN * float(a.abs().max()))
                i += 1
            a = layer(a)
    h_s = quantise_hyper_decoder(gained.h_s, peaks, gained.architecture.scale)
    bits = tuple(activation_bits(p) for p in peaks)
    dequantise(gained.h_s, h_s, bits)
    gains, z_tables = [], []
    for lmbda in level_lambdas(gained.anchors, levels):
        gains.append(level_gains(gained, h_s.kind, bits[0], lmbda))
        z_tables.append(factorized_tables(fold_density(gained, lmbda)))
    draft = Model(
        name=name,
        id="",
        gained=gained,
        h_s=h_s,
        gains=tuple(gains),
        y_tables=gaussian_tables(),
        z_tables=tuple(z_tables),
        bits=bits,
        fingerprint="",
        metadata={},
    )
    draft = replace(draft, fingerprint=fingerprint(h_s, gains[0]))
    metadata = {
        "format": FORMAT,
        "name": name,
        "architecture": asdict(gained.architecture),
        "anchors": list(gained.anchors),
        "levels": levels,
        "bits": list(bits),
        "slopes": [layer.slope for layer in h_s.layers],
        "fingerprint": draft.fingerprint,
        **record,
    }
    metadata["id"] = model_id(tensors_of(draft), metadata)
    return replace(draft, id=metadata["id"], metadata=metadata)


def level_gains(gained: GainedHyperprior, kind: str, bits: int, lmbda: float) -> IntegerGains:
    g_y, g_z, _ = gained.gains(lmbda)
    gain = g_y * gained.y_unit
    return quantise_gains(kind, bits, g_z, gained.density.median, gain, gain)
