"""What refinement minimises: the relaxed loss, with gradients, and the true loss, of the file that would be written.

relaxed   y, z ─relax─► ŷ, ẑ ─► λ·255²·MSE + bpp      float densities, float h_s, soft rounding
true      y, z ─commit─► integers ─► λ·255²·MSE + bpp  integer tables, exact h_s, 8-bit picture
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import image
from ..density import SCALE_BOUND, bits, gaussian_bits, lower_bound
from ..image import ImageError, Picture
from ..latents import Latents, analyse, code_length, commit, render
from ..model_file import LevelModel
from ..networks import HYPER_STRIDE
from .relaxations import Rounding, relax

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
            pixels = image.fill_transparent(pixels, picture.alpha)
        weights = visible.astype(np.float32)
        if roi is not None:
            if roi.shape != (height, width):
                raise ValueError(
                    f"the weight map has {roi.shape[1]}x{roi.shape[0]} pixels, not {width}x{height}"
                )
            weights *= roi.astype(np.float32)
            if not np.isfinite(weights).all() or weights.min() < 0 or (visible.any() and weights.max() <= 0):
                raise ValueError("the weight map must have finite weights of at least 0, and one above 0")
            weights *= visible.sum() / max(float(weights.sum()), 1e-30)
        x = image.pad(image.to_tensor(pixels), HYPER_STRIDE)
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
            shown = image.to_grey(shown)
        error = shown.astype(np.float32)
        error -= self.original
        squared = np.square(error, out=error).mean(axis=2) / 255.0**2  # (h, w)
        mse = float(squared[self.visible].mean(dtype=np.float64)) if self.visible.any() else 0.0
        weight = self.weight[0, 0, :height, :width].numpy()
        distortion = 255.0**2 * float((squared * weight).mean(dtype=np.float64))
        if self.metric == "ms-ssim":
            pair = [torch.from_numpy(v).permute(2, 0, 1)[None].float() / 255 for v in (shown, self.original)]
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

    x (B, 3, H, W), weight (B, 1, H, W), scale (B,): 1 / pixels of each image; active: y (B, H/16, W/16, 1) and z masks of
    the latents that may change, or None for all.
    """

    x: Tensor
    weight: Tensor
    scale: Tensor
    active_y: Tensor | None = None
    active_z: Tensor | None = None

    @staticmethod
    def of(level: LevelModel, problems: list[Problem]) -> Batch:
        """The batch of problems of one padded shape; all latents may change."""
        x = torch.cat([p.x for p in problems])
        return Batch(
            x=x.to(level.device).contiguous(memory_format=torch.channels_last),
            weight=torch.cat([p.weight for p in problems]).to(level.device),
            scale=torch.tensor([1 / p.pixels for p in problems], device=level.device),
        )


def relaxed_loss(
    level: LevelModel,
    batch: Batch,
    y: Tensor,
    z: Tensor,
    tau: float | Tensor,
    rounding: Rounding,
    noise: tuple[Tensor | None, Tensor | None],
    lmbda: float,
    metric: str = "mse",
    bf16: bool = False,
) -> Tensor:
    """λ·255²·MSE + bpp of softly rounded latents, (B,).

    Parameters
    ----------
    y, z : Tensor (B, H/16, W/16, M), (B, H/64, W/64, N) float32
        Latents, channels last.
    noise : pair
        Noise of the rounding of y and of z, as `relaxations.sample_noise` gives it.
    bf16 : bool
        Run the convolutions in bfloat16; loss and likelihoods stay float32.
    """
    networks, density = level.plain.networks, level.plain.density
    exponential = level.plain.architecture.scale == "exp"

    v_z = _relax(z - density.median, tau, rounding, noise[1], batch.active_z)
    z_hat = (v_z + density.median).permute(0, 3, 1, 2)  # (B, N, H/64, W/64)
    z_bits = bits(density.likelihood(z_hat)).sum(dim=(1, 2, 3))

    with torch.autocast(z.device.type, dtype=torch.bfloat16, enabled=bf16):
        features = networks.h_s[:-1](z_hat)
    parameters = networks.h_s[-1](features.float()).permute(0, 2, 3, 1)  # (B, H/16, W/16, 2M)
    scale, mu = parameters.chunk(2, 3)
    sigma = lower_bound(torch.exp(scale) if exponential else scale, SCALE_BOUND)

    v_y = _relax(y - mu, tau, rounding, noise[0], batch.active_y)
    y_bits = gaussian_bits(v_y, sigma).sum(dim=(1, 2, 3))

    with torch.autocast(z.device.type, dtype=torch.bfloat16, enabled=bf16):
        x_hat = networks.g_s((v_y + mu).permute(0, 3, 1, 2)).float()
    if metric == "ms-ssim":
        distortion = MS_SSIM_SCALE * (1 - ms_ssim(x_hat.clamp(0, 1), batch.x))
    else:
        squared = (x_hat - batch.x).square() * batch.weight
        distortion = 255**2 / 3 * squared.sum(dim=(1, 2, 3)) * batch.scale
    return lmbda * distortion + (y_bits + z_bits) * batch.scale


def _relax(
    v: Tensor, tau: float | Tensor, rounding: Rounding, noise: Tensor | None, active: Tensor | None
) -> Tensor:
    soft = relax(v, tau, rounding, noise=noise)
    return soft if active is None else torch.where(active, soft, torch.round(v))
