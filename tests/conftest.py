"""Fixtures of the tests that run real models, and the switch that rewrites golden files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from sgacodec.api import Codec
from sgacodec.models import catalogue as models
from sgacodec.models.file import read_model
from sgacodec.models.level import LevelModel, Model

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
        import tiny_model

        tiny_model.write(path, photograph)
    return path


@pytest.fixture(scope="session")
def tiny(tiny_path: Path) -> Model:
    return read_model(tiny_path)


@pytest.fixture(scope="module")
def codec() -> Codec:
    """The built-in model, as a user gets it."""
    return Codec("lite", device="cpu")


@pytest.fixture(scope="module")
def small(tiny_path: Path) -> Codec:
    """The small model of the golden files."""
    return Codec(str(tiny_path), device="cpu")
