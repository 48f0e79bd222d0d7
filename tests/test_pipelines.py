"""The recipes of docs/pipelines.md run. The codec is that of fake_codec."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import fake_codec
import pytest
from test_cli import picture

from sgacodec import bitstream
from sgacodec.cli import main

PAGE = (Path(__file__).parents[1] / "docs" / "pipelines.md").read_text()
PHOTOS = ("a", "b", "sub/c")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Work in a folder with photos; return an environment in which `sgacodec` is the command line with fake_codec."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    for name in PHOTOS:
        picture(tmp_path / "photos" / f"{name}.png")
    script = tmp_path / "bin" / "sgacodec"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {fake_codec.__file__} "$@"\n')
    script.chmod(0o755)
    return {**os.environ, "PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}", "LC_ALL": "C.UTF-8"}


def run(environment: dict[str, str], *line: str) -> None:
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def encoded() -> set[str]:
    """Names without folders of the files in small/, all of which are whole."""
    files = [path for path in Path("small").rglob("*") if path.suffix == ".sga"]
    assert all(bitstream.read(path.read_bytes()).width == 20 for path in files)
    return {path.stem for path in files}


@pytest.mark.parametrize("block", blocks("sh"))
def test_shell_recipes(environment: dict[str, str], block: str) -> None:
    """Guards against recipes that fail or leave files out."""
    if "parallel" in block and shutil.which("parallel") is None:
        pytest.skip("needs GNU parallel")
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    run(environment, "bash", "-euo", "pipefail", "-c", block)
    if "small" in block:
        assert encoded() == {"a", "b", "c"}
    if "back" in block:
        assert {path.stem for path in Path("back").rglob("*.png")} == {"a", "b", "c"}
    for name in re.findall(r"> (\S+\.\w+)", block):
        assert Path(name).stat().st_size > 0
    if "report.txt" in block:
        assert Path("report.txt").read_text().count(" bpp\n") == 3


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("block", blocks("make"))
def test_makefiles(environment: dict[str, str], block: str) -> None:
    """A changed picture, and no other, is encoded again."""
    Path("Makefile").write_text(block)
    run(environment, "make", "-s", "-j", "2")
    assert encoded() == {"a", "b", "c"}
    (a,), (b,) = Path("small").rglob("a.sga"), Path("small").rglob("b.sga")
    for path in (a, b):
        path.write_bytes(b"old")
    for age, folder in ((60, "photos"), (30, "small")):
        for path in Path(folder).rglob("*.*"):
            os.utime(path, (time.time() - age,) * 2)
    Path("photos/a.png").touch()
    run(environment, "make", "-s")
    assert a.read_bytes() != b"old"
    assert b.read_bytes() == b"old"


def test_other_commands_are_understood() -> None:
    """Guards against options, in commands that need a network, that were renamed."""
    lines = [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines()]
    for line in lines:
        _, name, *words = shlex.split(line)
        command = main.commands.get(name) or main.get_command(None, name)  # type: ignore[arg-type]
        assert command is not None
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known
    assert any("--engine ray" in line for line in lines)
