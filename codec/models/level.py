"""A model in memory, and one level of it, ready to run on a device."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ..coding.context_layers import IntegerContextGroup
from ..coding.hyper_decoder import IntegerGains, IntegerHyperDecoder
from ..coding.passes import fingerprint
from ..coding.prior import ExactPrior
from ..coding.range_coder import Tables
from ..hyperprior import GainedHyperprior, Hyperprior, fold, level_lambdas
from ..networks.lite import BlockTranspose
from .catalogue import ModelError

log = logging.getLogger(__name__)

CPU = torch.device("cpu")


@dataclass(frozen=True)
class LevelModel:
    """A model at one level, on one device.

    Attributes
    ----------
    model_name, model_id : str
        Of the model; the id is that of the files, 8 hexadecimal digits.
    level, lmbda : int, float
        Position on the ladder of the model, and λ there.
    folded : Hyperprior
        The float networks and the density of z with the gains of the level folded in, on `device`, without gradients.
    exact : ExactPrior
        The integer networks: on `device`, or on the CPU where `device` fails the self-test of integer arithmetic.
    y_tables, z_tables : Tables
        Integer probability tables: of y by scale index, of z by channel.
    """

    model_name: str
    model_id: str
    level: int
    lmbda: float
    device: torch.device
    folded: Hyperprior
    exact: ExactPrior
    y_tables: Tables
    z_tables: Tables


@dataclass(frozen=True)
class Model:
    """The content of a model file, on the CPU.

    Attributes
    ----------
    name, id : str
        The id is 8 hexadecimal digits, a hash of all that decoding depends on (`file.model_id`).
    gained : GainedHyperprior
        Its h_s has the values of the integer one.
    h_s, gains : IntegerHyperDecoder, tuple of IntegerGains
        Integer hyper-decoder, and its gains at each level, of the types in the file.
    context : tuple of IntegerContextGroup
        Integer context model; empty where there is none.
    y_tables, z_tables : Tables, tuple of Tables
        Integer probability tables: of y, shared by all levels; of z at each level.
    bits : tuple of int
        Fractional bits of the inputs of the layers of `h_s`.
    context_bits : tuple of int
        Fractional bits of the hidden activation of each group of `context`.
    fingerprint : str
        Result of the self-test of integer arithmetic (`coding.passes.fingerprint` at level 0).
    metadata : dict
        The JSON entry of the file.
    """

    name: str
    id: str
    gained: GainedHyperprior
    h_s: IntegerHyperDecoder
    gains: tuple[IntegerGains, ...]
    context: tuple[IntegerContextGroup, ...]
    y_tables: Tables
    z_tables: tuple[Tables, ...]
    bits: tuple[int, ...]
    context_bits: tuple[int, ...]
    fingerprint: str
    metadata: dict[str, Any]
    _tested: dict[torch.device, torch.device] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def lambdas(self) -> list[float]:
        """λ of each level."""
        return level_lambdas(self.gained.anchors, len(self.gains))

    def prior(self, level: int) -> ExactPrior:
        """The integer networks of one level."""
        return ExactPrior(h_s=self.h_s, gains=self.gains[level].to(torch.int64), context=self.context)

    def level_for(self, lmbda: float) -> int:
        """The level whose λ is nearest in the logarithm."""
        logs = np.log(self.lambdas)
        return int(np.argmin(np.abs(logs - np.log(lmbda))))

    def at(self, level: int, device: torch.device = CPU) -> LevelModel:
        """One level on a device: its gains folded into a copy of the networks, its integer networks tested.

        The integer networks run on the CPU, with a warning, where `device` fails their self-test. The result of the
        test is kept.

        Raises
        ------
        ModelError
            When the CPU fails the self-test, too.
        """
        exact_device = self._exact_device(device)
        lmbda = self.lambdas[level]
        folded = fold(self.gained, lmbda)
        for _, network in folded.networks.items():
            network.to(device).to(memory_format=torch.channels_last).eval()
            for module in network.modules():
                if isinstance(module, BlockTranspose):  # its weight is the matrix of a GEMM, not a kernel
                    module.weight.data = module.weight.data.contiguous()
        folded.density.to(device)
        if folded.context is not None:
            folded.context.to(device)
        folded = replace(folded, y_unit=folded.y_unit.to(device))
        return LevelModel(
            model_name=self.name,
            model_id=self.id,
            level=level,
            lmbda=lmbda,
            device=device,
            folded=folded,
            exact=self.prior(level).to(exact_device),
            y_tables=self.y_tables,
            z_tables=self.z_tables[level],
        )

    def exact_on(self, device: torch.device) -> bool:
        """Whether the integer networks give the recorded fingerprint on a device."""
        return fingerprint(self.prior(0).to(device)) == self.fingerprint

    def _exact_device(self, device: torch.device) -> torch.device:
        if device not in self._tested:
            if self.exact_on(device):
                self._tested[device] = device
            elif device == CPU or self._exact_device(CPU) != CPU:
                raise ModelError(
                    f"{self.name}: integer arithmetic does not give the recorded result on this machine; "
                    "its files cannot be coded here (is the model file damaged?)"
                )
            else:
                log.warning("%s does not compute exactly; the hyper-decoder runs on the CPU", device)
                self._tested[device] = CPU
        return self._tested[device]
