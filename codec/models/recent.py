"""A bounded cache of opened levels."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")
LEVELS_HELD = 4  # each takes tens of megabytes


class RecentlyUsed(Generic[T]):
    """The `LEVELS_HELD` values that were used last, by key; not thread-safe."""

    def __init__(self) -> None:
        self._values: dict[Hashable, T] = {}  # least recently used first

    def get(self, key: Hashable, create: Callable[[], T]) -> T:
        """The value of a key; `create` is called if it is not held, after the one that it replaces was dropped."""
        if key in self._values:
            value = self._values.pop(key)
        else:
            while len(self._values) >= LEVELS_HELD:
                self._values.pop(next(iter(self._values)))
            value = create()
        self._values[key] = value
        return value
