"""Export a trained GainedHyperprior as a Model: rounded weights, integer h_s, probability tables, fingerprint, id."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..coding.hyper_decoder import IntegerGains, fingerprint
from ..coding.quantise import activation_bits, dequantise_hyper_decoder, quantise_gains, quantise_hyper_decoder
from ..coding.tables import factorized_tables, gaussian_tables
from ..hyperprior import GainedHyperprior, fold_density, level_lambdas
from .catalogue import FORMAT
from .file import model_id, tensors_of
from .level import Model

_PEAK_MARGIN = 4.0  # the integers represent activations up to this multiple of the largest one in the calibration


@torch.no_grad()
def export(
    gained: GainedHyperprior,
    name: str,
    record: dict[str, Any],
    z_samples: list[Tensor],
    levels: int,
    as_is: bool = False,
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

    Raises
    ------
    ValueError
        When a weight or a gain of h_s is too large for the integers.
    """
    if not as_is:
        for module in (gained.g_a, gained.h_a, gained.g_s):
            for p in module.parameters():
                p.data = p.data.half().float()
        gained.density.update_median()
    peaks = _activation_peaks(gained.h_s, z_samples)
    h_s = quantise_hyper_decoder(gained.h_s, peaks, gained.architecture.scale)
    bits = tuple(activation_bits(p) for p in peaks)
    dequantise_hyper_decoder(h_s, bits, gained.h_s)
    lambdas = level_lambdas(gained.anchors, levels)
    draft = Model(
        name=name,
        id="",
        gained=gained,
        h_s=h_s,
        gains=tuple(level_gains(gained, h_s.kind, bits[0], lmbda) for lmbda in lambdas),
        y_tables=gaussian_tables(),
        z_tables=tuple(factorized_tables(fold_density(gained, lmbda)) for lmbda in lambdas),
        bits=bits,
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
        "slopes": [layer.slope for layer in h_s.layers],
        "fingerprint": fingerprint(h_s, draft.gains[0]),
        **record,
    }
    metadata["id"] = model_id(tensors_of(draft), metadata)
    return replace(draft, id=metadata["id"], fingerprint=metadata["fingerprint"], metadata=metadata)


def _activation_peaks(h_s: nn.Sequential, z_samples: list[Tensor]) -> list[float]:
    """For each convolution, the largest absolute input to represent: that of the samples, with a margin."""
    peaks = [0.0] * sum(isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) for m in h_s)
    for z in z_samples:
        i, a = 0, z
        for layer in h_s:
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                peaks[i] = max(peaks[i], _PEAK_MARGIN * float(a.abs().max()))
                i += 1
            a = layer(a)
    return peaks


def level_gains(gained: GainedHyperprior, kind: str, bits: int, lmbda: float) -> IntegerGains:
    """The integer gains at λ; `kind` is "exp" or "linear", `bits` the fractional bits of the input of h_s."""
    g_y, g_z, _ = gained.gains(lmbda)
    gain = g_y * gained.y_unit
    return quantise_gains(kind, bits, g_z, gained.density.median, gain, gain)
