"""The standard streams, any of which the caller may have closed: Python's object for it is then None."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import sys
from typing import BinaryIO, TextIO


def fill_missing() -> None:
    """Open the null device under the number of each closed stream; standard error then leads there.

    A file that is opened later would get that number, and with it what a C library or another process prints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # opens the lowest free number
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal; a missing one is not."""
    return stream is not None and stream.isatty()


def flush_output() -> None:
    """Write out what standard output holds back.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    if sys.stdout is not None:
        sys.stdout.flush()


def abandon_output() -> None:
    """Lead standard output to the null device if it cannot be written, so that Python does not try again at exit."""
    try:
        flush_output()
    except (OSError, ValueError):
        discard_output()


def discard_output() -> None:
    """Lead standard output to the null device."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def binary_input() -> BinaryIO:
    """Standard input, for bytes. One that does not block is made to: reading it would return None at times.

    Raises
    ------
    OSError
        If it is closed.
    """
    stream = _binary(sys.stdin)
    with contextlib.suppress(OSError):  # it may be no file
        os.set_blocking(stream.fileno(), True)
    return stream


def binary_output() -> BinaryIO:
    """Standard output, for bytes.

    Raises
    ------
    OSError
        If it is closed.
    """
    return _binary(sys.stdout)


def write_all(stream: BinaryIO, data: bytes) -> None:
    """Write and flush all of the data, also to a stream that takes a part of them at a time.

    A raw one, as standard output is with PYTHONUNBUFFERED, may do so, and one that does not block may take nothing.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    left = memoryview(data)
    while left:
        try:
            taken = stream.write(left)
        except BlockingIOError as error:
            taken = error.characters_written
        left = left[taken or 0 :]
        if left and not taken:
            select.select([], [stream], [])
    while True:
        try:
            return stream.flush()
        except BlockingIOError:
            select.select([], [stream], [])


def _binary(stream: TextIO | None) -> BinaryIO:
    if stream is None:
        raise OSError(errno.EBADF, "the stream is closed")
    return stream.buffer
