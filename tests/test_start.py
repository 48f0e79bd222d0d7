"""Where refinement starts: pictures that are not photographs, and pictures of which padding is a large part."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from sgacodec import latents
from sgacodec.api import Codec, Settings
from sgacodec.models.level import LevelModel, Model
from sgacodec.picture import Picture
from sgacodec.refine.problem import Candidate, Problem
from sgacodec.refine.start import starting_point


def dithered() -> np.ndarray:
    """A gradient of black and white pixels, 96×72."""
    gradient = np.tile(np.linspace(0, 255, 96), (72, 1)).astype(np.uint8)
    return np.array(Image.fromarray(gradient).convert("1").convert("RGB"))


def checkered() -> np.ndarray:
    """A checkerboard of single pixels."""
    board = np.add.outer(np.arange(64), np.arange(96)) % 2 * 255
    return np.repeat(board[..., None], 3, axis=2).astype(np.uint8)


def noisy() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)


def problem_of(model: Model, pixels: np.ndarray, lmbda: float, roi: np.ndarray | None = None) -> Problem:
    return Problem.of(model.at(model.level_for(lmbda)), Picture(pixels), roi, lmbda, "mse")


def flat_picture(problem: Problem) -> Candidate:
    """The candidate of a picture of the mean color."""
    flat = np.empty_like(problem.original)
    flat[:] = np.rint(np.average(problem.original, axis=(0, 1)))
    return problem.evaluate(*latents.analyse(problem.level, flat))


def unrefined(codec: Codec, pixels: np.ndarray, lmbda: float) -> float:
    """The true loss of `--method none`."""
    (encoded,) = codec.encode([Picture(pixels)], Settings(lmbda=lmbda, method="none"))
    return float(encoded.report["rd_loss"])


@pytest.mark.parametrize("lmbda", [0.0016, 0.0075, 0.045])
def test_photographs_start_from_the_encoder(
    lite: Model, photograph: np.ndarray, monkeypatch: pytest.MonkeyPatch, lmbda: float
) -> None:
    """Guards against other bytes for photographs, and against more than one evaluation of the true loss."""
    calls = []
    evaluate = Problem.evaluate

    def counted(problem: Problem, y: torch.Tensor, z: torch.Tensor) -> Candidate:
        calls.append(y)
        return evaluate(problem, y, z)

    monkeypatch.setattr(Problem, "evaluate", counted)
    for pixels in (photograph[:192, :256], photograph[200:320, 100:220]):  # an eighth of the second one is padding
        problem = problem_of(lite, pixels, lmbda)
        found = starting_point(problem)
        assert len(calls) == 1
        assert torch.equal(found.y, problem.start().y)
        calls.clear()


@pytest.mark.parametrize(("lmbda", "gain"), [(0.0016, 0.99), (0.0075, 0.995), (0.045, 0.999)])
def test_photographs_are_coded_with_a_dead_zone(
    codec: Codec, lite: Model, photograph: np.ndarray, lmbda: float, gain: float
) -> None:
    """Without refinement; refinement itself starts from the latents as they are, but is never worse than this."""
    nearest = problem_of(lite, photograph, lmbda).start()
    assert unrefined(codec, photograph, lmbda) < gain * nearest.loss
    (refined,) = codec.encode([Picture(photograph[:128, :128])], Settings(lmbda=lmbda, steps=2, rounds=0))
    (plain,) = codec.encode([Picture(photograph[:128, :128])], Settings(lmbda=lmbda, method="none"))
    assert refined.report["rd_loss_unrefined"] == plain.report["rd_loss"] >= refined.report["rd_loss"]


@pytest.mark.parametrize("make", [dithered, checkered, noisy])
@pytest.mark.parametrize(("lmbda", "gain"), [(0.0001, 0.3), (0.0016, 0.99)])
def test_no_picture_is_worse_than_a_flat_one(
    codec: Codec, lite: Model, make: Callable[[], np.ndarray], lmbda: float, gain: float
) -> None:
    """Guards against latents that cost more than they gain, for which no λ gives a small file."""
    problem = problem_of(lite, make(), lmbda)
    found = unrefined(codec, problem.original, lmbda)
    assert found <= 1.002 * flat_picture(problem).loss  # whose color is rounded to 8 bits
    assert found <= gain * problem.start().loss


def test_weights_count(lite: Model) -> None:
    """Guards against a start that is bad where the weights of `--roi` are."""
    roi = np.zeros((64, 96))
    roi[:, 48:] = 1
    pixels = np.concatenate([np.zeros((64, 48, 3), np.uint8), noisy()[:, :48]], axis=1)
    problem = problem_of(lite, pixels, 0.0016, roi)
    flat = np.empty_like(pixels)
    flat[:] = np.rint(pixels[:, 48:].mean(axis=(0, 1)))
    assert starting_point(problem).loss <= problem.evaluate(*latents.analyse(problem.level, flat)).loss


@pytest.mark.parametrize(("height", "width", "gain"), [(200, 3, 0.65), (1, 150, 0.8), (17, 33, 0.8), (100, 100, 0.99)])
def test_padding_costs_little(
    codec: Codec, lite: Model, photograph: np.ndarray, height: int, width: int, gain: float
) -> None:
    """Guards against slivers that cost several times their raw size for repeated pixels that nobody sees."""
    pixels = np.ascontiguousarray(photograph[100 : 100 + height, 200 : 200 + width])
    for lmbda in (0.0016, 0.045):
        assert unrefined(codec, pixels, lmbda) <= gain * problem_of(lite, pixels, lmbda).start().loss


def test_latents_of_the_padding_cost_nothing(lite_level: LevelModel, photograph: np.ndarray) -> None:
    """Symbols outside the picture become 0, and the latents inside stay as they are."""
    y, z = latents.analyse(lite_level, photograph[:70, :20])
    changed = latents.zero_padding(lite_level, y, z, 70, 20)
    assert torch.equal(changed[:, :, :5, :2], y[:, :, :5, :2])
    assert latents.quantize(lite_level, y, z).y[:, :, :, 2:].any()
    found = latents.quantize(lite_level, changed, z)
    assert found.y[:, :, :5, :2].any()
    assert not found.y[:, :, 5:].any()
    assert not found.y[:, :, :, 2:].any()
