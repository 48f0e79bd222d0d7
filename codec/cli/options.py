"""Options that commands share."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import click

from ..bitstream import DEFAULT_MAX_PIXELS
from ..device import check_device_name
from .output import Output


def _device(ctx: click.Context, param: click.Parameter, value: str) -> str:
    try:
        check_device_name(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    return value


def finite(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """Callback of numeric options: refuse "nan" and "inf", which click accepts."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter("it must be a finite number")
    return value


_BATCH = (
    click.option("--out-dir", metavar="DIR", help="Write into this folder, named after the inputs."),
    click.option(
        "--files-from",
        metavar="FILE",
        help="Read names of inputs from FILE (- for standard input), one per line.",
    ),
    click.option(
        "--jobs",
        metavar="N",
        type=click.IntRange(1, 1024),
        help="Work in N processes; with Ray, in N tasks at a time.  [default: 1; with Ray one a CPU or GPU]",
    ),
    click.option(
        "--engine",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="What runs a batch: this machine, or a Ray cluster (docs/pipelines.md).",
    ),
    click.option(
        "--address",
        metavar="ADDRESS",
        help="Address of the Ray cluster; local starts a temporary one.  [default: RAY_ADDRESS, else a running local "
        "cluster, else local]",
    ),
    click.option("--no-overwrite", is_flag=True, help="Skip inputs whose output exists (not a failure)."),
)
_MODEL = (
    click.option(
        "--model",
        metavar="NAME|PATH",
        help="Model: the name or path.  [default: to encode, the best for the device; to decode, that of the file]",
    ),
    click.option(
        "--device",
        metavar="auto|cpu|cuda[:N]",
        default="auto",
        show_default=True,
        callback=_device,
        help="Device to compute on.",
    ),
    click.option(
        "--max-pixels",
        metavar="N",
        type=click.IntRange(min=1),
        default=DEFAULT_MAX_PIXELS,
        show_default=True,
        help="Refuse images with more pixels.",
    ),
)
_CONSOLE = (
    click.option("--json", is_flag=True, help="Print one JSON object a file."),
    click.option("-q", "--quiet", is_flag=True, help="Print only errors (and JSON)."),
    click.option(
        "-v",
        "--verbose",
        count=True,
        help="Print details; -vv (or SGACODEC_TRACE=1) adds a hash of each decoding stage.",
    ),
)


classes = click.option(
    "--classes",
    metavar="2|3",
    type=click.IntRange(2, 3),
    help="Candidate integers of a latent (3: linear, cosine and ssl only).  [default: 2]",
)


def applied(options: tuple[Callable[..., Any], ...]) -> Callable[..., Any]:
    def apply(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


batch_options = applied(_BATCH)
model_options = applied(_MODEL)
console_options = applied(_CONSOLE)


def output(json: bool, quiet: bool, verbose: int, data_on_stdout: bool = False) -> Output:
    """The console that the options ask for."""
    if os.environ.get("SGACODEC_TRACE", "0") not in ("", "0"):
        verbose = max(verbose, 2)
    return Output(json=json, quiet=quiet, verbose=verbose, data_on_stdout=data_on_stdout)
