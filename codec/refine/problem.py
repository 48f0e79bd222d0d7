"""The true loss of one picture: the rate and the distortion of the file that given latents would become.

y, z ─► quantize ─► integers ─► bits under the integer tables
                        └─► exact hyper-decoder, g_s ─► 8-bit pixels ─► λ·255²·distortion
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..alpha import fill_transparent
from ..latents import Latents, analyse, preview, quantize
from ..memory import release_free_memory
from ..metrics import MS_SSIM_MIN_SIDE, ms_ssim_of_tensors
from ..models.level import LevelModel
from ..networks.architecture import padded_size
from ..picture import ImageError, Picture, to_grey
from ..pixels import window
from ..tiling import Box, slices

MS_SSIM_SCALE = 1290.0  # λ·255²·MSE ↔ λ·1290·(1 − MS-SSIM): the ratio of CompressAI's two ladders of λ
_KEPT = 2**20  # padded pixels of a picture whose integers are kept


@dataclass(frozen=True)
class Candidate:
    """Latents of one picture and their true loss after rounding.

    Attributes
    ----------
    y, z : Tensor (1, M, H/16, W/16), (1, N, H/64, W/64) float32
        Latents and hyper-latents, not rounded.
    mse : float
        Mean squared error of the visible 8-bit pixels, for pixels scaled to 0..1.
    bits : float
        Code length of z and y under the integer tables.
    loss : float
        λ·255²·distortion + bits per pixel. The distortion is the weighted MSE, or a scaled 1 − MS-SSIM.
    quantized : Latents, optional
        The integers; None for pictures of more than one megapixel, whose memory they would take.
    """

    y: Tensor
    z: Tensor
    mse: float
    bits: float
    loss: float
    quantized: Latents | None = None


@dataclass(frozen=True)
class Problem:
    """One picture, or a part of one, to be refined at one level and λ.

    Pixels are held as bytes; float tensors are made for the part that is worked on.

    Attributes
    ----------
    level : LevelModel
        The model at one level.
    lmbda : float
        λ of the loss.
    metric : {"mse", "ms-ssim"}
        The distortion of the loss.
    original : ndarray (h, w, 3) uint8
        Pixels, with the colours under alpha 0 replaced (`fill_transparent`).
    visible : ndarray (h, w) bool, optional
        Where alpha is not 0; None: everywhere.
    weights : ndarray (h, w) float32 or bool, optional
        Weight of each pixel's squared error: 0 under alpha 0, with mean 1 over the visible pixels; None: 1 everywhere.
    grey : bool
        Whether the file is grey: the decoder outputs the mean of the three channels of x̂.
    shape : tuple of int
        H and W after padding by replication: multiples of 64 for a whole picture.
    dead_zone : bool
        Whether y is rounded with a dead zone, as it is coded without refinement.
    """

    level: LevelModel
    lmbda: float
    metric: str
    original: np.ndarray
    visible: np.ndarray | None
    weights: np.ndarray | None
    grey: bool
    shape: tuple[int, int]
    dead_zone: bool = False

    @staticmethod
    def of(level: LevelModel, picture: Picture, roi: np.ndarray | None, lmbda: float, metric: str) -> Problem:
        """The problem of a whole picture.

        Parameters
        ----------
        roi : ndarray (h, w) float, optional
            Relative weight of each pixel's squared error.

        Raises
        ------
        ValueError
            When `roi` has another shape than the picture, or its weights are negative, not finite or all zero.
        ImageError
            When the metric is MS-SSIM and the picture is too small for it.
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
        return Problem(
            level=level,
            lmbda=lmbda,
            metric=metric,
            original=pixels,
            visible=visible,
            weights=weights,
            grey=picture.grey,
            shape=padded_size(height, width),
        )

    def part(self, box: Box) -> Problem:
        """The pixels in a box of the padded picture, as a problem of their own."""
        rows, cols = slices(box, 1)
        original, visible, weights = (
            None if v is None else v[rows, cols] for v in (self.original, self.visible, self.weights)
        )
        assert original is not None
        shape = box[2] - box[0], box[3] - box[1]
        return replace(self, original=original, visible=visible, weights=weights, shape=shape)

    @property
    def pixels(self) -> int:
        """Number of pixels, without padding."""
        return self.original.shape[0] * self.original.shape[1]

    @property
    def visible_pixels(self) -> int:
        """Number of pixels whose alpha is not 0."""
        return self.pixels if self.visible is None else int(self.visible.sum())

    @property
    def x(self) -> Tensor:
        """The padded picture, (1, 3, H, W) float32 in 0..1."""
        return window(self.original, 0, 0, *self.shape)

    @property
    def weight(self) -> Tensor:
        """Weight of each pixel's squared error, 0 in the padding, (1, 1, H, W) float32."""
        weight = torch.zeros(1, 1, *self.shape)
        height, width = self.original.shape[:2]
        weight[0, 0, :height, :width] = 1 if self.weights is None else torch.from_numpy(self.weights)
        return weight

    def start(self) -> Candidate:
        """The unrefined latents: the output of g_a and h_a."""
        return self.evaluate(*analyse(self.level, self.original))

    def evaluate(self, y: Tensor, z: Tensor) -> Candidate:
        """The true loss of y (1, M, H/16, W/16) and z (1, N, H/64, W/64), tile by tile.

        With a dead zone, y is changed in place.
        """
        squares = weighted = bits = 0.0
        decoded = self.original.copy() if self.metric == "ms-ssim" else None
        found = quantize(self.level, y, z, self.dead_zone)
        for box, shown, bits_of_box in preview(self.level, found):
            part = self.part(box)
            shown = shown[: part.original.shape[0], : part.original.shape[1]]
            if self.grey:
                shown = to_grey(shown)
            error = shown.astype(np.float32)
            error -= part.original
            squared = np.square(error, out=error).mean(axis=2) / 255.0**2  # (h, w)
            squares += float(squared.sum(dtype=np.float64, where=True if part.visible is None else part.visible))
            if decoded is not None:
                place = decoded[slices(box, 1)]
                np.copyto(place, shown, where=True if part.weights is None else part.weights[:, :, None] > 0)
            if part.weights is not None:
                squared *= part.weights
            weighted += float(squared.sum(dtype=np.float64))
            bits += bits_of_box
            if part.shape != self.shape:  # one tile of several
                release_free_memory()
        distortion = 255.0**2 * weighted / self.pixels
        if decoded is not None:
            x_hat, x = (torch.from_numpy(v).permute(2, 0, 1)[None].float() / 255 for v in (decoded, self.original))
            distortion = MS_SSIM_SCALE * float(1 - ms_ssim_of_tensors(x_hat, x))
        return Candidate(
            y=y,
            z=z,
            mse=squares / max(1, self.visible_pixels),
            bits=bits,
            loss=self.lmbda * distortion + bits / self.pixels,
            quantized=found if math.prod(self.shape) <= _KEPT else None,
        )


def with_lambda_of(candidate: Candidate, before: Problem, now: Problem) -> Candidate:
    """A candidate of a problem with the loss that it has with the λ of another problem of the same picture."""
    rate = candidate.bits / now.pixels
    return replace(candidate, loss=rate + (candidate.loss - rate) * (now.lmbda / before.lmbda))


def _weights(roi: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Relative weights (h, w) as `Problem.weights` has them: 0 where not visible, of mean 1 elsewhere, float32."""
    height, width = visible.shape
    if roi.shape != (height, width):
        raise ValueError(f"the weight map has {roi.shape[1]}x{roi.shape[0]} pixels, not {width}x{height}")
    weights = roi.astype(np.float64)
    weights *= visible
    most = weights.max()
    if not math.isfinite(most) or not weights.min() >= 0 or (visible.any() and most <= 0):
        raise ValueError("the weight map must have finite weights of at least 0, and one above 0")
    if most > 0:
        weights /= most
        weights *= visible.sum() / weights.sum()
    return weights.astype(np.float32)
