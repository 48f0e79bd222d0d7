"""What the C library does with memory that is freed, on a CPU: by itself, no one way suits all that is done here."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
from collections.abc import Iterator

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
_OWN_PAGES = 1 << 20  # bytes: larger tensors get pages of their own and give them back when they are freed


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within, memory that is freed stays with the process; where the C library is not glibc nothing happens.

    A step asks for the tensors that the step before has freed. Left alone, glibc gives large ones back to the system,
    which hands out and clears every page anew: a sixth of a step at one megapixel.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_MAX, 65536)
        libc.mallopt(_M_MMAP_THRESHOLD, _OWN_PAGES)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _OWN_PAGES)
        libc.malloc_trim(0)


def give_back() -> None:
    """Give what is free to the system now: what comes next asks for tensors of other sizes, which fit nowhere."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
