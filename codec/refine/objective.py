"""What refinement minimises: the relaxed loss, with gradients, and the true loss, of the file that would be written.

relaxed   y, z ─relax─► ŷ, ẑ ─► λ·255²·MSE + bpp      float densities, float h_s, soft rounding
true      y, z ─commit─► integers ─► λ·255²·MSE + bpp  integer tables, exact h_s, 8-bit picture
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..alpha import fill_transparent
from ..density import bits
from ..latents import Box, analyse, preview, slices
from ..memory import give_back
from ..metrics import MS_SSIM_MIN_SIDE, ms_ssim_of_tensors
from ..models.level import LevelModel
from ..networks.architecture import padded_size
from ..picture import ImageError, Picture
from ..pixels import to_grey, window
from ..rounding import Rounding
from .fused import coded_latents, weighted_squares
from .noise import sample_noise
from .relaxations import relax

MS_SSIM_SCALE = 1290.0  # λ·255²·MSE ↔ λ·1290·(1 − MS-SSIM): the ratio of CompressAI's two ladders of λ


@dataclass(frozen=True)
class Candidate:
    """Latents of one image and the true loss of the integers they round to.

    Attributes
    ----------
    y, z : Tensor (1, M, H/16, W/16), (1, N, H/64, W/64) float32
    mse : float
        Of the visible 8-bit pixels, in 0..1 units.
    bits : float
        Of z and y under the integer tables.
    loss : float
        λ·255²·distortion + bits a pixel; distortion weighted and, where asked for, MS-SSIM.
    """

    y: Tensor
    z: Tensor
    mse: float
    bits: float
    loss: float


@dataclass(frozen=True)
class Problem:
    """One picture, or a part of one, to be refined at one level and λ. It holds bytes: floats are made of a part.

    Attributes
    ----------
    original : ndarray (h, w, 3) uint8
        Colours under alpha 0 filled in.
    visible : ndarray (h, w) bool, optional
        Where alpha is not 0; None: everywhere.
    weights : ndarray (h, w) float32 or bool, optional
        Of each pixel's squared error: 0 under alpha 0, of mean 1 over what is visible; None: 1 everywhere.
    shape : tuple
        H and W, what it is padded to by replication: multiples of 64 for a whole picture.
    """

    level: LevelModel
    lmbda: float
    metric: str
    original: np.ndarray
    visible: np.ndarray | None
    weights: np.ndarray | None
    grey: bool
    shape: tuple[int, int]

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
        if metric == "ms-ssim" and min(height, width) < MS_SSIM_MIN_SIDE:
            raise ImageError(f"metric ms-ssim needs at least {MS_SSIM_MIN_SIDE} pixels a side")
        weights = visible = None if picture.alpha is None else picture.alpha > 0
        if picture.alpha is not None:
            pixels = fill_transparent(pixels, picture.alpha)
        if roi is not None:
            weights = _weights(roi, np.ones((height, width), bool) if visible is None else visible)
        shape = padded_size(height, width)
        return Problem(level, lmbda, metric, pixels, visible, weights, picture.grey, shape)

    def part(self, box: Box) -> Problem:
        """What lies in a box of the padded picture, as a problem of its own."""
        rows, cols = slices(box, 1)
        original, visible, weights = (
            None if v is None else v[rows, cols] for v in (self.original, self.visible, self.weights)
        )
        assert original is not None
        shape = box[2] - box[0], box[3] - box[1]
        return replace(self, original=original, visible=visible, weights=weights, shape=shape)

    @property
    def pixels(self) -> int:
        return self.original.shape[0] * self.original.shape[1]

    @property
    def seen(self) -> int:
        """How many pixels are visible."""
        return self.pixels if self.visible is None else int(self.visible.sum())

    @property
    def x(self) -> Tensor:
        """The padded picture, (1, 3, H, W) float32 in 0..1."""
        return window(self.original, 0, 0, *self.shape)

    @property
    def weight(self) -> Tensor:
        """Of each pixel's squared error, 0 in the padding, (1, 1, H, W) float32."""
        weight = torch.zeros(1, 1, *self.shape)
        height, width = self.original.shape[:2]
        weight[0, 0, :height, :width] = 1 if self.weights is None else torch.from_numpy(self.weights)
        return weight

    def start(self) -> Candidate:
        """The unrefined latents of the encoder networks."""
        return self.evaluate(*analyse(self.level, self.original))

    def evaluate(self, y: Tensor, z: Tensor) -> Candidate:
        """The true loss of latents (1, …): that of the file and the picture they would become."""
        squares = weighted = spent = 0.0
        seen = self.original.copy() if self.metric == "ms-ssim" else None
        for box, shown, bits_of_box in preview(self.level, y, z):
            part = self.part(box)
            shown = shown[: part.original.shape[0], : part.original.shape[1]]
            if self.grey:
                shown = to_grey(shown)
            error = shown.astype(np.float32)
            error -= part.original
            squared = np.square(error, out=error).mean(axis=2) / 255.0**2  # (h, w)
            squares += float(squared.sum(dtype=np.float64, where=True if part.visible is None else part.visible))
            if seen is not None:
                place = seen[slices(box, 1)]
                np.copyto(place, shown, where=True if part.weights is None else part.weights[:, :, None] > 0)
            if part.weights is not None:
                squared *= part.weights
            weighted += float(squared.sum(dtype=np.float64))
            spent += bits_of_box
            if part.shape != self.shape:  # there are more
                give_back()
        distortion = 255.0**2 * weighted / self.pixels
        if seen is not None:
            decoded, x = (torch.from_numpy(v).permute(2, 0, 1)[None].float() / 255 for v in (seen, self.original))
            distortion = MS_SSIM_SCALE * float(1 - ms_ssim_of_tensors(decoded, x))
        return Candidate(y, z, squares / max(1, self.seen), spent, self.lmbda * distortion + spent / self.pixels)


def _weights(roi: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """A weight map (h, w), 0 where nothing is visible and of mean 1 elsewhere, float32."""
    height, width = visible.shape
    if roi.shape != (height, width):
        raise ValueError(f"the weight map has {roi.shape[1]}x{roi.shape[0]} pixels, not {width}x{height}")
    weights = roi.astype(np.float32)
    weights *= visible
    if not np.isfinite(weights).all() or weights.min() < 0 or (visible.any() and weights.max() <= 0):
        raise ValueError("the weight map must have finite weights of at least 0, and one above 0")
    weights *= visible.sum() / max(float(weights.sum()), 1e-30)
    return weights


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
    window : pair of slices, optional
        Rows and columns of y whose pixels these are; None for all.
    active_y, active_z : Tensor (1, h, w, 1) bool, optional
        The latents that may change; None for all.
    """

    x: Tensor
    weight: Tensor
    scale: Tensor
    window: tuple[slice, slice] | None = None
    active_y: Tensor | None = None
    active_z: Tensor | None = None

    @staticmethod
    def of(level: LevelModel, problems: list[Problem]) -> Batch:
        """The batch of problems of one padded shape, all grey or none; all latents may change."""
        side = _shuffle(level.folded.networks.g_s)
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
    networks, density = level.folded.networks, level.folded.density
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
    exponential = level.folded.architecture.scale == "exp"
    y_hat, y_bits = coded_latents(y, side.parameters, tau, rounding, noise, batch.active_y, exponential)

    with torch.autocast(y.device.type, dtype=torch.bfloat16, enabled=bf16):
        x_hat = pixels_of(level, batch, y_hat)
    if metric == "ms-ssim":
        distortion = _relaxed_ms_ssim(x_hat.float(), batch, _shuffle(level.folded.networks.g_s))
    else:
        distortion = 255**2 / 3 * weighted_squares(x_hat, batch.x, batch.weight) * batch.scale
    return lmbda * distortion + (y_bits + side.bits) * batch.scale


def pixels_of(level: LevelModel, batch: Batch, y_hat: Tensor) -> Tensor:
    """x̂ of ŷ (B, h, w, M), held as `batch.x` is."""
    g_s = level.folded.networks.g_s
    if batch.window is not None:
        rows, cols = batch.window
        y_hat = y_hat[:, rows, cols]
    x_hat: Tensor = getattr(g_s, "unshuffled", g_s)(y_hat.permute(0, 3, 1, 2))
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
    similarity = ms_ssim_of_tensors(F.pixel_shuffle(x_hat, side), F.pixel_shuffle(batch.x, side))
    padded = batch.x[0, 0].numel() * side**2
    return MS_SSIM_SCALE * (1 - similarity) * (padded * batch.scale)


def _relax(v: Tensor, tau: float | Tensor, rounding: Rounding, noise: Tensor | None, active: Tensor | None) -> Tensor:
    soft = relax(v, tau, rounding, noise=noise)
    return soft if active is None else torch.where(active, soft, torch.round(v))
