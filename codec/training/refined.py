"""Latents as the encoder sends them, for stage "decoder": refined by coordinate descent over the integers of y.

    crops ─► g_a, h_a ─► integers ─► rounds ─► pool ─► batches

This is the last pass of a refinement (refine/flips.py) for a batch of crops, by the float networks and with z fixed. It
lowers the loss by a few percent in the time in which so few steps of SGA lower it by a few tenths of a percent.
"""

from __future__ import annotations

import random
from collections import deque

import torch
from torch import Tensor

from ..density import SCALE_BOUND, gaussian_bits
from ..hyperprior import GainedHyperprior
from ..networks.context import ContextPass, code_passes, last_layer, whole_grid
from .objective import apply_transform, squared_error
from .rate import anchor_gain, latents_of_passes

MARGIN = 0.05  # a symbol is changed where the loss is predicted to fall by more than this part of the curvature
SHARE = 0.4  # the share of the predicted changes of a crop that a round makes: those that gain most
LATER = 0.5  # weight of the gradient of later bits, which overestimates the effect of a change by one
POOL = 1024  # crops

Sent = tuple[Tensor, Tensor]  # y₀ (B, M, H/16, W/16) and z₀ (B, N, H/64, W/64)


class RefinedPool:
    """The last `POOL` refined crops: each is used in several steps, as refining it takes as long as those."""

    def __init__(self) -> None:
        self.items: deque[tuple[Tensor, ...]] = deque(maxlen=POOL)

    def __len__(self) -> int:
        return len(self.items)

    def add(self, x: Tensor, anchor: Tensor, sent: Sent) -> None:
        """Add crops x (B, 3, H, W) with anchors (B,), and what is sent for them."""
        for item in zip(x, anchor, *sent, strict=True):
            self.items.append(tuple(v.clone() for v in item))

    def draw(self, batch: int, seed: int) -> tuple[Tensor, Tensor, Sent]:
        """Random crops, of the size of the last ones, with their anchors and what is sent for them."""
        shape = self.items[-1][0].shape
        items = [item for item in self.items if item[0].shape == shape]
        chosen = random.Random(seed).choices(items, k=batch)
        x, anchor, y, z = (torch.stack(column) for column in zip(*chosen, strict=True))
        return x, anchor, (y, z)


@torch.no_grad()
def refine_latents(
    model: GainedHyperprior,
    x: Tensor,
    anchor: Tensor,
    lmbda: Tensor,
    rounds: int,
    generator: torch.Generator | None = None,
) -> Sent:
    """y₀ and z₀ after `rounds` rounds, without gains; y₀ is on the integer grid of the entropy coder.

    Parameters
    ----------
    model : GainedHyperprior
        Parameters that require no gradient; under autocast the convolutions run in bfloat16.
    x : Tensor (B, 3, H, W) float32
        Crops in 0..1.
    anchor : Tensor (B,) int64
        Index of each crop's level among the anchors.
    lmbda : Tensor (B,) float32
        λ of the loss.
    generator : torch.Generator, optional
        Source of the random signs of the curvature estimate, on the device of x.
    """
    crops = _Crops(model, x, anchor)
    symbols, y_hat, _, _ = crops.code(None)
    curvature = lmbda[:, None, None, None] * crops.curvature(y_hat, generator)
    for _ in range(rounds):
        with torch.enable_grad():
            _, y_hat, sigma, bits = crops.code(symbols.requires_grad_())
        gradient = crops.gradient(y_hat.detach(), lmbda)
        if bits.requires_grad:
            gradient.add_(torch.autograd.grad(bits, symbols)[0], alpha=LATER)
        symbols = symbols.detach()
        symbols = symbols + _moves(symbols, sigma, gradient, curvature)
    y_hat = crops.code(symbols)[1]
    return y_hat.permute(0, 3, 1, 2) / crops.gain_y, crops.z_0


def _moves(symbols: Tensor, sigma: Tensor, gradient: Tensor, curvature: Tensor) -> Tensor:
    """The change of each symbol, −1, 0 or 1, at most one channel at each position; all are (B, h, w, M)."""
    now = gaussian_bits(symbols, sigma)
    down = gaussian_bits(symbols - 1, sigma).sub_(now).sub_(gradient)
    up = gaussian_bits(symbols + 1, sigma).sub_(now).add_(gradient)
    gain, channel = torch.minimum(down, up).add_(curvature, alpha=0.5).min(dim=3, keepdim=True)
    worth = gain < -MARGIN * curvature.expand_as(symbols).gather(3, channel)
    count = (SHARE * worth.flatten(1).sum(dim=1)).long().clamp(min=1)
    ascending = gain.where(worth, torch.inf).flatten(1).sort(dim=1).values
    worth &= gain <= ascending.gather(1, count[:, None] - 1)[:, :, None, None]
    sign = torch.where(up.gather(3, channel) < down.gather(3, channel), 1.0, -1.0)
    return torch.zeros_like(symbols).scatter_(3, channel, sign * worth)


class _Crops:
    """Rate and distortion of crops as functions of the symbols of y (B, h, w, M), for fixed z."""

    def __init__(self, model: GainedHyperprior, x: Tensor, anchor: Tensor) -> None:
        self.model, self.x, self.anchor = model, x, anchor
        self.gain_y, gain_z = anchor_gain(model.log_gain_y, anchor), anchor_gain(model.log_gain_z, anchor)
        self.gain_d = anchor_gain(model.log_gain_d, anchor)
        median = model.density.median[None, :, None, None]
        y_0 = apply_transform(model.g_a, x).float()
        self.z_0 = model.h_a(y_0 / model.y_unit[None, :, None, None]).float()
        self.y = self.gain_y * y_0
        z_hat = torch.round(gain_z * (self.z_0 - median)) / gain_z + median
        features = model.h_s[:-1](z_hat).permute(0, 2, 3, 1).float()
        self.base = last_layer(model.h_s, features)
        self.mixed = [] if model.context is None else model.context.mix_features(features)
        self.log_gain = (model.log_gain_y[anchor] + model.y_unit.log())[:, None, None]  # (B, 1, 1, M)

    def code(self, symbols: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Symbols, ŷ, σ, and the bits of all symbols, differentiable through the σ that depend on earlier symbols.

        Without symbols, those of the encoder networks, pass by pass.
        """
        model = self.model
        given = latents_of_passes(model, self.y if symbols is None else symbols.permute(0, 3, 1, 2))
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        bits = self.y.new_zeros(())

        def code(current: ContextPass) -> Tensor:
            nonlocal bits
            log_gain = self.log_gain[..., current.channels]
            scale, mean = current.parameters.chunk(2, -1)
            log_scale = model.architecture.scale == "exp"
            sigma = (scale.clamp(-20, 20) + log_gain).exp() if log_scale else scale * log_gain.exp()
            sigma, mu = sigma.clamp(min=SCALE_BOUND), (mean * log_gain.exp()).detach()
            own = given[len(found)]
            if symbols is None:
                own = torch.round(own - mu)
            bits = bits + gaussian_bits(own.detach(), sigma).sum()
            found.append((own.detach(), own + mu, sigma.detach()))
            return found[-1][1] / log_gain.exp()

        ones = torch.ones_like(model.y_unit)
        code_passes(model.context, self.mixed, self.base, ones, self.anchor, code)
        context = model.context
        own, y_hat, sigma = (
            parts[0] if context is None else whole_grid(list(parts), context.context)
            for parts in zip(*found, strict=True)
        )
        return own, y_hat, sigma, bits

    def gradient(self, y_hat: Tensor, lmbda: Tensor) -> Tensor:
        """Derivative of λ·255²·(squared error) by ŷ."""
        weight = lmbda * 255**2 * (self.x.shape[2] * self.x.shape[3])
        with torch.enable_grad():
            y_hat = y_hat.requires_grad_()
            error = squared_error(self.model.g_s, self.gain_d * y_hat.permute(0, 3, 1, 2), self.x)
            loss = (error * weight).sum()
        return torch.autograd.grad(loss, y_hat)[0]

    def curvature(self, y_hat: Tensor, generator: torch.Generator | None) -> Tensor:
        """Second derivative of 255²·(squared error) by ŷ, (B, 1, 1, M): the mean over the crops of an anchor.

        By Hutchinson's estimator with one random vector, as in refine/flips.py.
        """
        with torch.enable_grad():
            y_hat = y_hat.detach().requires_grad_()
            scaled = self.gain_d * y_hat.permute(0, 3, 1, 2)
            x_hat = getattr(self.model.g_s, "unshuffled", self.model.g_s)(scaled).float()
            signs = torch.randint(0, 2, x_hat.shape, generator=generator, device=x_hat.device) * 2 - 1
            (product,) = torch.autograd.grad((x_hat * signs).sum(), y_hat)
        squares = product.square_().mean(dim=(1, 2))  # (B, M)
        anchors = len(self.model.anchors)
        of_anchor = squares.new_zeros(anchors, squares.shape[1]).index_add_(0, self.anchor, squares)
        count = squares.new_zeros(anchors).index_add_(0, self.anchor, torch.ones_like(squares[:, 0])).clamp_(min=1)
        return (2 * 255**2 / 3) * (of_anchor / count[:, None])[self.anchor][:, None, None]
