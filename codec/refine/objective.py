"""The relaxed loss: a differentiable estimate of rate and distortion that refinement descends.

z ─relax─► ẑ ─h_s─► entropy parameters (σ, μ) of y
                              │
y ──── relax(y − μ) + μ ────► ŷ ─g_s─► x̂          loss = λ·255²·distortion(x, x̂) + (bits of ŷ and ẑ) per pixel

Densities and h_s are floats here, and rounding is soft. The true loss, of integers and 8-bit pixels, is in problem.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..density import bits
from ..metrics import ms_ssim_of_tensors
from ..models.level import LevelModel
from ..networks.context import last_layer
from ..rounding import Rounding
from .context import GroupInputs, relaxed_passes
from .frozen_context import FrozenContext, freeze_context
from .fused import Relaxation, coded_latents, weighted_squares
from .noise import sample_noise
from .problem import MS_SSIM_SCALE, Problem
from .relaxations import relax

_PROBES = 2  # random vectors of the estimate of the curvature


@dataclass(frozen=True)
class Batch:
    """Tensors of the images that are refined together, on the model's device.

    Where g_s ends in a pixel shuffle with upscale factor s (1: no shuffle), pixels are kept unshuffled, so that
    neither x̂ nor its gradient is shuffled in every step.

    Attributes
    ----------
    x, weight : Tensor (B, 3s², H/s, W/s) float32, channels last
        Pixels in 0..1, and the weight of each squared error; (B, s², …) for grey pictures. All pictures of a batch are
        grey, or none is.
    scale : Tensor (B,)
        1 / number of pixels of each image, without padding.
    window : pair of slices, optional
        Rows and columns of y that x belongs to; None: all.
    active_y, active_z : Tensor (1, h, w, 1) bool, optional
        The latents that are refined; the others are rounded. None: all are refined.
    """

    x: Tensor
    weight: Tensor
    scale: Tensor
    window: tuple[slice, slice] | None = None
    active_y: Tensor | None = None
    active_z: Tensor | None = None

    @property
    def colours(self) -> int:
        """1 for grey pictures, else 3."""
        return 1 if self.x.shape[1] % 3 else 3

    @staticmethod
    def of(level: LevelModel, problems: list[Problem]) -> Batch:
        """The batch of problems of one padded shape, all grey or none."""
        factor = _upscale_factor(level.folded.networks.g_s)
        colours = 1 if problems[0].grey else 3

        def unshuffled(v: Tensor) -> Tensor:
            return F.pixel_unshuffle(v, factor).to(level.device).contiguous(memory_format=torch.channels_last)

        return Batch(
            x=unshuffled(torch.cat([p.x[:, :colours] for p in problems])),
            weight=unshuffled(torch.cat([p.weight * (3 / colours) for p in problems]).expand(-1, colours, -1, -1)),
            scale=torch.tensor([1 / p.pixels for p in problems], device=level.device),
        )


def _upscale_factor(g_s: nn.Module) -> int:
    """Of the pixel shuffle at the end of g_s; 1 where it has none."""
    return int(getattr(g_s, "shuffle", 1))


@dataclass(frozen=True)
class EntropyParameters:
    """Parameters of the Gaussian density of y, and the rate of the ẑ they are computed from.

    Attributes
    ----------
    parameters : Tensor float32
        Scale and mean of y: the output of h_s, (B, H/16, W/16, 2M), or `FrozenContext.parameters`. The scale is log σ
        or σ, as the architecture says.
    z_bits : Tensor (B,)
        Bits of ẑ.
    mixed : Tensor, optional
        Features of ẑ for the passes of the context model: `FrozenContext.parameters`.
    context : FrozenContext, optional
        The context model.
    inputs : list of GroupInputs, optional
        `context.group_inputs` of all that, where ẑ is fixed.
    """

    parameters: Tensor
    z_bits: Tensor
    mixed: Tensor | None = None
    context: FrozenContext | None = None
    inputs: list[GroupInputs] | None = None


def relaxed_parameters(
    level: LevelModel,
    batch: Batch,
    z: Tensor,
    tau: float | Tensor,
    rounding: Rounding,
    noise: Tensor | None,
    bf16: bool = False,
    context: FrozenContext | None = None,
) -> EntropyParameters:
    """The entropy parameters of y for softly rounded z (B, H/64, W/64, N); the arguments are as in `relaxed_loss`.

    `context` is `frozen_context` of the level, which is made here where it is None.
    """
    networks, density = level.folded.networks, level.folded.density
    v_z = _relax(z - density.median, tau, rounding, noise, batch.active_z)
    z_hat = (v_z + density.median).permute(0, 3, 1, 2)  # (B, N, H/64, W/64)
    z_bits = bits(density.likelihood(z_hat)).sum(dim=(1, 2, 3))
    context = context or frozen_context(level, bf16)
    with torch.autocast(z.device.type, dtype=torch.bfloat16, enabled=bf16):
        features = networks.h_s[:-1](z_hat).permute(0, 2, 3, 1)
        if context is None:
            return EntropyParameters(parameters=last_layer(networks.h_s, features), z_bits=z_bits)
        parameters, mixed = context.parameters(features)
    return EntropyParameters(parameters=parameters, z_bits=z_bits, mixed=mixed, context=context)


def frozen_context(level: LevelModel, bf16: bool) -> FrozenContext | None:
    """The context model of a level, if it has one, prepared for `relaxed_parameters`."""
    folded = level.folded
    last: Any = folded.networks.h_s[-1]
    return None if folded.context is None else freeze_context(folded.context, last, folded.y_unit, bf16)


def relaxed_latents(
    level: LevelModel,
    batch: Batch,
    y: Tensor,
    given: EntropyParameters,
    tau: float | Tensor,
    rounding: Rounding,
    noise: Tensor | None,
    curvature: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """ŷ (B, H/16, W/16, M) and its bits (B,) for softly rounded y; the arguments are as in `relaxed_loss`.

    With a context model the passes depend on the relaxed ŷ of earlier passes, and their gradients flow back into it.
    """
    if noise is None:
        noise = sample_noise(y.shape, rounding, device=y.device)
    relaxation = Relaxation(tau, rounding, noise, batch.active_y, curvature)
    log_scale = level.folded.architecture.scale == "exp"
    if given.context is None or given.mixed is None:
        return coded_latents(y, given.parameters, relaxation, log_scale)
    return relaxed_passes(y, given.parameters, given.mixed, given.context, given.inputs, relaxation, log_scale)


def relaxed_loss(
    level: LevelModel,
    batch: Batch,
    y: Tensor,
    given: EntropyParameters,
    tau: float | Tensor,
    rounding: Rounding,
    noise: Tensor | None,
    lmbda: float | Tensor,
    metric: str = "mse",
    bf16: bool = False,
    curvature: Tensor | None = None,
) -> Tensor:
    """λ·255²·distortion + bits per pixel of softly rounded latents, (B,).

    Parameters
    ----------
    y : Tensor (B, H/16, W/16, M) float32
        Latents, channels last.
    given : EntropyParameters
        Of `relaxed_parameters` for the z of the same images.
    tau : float or Tensor
        Temperature, as in `relaxations.relax`.
    noise : Tensor, optional
        Noise of the rounding of y, as `noise.sample_noise` returns it; None draws it. With a context model, its
        positions are in the order of rows of frozen_context.py.
    metric : {"mse", "ms-ssim"}
        The distortion.
    bf16 : bool
        Run the convolutions in bfloat16; loss and likelihoods stay float32.
    curvature : Tensor (M,) float32, optional
        `channel_curvature`, times the part of the variance of the rounding that counts: the rate of y is that of
        `fused.expected_derivatives`. None: the bits of relaxed y.
    """
    curvature = None if curvature is None else curvature * lmbda
    y_hat, y_bits = relaxed_latents(level, batch, y, given, tau, rounding, noise, curvature)
    with torch.autocast(y.device.type, dtype=torch.bfloat16, enabled=bf16):
        x_hat = synthesize(level, batch, y_hat)
    if metric == "ms-ssim":
        distortion = _relaxed_ms_ssim(x_hat.float(), batch, _upscale_factor(level.folded.networks.g_s))
    else:
        distortion = 255**2 / 3 * weighted_squares(x_hat, batch.x, batch.weight) * batch.scale
    return lmbda * distortion + (y_bits + given.z_bits) * batch.scale


@torch.no_grad()
def rounded_figures(
    level: LevelModel, batch: Batch, y: Tensor, z: Tensor, bf16: bool, context: FrozenContext | None
) -> tuple[Tensor, Tensor]:
    """Bits (B,) of rounded latents, and the squared error (B,) of the 8-bit pixels whose weight is not 0.

    The pixels are in 0..1, and their error is the mean of the colors. Computed by the float networks, both take half
    of the time of the true loss, and are within a fraction of a percent of it. The arguments are as in `relaxed_loss`.
    """
    rounding = Rounding("ste")
    given = relaxed_parameters(level, batch, z, 1.0, rounding, None, bf16, context)
    y_hat, y_bits = relaxed_latents(level, batch, y, given, 1.0, rounding, None)
    with torch.autocast(y.device.type, dtype=torch.bfloat16, enabled=bf16):
        x_hat = synthesize(level, batch, y_hat)
    error = x_hat.float().clamp(0, 1).mul_(255).round_().div_(255).sub_(batch.x).square_().mul_(batch.weight > 0)
    return y_bits + given.z_bits, error.sum(dim=(1, 2, 3)) / batch.colours


def synthesize(level: LevelModel, batch: Batch, y_hat: Tensor) -> Tensor:
    """x̂ of ŷ (B, h, w, M), in the layout of `batch.x`."""
    g_s = level.folded.networks.g_s
    if batch.window is not None:
        rows, cols = batch.window
        y_hat = y_hat[:, rows, cols]
    x_hat: Tensor = getattr(g_s, "unshuffled", g_s)(y_hat.permute(0, 3, 1, 2))
    if x_hat.shape[1] > batch.x.shape[1]:  # grey: the decoder shows the mean of the three colours
        x_hat = x_hat.float().unflatten(1, (3, -1)).mean(dim=1)
    return x_hat


def squared_jacobian(level: LevelModel, batch: Batch, y_hat: Tensor) -> Tensor:
    """Estimate of the squared norms of the columns of the Jacobian ∂x̂/∂ŷ, (B, h, w, M), weighted by 255²/3·weight.

    Twice this norm is the second derivative of 255²·(squared error) by the latent, with the Gauss-Newton approximation.
    Random signs times the transposed Jacobian have it as their mean square (Hutchinson's estimator).
    """
    with torch.enable_grad():
        y_hat = y_hat.detach().requires_grad_()
        x_hat = synthesize(level, batch, y_hat)
    squares = torch.zeros_like(y_hat)
    for seed in range(_PROBES):
        signs = torch.randint(0, 2, x_hat.shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.int8)
        probe = (2 * signs - 1).to(x_hat) * ((255**2 / 3) * batch.weight).sqrt()
        with torch.enable_grad():
            projection = (x_hat * probe).sum()  # `grad_outputs` in place of it would import sympy
        (product,) = torch.autograd.grad(projection, y_hat, retain_graph=seed < _PROBES - 1)
        squares.addcmul_(product, product, value=1 / _PROBES)
    return squares


@torch.no_grad()
def channel_curvature(level: LevelModel, batch: Batch, y: Tensor, bf16: bool) -> Tensor:
    """Second derivative of 255²·(squared error) by y (B, h, w, M), mean over the visible pixels: (M,)."""
    with torch.autocast(y.device.type, dtype=torch.bfloat16, enabled=bf16):
        squares = squared_jacobian(level, batch, y)
    if batch.window is not None:  # the derivatives by other latents are 0
        rows, cols = batch.window
        squares = squares[:, rows, cols]
    return 2 * squares.mean(dim=(0, 1, 2)) / (batch.weight > 0).float().mean().clamp(min=1e-6)


def _relaxed_ms_ssim(x_hat: Tensor, batch: Batch, factor: int) -> Tensor:
    """Distortion 1 − MS-SSIM, scaled; pixels of weight 0 are set to the original and left out of the mean."""
    x_hat = torch.where(batch.weight > 0, x_hat.clamp(0, 1), batch.x)
    similarity = ms_ssim_of_tensors(F.pixel_shuffle(x_hat, factor), F.pixel_shuffle(batch.x, factor))
    padded = batch.x[0, 0].numel() * factor**2
    return MS_SSIM_SCALE * (1 - similarity) * (padded * batch.scale)


def _relax(v: Tensor, tau: float | Tensor, rounding: Rounding, noise: Tensor | None, active: Tensor | None) -> Tensor:
    soft = relax(v, tau, rounding, noise=noise)
    return soft if active is None else torch.where(active, soft, torch.round(v))
