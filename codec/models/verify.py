"""Check a model file against a fresh derivation of its tables and integer gains."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from ..coding.quantise import integer_thresholds
from ..coding.tables import factorized_tables, gaussian_tables
from ..hyperprior import fold_density
from .catalogue import ModelError
from .export import level_gains
from .file import read_model


def verify(path: Path) -> list[str]:
    """Check the id, the fingerprint, every table, threshold and integer gain against a fresh derivation.

    A frequency may differ by a few counts in 2²⁴ (another machine's exp), an integer gain by one.
    """
    try:
        model = read_model(path)
    except ModelError as error:
        return [str(error)]
    problems = []
    if not model.exact_on(torch.device("cpu")):
        problems.append("the exact path does not give the stored fingerprint")
    if int((model.h_s.thresholds - integer_thresholds(model.h_s.kind)).abs().max()) > 1:
        problems.append("the thresholds of the scales are not those of the tables")
    pairs = [("y", model.y_tables, gaussian_tables())]
    for level, lmbda in enumerate(model.lambdas):
        fresh = factorized_tables(fold_density(model.gained, lmbda))
        pairs.append((f"z, level {level}", model.z_tables[level], fresh))
        gains = level_gains(model.gained, model.h_s.kind, model.bits[0], lmbda)
        for key in fields(gains):
            stored, derived = getattr(model.gains[level], key.name), getattr(gains, key.name)
            if stored.shape != derived.shape or int((stored - derived).abs().max()) > 1 + int(derived.abs().max()) // (
                1 << 20
            ):
                problems.append(f"the integer gains of level {level} are not those of the model")
    for label, stored_tables, derived_tables in pairs:
        same = all(
            np.array_equal(getattr(stored_tables, key), getattr(derived_tables, key)) for key in ("starts", "minimum")
        )
        if not same or np.abs(stored_tables.frequencies - derived_tables.frequencies).max() > 64:
            problems.append(f"the probability tables of {label} are not those of the model")
    return problems
