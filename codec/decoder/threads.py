"""Threads that evaluate tiles at once.

BLAS has threads of its own, but each product takes less than a millisecond here: threads that wait for each other at
every product gain little, and lose much where other programs use the CPU. So the command line gives BLAS one thread
(OPENBLAS_NUM_THREADS=1), and tiles are divided among threads here. Where BLAS has several, there is one thread here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST = 4  # threads: each needs memory for a tile


def workers() -> int:
    """The number of threads: that of the CPU's cores or OMP_NUM_THREADS, at most 4, if BLAS has one thread, else 1."""
    if os.environ.get("OPENBLAS_NUM_THREADS") != "1":
        return 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return min(_MOST, int(limit) if limit.isdecimal() and int(limit) else cores())


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """The results of a function for each item, computed in several threads; the first exception is raised."""
    count = min(workers(), len(items))
    if count <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(function, items))
