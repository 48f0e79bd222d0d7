"""Entropy parameters of y, pass by pass: the one sequence that the encoder and the decoder both drive.

    symbols of z ─► passes ─► Pass (index, μ) ─► quantize or decode ─► symbols of the pass ─┐
                      ▲                                                                     │
                      └───────────────────────────── send ──────────────────────────────────┘

The parameters of a pass depend on z and, with a context model, on the symbols of all earlier passes. Without one
there is a single pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator

import numpy as np
import torch
from torch import Tensor

from ..checkerboard import place
from .context_model import context_passes
from .hyper_decoder import UPSAMPLING, Seen, hyper_decode
from .prior import ExactPrior, Pass


def passes(prior: ExactPrior, k_z: Tensor, seen: Seen | None = None) -> Generator[Pass, Tensor, None]:
    """Yield the passes of y in coding order; `send` takes the symbols of the pass before, int32 of the shape of `mu`.

    Parameters
    ----------
    k_z : Tensor (1, N, h, w) integer
        round(z − median), on the prior's device, as all tensors that are yielded and sent.
    seen : callable, optional
        Called with the indexes of each part of a pass before the next part is evaluated; what it raises ends the
        evaluation.
    """
    if prior.context:
        yield from context_passes(prior, k_z, seen)
    else:
        yield Pass(slice(0, len(prior.gains.mean)), None, *hyper_decode(prior.h_s, prior.gains, k_z, seen))


def run_passes(
    prior: ExactPrior, k_z: Tensor, symbols_of: Callable[[Pass], Tensor], seen: Seen | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Drive :func:`passes` to its end.

    Parameters
    ----------
    k_z : Tensor (1, N, h, w) integer
        round(z − median), on any device.
    symbols_of : callable
        Gives the symbols of a pass, int32 of the shape of its `mu`: quantized by the encoder, read by the decoder.
    seen : callable, optional
        As in :func:`passes`.

    Returns
    -------
    symbols, index, mu : Tensor (1, M, 4h, 4w) int32, uint8, int32
        Of all passes, on the prior's device.
    """
    sequence = passes(prior, k_z.to(prior.device), seen)
    current = next(sequence)
    _, _, h, w = k_z.shape
    shape = 1, UPSAMPLING * h, UPSAMPLING * w, len(prior.gains.mean)
    if current.half is None and current.mu.shape[1] == shape[-1]:
        return symbols_of(current).to(prior.device), current.index, current.mu
    whole = [torch.empty(shape, dtype=t, device=prior.device) for t in (torch.int32, torch.uint8, torch.int32)]
    while True:
        sent = symbols_of(current).to(prior.device)
        for v, part in zip(whole, (sent, current.index, current.mu), strict=True):
            place(v[..., current.channels], current.half, part.permute(0, 2, 3, 1))
        try:
            current = sequence.send(sent)
        except StopIteration:
            symbols, index, mu = (v.permute(0, 3, 1, 2) for v in whole)
            return symbols, index, mu


def fingerprint(prior: ExactPrior) -> str:
    """SHA-256 of the entropy parameters for a fixed input: the self-test of a device before its first use.

    Some symbols are large enough to saturate activations, so that sums need most of float64's 53 bits.
    """
    k_z = _test_symbols(1, len(prior.gains.z_scale), 3, 5)
    digest = hashlib.sha256()

    def symbols_of(current: Pass) -> Tensor:
        digest.update(current.index.cpu().numpy().tobytes())
        digest.update(current.mu.cpu().numpy().astype("<i4").tobytes())
        return _test_symbols(*current.mu.shape).to(torch.int32)

    run_passes(prior, k_z, symbols_of)
    return digest.hexdigest()


def _test_symbols(*shape: int) -> Tensor:
    count = np.arange(np.prod(shape), dtype=np.int64).reshape(shape)
    return torch.from_numpy(((count * 7919 + 104729) % 31 - 15) * np.where(count % 17 == 0, 100, 1))
