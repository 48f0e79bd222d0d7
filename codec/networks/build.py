"""Build the networks of an architecture, and initialize their transforms for training."""

from __future__ import annotations

from torch import Tensor

from .architecture import Architecture
from .lite import build_lite, start_as_dct
from .mshyper import build_bmshj, build_mshyper
from .transforms import Networks

_BUILDERS = {"lite": build_lite, "mshyper": build_mshyper, "bmshj": build_bmshj}


def build(architecture: Architecture) -> Networks:
    """Build the networks with random weights, from torch's global generator.

    Raises
    ------
    ValueError
        When the family is unknown.
    """
    if architecture.family not in _BUILDERS:
        raise ValueError(f"unknown architecture family {architecture.family!r}")
    return _BUILDERS[architecture.family](architecture)


def start_transforms(architecture: Architecture, networks: Networks, crops: Tensor) -> Tensor | None:
    """Set g_a and g_s, in place, to the fixed transform that training begins with, if the family has one.

    Parameters
    ----------
    crops : Tensor (B, 3, H, W) float32
        Photographs in 0..1, H and W multiples of 64.

    Returns
    -------
    Tensor (M,) float32 or None
        Mean absolute value of each latent of the crops; None where training begins with random transforms.
    """
    return start_as_dct(networks, crops) if architecture.family == "lite" else None
