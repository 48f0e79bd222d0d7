"""Fixtures of the tests that run real models, the switch that rewrites golden files, and parallel test runs."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported: the tensors of the tests are too small to gain from more threads, and waiting threads occupy
# cores. Tests that need a certain number of threads set it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
import tiny_model
import torch
from hypothesis import settings
from PIL import Image

from sgacodec.api import Codec
from sgacodec.models import catalogue as models
from sgacodec.models.file import read_model, write_model
from sgacodec.models.level import LevelModel, Model

_MAX_WORKERS = 8
ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"

settings.register_profile("sgacodec", deadline=None)  # the first example pays for imports
settings.load_profile("sgacodec")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--regenerate-golden",
        action="store_true",
        help="rewrite tests/golden/, all tests at once; review the diff: old files must go on decoding",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the default suite, `pytest` without files, `-k` or `-m`, in one process per core if xdist is installed.

    `-n` sets another number; `-n 0` and `-p no:xdist` run everything in this process.
    """
    if hasattr(config, "workerinput"):  # in a worker of xdist
        return
    option = config.option
    complete = config.args_source == pytest.Config.ArgsSource.TESTPATHS and not option.keyword
    complete &= option.markexpr in config.getini("addopts")
    single = option.usepdb or option.collectonly or option.regenerate_golden  # golden files are written in one process
    if not complete or single or getattr(option, "numprocesses", 0) is not None:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores > 1:
        option.numprocesses = min(cores, _MAX_WORKERS)
        option.dist = "worksteal"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def regenerate(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--regenerate-golden"))


@pytest.fixture(scope="session")
def photograph() -> np.ndarray:
    """The repository's photograph, (400, 600, 3) uint8 or so."""
    with Image.open(ROOT / "docs" / "images" / "coffee.png") as im:
        return np.array(im.convert("RGB"))


@pytest.fixture(scope="session")
def lite_path() -> Path:
    return models.builtin_folder() / "lite.safetensors"


@pytest.fixture(scope="session")
def lite(lite_path: Path) -> Model:
    """The built-in model."""
    return read_model(lite_path)


@pytest.fixture(scope="session")
def lite_level(lite: Model) -> LevelModel:
    """The built-in model at the default λ."""
    return lite.at(lite.level_for(0.0075))


@pytest.fixture(scope="session")
def tiny_path(regenerate: bool, photograph: np.ndarray) -> Path:
    """The small model of the golden files: all that a real one has, in a quarter of a megabyte."""
    path = GOLDEN / "tiny.safetensors"
    if regenerate:
        tiny_model.write(path, photograph)
    return path


@pytest.fixture(scope="session")
def tiny(tiny_path: Path) -> Model:
    return read_model(tiny_path)


@pytest.fixture(scope="session")
def context_path(regenerate: bool, photograph: np.ndarray) -> Path:
    """A small model with a context model and linear scales, as imported networks have them."""
    path = GOLDEN / "context.safetensors"
    if regenerate:
        write_model(tiny_model.with_context("mshyper", photograph), path)
    return path


@pytest.fixture(scope="session")
def contexts(context_path: Path, photograph: np.ndarray) -> dict[str, Model]:
    """Small models with a context model: scales as logarithms or linear, and channel groups without a checkerboard."""
    return {
        "exp": tiny_model.with_context("lite", photograph),
        "linear": read_model(context_path),
        "groups": tiny_model.with_context("lite", photograph, checkerboard=False),
    }


@pytest.fixture(scope="module")
def codec() -> Codec:
    """The built-in model, as a user gets it."""
    return Codec("lite", device="cpu")


@pytest.fixture(scope="module")
def small(tiny_path: Path) -> Codec:
    """The small model of the golden files."""
    return Codec(str(tiny_path), device="cpu")
