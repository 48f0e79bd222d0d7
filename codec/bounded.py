"""Image files as Pillow reads them, which need not end: /dev/zero, pipes, sparse files, headers without an end."""

from __future__ import annotations

import io
import math
import os
import stat
from typing import BinaryIO

from .picture import ImageError

_CALLS = 2**22  # reads of a header: some seconds, as parsers look for its next part byte by byte


class Spool:
    """A pipe that can be positioned: it is read as far as needed, and what was read is kept.

    Parameters
    ----------
    stream : binary file
        Read from where it stands.
    limit : int
        Bytes to keep at most.
    """

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self._stream = stream
        self._kept = io.BytesIO()
        self._limit = limit
        self._ended = False

    def read(self, size: int = -1) -> bytes:
        """Read bytes, as of a file."""
        at = self._kept.tell()
        self._fetch(math.inf if size < 0 else at + size)
        self._kept.seek(at)
        return self._kept.read(size)

    def readline(self, size: int = -1) -> bytes:
        """Read a line, as of a file; the rest of the stream is fetched for it."""
        at = self._kept.tell()
        self._fetch(math.inf)
        self._kept.seek(at)
        return self._kept.readline(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position, as of a file."""
        if whence == os.SEEK_END:
            self._fetch(math.inf)
        return self._kept.seek(offset, whence)

    def tell(self) -> int:
        """The position."""
        return self._kept.tell()

    def drain(self) -> None:
        """Read on to the end and keep nothing, so that the writer of a pipe is not stopped by a signal."""
        size = self._kept.seek(0, os.SEEK_END)
        self._kept = io.BytesIO()
        while size <= self._limit and (piece := self._stream.read(2**20)):
            size += len(piece)

    def _fetch(self, end: float) -> None:
        """Keep the bytes up to a position, and be there.

        Raises
        ------
        ImageError
            If there are more bytes than the limit.
        """
        size = self._kept.seek(0, os.SEEK_END)
        while size < end and not self._ended:
            piece = self._stream.read(int(min(max(end - size, 2**16), 2**20)))
            self._ended = not piece
            size += self._kept.write(piece)
            if size > self._limit:
                raise ImageError(f"the input goes on for more than {self._limit} bytes (--max-pixels raises the limit)")


class BoundedFile:
    """A file of which only so much can be read.

    Parameters
    ----------
    file : binary file or Spool
    limit : int
        Bytes to read at most, in all.

    Attributes
    ----------
    calls_left : float
        Calls of `read` that are left. Set by those who know that the next step is not bounded otherwise.
    """

    def __init__(self, file: BinaryIO | Spool, limit: int) -> None:
        self._file = file
        self._left = limit
        self._limit = limit
        self.calls_left: float = math.inf
        self.seek = file.seek
        self.tell = file.tell
        if not isinstance(file, Spool):
            self.fileno = file.fileno  # libtiff reads large files by it

    def expect_header(self) -> None:
        """Bound the number of reads from now on by what a header takes."""
        self.calls_left = _CALLS

    def expect_pixels(self) -> None:
        """Stop bounding the number of reads: the number of pixels is known."""
        self.calls_left = math.inf

    def read(self, size: int = -1) -> bytes:
        """Read bytes.

        Raises
        ------
        ImageError
            If more was read than the limits allow.
        """
        if size < 0 and self._size() - self._file.tell() > self._left:
            self._refuse()
        return self._counted(self._file.read(self._left + 1 if size < 0 else min(size, self._left + 1)))

    def readline(self, size: int = -1) -> bytes:
        """Read a line; errors as of `read`."""
        return self._counted(self._file.readline(self._left + 1 if size < 0 else min(size, self._left + 1)))

    def _counted(self, data: bytes) -> bytes:
        self._left -= len(data)
        self.calls_left -= 1
        if self._left < 0:
            self._refuse()
        if self.calls_left < 0:
            raise ImageError("damaged or unsupported image (its header has no end)")
        return data

    def _refuse(self) -> None:
        raise ImageError(f"more than {self._limit} bytes have to be read (--max-pixels raises the limit)")

    def _size(self) -> int:
        """Bytes of a regular file; 0 if it is none."""
        if isinstance(self._file, Spool):
            return 0
        status = os.fstat(self._file.fileno())
        return status.st_size if stat.S_ISREG(status.st_mode) else 0
