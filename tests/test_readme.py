"""The commands and the Python example of the README work."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import sgacodec
from sgacodec.cli import main

ROOT = Path(__file__).parents[1]


def _commands() -> list[str]:
    """Every `sgacodec …` command of the README's shell blocks, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in re.split(r"&&|\||>", line)]
    return [part for part in parts if part.startswith("sgacodec ")]


@pytest.mark.parametrize("command", _commands())
def test_every_command_of_the_readme_is_understood(command: str) -> None:
    """Guards against options in the README that were renamed."""
    words = shlex.split(command)[1:]
    group = click.Context(main)
    found = main.get_command(group, words[0])
    assert found is not None
    if words[0] == "models":
        assert isinstance(found, click.Group)
        found = found.get_command(group, words[1])
        assert found is not None
        words = words[1:]
    known = {name for parameter in found.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= known


@pytest.fixture
def crop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Work in an empty folder; return a part of the photograph, (128, 192, 3) uint8."""
    monkeypatch.chdir(tmp_path)
    with Image.open(ROOT / "docs" / "images" / "coffee.png") as im:
        return np.array(im.convert("RGB"))[100:228, 200:392]


def test_the_first_command_encodes_and_decodes_the_photograph(crop: np.ndarray) -> None:
    """The README's first command, with a part of the photograph and fewer steps, makes a small file and an image."""
    Path("docs/images").mkdir(parents=True)
    Image.fromarray(crop).save("docs/images/coffee.png")
    encode, decode = (shlex.split(command)[1:] for command in _commands()[:2])
    runner = CliRunner()
    assert runner.invoke(main, [*encode, "--steps", "5"]).exit_code == 0
    assert Path("coffee.sga").stat().st_size < 0.1 * Path("docs/images/coffee.png").stat().st_size
    assert runner.invoke(main, decode).exit_code == 0
    assert _psnr(np.array(Image.open("coffee.png")), crop) > 26


def test_the_python_example_runs(crop: np.ndarray) -> None:
    """The README's Python examples run as they are printed, and their comments are true."""
    Image.fromarray(crop[:64, :64]).save("in.png")
    names: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL):
        exec(compile(example, "README.md", "exec"), names)
    assert Image.open("thumbnail.png").size == (96, 64)
    assert (names["picture"].pixels.shape, names["picture"].pixels.dtype) == ((64, 64, 3), np.uint8)
    assert _psnr(names["picture"].pixels, crop[:64, :64]) > 26
    unrefined = sgacodec.encode("in.png", sgacodec.Settings(lmbda=0.0075, method="none"))
    assert len(names["data"]) < len(unrefined)


def _psnr(pixels: np.ndarray, original: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((pixels / 255.0 - original / 255.0) ** 2)))
