"""What refinement minimises: the relaxed loss, with gradients, and the true loss, of the file that would be written.

relaxed   y, z ─relax─► ŷ, ẑ ─► λ·255²·MSE + bpp      float densities, float h_s, soft rounding
true      y, z ─commit─► integers ─► λ·255²·MSE + bpp  integer tables, exact h_s, 8-bit picture
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..density import bits
from ..image import ImageError, Picture
from ..latents import Latents, analyse, code_length, commit, render
from ..model_file import LevelModel
from ..networks import HYPER_STRIDE
from ..pixels import fill_transparent, pad, to_grey, to_tensor
from .fused import coded_latents, weighted_squares
from .relaxations import Rounding, relax, sample_noise

MS_SSIM_SMALLEST_SIDE = 160
MS_SSIM_SCALE = 1290.0  # λ·255²·MSE ↔ λ·1290·(1 − MS-SSIM): the ratio of CompressAI's two ladders of λ


@dataclass(frozen=True)
class Candidate:
    """Latents of one image, the integers they round to and the true loss of those.

    Attributes
    ----------
    y, z : Tensor (1, M, H/16, W/16), (1, N, H/64, W/64) float32
    latents : Latents
    mse : float
        Of the visible 8-bit pixels, in 0..1 units.
    bits : float
        Of z and y under the integer tables.
    loss : float
        λ·255²·distortion + bits a pixel; distortion weighted and, where asked for, MS-SSIM.
    """

    y: Tensor
    z: Tensor
    latents: Latents
    mse: float
    bits: float
    loss: float


@dataclass(frozen=True)
class Problem:
    """One picture to be refined at one level and λ.

    Attributes
    ----------
    x : Tensor (1, 3, H, W) float32 in 0..1
        Padded by replication to multiples of 64, colours under alpha 0 filled in.
    weight : Tensor (1, 1, H, W) float32
        Of each pixel's squared error: 0 in the padding and under alpha 0, of mean 1 over what is visible.
    original, visible : ndarray (h, w, 3) uint8, (h, w) bool
    """

    level: LevelModel
    lmbda: float
    metric: str
    x: Tensor
    weight: Tensor
    original: np.ndarray
    visible: np.ndarray
    grey: bool

    @staticmethod
    def of(level: LevelModel, picture: Picture, roi: np.ndarray | None, lmbda: float, metric: str) -> Problem:
        """The problem of a picture; `roi` (h, w) weighs its pixels.

        Raises
        ------
        ValueError
            When the weights have another shape, are negative or all zero.
        ImageError
            When MS-SSIM is asked for and the picture is too small for it.
        """
        pixels = picture.pixels
        height, width = pixels.shape[:2]
        if metric == "ms-ssim" and min(height, width) <= MS_SSIM_SMALLEST_SIDE:
            raise ImageError(f"metric ms-ssim needs more than {MS_SSIM_SMALLEST_SIDE} pixels a side")
        visible = np.ones((height, width), bool) if picture.alpha is None else picture.alpha > 0
        if picture.alpha is not None:
            pixels = fill_transparent(pixels, picture.alpha)
        weights = visible.astype(np.float32)
        if roi is not None:
            if roi.shape != (height, width):
                raise ValueError(f"the weight map has {roi.shape[1]}x{roi.shape[0]} pixels, not {width}x{height}")
            weights *= roi.astype(np.float32)
            if not np.isfinite(weights).all() or weights.min() < 0 or (visible.any() and weights.max() <= 0):
                raise ValueError("the weight map must have finite weights of at least 0, and one above 0")
            weights *= visible.sum() / max(float(weights.sum()), 1e-30)
        x = pad(to_tensor(pixels), HYPER_STRIDE)
        weight = torch.zeros(1, 1, *x.shape[2:])
        weight[0, 0, :height, :width] = torch.from_numpy(weights)
        return Problem(level, lmbda, metric, x, weight, pixels, visible, picture.grey)

    @property
    def pixels(self) -> int:
        return self.visible.size

    def start(self) -> Candidate:
        """The unrefined latents of the encoder networks."""
        return self.evaluate(*analyse(self.level, self.x))

    def evaluate(self, y: Tensor, z: Tensor) -> Candidate:
        """The true loss of latents (1, …): that of the file and the picture they would become."""
        height, width = self.original.shape[:2]
        latents = commit(self.level, y, z)
        shown = render(self.level, latents, height, width)
        if self.grey:
            shown = to_grey(shown)
        error = shown.astype(np.float32)
        error -= self.original
        squared = np.square(error, out=error).mean(axis=2) / 255.0**2  # (h, w)
        mse = float(squared[self.visible].mean(dtype=np.float64)) if self.visible.any() else 0.0
        weight = self.weight[0, 0, :height, :width].numpy()
        distortion = 255.0**2 * float((squared * weight).mean(dtype=np.float64))
        if self.metric == "ms-ssim":
            seen = np.where(weight[:, :, None] > 0, shown, self.original)
            pair = [torch.from_numpy(v).permute(2, 0, 1)[None].float() / 255 for v in (seen, self.original)]
            distortion = MS_SSIM_SCALE * float(1 - ms_ssim(*pair))
        spent = code_length(self.level, latents)
        return Candidate(y, z, latents, mse, spent, self.lmbda * distortion + spent / self.pixels)


def ms_ssim(a: Tensor, b: Tensor) -> Tensor:
    """MS-SSIM (Wang et al. 2003) of images (B, 3, H, W) in 0..1, both sides above 160; (B,)."""
    from pytorch_msssim import ms_ssim as library

    return library(a, b, data_range=1.0, size_average=False)


@dataclass(frozen=True)
class Batch:
    """Tensors of the images that are refined together, on the model's device.

    Where g_s ends in a pixel shuffle of side s (1: it has none), pixels are held as they are before it, which saves
    shuffling x̂ and its gradient in every step.

    Attributes
    ----------
    x, weight : Tensor (B, 3s², H/s, W/s) float32, channels last
        Pixels, and the weight of each squared error; (B, s², …) for grey pictures, of which all are or none is.
    scale : Tensor (B,)
        1 / pixels of each image.
    active_y, active_z : Tensor (1, H/16, W/16, 1), (1, H/64, W/64, 1) bool, optional
        The latents that may change; None for all.
    """

    x: Tensor
    weight: Tensor
    scale: Tensor
    active_y: Tensor | None = None
    active_z: Tensor | None = None

    @staticmethod
    def of(level: LevelModel, problems: list[Problem]) -> Batch:
        """The batch of problems of one padded shape, all grey or none; all latents may change."""
        side = _shuffle(level.plain.networks.g_s)
        colours = 1 if problems[0].grey else 3

        def held(v: Tensor) -> Tensor:
            unshuffled = F.pixel_unshuffle(v, side).to(level.device)
            return unshuffled.contiguous(memory_format=torch.channels_last)

        return Batch(
            x=held(torch.cat([p.x[:, :colours] for p in problems])),
            weight=held(torch.cat([p.weight * (3 / colours) for p in problems]).expand(-1, colours, -1, -1)),
            scale=torch.tensor([1 / p.pixels for p in problems], device=level.device),
        )


def _shuffle(g_s: nn.Module) -> int:
    return int(getattr(g_s, "shuffle", 1))


@dataclass(frozen=True)
class Side:
    """What ẑ says of y: the output of h_s.

    Attributes
    ----------
    parameters : Tensor (B, H/16, W/16, 2M) float32
        Scale and mean of y, channels last: the scale is log σ or σ as the architecture has it.
    bits : Tensor (B,)
        Of ẑ.
    """

    parameters: Tensor
    bits: Tensor


def relaxed_side(
    level: LevelModel,
    batch: Batch,
    z: Tensor,
    tau: float | Tensor,
    rounding: Rounding,
    noise: Tensor | None,
    bf16: bool = False,
) -> Side:
    """What softly rounded z (B, H/64, W/64, N) says of y; parameters as in `relaxed_loss`."""
    networks, density = level.plain.networks, level.plain.density
    v_z = _relax(z - density.median, tau, rounding, noise, batch.active_z)
    z_hat = (v_z + density.median).permute(0, 3, 1, 2)  # (B, N, H/64, W/64)
    z_bits = bits(density.likelihood(z_hat)).sum(dim=(1, 2, 3))
    with torch.autocast(z.device.type, dtype=torch.bfloat16, enabled=bf16):
        features = networks.h_s[:-1](z_hat)
    return Side(_last_layer(networks.h_s[-1], features.float()), z_bits)


def relaxed_loss(
    level: LevelModel,
    batch: Batch,
    y: Tensor,
    side: Side,
    tau: float | Tensor,
    rounding: Rounding,
    noise: Tensor | None,
    lmbda: float,
    metric: str = "mse",
    bf16: bool = False,
) -> Tensor:
    """λ·255²·MSE + bpp of softly rounded latents, (B,).

    Parameters
    ----------
    y : Tensor (B, H/16, W/16, M) float32
        Latents, channels last.
    noise : Tensor, optional
        Noise of the rounding of y, as `relaxations.sample_noise` gives it; None draws it.
    bf16 : bool
        Run the convolutions in bfloat16; loss and likelihoods stay float32.
    """
    if noise is None:
        noise = sample_noise(y.shape, rounding, device=y.device)
    exponential = level.plain.architecture.scale == "exp"
    y_hat, y_bits = coded_latents(y, side.parameters, tau, rounding, noise, batch.active_y, exponential)

    with torch.autocast(y.device.type, dtype=torch.bfloat16, enabled=bf16):
        x_hat = pixels_of(level, batch, y_hat.permute(0, 3, 1, 2))
    if metric == "ms-ssim":
        distortion = _relaxed_ms_ssim(x_hat.float(), batch, _shuffle(level.plain.networks.g_s))
    else:
        distortion = 255**2 / 3 * weighted_squares(x_hat, batch.x, batch.weight) * batch.scale
    return lmbda * distortion + (y_bits + side.bits) * batch.scale


def pixels_of(level: LevelModel, batch: Batch, y_hat: Tensor) -> Tensor:
    """x̂ of ŷ (B, M, H/16, W/16), held as `batch.x` is."""
    g_s = level.plain.networks.g_s
    x_hat: Tensor = getattr(g_s, "unshuffled", g_s)(y_hat)
    if x_hat.shape[1] > batch.x.shape[1]:  # what a grey file shows is the mean of the colours
        x_hat = x_hat.float().unflatten(1, (3, -1)).mean(dim=1)
    return x_hat


def _last_layer(layer: Any, features: Tensor) -> Tensor:
    """The last convolution of h_s, in float32, channels last: (B, C, h, w) → (B, h, w, 2M)."""
    if layer.weight.shape[2:] == (1, 1):
        return F.linear(features.permute(0, 2, 3, 1), layer.weight.flatten(1), layer.bias)
    parameters: Tensor = layer(features)
    return parameters.permute(0, 2, 3, 1)


def _relaxed_ms_ssim(x_hat: Tensor, batch: Batch, side: int) -> Tensor:
    """The distortion of MS-SSIM: pixels without weight are taken as perfect, and not counted in the mean."""
    x_hat = torch.where(batch.weight > 0, x_hat.clamp(0, 1), batch.x)
    similarity = ms_ssim(F.pixel_shuffle(x_hat, side), F.pixel_shuffle(batch.x, side))
    padded = batch.x[0, 0].numel() * side**2
    return MS_SSIM_SCALE * (1 - similarity) * (padded * batch.scale)


def _relax(v: Tensor, tau: float | Tensor, rounding: Rounding, noise: Tensor | None, active: Tensor | None) -> Tensor:
    soft = relax(v, tau, rounding, noise=noise)
    return soft if active is None else torch.where(active, soft, torch.round(v))
