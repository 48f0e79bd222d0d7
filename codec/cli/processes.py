"""Work in several processes of this machine.

Workers read and compute; only the main process writes, so a worker can be terminated at any moment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import replace

from . import output
from .batch import Outcome
from .exits import FAILED
from .files import Task
from .portions import Work


def in_processes(
    work: Work, portions: list[list[Task]], jobs: int, out: output.Output
) -> Generator[Outcome, None, None]:
    """Run tasks in several processes; yield the outcomes in the order of the portions.

    Parameters
    ----------
    work : function
        Picklable; called in the workers, with one portion at a time.
    portions : list of list of Task
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
    left = deque(portions)
    running: deque[tuple[list[Task], Future[list[Outcome]]]] = deque()
    try:
        while left or running:
            while left and len(running) < 2 * jobs:
                with _interrupts_blocked():
                    running.append((left[0], pool.submit(_all_of, work, left[0])))
                left.popleft()
            outcomes = running[0][1].result()
            running.popleft()
            yield from outcomes
        pool.shutdown()
    except BrokenProcessPool:
        for portion in (*(portion for portion, _ in running), *left):
            for task in portion:
                yield Outcome(task, error=f"{task.source}: a worker process died (out of memory?)", code=FAILED)
    finally:
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown(cancel_futures=True)  # waits: at exit, CPython may still write to a pipe that its thread closes


def _all_of(work: Work, tasks: list[Task]) -> list[Outcome]:
    return list(work(tasks))


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
