"""Files in remote stores, named by URLs as s3://bucket/photo.png, through fsspec.

A name is a URL if it begins with a scheme of two letters or more and "://", or with fsspec's "scheme::" before such a
URL. Local files, also those named file:///…, do not come here. fsspec takes credentials and settings from its
configuration and from the environment of each store.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import re
import secrets
from collections.abc import Iterator
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)(?:://|::(?=.*://))")
_LOCAL = ("file://", "local://")
# stores in which an object appears when it is complete
_SINGLE_PUT = frozenset(["abfs", "abfss", "adl", "az", "gcs", "gs", "hf", "memory", "oci", "oss", "r2", "s3", "s3a"])
_LISTED = 16  # from this number of objects on, one listing is cheaper than a request for each


def is_url(name: str) -> bool:
    """Whether a name is that of a file in a remote store."""
    return _SCHEME.match(name) is not None and not name.startswith(_LOCAL)


def local_name(name: str) -> str:
    """The path of a file:// URL; other names as they are."""
    for prefix in _LOCAL:
        name = name.removeprefix(prefix)
    return name


def join(folder: str, name: str) -> str:
    """The URL of a file in a folder."""
    before, inner, after = _innermost(folder)
    if inner.endswith("://"):  # all of an archive
        return f"{before}{inner}{name}{after}"
    return f"{before}{inner.rstrip('/')}/{name}{after}"


def file_name(url: str) -> str:
    """The last part of the path, without a query."""
    inner = _innermost(url)[1]
    path = urlsplit(inner).path if inner.startswith(("http://", "https://")) else inner.partition("://")[2]
    return posixpath.basename(path)


def _innermost(url: str) -> tuple[str, str, str]:
    """A chained URL, as zip://photo.png::simplecache::s3://bucket/photos.zip, around the part that names the file.

    This is the first part with a path; parts before it, as simplecache, pass on what they get.
    """
    parts = url.split("::")
    first = next((i for i, part in enumerate(parts) if "://" in part), 0)
    before, after = "::".join([*parts[:first], ""]), "::".join(["", *parts[first + 1 :]])
    return before, parts[first], after


def canonical(url: str) -> str:
    """The normalized form of a URL, the same for all its spellings."""
    fs, path = _store(url)
    return str(fs.unstrip_protocol(path))


def is_folder(url: str) -> bool:
    """Whether this is a folder, or a prefix of objects."""
    fs, path = _store(url)
    with _explained(url):
        return bool(fs.isdir(path))


def inside(folder: str) -> dict[str, int | None]:
    """Names, relative to it, of the files in a folder and its subfolders, and their sizes in bytes where known."""
    fs, path = _store(folder)
    with _explained(folder):
        found = fs.find(path, detail=True)
    return {name[len(path) :].lstrip("/"): entry.get("size") for name, entry in found.items()}


def existing(urls: list[str]) -> set[str]:
    """The URLs at which a file exists. Many are looked up by listing their common folder."""
    if not urls:
        return set()
    fs, _ = _store(urls[0])
    paths = {url: str(fs._strip_protocol(url)) for url in urls}
    with _explained(urls[0]):
        if len(urls) < _LISTED:
            return {url for url, path in paths.items() if fs.exists(path)}
        try:
            found = set(fs.find(posixpath.commonpath([posixpath.dirname(path) for path in paths.values()])))
        except FileNotFoundError:
            return set()
    return {url for url, path in paths.items() if path in found}


@contextlib.contextmanager
def opened(url: str) -> Iterator[BinaryIO]:
    """Open a file for reading from its start to its end; it has the methods `read` and `fileno`.

    Raises
    ------
    OSError
        If the store does not give it, also from `read`.
    """
    fs, path = _store(url)
    with contextlib.ExitStack() as stack:
        with _explained(url):
            file = stack.enter_context(fs.open(path, "rb"))
        yield cast(BinaryIO, _Reader(url, file))


def write(url: str, data: bytes) -> None:
    """Write a file, replacing an old one, so that nobody sees a part of it.

    An object store gets it by one put or one completed upload. Other stores get a file of another name in the same
    folder, which is then moved; how that replaces an old file is up to the store.

    Raises
    ------
    OSError
        If the store does not take it.
    """
    fs, path = _store(url)
    with _explained(url):
        if _scheme(url) in _SINGLE_PUT:
            fs.pipe_file(path, data)
            return
        folder = fs._parent(path)
        fs.makedirs(folder, exist_ok=True)
        temporary = f"{folder.rstrip('/')}/.sgacodec-{os.getpid()}-{secrets.token_hex(4)}.tmp"
        try:
            fs.pipe_file(temporary, data)
            fs.mv(temporary, path)
        except BaseException:
            with contextlib.suppress(Exception):
                fs.rm_file(temporary)
            raise


class _Reader:
    """A file of a store whose errors are OSError."""

    def __init__(self, url: str, file: Any) -> None:
        self._url = url
        self._file = file

    def read(self, size: int = -1) -> bytes:
        with _explained(self._url):
            return bytes(self._file.read(size))

    def fileno(self) -> int:
        raise OSError(errno.EBADF, "a remote file has no number")


def _scheme(url: str) -> str:
    match = _SCHEME.match(url)
    return match[1].lower() if match else ""


def _store(url: str) -> tuple[Any, str]:
    """The file system of fsspec, and the path in it.

    Raises
    ------
    OSError
        If fsspec, or the package that it needs for this store, is not installed, or does not know the scheme.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise OSError(errno.ENOSYS, "URLs need fsspec: pip install fsspec", url) from None
    with _explained(url):
        fs, path = url_to_fs(url)
    return fs, path


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn the errors of a store, which are of many types, into OSError with a reason of one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise _not_found(url, error) from None
    except Exception as error:
        number = getattr(error, "errno", None) or errno.EIO
        text = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise OSError(number, text, url) from error


def _not_found(url: str, error: FileNotFoundError) -> OSError:
    """What fsspec's HTTP store calls "not found": that, another status, or no connection, which is the cause."""
    cause = error.__cause__
    status = getattr(cause, "status", None)
    if cause is None or status == 404:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
    reason = " ".join(str(cause).split()) or type(cause).__name__
    return OSError(errno.EIO, f"the server answers with status {status}" if status else reason, url)
