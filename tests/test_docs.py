"""docs/architecture.md agrees with the import contracts and with the files."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _layers_of_the_contract() -> list[set[str]]:
    contract = re.search(
        r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), flags=re.DOTALL | re.MULTILINE
    )
    assert contract is not None
    return [set(re.findall(r"\w+", line)) for line in contract[1].splitlines()]


def test_table_of_the_layers_is_that_of_the_contract() -> None:
    """Guards against a table that lists other layers than `lint-imports` checks."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| \d+ \| (.*?) \|", text, flags=re.MULTILINE)
    documented = [{name.removesuffix("/").removesuffix(".py") for name in re.findall(r"`(.*?)`", row)} for row in rows]
    assert documented == _layers_of_the_contract()


def test_modules_that_the_architecture_names_exist() -> None:
    """Guards against names of modules and functions that were renamed."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    packages = "|".join(path.stem for path in (ROOT / "codec").iterdir() if path.suffix in ("", ".py"))
    for path in set(re.findall(rf"\b((?:{packages})(?:\.(?!md)[a-z_]+)+)\b", text)):
        parts = path.removesuffix(".py").split(".")
        *folder, module = (ROOT / "codec").joinpath(*parts).relative_to(ROOT).parts
        file = ROOT.joinpath(*folder, f"{module}.py")
        parent = ROOT.joinpath(*folder).with_suffix(".py")
        assert file.is_file() or re.search(rf"^def {module}\b", parent.read_text(), flags=re.MULTILINE), path
