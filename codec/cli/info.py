"""`sgacodec info`: the header of .sga files, without torch and weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..settings import LADDER, LEVELS, level_lambda
from . import options, output, urls
from .exits import DONE, combined, debugging, exit_code, named
from .storage import read_sga, shown

if TYPE_CHECKING:
    from ..models.catalogue import ModelInfo


MAX_PIXELS = 2**64  # all that the format can state: nothing is allocated for the pixels


@click.command(short_help="Show what .sga files hold, without decoding them.")
@click.argument("names", nargs=-1, required=True, metavar="FILE...")
@options.console_options
@click.pass_context
def command(ctx: click.Context, names: tuple[str, ...], json: bool, quiet: bool, verbose: int) -> None:
    """Show what .sga files hold, without decoding them.

    The checksum is verified, the pixels are not decoded. FILE may be a URL, or - for standard input. The model is shown
    by name if it is installed; its weights are not needed.

    \b
    sgacodec info photo.sga
    sgacodec info --json *.sga
    """
    from ..models.catalogue import list_models

    out = options.output(json, quiet, verbose)
    models = {info.id: info for info in list_models()}
    codes = []
    for name in map(urls.local_name, names):
        try:
            report = describe(read_sga(name, MAX_PIXELS), models)
        except (ValueError, OSError, MemoryError) as error:
            if debugging():
                raise
            text = named(shown(name), error)
            output.problem(out, text)
            output.record(out, {"input": name, "error": text})
            codes.append(exit_code(error))
            continue
        codes.append(DONE)
        output.record(out, {"input": name, **report})
        for line in _table(shown(name), report):
            output.result(out, line)
    ctx.exit(combined(codes))


def describe(data: bytes, models: dict[str, ModelInfo]) -> dict[str, Any]:
    """The header fields of a .sga file, for JSON.

    Parameters
    ----------
    data : bytes
        The file.
    models : dict
        Installed models by id, in hexadecimal.

    Raises
    ------
    FormatError
        If the file is not valid.
    """
    from .. import bitstream

    file = bitstream.read(data, max_pixels=MAX_PIXELS)
    model = models.get(file.model_id.hex())
    return {
        "format_version": bitstream.VERSION,
        "model": model.name if model else None,
        "model_id": file.model_id.hex(),
        "level": file.level,
        "lambda": _lambda(file.level, model),
        "width": file.width,
        "height": file.height,
        "bytes": len(data),
        "bpp": 8 * len(data) / (file.width * file.height),
        "grey": file.grey,
        "sections": bitstream.sections(file),
    }


def _lambda(level: int, model: ModelInfo | None) -> float:
    """λ of a level: on the model's own ladder if it is installed, else on the usual one."""
    if model is None:
        return level_lambda(level)
    anchors = model.metadata.get("anchors") or LADDER
    return level_lambda(level, (anchors[0], anchors[-1]), model.metadata.get("levels", LEVELS))


def _table(name: str, report: dict[str, Any]) -> list[str]:
    model = report["model"] or "not installed"
    sections = ", ".join(f"{section} {size}" for section, size in report["sections"].items())
    rows = {
        "image": f"{report['width']}×{report['height']}, {'grey' if report['grey'] else 'colour'}",
        "size": f"{report['bytes']} bytes, {report['bpp']:.4f} bpp",
        "model": f"{model} (id {report['model_id']})",
        "level": f"{report['level']} (lambda {report['lambda']:.4g})",
        "sections": f"{sections} bytes",
        "format": f"version {report['format_version']}",
    }
    return [name, *(f"  {key:<9} {value}" for key, value in rows.items())]
