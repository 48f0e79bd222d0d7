"""Many inputs: one that fails does not stop the others, and an interrupted run leaves no half file.

Workers read and compute; only the main process writes, so a worker can be terminated at any moment.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from . import output
from .exits import DONE, FAILED, combined, debugging, exit_code, named, one_line
from .files import STREAM, Task, shown, write_bytes

if TYPE_CHECKING:
    from ..api import Codec
    from ..decoder.decode import PictureDecoder


@dataclass(frozen=True)
class Outcome:
    """Result of a task.

    Attributes
    ----------
    data : bytes, optional
        Content of the output; None if the task failed.
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
    left = []
    for task in tasks:
        if task.destination != STREAM and os.path.lexists(task.destination):
            output.record(out, {"input": task.source, "output": task.destination, "skipped": True})
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
            outcome = _written(outcome)
            source, destination = outcome.task.source, outcome.task.destination
            name = shown(source)
            for text in outcome.notes:
                output.note(out, f"{name}: {text}")
            if outcome.error:
                output.problem(out, outcome.error)
                output.record(out, {"input": source, "output": None, "error": outcome.error})
            else:
                output.record(out, {"input": source, "output": destination, **outcome.report})
                output.result(out, f"{name} → {shown(destination, 'standard output')}  {describe(outcome)}")
                if out.verbose:
                    output.note(out, f"{name}: {output.details(outcome.report)}")
            codes.append(outcome.code)
            output.file_done(out)
    return combined(codes)


def _written(outcome: Outcome) -> Outcome:
    """Write the data of an outcome; the outcome itself, or a failure if writing failed."""
    if outcome.data is None:
        return outcome
    try:
        write_bytes(outcome.task.destination, outcome.data)
    except BrokenPipeError:
        raise
    except OSError as error:
        name = shown(outcome.task.destination, "standard output")
        return Outcome(outcome.task, error=named(name, error), code=exit_code(error))
    return outcome


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


# -------------------------------------------------------------------------------------------------- processes


def in_processes(
    work: Callable[[Task], Outcome], tasks: list[Task], jobs: int, out: output.Output
) -> Generator[Outcome, None, None]:
    """Run tasks in several processes; yield the outcomes in the tasks' order.

    Parameters
    ----------
    work : function
        Picklable; called in the workers, one task at a time.
    tasks : list of Task
        At most two a process are submitted ahead, so that memory stays bounded.
    jobs : int
        Number of processes.
    out : Output
        The console, also of the workers' log.
    """
    import multiprocessing
    from concurrent.futures import Future, ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    context = multiprocessing.get_context("spawn")  # a forked torch may hang, and CUDA forbids it
    console = replace(out, bar=None)  # the progress bar belongs to this process
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker, initargs=(console,))
    left = deque(tasks)
    running: deque[tuple[Task, Future[Outcome]]] = deque()
    try:
        while left or running:
            while left and len(running) < 2 * jobs:
                with _interrupts_blocked():
                    running.append((left[0], pool.submit(work, left[0])))
                left.popleft()
            outcome = running[0][1].result()
            running.popleft()
            yield outcome
        pool.shutdown()
    except BrokenProcessPool:
        for task in (*(task for task, _ in running), *left):
            yield Outcome(task, error=f"{task.source}: a worker process died (out of memory?)", code=FAILED)
    finally:
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown(cancel_futures=True)  # waits: at exit, CPython may still write to a pipe that its thread closes


def check_model(name: str | None) -> None:
    """Check that the model exists, before processes are started.

    Raises
    ------
    ModelNotFoundError
    """
    if name is not None:
        from ..models.catalogue import find_model

        find_model(name)


@functools.lru_cache(maxsize=1)
def open_codec(model: str | None, device: str, jobs: int) -> Codec:
    """The codec of this process, made once; with several processes, each takes its share of the CPU's threads.

    Raises
    ------
    click.UsageError
        If there is no such device.
    ModelNotFoundError, ModelError
        If the model is missing or damaged.
    """
    from ..api import Codec

    if jobs > 1:
        import torch

        torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
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


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block SIGINT in the block. A process that is started in it inherits the block, so Ctrl-C does not reach it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(out: output.Output) -> None:
    """Ignore Ctrl-C in a worker, since the main process handles it and stops the workers; end when that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    output.start_logging(out)


def _end_with_parent() -> None:
    """End this process, at once, when the process that started it has ended."""
    import multiprocessing

    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(FAILED)
