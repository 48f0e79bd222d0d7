"""Tune glibc malloc on CPUs. With another C library nothing happens."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
from collections.abc import Iterator

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # parameters of mallopt(3)
_MMAP_MAX = 65536  # glibc's default
_MMAP_THRESHOLD = 1 << 20  # bytes; larger tensors are mapped, and unmapped when they are freed


@contextlib.contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Context manager, or decorator, within which freed memory stays with the process.

    Each step of a refinement or training allocates tensors of the sizes that the previous one freed. By default, glibc
    unmaps large tensors, and the kernel then clears every page of the next ones: a sixth of a refinement step at one
    megapixel.
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
        libc.mallopt(_M_MMAP_MAX, _MMAP_MAX)
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _MMAP_THRESHOLD)
        libc.malloc_trim(0)


def release_free_memory() -> None:
    """Return free memory to the system, before tensors of other sizes are allocated."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
