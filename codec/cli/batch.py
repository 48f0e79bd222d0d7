"""Many inputs: one that fails does not stop the others, and an interrupted run leaves no half file."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from . import output, urls
from .exits import DONE, FAILED, combined, debugging, exit_code, named, one_line
from .files import Task
from .storage import STREAM, shown, write_bytes
from .streams import discard_output

if TYPE_CHECKING:
    from ..api import Codec
    from ..decoder.decode import PictureDecoder

Printed = TypeVar("Printed")


@dataclass(frozen=True)
class Outcome:
    """Result of a task.

    Attributes
    ----------
    data : bytes, optional
        Content of the output; None if the task failed, or after `written`.
    report : dict
        Figures of the file, as `--json` prints them.
    notes : tuple of str
        Warnings, one line each.
    error : str
        Error message of one line; empty on success.
    code : int
        Exit code of a failure.
    """

    task: Task
    data: bytes | None = None
    report: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    error: str = ""
    code: int = DONE


def failure(task: Task, error: Exception) -> Outcome:
    """The outcome of a task that raised an exception.

    Raises
    ------
    Exception
        The error itself, with SGACODEC_DEBUG=1.
    """
    if debugging():
        raise error
    return Outcome(task, error=named(shown(task.source), error), code=exit_code(error))


def absent_outputs(tasks: list[Task], out: output.Output) -> list[Task]:
    """The tasks whose output does not exist; the others are reported as skipped (--no-overwrite)."""
    remote = urls.existing([task.destination for task in tasks if urls.is_url(task.destination)])
    left = []
    for task in tasks:
        if task.destination in remote or (task.destination != STREAM and os.path.lexists(task.destination)):
            _try_output(output.record, out, {"input": task.source, "output": task.destination, "skipped": True})
            if not out.json:
                output.note(out, f"{shown(task.source)}: skipped, {task.destination} exists")
        else:
            left.append(task)
    return left


def finish(outcomes: Generator[Outcome, None, None], out: output.Output, describe: Callable[[Outcome], str]) -> int:
    """Write and report outcomes as they come; return the exit code.

    Parameters
    ----------
    outcomes : generator
        Does the work while it is iterated; closed at the end, so that an interruption stops its workers.
    out : Output
        The console.
    describe : function
        Makes the line that reports a success.
    """
    codes = []
    with contextlib.closing(outcomes), output.logged(out):
        for outcome in outcomes:
            outcome = written(outcome)
            _report(outcome, out, describe)
            codes.append(outcome.code)
            output.file_done(out)
    return combined(codes)


def _report(outcome: Outcome, out: output.Output, describe: Callable[[Outcome], str]) -> None:
    """Print what a task has done."""
    source, destination = outcome.task.source, outcome.task.destination
    name = shown(source)
    for text in outcome.notes:
        output.note(out, f"{name}: {text}")
    if outcome.error:
        output.problem(out, outcome.error)
        _try_output(output.record, out, {"input": source, "output": None, "error": outcome.error})
        return
    _try_output(output.record, out, {"input": source, "output": destination, **outcome.report})
    _try_output(output.result, out, f"{name} → {shown(destination, 'standard output')}  {describe(outcome)}")
    if out.verbose:
        output.note(out, f"{name}: {output.details(outcome.report)}")


def _try_output(write: Callable[[output.Output, Printed], None], out: output.Output, content: Printed) -> None:
    """Print a line of a batch; if standard output cannot be written, work goes on without these lines."""
    try:
        write(out, content)
    except OSError as error:
        discard_output()
        if not isinstance(error, BrokenPipeError):
            output.problem(out, f"standard output: {one_line(error)}")


def written(outcome: Outcome) -> Outcome:
    """Write the data of an outcome, if it has any; the outcome without them, or a failure if writing failed."""
    if outcome.data is None:
        return outcome
    try:
        write_bytes(outcome.task.destination, outcome.data)
    except OSError as error:
        if outcome.task.destination == STREAM and isinstance(error, BrokenPipeError):
            raise  # the reader of standard output has gone
        name = shown(outcome.task.destination, "standard output")
        return Outcome(outcome.task, error=named(name, error), code=exit_code(error))
    return replace(outcome, data=None)


# ----------------------------------------------------------------------------------------------- interruption


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise SystemExit in the block, so that temporary files are removed as after Ctrl-C."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    replaced = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                replaced[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------ codec


def found_model(name: str | None) -> str | None:
    """The model as other processes find it: a path is made absolute, as they may have other working folders.

    Raises
    ------
    ModelNotFoundError
    """
    if name in (None, "auto"):
        return name
    from ..models.catalogue import find_model

    path = find_model(str(name))
    return os.path.abspath(path) if path == Path(str(name)) else name


def check_device(name: str) -> None:
    """Raise a usage error if there is no such device, before processes are started; torch is imported for CUDA only."""
    if name.startswith("cuda"):
        from ..device import device_of

        with _missing_device_reported():
            device_of(name)


@functools.lru_cache(maxsize=1)
def open_codec(model: str | None, device: str, processes: int) -> Codec:
    """The codec of this process, made once; of several processes, each takes its share of the CPU's threads.

    Raises
    ------
    click.UsageError
        If there is no such device.
    ModelNotFoundError, ModelError
        If the model is missing or damaged.
    """
    from ..api import Codec

    if processes > 1:
        import torch

        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    with _missing_device_reported():
        return Codec(model, device)


@functools.lru_cache(maxsize=1)
def open_decoder(model: str | None, device: str, pixels: int) -> PictureDecoder | Codec:
    """The decoder of this process for a number of pixels, made once.

    Raises
    ------
    As `open_codec`.
    """
    from ..decoding import open_decoder

    with _missing_device_reported():
        return open_decoder(model, device, pixels)


@contextlib.contextmanager
def _missing_device_reported() -> Iterator[None]:
    """Raise a usage error if the block finds that there is no such device."""
    try:
        yield
    except ValueError as error:
        if exit_code(error) == FAILED:
            raise click.UsageError(one_line(error)) from None
        raise


def divide_threads(jobs: int) -> None:
    """Give each of the processes that will be started its share of the CPU's threads; BLAS of numpy one, as tiles have.

    To be called before numpy is imported; what the user has set stays.
    """
    from ..decoder.threads import cores

    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // jobs)))
