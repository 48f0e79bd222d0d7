"""The ranges of the activations of the entropy networks on photographs, which decide their fractional bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..hyperprior import GainedHyperprior, code_rounded, fold

_MARGIN = 4.0  # room above the largest activation that was seen


@dataclass
class Ranges:
    """Largest absolute values to be represented.

    Attributes
    ----------
    h_s : list of float
        Input of each (transposed) convolution; the last one holds the features of the context model, too.
    hidden : list of float
        Hidden activation of each group of the context model.
    """

    h_s: list[float]
    hidden: list[float] = field(default_factory=list)


@torch.no_grad()
def measure_ranges(gained: GainedHyperprior, z_samples: Sequence[Tensor], y_samples: Sequence[Tensor]) -> Ranges:
    """Run h_s on ẑ₀ (B, N, h, w) and, with a context model, all passes on the y₀ (B, M, 4h, 4w) that belong to them.

    Raises
    ------
    ValueError
        When there is a context model, but no y₀.
    """
    if gained.context is not None and not y_samples:
        raise ValueError("a context model is calibrated on samples of y, too")
    convolutions = [m for m in gained.h_s if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    ranges = Ranges([0.0] * len(convolutions))
    hooks = [m.register_forward_pre_hook(_input(ranges.h_s, i)) for i, m in enumerate(convolutions)]
    for z in z_samples:
        gained.h_s(z)
    for hook in hooks:
        hook.remove()
    if gained.context is not None:
        _measure_context(gained, z_samples, y_samples, ranges)
    ranges.h_s = [_MARGIN * peak for peak in ranges.h_s]
    ranges.hidden = [_MARGIN * peak for peak in ranges.hidden]
    return ranges


def _measure_context(
    gained: GainedHyperprior, z_samples: Sequence[Tensor], y_samples: Sequence[Tensor], ranges: Ranges
) -> None:
    ranges.hidden = [0.0] * len(gained.architecture.context.groups if gained.architecture.context else ())
    for lmbda in gained.anchors[:: max(1, len(gained.anchors) - 1)]:  # the ends: ŷ is coarsest and finest there
        g_y, g_z, _ = gained.gains(lmbda)
        folded = fold(gained, lmbda)
        assert folded.context is not None
        for i, group in enumerate(folded.context.members):
            group.out.register_forward_pre_hook(_input(ranges.hidden, i))
            for conv in (group.past, group.near):
                if conv is not None:
                    conv.register_forward_hook(_output(ranges.h_s, len(ranges.h_s) - 1))
        median = folded.density.median[None, :, None, None]
        for y, z in zip(y_samples, z_samples, strict=True):
            z_hat = torch.round(z * g_z[None, :, None, None] - median) + median
            code_rounded(folded, y * g_y[None, :, None, None], z_hat)


def _input(peaks: list[float], i: int) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        peaks[i] = max(peaks[i], float(inputs[0].abs().max()))

    return hook


def _output(peaks: list[float], i: int) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        peaks[i] = max(peaks[i], float(output.abs().max()))

    return hook
