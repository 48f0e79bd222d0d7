"""`sgacodec models`: list, show, import and verify models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import output
from .exits import NO_MODEL, one_line
from .output import Output, json_line

if TYPE_CHECKING:
    from ..models.catalogue import ModelError, ModelInfo


@click.group(short_help="List, show, import and verify models.")
def command() -> None:
    """List, show, import and verify models.

    A file names its model by an id. Models are looked up among the built-in ones and in the user's folder
    (the variable SGACODEC_MODELS, if set); encode and decode take any other with --model PATH.
    """


@command.command("list")
@click.option("--json", is_flag=True, help="Print a JSON array.")
def list_command(json: bool) -> None:
    """List the installed models; files in the model folders that cannot be read are listed as damaged."""
    from ..models.catalogue import survey, user_folder

    models = survey()
    if json:
        click.echo(json_line([_summary(path, found) for path, found in models], indent=2))
        return
    if not models:
        raise click.ClickException(f"no models are installed (the user's folder is {user_folder()})")
    summaries = [_summary(path, found) for path, found in models]
    rows = [["" if value is None else str(value) for key, value in s.items() if key != "error"] for s in summaries]
    rows.insert(0, [key for key in summaries[0] if key != "error"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        output.line("  ".join(cells).rstrip())
    for summary in summaries:
        if summary["error"]:
            output.problem(Output(), summary["error"])


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
    type=click.FloatRange(1e-6, 1e6),  # models.catalogue.ANCHOR_RANGE
    help="Lambda the checkpoint was trained with.  [default: that of the quality in the file's name, else 0.0067]",
)
def import_command(file: Path, name: str, lmbda: float | None) -> None:
    """Import a CompressAI checkpoint (.pth, .pth.tar) into the user's folder: mbt2018-mean or bmshj2018-hyperprior.

    The model has one level, that of its training. Nothing in the file is executed.
    """
    from ..models.catalogue import SUFFIX, reserved_names

    if not name or name != Path(name).name or name.startswith(".") or name.endswith(SUFFIX):
        raise click.UsageError(f"--name '{name}': a plain name is wanted, without folder and suffix")
    if name in reserved_names():
        raise click.UsageError(f"--name '{name}': a name of built-in models, choose another")
    from ..models.compressai_import import import_compressai

    output.line(f"imported as {import_compressai(file, name, lmbda)}")


@command.command("verify")
@click.argument("name", required=False, metavar="[NAME|PATH]")
@click.pass_context
def verify_command(ctx: click.Context, name: str | None) -> None:
    """Check a model, or every installed one: id, digest, tables, and the bounds that make decoding exact."""
    from ..models.catalogue import find_model, read_info, survey
    from ..models.verify import verify

    paths = [find_model(name)] if name is not None else [path for path, _ in survey()]
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
            digest = "encoder" in read_info(path).metadata
            output.line(f"{path}: ok" + ("" if digest else ", but it has no digest of the tensors for encoding"))
    if damaged or not paths:
        if not paths:
            output.problem(Output(), "no models are installed")
        ctx.exit(NO_MODEL)


def _summary(path: Path, found: ModelInfo | ModelError) -> dict[str, Any]:
    """The row of a model; its architecture is "damaged", and `error` says why, where the file cannot be read."""
    try:
        size = path.stat().st_size
    except OSError:
        size = None
    if isinstance(found, ValueError):
        row = {"name": path.stem, "id": None, "architecture": "damaged", "levels": None}
    else:
        levels = found.metadata["levels"]
        row = {"name": found.name, "id": found.id, "architecture": found.architecture["family"], "levels": levels}
    return row | {"bytes": size, "path": str(path), "error": str(found) if isinstance(found, ValueError) else None}
