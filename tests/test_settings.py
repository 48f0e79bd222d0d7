"""Settings of an encoding: defaults, combinations that are refused, and what must load without torch."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from sgacodec.settings import ANCHORS, EFFORTS, LEVELS, METHODS, Settings, level_lambda, refined_lambda


@pytest.mark.parametrize("module", ["rounding", "annealing", "settings"])
def test_no_torch_is_imported(module: str) -> None:
    """Guards against `sgacodec --help` taking seconds: the command line reads its choices from these modules."""
    code = f"import sys, sgacodec.{module}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_defaults() -> None:
    """Guards against defaults other than the documented ones: ssl, two classes, λ = 0.0075."""
    settings = Settings()
    settings.validate()
    assert (settings.method, settings.lmbda) == ("ssl", 0.0075)
    assert settings.rounding_classes == 2
    assert Settings(method="none").annealing_steps == 0
    assert (Settings(classes=3).rounding_classes, Settings(steps=7).annealing_steps) == (3, 7)


@pytest.mark.parametrize(("kind", "steps"), [("cpu", 75), ("cuda", 500)])
def test_the_default_steps_are_those_of_the_device(kind: str, steps: int) -> None:
    """Guards against minutes for a small picture on a CPU, and against a choice that the default replaces."""
    assert Settings().on_device(kind).annealing_steps == steps
    for chosen, count in ((Settings(steps=7), 7), (Settings(steps=0), 0), (Settings(method="none"), 0)):
        assert chosen.on_device(kind) == chosen
        assert chosen.annealing_steps == count
    assert Settings(time_limit=600.0).on_device(kind).annealing_steps == 500


@pytest.mark.parametrize(("megapixels", "steps"), [(0.1, 75), (4, 75), (8, 37), (12, 25), (50, 25)])
def test_a_cpu_makes_fewer_steps_for_a_large_picture(megapixels: float, steps: int) -> None:
    """Guards against a default that takes more than ten minutes for the picture of a camera."""
    pixels = round(megapixels * 2**20)
    assert Settings().on_device("cpu", pixels).annealing_steps == steps
    assert Settings().on_device("cuda", pixels).annealing_steps == 500
    for chosen in (Settings(steps=100), Settings(method="none"), Settings(time_limit=9.0)):
        assert chosen.on_device("cpu", pixels) == chosen


def test_settings_know_whether_they_refine() -> None:
    """Guards against the preparation of a refinement without steps, and against rounds that are left out."""
    for unrefined in (Settings(method="none"), Settings(steps=0), Settings(steps=0, schedule="exp")):
        assert not unrefined.refines
    for refined in (Settings(), Settings(steps=0, rounds=2), Settings(steps=1, schedule="exp"), Settings(time_limit=1)):
        assert refined.refines


@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_effort_is_valid(method: str) -> None:
    """Guards against a choice of the command line that the encoder refuses."""
    for steps in EFFORTS if method != "none" else (0, None):
        Settings(method=method, steps=steps).validate()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("classes", 2),
        ("steps", 100),
        ("time_limit", 3.0),
        ("schedule", "exp"),
        ("tau_max", 0.5),
        ("rate", 0.1),
        ("lr", 0.1),
        ("rounds", 0),
        ("ssl_a", 2.0),
        ("r", 0.9),
        ("n", 1.4),
    ],
)
def test_what_only_refinement_has_is_refused_without_it(name: str, value: Any) -> None:
    """Guards against options that are accepted and ignored."""
    with pytest.raises(ValueError, match=f"^{name} has no meaning with method none$"):
        Settings(method="none", **{name: value}).validate()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lmbda": 0.0}, "lambda must be a positive number of at most 1e.12, not 0.0"),
        ({"time_limit": float("inf")}, "time_limit must be a positive number"),
        ({"target_bpp": 1e308}, "target_bpp must be a positive number"),
        ({"target_size": 10**400}, "target_size must be a positive number"),
        ({"steps": -1}, "steps must be an integer from 0 to 1000000, not -1"),
        ({"steps": 10**400}, "steps must be an integer"),
        ({"steps": 2.5}, "steps must be an integer"),
        ({"target_size": 300.5}, "target_size must be an integer"),
        ({"rounds": -1}, "rounds must be an integer"),
        ({"seed": 2**64}, "seed must be an integer"),
        ({"method": "ste", "tau_max": 1.0}, "tau_max has no meaning with method ste"),
        ({"method": "noise", "schedule": "exp", "rate": 0.1}, "rate has no meaning with method noise"),
        ({"target_bpp": 1.0, "target_psnr": 30.0}, "only one of target_bpp, target_size and target_psnr"),
        ({"metric": "vmaf"}, "metric must be mse or ms-ssim"),
        ({"metric": "ms-ssim", "rounds": 3}, "rounds has no meaning with metric ms-ssim"),
        ({"method": "sgd"}, "method must be one of none, ste, noise, danneal, atanh, linear, cosine, ssl, not 'sgd'"),
        ({"schedule": "linear"}, "schedule must be one of exp, sga, cold"),
        ({"classes": 4}, "classes must be 2 or 3"),
        ({"classes": 3, "method": "atanh"}, "three classes: linear, cosine, ssl"),
        ({"method": "linear", "ssl_a": 2.0}, "a is for method ssl only"),
        ({"rate": 0.1}, "rate belongs to the schedules exp and sga"),
    ],
)
def test_wrong_settings_are_refused_with_what_is_allowed(options: dict[str, Any], message: str) -> None:
    """Guards against a mistyped setting that fails after a minute, or is ignored."""
    with pytest.raises(ValueError, match=message):
        Settings(**options).validate()


def test_integers_of_numpy_are_integers() -> None:
    """Guards against steps of `numpy.arange` that are refused."""
    Settings(steps=np.int64(5), target_size=np.int32(300), seed=np.uint8(1)).validate()  # type: ignore[arg-type]


def test_which_annealings_have_a_last_pass() -> None:
    """Guards against a last pass where it gains nothing or the papers have none, and none where it helps."""
    assert [Settings(method="linear").rounds_after(steps) for steps in (0, 1, 50, 500, 2000)] == [0, 1, 10, 31, 63]
    assert Settings(classes=3).rounds_after(50) == 10
    assert Settings().rounds_after(500) == 0
    assert Settings(schedule="exp").rounds_after(500) == Settings(schedule="sga").rounds_after(500) == 0
    assert Settings(rounds=0, method="linear").rounds_after(500) == 0
    assert Settings(metric="ms-ssim").rounds_after(500) == 0
    assert Settings(rounds=7, schedule="exp").rounds_after(500) == Settings(rounds=7).rounds_after(50) == 7
    Settings(rounds=0, metric="ms-ssim").validate()


def test_a_time_limit_is_divided_into_steps_and_rounds() -> None:
    """Guards against a time limit that is exceeded, or an annealing that is longer than the default."""
    assert Settings(steps=50, rounds=7).steps_and_rounds() == (50, 7)
    assert Settings().steps_and_rounds(8) == (8, 0)
    assert Settings(method="linear").steps_and_rounds(100) == (86, 14)
    assert Settings(method="linear").steps_and_rounds(10**6) == (500, 31)
    assert Settings().steps_and_rounds(10**6) == (500, 0)
    assert Settings(rounds=3).steps_and_rounds(8) == (5, 3)
    assert Settings(rounds=30).steps_and_rounds(8) == (0, 30)
    assert Settings().steps_and_rounds(0) == (0, 0)


def test_the_ladder_is_geometric() -> None:
    """Guards against files whose level has another λ than the one they were encoded with."""
    assert level_lambda(0) == ANCHORS[0]
    assert level_lambda(LEVELS - 1) == pytest.approx(ANCHORS[-1])
    assert level_lambda(21) / level_lambda(20) == pytest.approx(level_lambda(1) / level_lambda(0))
    assert level_lambda(0, (0.01, 0.01), 1) == 0.01


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        (Settings(lmbda=0.0016), 0.75),
        (Settings(lmbda=0.015), 0.75),
        (Settings(lmbda=math.sqrt(0.015 * 0.07)), math.sqrt(0.75)),
        (Settings(lmbda=0.07), 1.0),
        (Settings(lmbda=0.3), 1.0),
        (Settings(lmbda=0.0075, method="none"), 1.0),
        (Settings(lmbda=0.0075, schedule="exp"), 1.0),
        (Settings(lmbda=0.0075, metric="ms-ssim"), 1.0),
        (Settings(lmbda=0.0075, target_psnr=30), 0.75),
        (Settings(lmbda=0.0075, level_lambda=0.0225), 3.0),
    ],
)
def test_the_level_of_a_refined_file(settings: Settings, factor: float) -> None:
    """docs/refinement.md says which level a file has."""
    assert settings.coding_lambda == pytest.approx(factor * settings.lmbda)


def test_refined_lambda_is_the_inverse_of_the_coding_lambda() -> None:
    """Guards against a decoder that is trained for latents of another λ than those it receives."""
    for lmbda in (0.0005, 0.002, 0.0149, 0.02, 0.03, 0.045, 0.0699, 0.07, 0.2):
        assert refined_lambda(Settings(lmbda=lmbda).coding_lambda) == pytest.approx(lmbda, rel=1e-9)
