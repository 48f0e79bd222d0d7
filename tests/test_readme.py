"""The README's commands work: a newcomer's first minute."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

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
    """An option that was renamed must not stay in the README."""
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


def test_the_first_command_encodes_and_decodes_the_photograph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's first command, with fewer steps, gives a small file and the picture back."""
    shutil.copytree(ROOT / "docs" / "images", tmp_path / "docs" / "images")
    monkeypatch.chdir(tmp_path)
    encode, decode = (shlex.split(command)[1:] for command in _commands()[:2])
    runner = CliRunner()
    assert runner.invoke(main, [*encode, "--steps", "5"]).exit_code == 0
    assert Path("coffee.sga").stat().st_size < 0.1 * Path("docs/images/coffee.png").stat().st_size
    assert runner.invoke(main, decode).exit_code == 0
    assert Path("coffee.png").stat().st_size > 0
