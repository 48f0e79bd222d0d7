"""`sgacodec models`: list, show, import and verify models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import output
from .exits import NO_MODEL, one_line
from .output import Output, json_line


@click.group(short_help="List, show, import and verify models.")
def command() -> None:
    """List, show, import and verify models.

    A file names its model by an id. Models are looked up among the built-in ones and in the user's folder
    (the variable SGACODEC_MODELS, if set); encode and decode take any other with --model PATH.
    """


@command.command("list")
@click.option("--json", is_flag=True, help="Print a JSON array.")
def list_command(json: bool) -> None:
    """List the installed models."""
    from ..models.catalogue import list_models, user_folder

    models = list_models()
    if json:
        click.echo(json_line([_summary(info) for info in models], indent=2))
        return
    if not models:
        raise click.ClickException(f"no models are installed (the user's folder is {user_folder()})")
    rows = [[str(value) for value in _summary(info).values()] for info in models]
    rows.insert(0, [key.replace("_", " ") for key in _summary(models[0])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        output.line("  ".join(cells).rstrip())


@command.command("show")
@click.argument("name", metavar="NAME|PATH")
def show_command(name: str) -> None:
    """Show the metadata of a model as JSON: architecture, training record, licence."""
    from ..models.catalogue import find_model, read_info

    info = read_info(find_model(name))
    click.echo(json_line({"path": str(info.path), "bytes": info.path.stat().st_size, **info.metadata}, indent=2))


@command.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE")
@click.option("--name", required=True, help="Name of the model.")
@click.option(
    "--lambda",
    "lmbda",
    type=click.FloatRange(min=0, min_open=True),
    help="Lambda of its training.  [default: that of the quality in the file's name, else 0.0067]",
)
def import_command(file: Path, name: str, lmbda: float | None) -> None:
    """Import a CompressAI checkpoint (.pth, .pth.tar) into the user's folder: mbt2018-mean or bmshj2018-hyperprior.

    The model has one level, that of its training. Nothing in the file is executed.
    """
    from ..models.catalogue import SUFFIX

    if not name or name != Path(name).name or name.startswith(".") or name.endswith(SUFFIX):
        raise click.UsageError(f"--name '{name}': a plain name is wanted, without folder and suffix")
    from ..models.compressai_import import import_compressai

    output.line(f"imported as {import_compressai(file, name, lmbda)}")


@command.command("verify")
@click.argument("name", required=False, metavar="[NAME|PATH]")
@click.pass_context
def verify_command(ctx: click.Context, name: str | None) -> None:
    """Check a model, or every installed one: its id, its tables, and the bounds that make decoding exact."""
    from ..models.catalogue import find_model, list_models
    from ..models.verify import verify

    paths = [find_model(name)] if name is not None else [info.path for info in list_models()]
    damaged = False
    for path in paths:
        try:
            problems = verify(path)
        except (ValueError, OSError) as error:
            problems = [one_line(error)]
        damaged = damaged or bool(problems)
        for problem in problems:
            output.problem(Output(), f"{path}: {problem.removeprefix(f'{path}: ')}")
        if not problems:
            output.line(f"{path}: ok")
    if damaged or not paths:
        if not paths:
            output.problem(Output(), "no models are installed")
        ctx.exit(NO_MODEL)


def _summary(info: Any) -> dict[str, Any]:
    return {
        "name": info.name,
        "id": info.id,
        "architecture": info.architecture.get("family"),
        "levels": info.metadata.get("levels"),
        "bytes": info.path.stat().st_size,
        "path": str(info.path),
    }
