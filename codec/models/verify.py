"""Check a model file against a fresh derivation of its tables, thresholds and integer gains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..coding.quantize import integer_thresholds
from ..coding.range_coder import Tables
from ..coding.tables import factorized_tables, gaussian_tables
from ..hyperprior import fold_density
from .catalogue import ModelError
from .export import level_gains
from .file import read_model

_FREQUENCY_TOLERANCE = 64  # of 2²⁴: exp and erf differ between machines
_GAIN_TOLERANCE = 2.0**-20  # relative, and 1 besides


def verify(path: Path) -> list[str]:
    """Check id, bounds and fingerprint, and derive the tables, thresholds and integer gains of every level anew.

    Returns
    -------
    list of str
        Problems, one line each; empty when the model is sound.
    """
    try:
        model = read_model(path)
    except ModelError as error:
        return [str(error)]
    problems = []
    if not model.exact_on(torch.device("cpu")):
        problems.append("the integer networks do not give the recorded fingerprint")
    if int((model.h_s.thresholds - integer_thresholds(model.h_s.kind)).abs().max()) > 1:
        problems.append("the scale thresholds are not those of the tables")
    for level, lmbda in enumerate(model.lambdas):
        try:
            derived = level_gains(
                model.gained, model.h_s.kind, model.bits[0], model.context, model.context_bits, lmbda
            ).tensors()
        except ValueError as error:
            problems.append(f"level {level}: {error}")
            continue
        if not all(_gains_agree(stored, derived[name]) for name, stored in model.gains[level].tensors().items()):
            problems.append(f"the integer gains of level {level} are not those of the model")
    if not _tables_agree(model.y_tables, gaussian_tables()):
        problems.append("the probability tables of y are not those of the model")
    for level, lmbda in enumerate(model.lambdas):
        if not _tables_agree(model.z_tables[level], factorized_tables(fold_density(model.gained, lmbda))):
            problems.append(f"the probability tables of z, level {level} are not those of the model")
    return problems


def _gains_agree(stored: Tensor, derived: Tensor) -> bool:
    tolerance = 1 + int(_GAIN_TOLERANCE * int(derived.abs().max()))
    return stored.shape == derived.shape and int((stored - derived).abs().max()) <= tolerance


def _tables_agree(stored: Tables, derived: Tables) -> bool:
    same = all(np.array_equal(getattr(stored, key), getattr(derived, key)) for key in ("starts", "minimum"))
    return same and int(np.abs(stored.frequencies - derived.frequencies).max()) <= _FREQUENCY_TOLERANCE
