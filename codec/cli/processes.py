"""Work in several processes of this machine.

Workers read and compute; only the main process writes, so a worker can be terminated at any moment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections import deque
from collections.abc import Collection, Generator, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from . import output
from .batch import Outcome
from .exits import FAILED
from .files import Task
from .portions import Work

if TYPE_CHECKING:
    from concurrent.futures import Future, ProcessPoolExecutor

    from ..refine.loop import Progress

_REFRESH = 0.2  # seconds between updates of the progress bar


def in_processes(
    work: Work, portions: list[list[Task]], jobs: int, out: output.Output
) -> Generator[Outcome, None, None]:
    """Run tasks in several processes; yield the outcomes of each portion when it is done.

    When a worker dies, the portions that were not done are done again, one task after the other, and only the task for
    which another worker dies fails.

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
    from concurrent.futures.process import BrokenProcessPool

    workers = _Workers(work, jobs, out)
    left = deque(portions)
    running: dict[Future[list[Outcome]], list[Task]] = {}
    try:
        while left or running:
            try:
                while left and len(running) < 2 * jobs:
                    running[workers.submit(left[0])] = left[0]
                    left.popleft()
                future = workers.first_done(running)
                outcomes = future.result()
            except BrokenProcessPool:
                workers.restart()
                if not running:  # it died before the portion was submitted
                    yield from _one_by_one(left.popleft(), workers)
                for future, portion in running.items():
                    done = future.exception() is None
                    yield from future.result() if done else _one_by_one(portion, workers)
                running.clear()
            else:
                del running[future]
                yield from outcomes
        workers.end()
    finally:
        workers.stop()


def _one_by_one(tasks: list[Task], workers: _Workers) -> Generator[Outcome, None, None]:
    """Run tasks one after the other; that for which a worker dies fails."""
    from concurrent.futures.process import BrokenProcessPool

    for task in tasks:
        try:
            yield from workers.first_done([workers.submit([task])]).result()
        except BrokenProcessPool:
            workers.restart()
            yield Outcome(task, error=f"{task.source}: a worker process died (out of memory?)", code=FAILED)


class _Workers:
    """A pool of processes for `work`, which can be started anew after one of them has died."""

    def __init__(self, work: Work, jobs: int, out: output.Output) -> None:
        import multiprocessing

        self._work, self._jobs, self._out = work, jobs, out
        self._context = multiprocessing.get_context("spawn")  # a forked torch may hang, and CUDA forbids it
        self._total = self._context.Value("d", 0.0)
        self._pool = self._started()

    def _started(self) -> ProcessPoolExecutor:
        from concurrent.futures import ProcessPoolExecutor

        console = replace(self._out, bar=None)  # the progress bar belongs to this process
        given = (console, self._total)
        return ProcessPoolExecutor(self._jobs, mp_context=self._context, initializer=_start_worker, initargs=given)

    def submit(self, tasks: list[Task]) -> Future[list[Outcome]]:
        with _interrupts_blocked():
            return self._pool.submit(_all_of, self._work, tasks)

    def first_done(self, futures: Collection[Future[list[Outcome]]]) -> Future[list[Outcome]]:
        """The first future to be done; the progress bar shows what all workers have done in the meantime."""
        from concurrent.futures import FIRST_COMPLETED, wait

        timeout = None if self._out.bar is None else _REFRESH
        while not (done := wait(futures, timeout, FIRST_COMPLETED).done):
            output.completed(self._out, self._total.get_obj().value)  # without its lock
        return next(future for future in futures if future in done)

    def end(self) -> None:
        """Wait for the end of the processes."""
        self._pool.shutdown()

    def restart(self) -> None:
        self.end()
        self._pool = self._started()

    def stop(self) -> None:
        """Terminate what still runs."""
        import multiprocessing

        for process in multiprocessing.active_children():
            process.terminate()
        self._pool.shutdown(cancel_futures=True)  # waits: at exit, CPython may still write to a pipe its thread closes


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


# ----------------------------------------------------------------------------------------------------- in a worker


@dataclass
class _Tally:
    """Tasks of a portion that this worker has done, those that are being refined in part.

    Attributes
    ----------
    total : multiprocessing.Value
        Tasks done by all workers.
    done : int
        Tasks done.
    counted : float
        What has been added to `total`.
    """

    total: Any
    done: int = 0
    counted: float = 0.0

    def count(self, part: float) -> None:
        """Add what is new to `total`; `part` is what is done of the tasks under way."""
        new = self.done + part - self.counted
        lock = self.total.get_lock()
        if new > 0 and lock.acquire(timeout=0.1):  # a worker that was killed may hold it for ever
            self.total.get_obj().value += new
            self.counted += new
            lock.release()


_tally: _Tally | None = None  # of this process, if it is a worker


def step(progress: Progress) -> None:
    """Count images that are being refined in part."""
    if _tally is not None:
        _tally.count(progress.images * progress.step / max(1, progress.steps))


def _all_of(work: Work, tasks: list[Task]) -> list[Outcome]:
    assert _tally is not None
    _tally.done, _tally.counted = 0, 0.0
    outcomes = []
    for outcome in work(tasks):
        outcomes.append(outcome)
        _tally.done += 1
        _tally.count(0)
    return outcomes


def _start_worker(out: output.Output, total: Any) -> None:
    """Ignore Ctrl-C in a worker, since the main process handles it and stops the workers; end when that is killed."""
    global _tally
    _tally = _Tally(total)
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
