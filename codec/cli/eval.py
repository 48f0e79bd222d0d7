"""`sgacodec eval`: rate and distortion of images; tables, plots and a report."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from ..atomic import write_whole
from ..settings import ANCHORS, CPU_STEPS, METHODS, STEPS
from . import batch, options, output
from .encoder_options import refinement_options
from .exits import DONE, FAILED, named, one_line
from .streams import is_terminal

if TYPE_CHECKING:
    from ..evaluate.bd import Curve
    from ..evaluate.coders import Coder
    from ..evaluate.pictures import View
    from ..evaluate.summary import Summary
    from ..evaluate.sweep import Sweep

T = TypeVar("T")


def _list_of(kind: Callable[[str], T], what: str) -> Callable[..., tuple[T, ...]]:
    """Callback of an option that can be repeated and takes comma-separated values; `what` names them in errors."""

    def split(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> tuple[T, ...]:
        items = [item.strip() for value in values for item in value.split(",") if item.strip()]
        if values and not items:
            raise click.BadParameter("the list is empty")
        try:
            return tuple(kind(item) for item in items)
        except ValueError:
            raise click.BadParameter(f"'{','.join(items)}' is not a list of {what}") from None

    return split


def _lambda(text: str) -> float:
    value = float(text)
    if not 1e-4 <= value <= 1:
        raise click.BadParameter(f"{text} is not in the range 0.0001 to 1")
    return value


def _method(text: str) -> str:
    if text not in METHODS:
        raise click.BadParameter(f"'{text}' is none of {', '.join(METHODS)}")
    return text


def _peer(text: str) -> str:
    names = ("jpeg", "webp", "avif", "jxl")
    if text not in names:
        raise click.BadParameter(f"'{text}' is none of {', '.join(names)}")
    return text


def _steps(text: str) -> int:
    value = int(text)
    if value < 0:
        raise click.BadParameter(f"{text} is negative")
    return value


@click.command("eval", short_help="Measure rate and distortion over images.")
@click.argument("images", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--lambda",
    "lmbdas",
    metavar="L[,L...]",
    multiple=True,
    default=[",".join(map(str, ANCHORS))],
    show_default=True,
    callback=_list_of(_lambda, "numbers"),
    help="Points of the curve (can be repeated).",
)
@click.option(
    "--method",
    "methods",
    metavar="M[,M...]",
    multiple=True,
    default=["none,ssl"],
    show_default=True,
    callback=_list_of(_method, "methods"),
    help="Refinement methods: " + ", ".join(METHODS) + ".",
)
@click.option(
    "--steps",
    metavar="N[,N...]",
    multiple=True,
    callback=_list_of(_steps, "whole numbers"),
    help=f"Refinement steps.  [default: {STEPS} on a GPU, {CPU_STEPS} on a CPU]",
)
@options.classes
@click.option(
    "--seed", metavar="S", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Random seed."
)
@refinement_options
@click.option(
    "--peers",
    metavar="NAME[,NAME...]",
    multiple=True,
    callback=_list_of(_peer, "names"),
    help="Encoders of Pillow to measure as well: jpeg, webp, avif, jxl (JPEG XL: pip install 'sgacodec[peers]').",
)
@click.option("--trace", metavar="N", type=click.IntRange(1), help="Record the refinement every N steps in traces.tsv.")
@click.option("--flip", is_flag=True, help="Measure the perceptual error FLIP (pip install 'sgacodec[peers]').")
@click.option("--crop", metavar="SIZE", type=click.IntRange(1), help="Measure only a central square of this side.")
@click.option("--model", metavar="NAME|PATH", help="Use this model.")
@click.option(
    "--device",
    metavar="auto|cpu|cuda[:N]",
    default="auto",
    show_default=True,
    help="Where to compute.",
)
@click.option(
    "--out",
    metavar="DIR",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for results.tsv, results.json, plots, report.html and the .sga files.",
)
@click.option(
    "--against",
    metavar="CURVE",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Reference curve: CompressAI's JSON, CSV (bpp, PSNR), or results.tsv of another sweep.",
)
@click.option("--plot/--no-plot", default=True, show_default=True, help="Draw plots, and show pictures in the report.")
@click.option(
    "--view",
    metavar="L",
    type=float,
    help="Lambda of the pictures in the report, one of --lambda.  [default: the lowest]",
)
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.pass_context
def command(
    ctx: click.Context,
    images: tuple[Path, ...],
    lmbdas: tuple[float, ...],
    methods: tuple[str, ...],
    steps: tuple[int, ...],
    classes: int | None,
    seed: int,
    peers: tuple[str, ...],
    trace: int | None,
    flip: bool,
    crop: int | None,
    model: str | None,
    device: str,
    out: Path,
    against: tuple[Path, ...],
    plot: bool,
    view: float | None,
    quiet: bool,
    **refinement: Any,
) -> None:
    """Measure rate and distortion of encoded files over IMAGES (files or folders).

    Every image is encoded at every lambda, method and number of steps, written, and decoded from the file. Each
    measurement is appended to results.tsv at once: the same command continues an interrupted sweep. Transparency and
    metadata are not coded. --against prints BD-rate and BD-PSNR. --peers measures other encoders over the same images,
    at several qualities, and compares with them.

    \b
    sgacodec eval kodak/ --out kodak-ssl --against docs/results/published/kodak-mbt2018-mean.json --peers jpeg,webp
    sgacodec eval kodak/ --lambda 0.0016,0.0075 --method none,atanh,ssl --steps 100,500 --out study
    """
    from ..evaluate import report, sweep
    from ..evaluate.coders import own_coders, peer_coders, settings_grid
    from ..evaluate.curves import reference_curves
    from ..evaluate.summary import summarize

    console = options.output(json=False, quiet=quiet, verbose=0)
    if set(methods) == {"none"}:
        for name in ("steps", "classes", "seed", "trace", *(n for n in refinement if n != "level_lambda")):
            if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise click.UsageError(f"--{name.replace('_', '-')} has no meaning with --method none")
    try:
        found = sweep.find_images(images)
        grid = settings_grid(lmbdas, methods, steps or (None,), classes=classes, seed=seed, **refinement)
        anchors = [curve for path in against for curve in reference_curves(path)]
    except (ValueError, OSError) as error:
        raise click.UsageError(one_line(error)) from None
    if view is not None and not plot:
        raise click.UsageError("--view has no meaning with --no-plot")
    if view is not None and view not in lmbdas:
        raise click.UsageError(f"--view {view:g} is none of --lambda")
    if flip and importlib.util.find_spec("flip_evaluator") is None:
        raise click.UsageError("--flip needs a package: pip install 'sgacodec[peers]'")
    codec = batch.open_codec(model, device, 1)
    coders, missing = peer_coders(peers, crop)
    for message in missing:
        output.problem(console, message)
    coders = own_coders(codec, [s.on_device(codec.device.type) for s in grid], crop, trace) + coders

    if crop is not None and anchors:
        output.note(console, "warning: --against is comparable only if its curves were measured on the same crops")
    reported = set()

    def done(name: str, error: str | None) -> None:
        if error is not None and name not in reported:
            reported.add(name)
            output.problem(console, named(str(found[name]), ValueError(error)))
        output.file_done(console)

    with batch.stoppable(), output.progress(console, "measure", len(found) * len(coders)), output.logged(console):
        measured = sweep.run(coders, found, out, flip=flip, progress=done)
    shown = _views(measured, coders, found, out, view, console) if plot else ([], True)
    with batch.stoppable():
        summary = summarize(measured, anchors, out)
        title = f"Rate and distortion: {out.resolve().name}"
        page = report.html_report(summary, measured.rows, _plots(summary, anchors, out) if plot else {}, title, *shown)
        write_whole(out / report.REPORT, page.encode())
    if not quiet:
        _print(summary, out)
    ctx.exit(FAILED if summary.failed or missing else DONE)


def _views(
    measured: Sweep,
    coders: Sequence[Coder],
    found: dict[str, Path],
    out: Path,
    view: float | None,
    console: output.Output,
) -> tuple[list[View], bool]:
    """The pictures of the report; none, with a warning, where they cannot be made."""
    from ..evaluate.pictures import views_of

    lmbdas = [row["lambda"] for row in measured.rows if row["lambda"] is not None]
    if not lmbdas:
        return [], True
    with batch.stoppable(), output.progress(console, "show", len(found)), output.logged(console):
        try:
            lmbda = min(lmbdas) if view is None else view
            return views_of(measured.rows, coders, found, out, lmbda, lambda: output.file_done(console))
        except Exception as error:  # of one file: tables and plots are worth more than pictures
            output.problem(console, f"no pictures in the report: {one_line(error)}")
            return [], True


def _plots(summary: Summary, anchors: Sequence[Curve], out: Path) -> dict[str, str]:
    """The plots of the report as SVG; writes rd.png and rd.svg."""
    from ..evaluate import plots

    drawn = {}
    if any(curve.bpp for curve in summary.curves):
        figure = plots.rate_distortion(summary.curves, anchors, summary.peers)
        plots.save_plots(figure, out)
        drawn["Rate and distortion"] = plots.svg(figure, transparent=True)
    if sum(cost.bd_rate is not None for cost in summary.costs) > 1:
        drawn["Time and gain"] = plots.svg(plots.time_and_gain(summary.costs), "time", transparent=True)
    if summary.traces:
        drawn["Convergence"] = plots.svg(plots.convergence(summary.traces), "convergence", transparent=True)
    return drawn


def _print(summary: Summary, out: Path) -> None:
    from rich.console import Console

    from ..evaluate import report

    terminal = Console(width=None if is_terminal(sys.stdout) else 160)  # 160: the table fits without wrapping
    if summary.points:
        report.print_summary(summary, terminal)
    terminal.print(f"{out / report.REPORT}", markup=False, highlight=False, soft_wrap=True)
