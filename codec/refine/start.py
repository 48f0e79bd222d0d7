"""The latents that refinement starts from, which are also what is coded without refinement.

The analysis network suits photographs. Two kinds of pictures get other candidates as well, and the one of lowest true
loss is taken:

* Pictures of which padding is a large part. Smooth padding is cheaper than replicated pixels, and symbols of y that
  have no visible pixel in their block can be 0.
* Pictures that the network codes badly: dithered ones, fine patterns, noise. Their latents are mixed with those of a
  low-passed picture, which lowers the contrast of their high frequencies; the last resort is the mean color.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from ..alpha import fill_transparent
from ..latents import analyse, hyper_analyse, zero_padding
from .problem import Candidate, Problem

_MUCH_PADDING = 0.25  # part of the padded picture from which on padding has candidates of its own
_RADII = (3, 1)  # of the low-pass filters, in pixels
_PARTS = (0.25, 0.5, 0.75)  # of the high frequencies that the mixed latents keep
_FLAT = 1e-3  # variance, in 8-bit units, below which a picture has one color
_STRIP = 256  # rows that are counted at once


def starting_point(problem: Problem) -> Candidate:
    """The best unrefined latents of a whole picture.

    For most pictures this is `Problem.start`, the output of g_a and h_a. Where the metric is MSE, the true loss is
    never above that of a picture of the mean color.
    """
    best = problem.start()
    pixels = problem.original
    if _has_much_padding(problem):
        pixels = _padded_smoothly(problem)
        best = _better(problem, best, *analyse(problem.level, pixels))
    if _is_coded_badly(problem, best):
        best = _among_smoother(problem, pixels, best)
    return best


def _has_much_padding(problem: Problem) -> bool:
    return problem.pixels <= (1 - _MUCH_PADDING) * math.prod(problem.shape)


def _better(problem: Problem, best: Candidate, y: Tensor, z: Tensor) -> Candidate:
    """The better one of a candidate and of latents y, z, whose symbols in the padding are zeroed if it is large."""
    if _has_much_padding(problem):
        y = zero_padding(problem.level, y, z, *problem.original.shape[:2])
    candidate = problem.evaluate(y, z)
    return candidate if candidate.loss < best.loss else best


def _padded_smoothly(problem: Problem) -> np.ndarray:
    """The pixels in the padded size, with padding that fades to means of ever larger surroundings."""
    (height, width), (rows, cols) = problem.original.shape[:2], problem.shape
    visible = np.zeros((rows, cols), np.uint8)
    visible[:height, :width] = 255
    padded = np.pad(problem.original, ((0, rows - height), (0, cols - width), (0, 0)), mode="edge")
    return fill_transparent(padded, visible)


def _among_smoother(problem: Problem, pixels: np.ndarray, best: Candidate) -> Candidate:
    """The best of `best`, of flat and low-passed pictures, and of mixtures of `best` and a low-passed one."""
    level, y = problem.level, best.y
    flat = np.empty_like(pixels)
    flat[:] = np.rint(_moments(problem)[0])
    best = _better(problem, best, *analyse(level, flat))
    image = Image.fromarray(pixels)
    for radius in _RADII:
        smooth, z = analyse(level, np.asarray(image.filter(ImageFilter.GaussianBlur(radius))))
        best = _better(problem, best, smooth, z)
    for part in _PARTS:
        mixed = torch.lerp(smooth, y, part)
        best = _better(problem, best, mixed, hyper_analyse(level, mixed))
    return best


def _is_coded_badly(problem: Problem, candidate: Candidate) -> bool:
    """Whether a picture of the mean color could have a lower loss, or white noise of the same variance a lower rate."""
    variance = float(_moments(problem)[1].mean())
    distortion = 255.0**2 * candidate.mse * problem.visible_pixels / problem.pixels
    if problem.metric == "mse":
        distortion = (candidate.loss - candidate.bits / problem.pixels) / problem.lmbda
        if variance >= _FLAT and candidate.loss >= problem.lmbda * variance:
            return True
    if variance < _FLAT or distortion <= 0:
        return False
    bits = (1 if problem.grey else 3) / 2 * math.log2(variance / distortion)  # R(D) of white Gaussian noise
    return candidate.bits > bits * problem.visible_pixels


def _moments(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean of each color, and the mean weighted square of the distance to it, (3,) each, in 8-bit units."""
    counts = np.zeros((3, 256))
    for top in range(0, problem.original.shape[0], _STRIP):
        rows = problem.original[top : top + _STRIP]
        weights = None if problem.weights is None else problem.weights[top : top + _STRIP].ravel()
        for color in range(3):
            counts[color] += np.bincount(rows[..., color].ravel(), weights, 256)
    values = np.arange(256)
    mean = counts @ values / np.maximum(counts.sum(axis=1), 1e-30)
    return mean, np.sum(counts * (values - mean[:, None]) ** 2, axis=1) / problem.pixels
