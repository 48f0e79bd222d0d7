"""Work on a Ray cluster: a task of Ray for a portion of the files, one model a worker.

Workers read and write by themselves; only reports come back. A worker process runs many tasks, one after the other, and
keeps its model between them. Ray starts a task again when its worker, or machine, is lost.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from . import output, urls
from .batch import Outcome, written
from .exits import FAILED, named
from .files import Task
from .portions import Work, portions

if TYPE_CHECKING:
    from .engines import Engine

_RETRIES = 3  # of a task whose worker is lost
_SUBMITTED = 1000  # tasks that Ray knows at a time; it asks for more machines by their number
_PATIENCE = 5.0  # seconds in which interrupted tasks can remove their temporary files


def on_ray(
    work: Work, tasks: list[Task], engine: Engine, device: str, out: output.Output
) -> Generator[Outcome, None, None]:
    """Run tasks on a Ray cluster; yield the outcomes as they come, without data.

    Parameters
    ----------
    work : function
        Picklable; called in the workers, with one portion of the tasks at a time.
    device : str
        "auto" takes GPUs if the cluster has any; "cuda" and "auto" then give one to each worker.

    Raises
    ------
    click.UsageError
        If Ray is not installed, or a new cluster on this machine has no GPU for "cuda".
    ConnectionError
        If there is no cluster at the address.
    """
    with _cluster(engine, out) as ray:
        resources = ray.cluster_resources()
        gpus = device != "cpu" and (device == "cuda" or resources.get("GPU", 0) > 0)
        if gpus and not resources.get("GPU"):
            if engine.address == "local":
                raise click.UsageError("no such device: 'cuda' (no GPU in the cluster)")
            output.note(out, "the cluster has no GPU so far: waiting for one")
        workers = engine.jobs or int(max(1, resources.get("GPU" if gpus else "CPU", 1)))
        remote = ray.remote(num_cpus=1, num_gpus=int(gpus), max_retries=_RETRIES)(_run)
        left = deque(portions([_absolute(task) for task in tasks], workers, "cuda" if gpus else "cpu"))
        running: dict[Any, list[Task]] = {}
        try:
            while left or running:
                while left and len(running) < (engine.jobs or _SUBMITTED):
                    portion = left.popleft()
                    running[remote.remote(work, portion, replace(out, bar=None))] = portion
                done, _ = ray.wait(list(running), num_returns=1)
                portion = running.pop(done[0])
                try:
                    yield from ray.get(done[0])
                except ray.exceptions.RayError as error:
                    if len(portion) > 1:  # one of them may be the reason
                        left.extendleft([task] for task in portion)
                    else:
                        yield _lost(portion[0], error)
        finally:
            for reference in running:
                ray.cancel(reference)
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=_PATIENCE)


@contextlib.contextmanager
def _cluster(engine: Engine, out: output.Output) -> Iterator[Any]:
    """The module `ray`, connected to the cluster; one that was connected before stays so."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise click.UsageError("--engine ray needs Ray: pip install 'sgacodec[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    new: dict[str, Any] = {"num_cpus": engine.jobs, "include_dashboard": False} if engine.address == "local" else {}
    with _handlers_kept():
        ray.init(address=engine.address, log_to_driver=out.verbose > 0, logging_level=logging.ERROR, **new)
    try:
        yield ray
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """Restore the handler of SIGTERM at the end of the block: Ray replaces it."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _run(work: Work, tasks: list[Task], out: output.Output) -> list[Outcome]:
    """Do a portion of the work in a worker, and write the outputs."""
    output.start_logging(out)
    return list(map(written, work(tasks)))


def _absolute(task: Task) -> Task:
    """The task with full paths, as workers have other working folders."""
    source, destination = (
        name if urls.is_url(name) else os.path.abspath(name) for name in (task.source, task.destination)
    )
    return replace(task, source=source, destination=destination)


def _lost(task: Task, error: Any) -> Outcome:
    """The outcome of a task that Ray has given up."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):  # raised in the worker
        return Outcome(task, error=named(task.source, cause), code=FAILED)
    return Outcome(task, error=f"{task.source}: its worker was lost {1 + _RETRIES} times (out of memory?)", code=FAILED)
