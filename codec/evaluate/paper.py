"""The tables and figures of SGA+ (Perugachi-Diaz et al. 2024, arXiv 2401.17789), measured with our models.

    python -m sgacodec.evaluate.paper --kodak kodak/                    # everything, on eight 256² crops
    python -m sgacodec.evaluate.paper table-2 --kodak kodak/            # one study
    python -m sgacodec.evaluate.paper --whole --device cuda --kodak kodak/     # on the 24 whole images, for a GPU
    python -m sgacodec.evaluate.paper --plots                           # draw again what has been measured

An interrupted run continues where it was. Tables go to docs/results/paper/, plots to docs/images/paper/ (with --whole
to …/paper-whole/); docs/paper.md shows them. "published" is the annealing of the paper (exp, constant learning rate
0.005, no last pass), "ours" the default of `sgacodec encode`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ..atomic import write_whole
from ..models.catalogue import ModelNotFoundError
from ..settings import ANCHORS, Settings
from . import paper_plots
from .coders import settings_grid
from .regenerate import RESULTS
from .studies import Study, chosen_of, finish, measure, measuring_options

LMBDA = 0.0016  # of the studies at one λ
SHORT, LONG = 500, 2000  # iterations of Table 1; the paper's other studies have the larger number
EVERY = 25  # steps between the points of a trace
SGA_PLUS = ("atanh", "linear", "cosine", "ssl")
TAU_MAX = (0.2, 0.4, 0.6, 0.8, 1.0)
SSL_A = (0.6, 0.8, 1.0, 4 / 3, 1.65, 2.0, 2.3, 3.0, 5.0)
LEARNING_RATES = (0.02, 0.01, 0.005)
LEVELS = (0.0032, 0.0075, 0.03)  # λ of the decoders that are refined for other λ


def published(method: str, steps: int, lmbda: float = LMBDA, **others: Any) -> Settings:
    """The settings of the paper."""
    return Settings(lmbda=lmbda, method=method, steps=steps, schedule="exp", rounds=0, **others)


def ours(method: str, steps: int, lmbda: float = LMBDA, **others: Any) -> Settings:
    """The defaults of `sgacodec encode`."""
    return Settings(lmbda=lmbda, method=method, steps=steps, **others)


def _study(name: str, grid: Iterable[Settings], trace: int | None = None) -> Study:
    return Study(name=f"paper/{name}", images="eight", crop=256, grid=tuple(grid), trace=trace)


def _of_kind(kind: str, settings: Callable[..., Settings], steps: int) -> dict[str, Study]:
    """The studies that are made with both annealings, by the name of their table or figure in the paper."""
    curves = (settings(m, n, v) for n in (SHORT, LONG) for m in ("atanh", "ssl") for v in ANCHORS)
    levels = (settings("ssl", steps, v, level_lambda=w) for w in LEVELS for v in ANCHORS)
    classes = (settings(m, steps, classes=c) for m in ("linear", "cosine", "ssl") for c in (2, 3))
    studies = (
        _study(f"figure-2-{kind}", (settings(m, steps) for m in ("ste", "noise", "atanh", "ssl")), EVERY),
        _study(f"table-1-{kind}", curves),
        _study(f"figure-3c-{kind}", levels),
        _study(f"table-4-{kind}", (settings("ssl", steps, ssl_a=a) for a in SSL_A)),
        _study(f"table-c5-{kind}", classes, EVERY),
    )
    return dict(zip(("figure-2", "table-1", "figure-3c", "table-4", "table-c5"), studies, strict=True))


def studies_with(steps: int) -> tuple[Study, ...]:
    """All studies, those with the published annealing and few settings first; Table 1 has its own numbers of steps."""
    paper, default = _of_kind("published", published, steps), _of_kind("ours", ours, steps)
    return (
        _study("unrefined", settings_grid(ANCHORS, ["none"])),
        paper["table-4"],
        paper["table-c5"],
        _study("table-2", (published(m, steps, tau_max=t) for m in SGA_PLUS for t in TAU_MAX)),
        _study("table-c3", (published(m, steps, lr=v) for m in SGA_PLUS for v in LEARNING_RATES), EVERY),
        paper["figure-2"],
        default["table-4"],
        default["table-c5"],
        default["figure-2"],
        paper["table-1"],
        paper["figure-3c"],
        default["table-1"],
        default["figure-3c"],
        _study("figure-3a-baselines", (published(m, steps, v) for m in ("ste", "noise") for v in ANCHORS)),
    )


STUDIES = studies_with(LONG)
PREFIX = "paper/"


def whole(study: Study) -> Study:
    """The study on all of Kodak, without cropping."""
    name = study.name.replace(PREFIX, "paper-whole/")
    return replace(study, name=name, images="kodak", crop=None)


def draw(results: Path, folder: Path, work: Path, kodak: Path | None) -> tuple[list[Path], list[str]]:
    """Draw every figure whose tables are there, and Figure 4 where its files and its original are.

    Parameters
    ----------
    results : Path
        Folder of the tables.
    folder : Path
        Where the SVG files go.
    work : Path
        Folder of the files of the sweeps.
    kodak : Path, optional
        The images.

    Returns
    -------
    list of Path, list of str
        The files written, and why others that could be drawn were not: the model of their files is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = dict(paper_plots.FIGURES)
    if kodak is not None:
        original = kodak / paper_plots.PICTURE
        figures["figure-4"] = lambda results: paper_plots.figure_4(results, work / results.name, original)
    written, problems = [], []
    for name, plot in figures.items():
        try:
            drawn = plot(results)
        except FileNotFoundError:  # not measured yet
            continue
        except ModelNotFoundError as error:
            problems.append(f"{name}: {error}")
            continue
        write_whole(folder / f"{name}.svg", drawn.encode())
        written.append(folder / f"{name}.svg")
    return written, problems


@click.command()
@click.argument("names", nargs=-1, metavar="[STUDY]...")
@click.option("--whole", "on_whole", is_flag=True, help="Measure the 24 whole images, not eight 256² crops.")
@click.option(
    "--steps",
    metavar="N",
    type=click.IntRange(1),
    default=LONG,
    show_default=True,
    help="Iterations, but for Table 1, which has 500 and 2000.",
)
@click.option("--plots", is_flag=True, help="Measure nothing; draw what has been measured.")
@click.option("--list", "listed", is_flag=True, help="Print the studies and their refinement steps.")
@measuring_options
@click.pass_context
def main(
    ctx: click.Context,
    names: tuple[str, ...],
    on_whole: bool,
    steps: int,
    plots: bool,
    listed: bool,
    **options: Any,
) -> None:
    """Measure the studies of docs/paper.md (all, or those that are named), in the root of a checkout."""
    chosen = chosen_of([PREFIX + name.removeprefix(PREFIX) for name in names], studies_with(steps))
    folder = "paper-whole" if on_whole else "paper"
    if listed:
        for study in chosen:
            total = sum(settings.annealing_steps for settings in study.grid)
            click.echo(f"{study.name.removeprefix(PREFIX)}: {len(study.grid)} settings, {total} steps an image")
        return

    def work() -> list[str]:
        problems = [] if plots else measure([whole(s) if on_whole else s for s in chosen], options, RESULTS)
        images = RESULTS.parent / "images" / folder
        drawn, undrawn = draw(RESULTS / folder, images, options["work"], options["kodak"])
        for path in drawn:
            click.echo(f"drawn: {path}")
        return problems + undrawn

    finish(ctx, work)


if __name__ == "__main__":
    main()
