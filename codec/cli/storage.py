"""Reading and writing of inputs and outputs: standard streams, local files and URLs."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import BinaryIO

from ..atomic import write_whole
from . import urls
from .streams import binary_input, binary_output, write_all

STREAM = "-"


def shown(name: str, stream: str = "standard input") -> str:
    """The name of an input or output, for messages."""
    return stream if name == STREAM else name


@contextlib.contextmanager
def opened(source: str) -> Iterator[BinaryIO]:
    """Open an input for reading; only local files can be positioned.

    Raises
    ------
    OSError
        If it cannot be read.
    """
    if source == STREAM:
        yield binary_input()
    elif urls.is_url(source):
        with urls.opened(source) as remote:
            yield remote
    else:
        with open(source, "rb") as file:
            yield file


def read_sga(source: str, max_pixels: int) -> bytes:
    """Read a .sga file, for `bitstream.read`; of any other file, only the first bytes.

    Raises
    ------
    OSError
        If it cannot be read.
    FormatError
        If there are more bytes than a file of this image can have.
    """
    from ..bitstream import read_stream

    with opened(source) as file:
        return read_stream(file, max_pixels)


def is_standard_output(destination: str) -> bool:
    """Whether an output goes to standard output: `-`, and a name of the pipe that it is, as /dev/stdout."""
    if destination == STREAM:
        return True
    with contextlib.suppress(OSError, ValueError):
        status = os.stat(destination)
        return stat.S_ISFIFO(status.st_mode) and os.path.samestat(status, os.fstat(1))
    return False


def write_bytes(destination: str, data: bytes) -> None:
    """Write an output, whole or not at all.

    A failure or a signal before all of it was written leaves the old file. Missing folders are made. What is no
    regular file (a device, a pipe) is written directly, and a symbolic link is followed. `urls.write` tells how remote
    stores are written.

    Raises
    ------
    OSError
        If writing fails; no temporary file is left.
    """
    if destination == STREAM:
        write_all(binary_output(), data)
        return
    if urls.is_url(destination):
        urls.write(destination, data)
        return
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(destination).st_mode):  # not of the real path: that of /dev/stdout may not exist
            with open(destination, "wb") as file:
                file.write(data)
            return
    path = os.path.realpath(destination)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        write_whole(path, data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, destination) from None
