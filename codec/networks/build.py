"""From an architecture to its networks."""

from __future__ import annotations

from .architecture import Architecture, Networks
from .lite import build_lite
from .mshyper import build_bmshj, build_mshyper


def build(architecture: Architecture) -> Networks:
    """Build the networks with their initial weights.

    Raises
    ------
    ValueError
        When the family is unknown.
    """
    if architecture.family == "lite":
        return build_lite(architecture)
    if architecture.family == "mshyper":
        return build_mshyper(architecture)
    if architecture.family == "bmshj":
        return build_bmshj(architecture)
    raise ValueError(f"unknown architecture family {architecture.family!r}")
