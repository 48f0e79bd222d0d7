"""Context model of y: σ and μ of a channel group and checkerboard half, from ẑ and from what has been coded before.

    features of h_s ──────────────► mix ─► LeakyReLU ─► out ─► + output of h_s ─► σ, μ of the pass
    earlier groups ─► past 3×3 ───►  ▲
    first half of this group ─► near ┘   (second half only)

Channel groups after Minnen & Singh 2020 (arXiv 2007.08739), the checkerboard after He et al. 2021 (arXiv 2103.15306),
both together after ELIC (He et al. 2022, arXiv 2203.10886). All tensors are channels-last, (B, h, w, C).

The inputs are residuals r = (ŷ − μ_h) / (g_y · y_unit), clamped to ±LIMIT, where μ_h is the mean that h_s alone
predicts: they are of order one at every rate, so that low precision does not hurt the prediction of large coefficients.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkerboard import halves, merge
from .architecture import Context

LIMIT = 16.0


@dataclass(frozen=True)
class ContextPass:
    """Entropy parameters of the latents that are coded in one pass.

    Attributes
    ----------
    channels : slice
    half : int, optional
        0 or 1 of the checkerboard; None: all positions.
    parameters : Tensor (B, h, w or w/2, 2C) float32
        Scale and mean, as the output of h_s.
    mean_h : Tensor (B, h, w or w/2, C) float32
        The mean that h_s alone predicts.
    """

    channels: slice
    half: int | None
    parameters: Tensor
    mean_h: Tensor


class ContextGroup(nn.Module):
    """The networks of one channel group; `bias_by_anchor` (A, halves, hidden) depends on the anchor λ."""

    def __init__(self, context: Context, k: int, features: int, anchors: int) -> None:
        super().__init__()
        done, own = sum(context.groups[:k]), context.groups[k]
        past, near = context.past if done else 0, context.near if context.checkerboard else 0
        kernel = context.kernel(k)
        self.past = nn.Conv2d(done, past, 3, padding=1) if past else None
        self.near = nn.Conv2d(own, near, kernel, padding=kernel // 2) if near else None
        self.mix = nn.Linear(features + past + near, context.hidden, bias=False)
        self.bias_by_anchor = nn.Parameter(torch.zeros(anchors, 2 if near else 1, context.hidden))
        self.out = nn.Linear(context.hidden, 2 * own)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.ends = features, features + past  # columns of `mix`: features | past | near

    def mix_features(self, features: Tensor) -> Tensor:
        return F.linear(features, self.mix.weight[:, : self.ends[0]])

    def mix_past(self, residual: Tensor) -> Tensor:
        """Of the earlier groups' residuals (B, h, w, C)."""
        assert self.past is not None
        return F.linear(_convolve(self.past, residual), self.mix.weight[:, self.ends[0] : self.ends[1]])

    def mix_near(self, residual: Tensor) -> Tensor:
        """Of this group's residuals, zero in the second half, at the positions of the second half."""
        assert self.near is not None
        return F.linear(halves(_convolve(self.near, residual))[1], self.mix.weight[:, self.ends[1] :])

    def head(self, mixed: Tensor) -> Tensor:
        with torch.autocast(mixed.device.type, enabled=False):  # σ and μ need float32
            return self.out(F.leaky_relu(mixed.float()))


def _convolve(layer: nn.Conv2d, v: Tensor) -> Tensor:
    """A convolution and LeakyReLU on channels-last tensors."""
    out: Tensor = layer(v.permute(0, 3, 1, 2))
    return F.leaky_relu(out).permute(0, 2, 3, 1)


class ContextModel(nn.Module):
    """All groups of the context model."""

    def __init__(self, context: Context, features: int, anchors: int) -> None:
        super().__init__()
        self.context = context
        members = [ContextGroup(context, k, features, anchors) for k in range(len(context.groups))]
        self.groups = nn.ModuleList(members)

    @property
    def members(self) -> list[ContextGroup]:
        groups: Any = self.groups
        return list(groups)

    def fold(self, biases: list[Tensor], scale_gain: Tensor, mean_gain: Tensor) -> None:
        """Fix the rate level, in place: biases (halves, hidden) of each group, gains (M,) of the outputs."""
        done = 0
        for group, bias in zip(self.members, biases, strict=True):
            own = slice(done, done + group.out.out_features // 2)
            gain = torch.cat((scale_gain[own], mean_gain[own]))
            group.bias_by_anchor = nn.Parameter(bias[None].clone())
            group.out.weight.data *= gain[:, None]
            group.out.bias.data *= gain
            done = own.stop

    def mix_features(self, features: Tensor) -> list[Tensor]:
        """The part of each group's first activation that depends on ẑ only, from the features of h_s (B, h, w, F)."""
        return [group.mix_features(features) for group in self.members]

    def passes(
        self, mixed: list[Tensor], base: Tensor, unit: Tensor, anchor: Tensor
    ) -> Generator[ContextPass, Tensor, None]:
        """Entropy parameters pass by pass; `.send()` takes ŷ of the pass, of the shape and units of its `mean_h`.

        Parameters
        ----------
        mixed : list of Tensor
            From `mix_features`.
        base : Tensor (B, h, w, 2M) float32
            The output of h_s.
        unit : Tensor (M,)
            What residuals are divided by: 1 in training, where means are in natural units; in a folded model the gain
            of y times y_unit.
        anchor : Tensor (B or 1,) int64
            Index of the anchor λ.
        """
        groups = self.context.groups
        parts = base.split([*groups, *groups], -1)  # the backward of one split is faster than that of slices
        scales, means = parts[: len(groups)], parts[len(groups) :]
        done = 0
        past: list[Tensor] = []
        for group, h, own, scale_h, mean_h in zip(self.members, mixed, groups, scales, means, strict=True):
            channels = slice(done, done + own)
            bias = group.bias_by_anchor[anchor][:, None, None]  # (B, 1, 1, halves, hidden)
            if past:
                h = h + group.mix_past(torch.cat(past, -1))
            base_k = torch.cat((scale_h, mean_h), -1)
            if self.context.checkerboard:
                hidden, given = halves(h), halves(base_k)
                parameters = group.head(hidden[0] + bias[..., 0, :]) + given[0]
                first = yield ContextPass(channels, 0, parameters, given[0][..., own:])
                residual = ((first - given[0][..., own:]) / unit[channels]).clamp(-LIMIT, LIMIT)
                near = group.mix_near(merge(residual, torch.zeros_like(residual)))
                parameters = group.head(hidden[1] + near + bias[..., 1, :]) + given[1]
                second = yield ContextPass(channels, 1, parameters, given[1][..., own:])
                other = ((second - given[1][..., own:]) / unit[channels]).clamp(-LIMIT, LIMIT)
                past.append(merge(residual, other))
            else:
                y_hat = yield ContextPass(channels, None, group.head(h + bias[..., 0, :]) + base_k, base_k[..., own:])
                past.append(((y_hat - base_k[..., own:]) / unit[channels]).clamp(-LIMIT, LIMIT))
            done += own


def last_layer(h_s: nn.Sequential, features: Tensor) -> Tensor:
    """The last convolution of h_s in float32, channels-last: (B, h, w, F) → (B, h, w, 2M)."""
    layer: Any = h_s[-1]
    with torch.autocast(features.device.type, enabled=False):  # σ and μ need float32
        if layer.weight.shape[2:] == (1, 1):
            return F.linear(features.float(), layer.weight.flatten(1), layer.bias)
        parameters: Tensor = layer(features.float().permute(0, 3, 1, 2))
        return parameters.permute(0, 2, 3, 1)


def code_passes(
    context: ContextModel | None,
    mixed: list[Tensor],
    base: Tensor,
    unit: Tensor,
    anchor: Tensor,
    code: Callable[[ContextPass], Tensor],
) -> None:
    """Run the passes of `ContextModel.passes`, or the one pass of a prior without context.

    `code` receives each pass in turn, and returns ŷ of it in the units of its `mean_h`; the rest is as there.
    """
    M = base.shape[-1] // 2
    if context is None:
        code(ContextPass(slice(0, M), None, base, base[..., M:]))
        return
    passes = context.passes(mixed, base, unit, anchor)
    current: ContextPass | None = next(passes)
    while current is not None:
        y_hat = code(current)
        try:
            current = passes.send(y_hat)
        except StopIteration:
            current = None


def parts_of(y: Tensor, context: Context) -> list[Tensor]:
    """y (B, h, w, M) split into the latents of each pass, differentiable."""
    groups = y.split(context.groups, dim=-1)
    return [half for group in groups for half in (halves(group) if context.checkerboard else (group,))]


def whole_grid(parts: list[Tensor], context: Context) -> Tensor:
    """The inverse of `parts_of`."""
    if context.checkerboard:
        parts = [merge(first, second) for first, second in zip(parts[::2], parts[1::2], strict=True)]
    return torch.cat(parts, dim=-1)
