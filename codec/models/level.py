"""A model in memory, and one level of it on a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..coding.hyper_decoder import IntegerGains, IntegerHyperDecoder, fingerprint
from ..coding.passes import ExactPrior
from ..coding.range_coder import Tables
from ..hyperprior import GainedHyperprior, Hyperprior, fold, level_lambdas
from ..networks.lite import BlockTranspose


@dataclass(frozen=True)
class LevelModel:
    """A model at one level, ready to run on one device.

    Attributes
    ----------
    folded : Hyperprior
        The folded float networks and density on `device`, gradients off.
    exact : ExactPrior
        The integer networks, on `device` or, where that does not compute exactly, on the CPU.
    y_tables, z_tables : Tables
        Gaussian tables by index; one table a channel of z.
    """

    folded: Hyperprior
    exact: ExactPrior
    y_tables: Tables
    z_tables: Tables
    level: int
    lmbda: float
    device: torch.device


@dataclass(frozen=True)
class Model:
    """A model as its file holds it, on the CPU."""

    name: str
    id: str
    gained: GainedHyperprior
    h_s: IntegerHyperDecoder
    gains: tuple[IntegerGains, ...]
    y_tables: Tables
    z_tables: tuple[Tables, ...]
    bits: tuple[int, ...]
    fingerprint: str
    metadata: dict[str, Any]

    @property
    def lambdas(self) -> list[float]:
        return level_lambdas(self.gained.anchors, len(self.gains))

    def level_for(self, lmbda: float) -> int:
        """The level whose λ is nearest in the logarithm."""
        logs = np.log(self.lambdas)
        return int(np.argmin(np.abs(logs - np.log(lmbda))))

    def at(self, level: int, device: torch.device, exact_device: torch.device) -> LevelModel:
        """Fold one level and move it to its devices."""
        lmbda = self.lambdas[level]
        folded = fold(self.gained, lmbda)
        for _, network in folded.networks.items():
            network.to(device).to(memory_format=torch.channels_last).eval()
            for module in network.modules():
                if isinstance(module, BlockTranspose):  # its weight is a matrix, not a kernel
                    module.weight.data = module.weight.data.contiguous()
        folded.density.to(device)
        return LevelModel(
            folded=folded,
            exact=ExactPrior(h_s=self.h_s, gains=self.gains[level]).to(exact_device),
            y_tables=self.y_tables,
            z_tables=self.z_tables[level],
            level=level,
            lmbda=lmbda,
            device=device,
        )

    def exact_on(self, device: torch.device) -> bool:
        """Whether the exact path gives the stored fingerprint on this device."""
        return fingerprint(self.h_s.to(device), self.gains[0].to(device)) == self.fingerprint


def asdict_shallow(gains: IntegerGains) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return gains.z_scale, gains.z_offset, gains.scale, gains.mean
