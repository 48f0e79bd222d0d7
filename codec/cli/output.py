"""Console output: messages, JSON lines and the progress bar.

Results go to standard output, one line a file; warnings and errors go to standard error. When the data itself
goes to standard output, everything else goes to standard error.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from .streams import is_terminal

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from ..refine.loop import Progress


@dataclass
class Output:
    """The console: what is printed, and how.

    Attributes
    ----------
    json : bool
        One JSON object a file instead of a line of text.
    quiet : bool
        Errors only (and JSON, if asked for).
    verbose : int
        1 adds the figures of every file, 2 a hash of each decoding stage.
    data_on_stdout : bool
        Image or file data go to standard output.
    bar : rich.progress.Progress, optional
        The progress bar, while one is shown.
    """

    json: bool = False
    quiet: bool = False
    verbose: int = 0
    data_on_stdout: bool = False
    bar: Bar | None = None


def result(out: Output, text: str) -> None:
    """Print the line of a finished file, unless quiet or JSON."""
    if not out.quiet and not out.json:
        _line(out, text, err=out.data_on_stdout)


def record(out: Output, values: dict[str, Any]) -> None:
    """Print the JSON object of a file, with --json."""
    if out.json:
        _line(out, json_line(values), err=out.data_on_stdout)


def note(out: Output, text: str) -> None:
    """Print a line on standard error, unless quiet."""
    if not out.quiet:
        _line(out, f"sgacodec: {text}", err=True)


def problem(out: Output, text: str) -> None:
    """Print an error on standard error, always."""
    _line(out, f"sgacodec: {text}", err=True)


def line(text: str, err: bool = False) -> None:
    """Print one line on standard output, or on standard error, always."""
    _line(Output(), text, err)


def details(values: dict[str, Any]) -> str:
    """The figures of a file, in one line."""
    known = {key: value for key, value in _plain(values).items() if value is not None}
    return ", ".join(f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in known.items())


def start_logging(out: Output) -> None:
    """Print what the codec logs: warnings, information with -v, debugging with -vv; nothing of other libraries."""
    import logging
    import warnings

    class Handler(logging.Handler):
        def emit(self, entry: logging.LogRecord) -> None:
            _line(out, f"sgacodec: {entry.getMessage()}", err=True)

    levels = (logging.WARNING, logging.INFO, logging.DEBUG)
    logger = logging.getLogger("sgacodec")
    logger.handlers = [Handler()]
    logger.setLevel(logging.ERROR if out.quiet else levels[min(out.verbose, 2)])
    logger.propagate = False
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # it raises what it logs
    if not out.verbose:
        warnings.simplefilter("ignore")


@contextlib.contextmanager
def logged(out: Output) -> Iterator[None]:
    """Print what the codec logs while the block runs."""
    import logging
    import warnings

    logger, pillow = logging.getLogger("sgacodec"), logging.getLogger("PIL")
    before = logger.handlers, logger.level, logger.propagate, pillow.level
    with warnings.catch_warnings():
        start_logging(out)
        try:
            yield
        finally:
            logger.handlers, logger.propagate = before[0], before[2]
            logger.setLevel(before[1])
            pillow.setLevel(before[3])


def json_line(values: Any, indent: int | None = None) -> str:
    """Strict JSON in ASCII: numbers of numpy and torch as Python's, numbers that are not finite as null."""
    return json.dumps(_plain(values), allow_nan=False, indent=indent)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if hasattr(value, "item"):  # numbers of numpy and torch
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _line(out: Output, text: str, err: bool) -> None:
    """Print one line of printable characters, above the progress bar if there is one on this stream.

    Control characters, which a terminal would obey, are replaced: names of files and metadata of models may hold them.
    """
    stream = sys.stderr if err else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    text = "".join(c if c.isprintable() else "?" for c in text)
    text = text.encode(encoding, "replace").decode(encoding)
    with contextlib.suppress(OSError) if err else contextlib.nullcontext():  # no reason to stop the work
        if out.bar is not None and is_terminal(stream):
            out.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            click.echo(text, err=err)


# --------------------------------------------------------------------------------------------------- progress


def new_bar(count: Any) -> Any:
    """A rich progress bar on standard error, removed at the end; `count` is the column with the count."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        count,
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}", markup=False),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )


@contextlib.contextmanager
def progress(out: Output, verb: str, files: int) -> Iterator[None]:
    """Show a progress bar on a terminal's standard error while the block runs."""
    from importlib.util import find_spec

    if out.quiet or not is_terminal(sys.stderr) or find_spec("rich") is None:  # a receiver may lack it
        yield
        return
    from rich.progress import MofNCompleteColumn

    bar = new_bar(MofNCompleteColumn())
    with bar:
        out.bar = bar
        bar.add_task(verb, total=files, state="files", visible=files > 1, done=0)
        bar.add_task("refine", total=None, state="", visible=False)
        try:
            yield
        finally:
            out.bar = None


def file_done(out: Output) -> None:
    """Count one more file as done."""
    if out.bar is not None:
        task = out.bar.tasks[0]
        done = task.fields["done"] + 1
        out.bar.update(task.id, completed=max(done, task.completed), done=done)
        out.bar.reset(out.bar.task_ids[1], visible=False)


def completed(out: Output, files: float) -> None:
    """Show how many files are done, those under way in part; never fewer than before."""
    if out.bar is not None:
        task = out.bar.tasks[0]
        out.bar.update(task.id, completed=max(files, task.completed))


def step(out: Output, progress: Progress) -> None:
    """Show the progress of a refinement, and its bpp and PSNR so far.

    Images that are being refined count in part, so that the time remaining of a batch is known from the first steps on.
    """
    if out.bar is not None:
        task = out.bar.tasks[0]
        completed(out, task.fields["done"] + progress.images * progress.step / max(1, progress.steps))
        state = f"{progress.bpp:.3f} bpp {progress.psnr:.2f} dB"
        out.bar.update(out.bar.task_ids[1], completed=progress.step, total=progress.steps, state=state, visible=True)
