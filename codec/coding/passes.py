"""Entropy parameters of y, pass by pass: the one sequence that the encoder and the decoder both drive.

    symbols of z ─► passes ─► Pass (index, μ) ─► quantize or decode ─► symbols of the pass ─┐
                      ▲                                                                     │
                      └───────────────────────────── send ──────────────────────────────────┘

The parameters of a pass may depend on z and on the symbols of all earlier passes. The plain hyper-decoder has one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from .hyper_decoder import IntegerGains, IntegerHyperDecoder, hyper_decode


@dataclass(frozen=True)
class ExactPrior:
    """The integer networks that give the entropy parameters of y at one level, on one device."""

    h_s: IntegerHyperDecoder
    gains: IntegerGains

    @property
    def device(self) -> torch.device:
        return self.gains.mean.device

    def to(self, device: torch.device | str) -> ExactPrior:
        return ExactPrior(h_s=self.h_s.to(device), gains=self.gains.to(device))


@dataclass(frozen=True)
class Pass:
    """Symbols of y that can be coded at once.

    Attributes
    ----------
    channels : slice
        Which channels of y.
    index : Tensor (1, Mk, 4h, 4w) uint8
        Gaussian table of each symbol.
    mu : Tensor (1, Mk, 4h, 4w) int32
        Mean with MU_BITS fractional bits.
    """

    channels: slice
    index: Tensor
    mu: Tensor

    def of(self, v: Tensor) -> Tensor:
        """What v (1, M, 4h, 4w) holds for the symbols of this pass, (1, Mk, 4h, 4w)."""
        return v[:, self.channels]


def passes(prior: ExactPrior, k_z: Tensor) -> Generator[Pass, Tensor, None]:
    """Yield the passes of y in coding order; `send` takes the symbols of the pass before, (1, Mk, 4h, 4w) int32.

    Parameters
    ----------
    k_z : Tensor (1, N, h, w) integer
        round(z − median), on the prior's device, as all tensors that are yielded and sent.
    """
    M = len(prior.gains.mean)
    yield Pass(slice(0, M), *hyper_decode(prior.h_s, prior.gains, k_z))


def run_passes(prior: ExactPrior, k_z: Tensor, symbols_of: Callable[[Pass], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Drive :func:`passes` to its end.

    Parameters
    ----------
    k_z : Tensor (1, N, h, w) integer
        round(z − median), on any device.
    symbols_of : callable
        Gives the symbols of a pass, (1, Mk, 4h, 4w) int32: quantized by the encoder, read by the decoder.

    Returns
    -------
    symbols, index, mu : Tensor (1, M, 4h, 4w) int32, uint8, int32
        Of all passes, on the prior's device.
    """
    done: list[tuple[Tensor, Tensor, Tensor]] = []
    sequence = passes(prior, k_z.to(prior.device))
    current = next(sequence)
    while True:
        symbols = symbols_of(current).to(prior.device)
        done.append((symbols, current.index, current.mu))
        try:
            current = sequence.send(symbols)
        except StopIteration:
            break
    if len(done) == 1:
        return done[0]
    symbols, index, mu = (torch.cat(parts, 1) for parts in zip(*done, strict=True))
    return symbols, index, mu
