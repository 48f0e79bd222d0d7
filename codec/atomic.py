"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from typing import BinaryIO


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing, and rename it to `path` at the end of the block.

    The bytes are brought to the disk before the file is renamed, so that `path` is whole after a crash of the machine,
    too. When the block, or writing, ends in an exception, the temporary file is removed and an old file at `path` is
    left as it was. Only a process that is killed outright leaves the temporary file.

    Parameters
    ----------
    path : path
        In a folder that exists. A symbolic link is followed. The permission bits of an old file are kept, and its
        owner where that is allowed.

    Raises
    ------
    OSError
        If writing fails.
    """
    path = os.path.realpath(path)
    folder = os.path.dirname(path)
    temporary = os.path.join(folder, f".sgacodec-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            _keep_permissions(path, temporary)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(data)


def _keep_permissions(path: str, temporary: str) -> None:
    """Give the new file the permissions of the old one, before it holds anything that they protect."""
    with contextlib.suppress(OSError):  # no old file, or a file system without permissions
        old = os.lstat(path)
        if not stat.S_ISREG(old.st_mode):
            return
        os.chmod(temporary, stat.S_IMODE(old.st_mode) & 0o777)
        new = os.stat(temporary)
        if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
            os.chown(temporary, old.st_uid, old.st_gid)
