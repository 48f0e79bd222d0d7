"""Division of a batch into the portions that workers take, one at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

from . import urls
from .batch import Outcome
from .files import Task

Work = Callable[[list[Task]], Iterator[Outcome]]  # picklable

_PORTION = 8  # files that a worker gets at a time, at most
_PORTION_BYTES = 2**20  # of those files, so that a portion of large ones does not take for ever
_PORTIONS_EACH = 4  # for every worker, at least, so that all are busy to the end


def portions(tasks: list[Task], workers: int, device: str) -> list[list[Task]]:
    """Divide tasks, in their order, into portions.

    Small files go together, as they can form one batch, and cost less that way; a file of unknown size goes alone. On
    CUDA all files can form batches.
    """
    most = min(_PORTION, max(1, len(tasks) // (_PORTIONS_EACH * workers)))
    divided: list[list[Task]] = []
    room = 0
    for task in tasks:
        size = 0 if device == "cuda" else _size(task)
        if not divided or len(divided[-1]) == most or size > room:
            divided.append([])
            room = _PORTION_BYTES
        divided[-1].append(task)
        room -= size
    return divided


def _size(task: Task) -> int:
    """Bytes of the input; those of a whole portion if they are not known."""
    if task.size is not None:
        return task.size
    with contextlib.suppress(OSError):
        if not urls.is_url(task.source):
            return os.stat(task.source).st_size
    return _PORTION_BYTES
