"""Engines that run a batch: this process, several processes of this machine, or the workers of a Ray cluster."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import click

from . import output
from .batch import Outcome, check_device
from .files import Task
from .portions import Work, portions
from .storage import STREAM


@dataclass(frozen=True)
class Engine:
    """How the tasks of a batch are run.

    Attributes
    ----------
    name : str
        "local" or "ray".
    jobs : int, optional
        Workers at a time. None: 1 of "local", all CPUs (or GPUs) of "ray".
    address : str, optional
        Of the Ray cluster. None: that of RAY_ADDRESS, else one that runs on this machine, else a new one.
    """

    name: str
    jobs: int | None = None
    address: str | None = None

    @property
    def processes(self) -> int:
        """Workers that share the CPUs of this machine as they like; those of Ray have theirs assigned."""
        return self.jobs or 1 if self.name == "local" else 1

    @property
    def elsewhere(self) -> bool:
        """Whether other processes do the work."""
        return self.name != "local" or self.processes > 1


def chosen(engine: str, jobs: int | None, address: str | None, device: str, tasks: list[Task]) -> Engine:
    """The engine of the options.

    Raises
    ------
    click.UsageError
        If options have no meaning together.
    """
    if engine == "local":
        if address is not None:
            raise click.UsageError("--address has no meaning without --engine ray")
        return Engine(engine, min(jobs or 1, len(tasks)))
    if any(STREAM in (task.source, task.destination) for task in tasks):
        raise click.UsageError("--engine ray cannot use standard input or output")
    if device not in ("auto", "cpu", "cuda"):
        raise click.UsageError(f"--engine ray assigns the GPUs itself: give --device cuda, not {device}")
    return Engine(engine, jobs, address)


def outcomes(
    work: Work, tasks: list[Task], engine: Engine, device: str, out: output.Output
) -> Generator[Outcome, None, None]:
    """Run the tasks in other processes; yield their outcomes as they come."""
    if engine.name == "ray":
        from .ray_engine import on_ray

        yield from on_ray(work, tasks, engine, device, out)
    else:
        from .processes import in_processes

        check_device(device)
        yield from in_processes(work, portions(tasks, engine.processes, device), engine.processes, out)
