"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from typing import BinaryIO


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], *, sync: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing, and rename it to `path` at the end of the block.

    When the block, or writing, ends in an exception, the temporary file is removed and an old file at `path` is left
    as it was. Only a process that is killed outright leaves the temporary file.

    Parameters
    ----------
    path : path
        In a folder that exists. A symbolic link is replaced, not followed.
    sync : bool
        Wait until the bytes are on the disk before the file is renamed, so that `path` is whole after a crash of the
        machine, too.

    Raises
    ------
    OSError
        If writing fails.
    """
    folder = os.path.dirname(os.fspath(path))
    temporary = os.path.join(folder, f".sgacodec-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
