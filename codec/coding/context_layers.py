"""The integer layers of the context model, and the proof that they cannot overflow.

They are those of networks/context.py on 16-bit integers; see integer_layers.py for why sums are exact.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .gemm import Matrix, matrix_of
from .hyper_decoder import BIAS_MAX, INTEGERS, IntegerGains, IntegerHyperDecoder
from .integer_layers import SLOPE_BITS, IntegerLayer, check_layer, sum_bound

CONTEXT_SLOPE = round(0.01 * 2**SLOPE_BITS)  # of the LeakyReLUs
RESIDUAL_BITS = 11  # fractional bits of the input of `past` and `near`


@dataclass(frozen=True)
class IntegerContextGroup:
    """The layers of one channel group.

    Attributes
    ----------
    past, near : IntegerLayer or None
        Odd kernels on the residuals of the earlier groups, and of the first half of this group.
    mix : IntegerLayer
        1×1 on features of h_s | past | near, which have the same fractional bits; its biases are those of the level.
    out : IntegerLayer
        1×1, scales then means, added to the last layer of h_s.
    """

    past: IntegerLayer | None
    near: IntegerLayer | None
    mix: IntegerLayer
    out: IntegerLayer

    def layers(self) -> dict[str, IntegerLayer]:
        named = {"past": self.past, "near": self.near, "mix": self.mix, "out": self.out}
        return {name: layer for name, layer in named.items() if layer is not None}

    @functools.cached_property
    def matrices(self) -> dict[str, Matrix]:
        """The layers, prepared for evaluation."""
        return {name: matrix_of(layer) for name, layer in self.layers().items()}

    @functools.cached_property
    def near_weight(self) -> Tensor:
        """The weights of `near` at positions of the other half, (K, out) float64: even rows, then odd ones."""
        matrix = self.matrices["near"]
        k = matrix.layer.weight.shape[-1]
        taps = matrix.weight.view(k, k, -1, matrix.weight.shape[-1])
        return torch.cat([taps[0::2, 1::2].flatten(0, 2), taps[1::2, 0::2].flatten(0, 2)])

    @property
    def channels(self) -> int:
        return self.out.out_channels // 2

    def to(self, device: torch.device | str) -> IntegerContextGroup:
        """On a device; itself where it is there, so that levels share `matrices`."""
        if self.out.weight.device == torch.device(device):
            return self
        moved = {name: layer.to(device) for name, layer in self.layers().items()}
        return IntegerContextGroup(moved.get("past"), moved.get("near"), moved["mix"], moved["out"])


def check_context(context: tuple[IntegerContextGroup, ...], h_s: IntegerHyperDecoder, M: int) -> None:
    """Prove that no sum of the context model can overflow, and that its layers fit together; M: channels of y.

    Raises
    ------
    ValueError
        When a bound does not hold, or types or sizes are wrong.
    """
    last = h_s.layers[-1]
    if last.transposed or last.slope or last.padding != last.weight.shape[-1] // 2:
        raise ValueError("context model: the last layer of the hyper-decoder is not a linear convolution")
    done = 0
    for group in context:
        for name, layer in group.layers().items():
            check_layer(layer)
            k, odd = layer.weight.shape[-1], layer.weight.shape[-1] % 2 == 1
            if layer.transposed or not odd or layer.padding != k // 2 or (name in ("mix", "out") and k != 1):
                raise ValueError(f"context model: the kernel of {name} is wrong")
            if layer.slope != (0 if name == "out" else CONTEXT_SLOPE):
                raise ValueError(f"context model: the slope of {name} is wrong")
        width = last.in_channels
        for source, channels in ((group.past, done), (group.near, group.channels)):
            if source is not None:
                if source.in_channels != channels:
                    raise ValueError("context model: the numbers of channels do not match")
                width += source.out_channels
        if (group.past is not None and not done) or group.mix.in_channels != width:
            raise ValueError("context model: the numbers of channels do not match")
        if group.out.in_channels != group.mix.out_channels or bool(group.mix.bias.any()):
            raise ValueError("context model: the layers do not fit together")
        if (sum_bound(group.mix) + BIAS_MAX) * max(2, group.mix.slope) >= 2**63:
            raise ValueError("context model: a product could reach 2^63")
        done += group.channels
    if done != M:
        raise ValueError("context model: the groups do not hold all channels")


def check_context_biases(context: tuple[IntegerContextGroup, ...], gains: IntegerGains) -> None:
    """Prove that the biases of a level belong to the context model and cannot overflow.

    Raises
    ------
    ValueError
        When a bias is out of range, or types or sizes are wrong.
    """
    if not context:
        if gains.context is not None:
            raise ValueError("context biases: there is no context model")
        return
    biases = gains.context
    shape = len(context), 1 if context[0].near is None else 2, context[0].mix.out_channels
    if biases is None or biases.dtype not in INTEGERS or biases.shape != shape:
        raise ValueError("context biases: not int32 or int64 numbers of groups, halves and features")
    if any((group.near is None) != (shape[1] == 1) or group.mix.out_channels != shape[2] for group in context):
        raise ValueError("context model: the groups are not alike")
    if int(biases.max()) > BIAS_MAX or int(biases.min()) < -BIAS_MAX:
        raise ValueError("context biases: out of range")
