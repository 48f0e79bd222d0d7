"""Latents as the encoder sends them, for stage "decoder": y refined by a short annealing, with z fixed.

    crops ─► g_a, h_a ─► [ relax ─► loss ─► gradient ─► Adam ] × steps ─► integers ─► pool ─► batches

This is a refinement with expected bits (refine/fused.py) for crops at several levels, by the float networks.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import replace

import torch
from torch import Tensor

from ..annealing import EXPECTED, Annealing
from ..hyperprior import GainedHyperprior
from ..networks.context import ContextPass, code_passes, last_layer, whole_grid
from ..refine.fused import Relaxation, coded_latents
from ..refine.noise import NoiseSequence
from ..rounding import Rounding, rounding
from .objective import apply_transform, squared_error
from .rate import anchor_gain, latents_of_passes

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
    steps: int,
    generator: torch.Generator | None = None,
) -> Sent:
    """y₀ and z₀ after an annealing of `steps` steps, without gains; y₀ is on the integer grid of the entropy coder.

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
        Source of the noise and of the random signs of the curvature estimate, on the device of x.
    """
    crops = _Crops(model, x, anchor, lmbda)
    y = crops.y.clone(memory_format=torch.contiguous_format)
    curvature = crops.curvature(crops.rounded(y), generator)
    annealing, method = Annealing.default(EXPECTED[0], steps), rounding(*EXPECTED)
    noise = NoiseSequence(y.shape, method, annealing.noise_period, y.device, annealing.noise)
    optimizer = torch.optim.Adam([y.requires_grad_()], fused=True)
    schedules = (annealing.temperatures(steps), annealing.learning_rates(steps), annealing.variances(steps))
    for tau, rate, part in zip(*schedules, strict=True):
        noise.prepare(generator)
        with torch.enable_grad():
            loss = crops.loss(y, Relaxation(tau, method, noise.next()), part * curvature)
        y.grad = torch.autograd.grad(loss, y)[0].contiguous()  # in the layout of y, as fused Adam requires
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return crops.rounded(y.detach()) / crops.gain_y, crops.z_0


class _Crops:
    """The relaxed loss of crops as a function of y (B, M, h, w) with gains, for fixed z."""

    def __init__(self, model: GainedHyperprior, x: Tensor, anchor: Tensor, lmbda: Tensor) -> None:
        self.model, self.x, self.anchor, self.lmbda = model, x, anchor, lmbda
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

    def rounded(self, y: Tensor) -> Tensor:
        """ŷ (B, M, h, w) with gains."""
        return self._coded(y, Relaxation(1.0, Rounding("ste")), None)[0]

    def loss(self, y: Tensor, relaxation: Relaxation, curvature: Tensor) -> Tensor:
        """λ·255²·(squared error) plus bits, the sum over all crops.

        `curvature` (B, 1, 1, M) is that of the squared error, times the part of the variance of the rounding that
        counts.
        """
        y_hat, bits = self._coded(y, relaxation, curvature)
        weight = self.lmbda * 255**2 * (self.x.shape[2] * self.x.shape[3])
        error = squared_error(self.model.g_s, self.gain_d * y_hat, self.x)
        return (error * weight).sum() + bits

    def _coded(self, y: Tensor, relaxation: Relaxation, curvature: Tensor | None) -> tuple[Tensor, Tensor]:
        """ŷ, and its bits plus, with a curvature, what the variance of the rounding adds to the squared error."""
        model, log_scale = self.model, self.model.architecture.scale == "exp"
        given = latents_of_passes(model, y)
        noises = [] if relaxation.noise is None else latents_of_passes(model, relaxation.noise)
        found: list[Tensor] = []
        spent: list[Tensor] = []

        def code(current: ContextPass) -> Tensor:
            log_gain = self.log_gain[..., current.channels]
            scale, mean = current.parameters.chunk(2, -1)
            scale = scale.clamp(-20, 20) + log_gain if log_scale else scale * log_gain.exp()
            mu = mean * log_gain.exp()
            own = replace(relaxation, noise=noises[len(found)] if noises else None)
            if curvature is not None:  # the curvature of the crops differs, so it is added here
                own = replace(own, curvature=torch.zeros_like(log_gain[0, 0, 0]))
            y_hat, bits = coded_latents(given[len(found)], torch.cat((scale, mu), -1), own, log_scale)
            if curvature is not None:
                upper = (y_hat - mu) - (y_hat - mu).detach().floor()  # its probability
                spent.append((0.5 * curvature[..., current.channels] * upper * (1 - upper)).sum())
            found.append(y_hat)
            spent.append(bits.sum())
            return y_hat / log_gain.exp()

        code_passes(model.context, self.mixed, self.base, torch.ones_like(model.y_unit), self.anchor, code)
        y_hat = found[0] if model.context is None else whole_grid(found, model.context.context)
        return y_hat.permute(0, 3, 1, 2), torch.stack(spent).sum()

    def curvature(self, y_hat: Tensor, generator: torch.Generator | None) -> Tensor:
        """Second derivative of λ·255²·(squared error) by ŷ (B, 1, 1, M): the mean over the crops of an anchor, times λ.

        By Hutchinson's estimator with one random vector.
        """
        with torch.enable_grad():
            y_hat = y_hat.detach().requires_grad_()
            scaled = self.gain_d * y_hat
            x_hat = getattr(self.model.g_s, "unshuffled", self.model.g_s)(scaled).float()
            signs = torch.randint(0, 2, x_hat.shape, generator=generator, device=x_hat.device) * 2 - 1
            (product,) = torch.autograd.grad((x_hat * signs).sum(), y_hat)
        squares = product.square_().mean(dim=(2, 3))  # (B, M)
        anchors = len(self.model.anchors)
        of_anchor = squares.new_zeros(anchors, squares.shape[1]).index_add_(0, self.anchor, squares)
        count = squares.new_zeros(anchors).index_add_(0, self.anchor, torch.ones_like(squares[:, 0])).clamp_(min=1)
        mean = (of_anchor / count[:, None])[self.anchor] * self.lmbda[:, None]
        return (2 * 255**2 / 3) * mean[:, None, None]
