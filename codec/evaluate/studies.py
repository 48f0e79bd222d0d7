"""The sweeps behind the documentation: what is measured, and how the tables of docs/results/ are made from it.

    python -m sgacodec.evaluate.studies --kodak kodak/ --held-out held-out/       # measure all of it anew
    python -m sgacodec.evaluate.studies kodak-lite-none --kodak kodak/            # or one of it

An interrupted run continues where it was when the command is repeated. A table in docs/results/ is replaced when its
sweep is complete. `python -m sgacodec.evaluate.regenerate` then brings the documents up to date.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..atomic import write_whole
from ..settings import ANCHORS, CPU_STEPS, EFFORTS, Settings
from . import sweep
from .coders import CodecLike, own_coders, peer_coders, settings_grid
from .regenerate import RESULTS
from .rows import COLUMNS, TRACE_COLUMNS, Row, table_text

EIGHT = tuple(f"kodim{number:02}.png" for number in range(1, 24, 3))  # of Kodak, for studies of many settings


@dataclass(frozen=True)
class Study:
    """A sweep whose table is kept.

    Attributes
    ----------
    name : str
        Of the table, without suffix; its traces are NAME-traces.
    images : {"kodak", "eight", "held-out"}
        All of Kodak, eight images of it, or the held-out photographs.
    grid : sequence of Settings
        Settings of our codec.
    peers : tuple of str
        Other encoders.
    crop, trace : int, optional
        As of `sgacodec eval`.
    """

    name: str
    images: str
    grid: Sequence[Settings] = ()
    peers: tuple[str, ...] = ()
    crop: int | None = None
    trace: int | None = None


STUDIES = (
    Study(name="kodak-lite-none", images="kodak", grid=settings_grid(ANCHORS, ["none"])),
    Study(name="kodak-peers", images="kodak", peers=("jpeg", "webp", "avif", "jxl")),
    Study(name="held-out-lite-none", images="held-out", grid=settings_grid(ANCHORS, ["none"])),
    Study(name="held-out-peers", images="held-out", peers=("jpeg", "webp", "avif", "jxl")),
    Study(name="kodak-crops-lite-ssl", images="eight", crop=256, grid=settings_grid(ANCHORS, ["none", "ssl"], [150])),
    Study(
        name="kodak-crops-lite-efforts",
        images="eight",
        crop=256,
        grid=settings_grid(ANCHORS, ["none", "ssl"], EFFORTS[1:4]),
    ),
    Study(name="kodak-default", images="kodak", grid=settings_grid(ANCHORS, ["ssl"], [CPU_STEPS])),
    Study(name="kodak-lite-ssl", images="kodak", grid=settings_grid(ANCHORS, ["ssl"], [150])),
    Study(name="held-out-default", images="held-out", grid=settings_grid(ANCHORS, ["ssl"], [CPU_STEPS])),
)


def run_study(
    study: Study,
    images: dict[str, Path],
    codec: CodecLike,
    work: Path,
    results: Path,
    log: Callable[[str], None],
) -> list[str]:
    """Measure a study in ``work/NAME``, and write its table into `results` when it is complete.

    Parameters
    ----------
    log : callable
        Called with one line for each measurement.

    Returns
    -------
    list of str
        Messages of what could not be measured; if there are any, the table is not written.
    """
    peers, problems = peer_coders(study.peers, study.crop)
    coders = own_coders(codec, study.grid, study.crop, study.trace) + peers
    total, done, start = len(coders) * len(images), 0, time.monotonic()

    def progress(name: str, error: str | None) -> None:
        nonlocal done
        done += 1
        elapsed = time.monotonic() - start
        log(f"{study.name} {done}/{total} {name} {elapsed:.0f} s{f': {error}' if error else ''}")

    found = sweep.run(coders, images, work / study.name, progress=progress)
    problems += [f"{study.name}: {name}: {error}" for name, error in found.failed.items()]
    if not problems:
        _publish(found.rows, results / f"{study.name}.tsv", COLUMNS)
        if study.trace is not None:
            _publish(found.traces, results / f"{study.name}-traces.tsv", TRACE_COLUMNS)
    return problems


def _publish(rows: Sequence[Row], path: Path, columns: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, table_text(rows, columns).encode())


def images_of(study: Study, kodak: Path | None, held_out: Path | None) -> dict[str, Path]:
    """The images of a study.

    Raises
    ------
    ValueError
        If their folder is not given or lacks one.
    """
    folder = held_out if study.images == "held-out" else kodak
    if folder is None:
        raise ValueError(f"{study.name} needs --{'held-out' if study.images == 'held-out' else 'kodak'}")
    found = sweep.find_images([folder])
    if study.images == "eight":
        missing = [name for name in EIGHT if name not in found]
        if missing:
            raise ValueError(f"{study.name}: {folder} lacks {', '.join(missing)}")
        found = {name: found[name] for name in EIGHT}
    return found


def measure(chosen: Sequence[Study], options: dict[str, Any], results: Path) -> list[str]:
    """Measure studies one after the other; `options` are those of `measuring_options`. Returns the problems."""
    from ..api import Codec

    problems: list[str] = []
    sets = {study.name: images_of(study, options["kodak"], options["held_out"]) for study in chosen}
    codec = Codec(options["model"], options["device"])
    for study in chosen:
        problems += run_study(study, sets[study.name], codec, options["work"], results, _log)
    return problems


def _log(line: str) -> None:
    click.echo(f"{time.strftime('%H:%M:%S')} {line}")


def measuring_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a command that measures studies."""
    folder = click.Path(exists=True, file_okay=False, path_type=Path)
    for option in (
        click.option("--device", default="auto", show_default=True, help="Where to compute."),
        click.option("--model", metavar="NAME|PATH", help="Use this model."),
        click.option(
            "--work",
            metavar="DIR",
            default="measuring",
            show_default=True,
            type=click.Path(file_okay=False, path_type=Path),
            help="Folder for rows and files of unfinished sweeps.",
        ),
        click.option("--held-out", metavar="DIR", type=folder, help="The held-out photographs."),
        click.option("--kodak", metavar="DIR", type=folder, help="The 24 Kodak images, kodim01.png to kodim24.png."),
    ):
        command = option(command)
    return command


def chosen_of(names: Sequence[str], studies: Sequence[Study]) -> list[Study]:
    """The studies of these names; all, if there is none. A usage error for an unknown name."""
    known = {study.name: study for study in studies}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise click.UsageError(f"'{unknown[0]}' is none of {', '.join(known)}")
    return [known[name] for name in names] or list(studies)


def finish(ctx: click.Context, work: Callable[[], list[str]]) -> None:
    """Do the work of a command, print the problems that it returns, and exit; an error of the work is one line."""
    try:
        problems = work()
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None
    for problem in problems:
        click.echo(problem, err=True)
    ctx.exit(1 if problems else 0)


@click.command()
@click.argument("names", nargs=-1, metavar="[STUDY]...")
@measuring_options
@click.pass_context
def main(ctx: click.Context, names: tuple[str, ...], **options: Any) -> None:
    """Measure the studies of docs/results/ (all, or those that are named), in the root of a checkout."""
    chosen = chosen_of(names, STUDIES)
    finish(ctx, lambda: measure(chosen, options, RESULTS))


if __name__ == "__main__":
    main()
