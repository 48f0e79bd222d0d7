"""Memory between the steps of a refinement on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
_DYNAMIC_LIMIT = 32 << 20  # bytes: what glibc itself lets the second of these grow to


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within, memory that is freed stays with the process; where the C library is not glibc nothing happens.

    A step asks for the tensors that the step before has freed. Left alone, glibc gives large ones back to the system,
    which hands out and clears every page anew: a sixth of a step at one megapixel.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_MAX, 65536)
        libc.mallopt(_M_MMAP_THRESHOLD, _DYNAMIC_LIMIT)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _DYNAMIC_LIMIT)
        libc.malloc_trim(0)
