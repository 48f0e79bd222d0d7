"""Names of inputs and outputs.

`plan` turns the names on the command line into tasks, and finds every mistake that can be found before work starts.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import click

from ..folders import IMAGE_SUFFIXES, files_below, suffix
from . import urls
from .storage import STREAM, opened
from .streams import is_terminal

SGA_SUFFIXES = frozenset({".sga"})
_LONGEST_LIST = 2**26  # bytes


@dataclass(frozen=True)
class Task:
    """One input and where its output goes: paths or URLs; `-` is standard input or output.

    Attributes
    ----------
    size : int, optional
        Bytes of the input, where a listing told it.
    """

    source: str
    destination: str
    size: int | None = None


@dataclass(frozen=True)
class Direction:
    """What a command reads and writes.

    Attributes
    ----------
    inputs : frozenset of str
        Suffixes, in lower case, of the files to take from a folder; they are replaced in the output's name.
    extension : str
        Suffix of an output named after its input.
    output : str
        What the output is, for messages.
    """

    inputs: frozenset[str]
    extension: str
    output: str


ENCODING = Direction(IMAGE_SUFFIXES, ".sga", "an .sga file")


def decoding(extension: str) -> Direction:
    """The direction from .sga files to images of a type."""
    return Direction(SGA_SUFFIXES, extension, "an image")


# ----------------------------------------------------------------------------------------------------- naming


def plan(
    names: tuple[str, ...],
    files_from: str | None,
    out_dir: str | None,
    direction: Direction,
    also_read: Iterable[str | None] = (),
) -> list[Task]:
    """Make a task of each input.

    Parameters
    ----------
    names : tuple of str
        The arguments of the command.
    files_from, out_dir : str, optional
        The options.
    direction : Direction
        What the command reads and writes.
    also_read : iterable of str
        Other files that the command reads, as masks and models; None where an option is not given.

    Raises
    ------
    click.UsageError
        If the names are not IN and OUT, if an output would overwrite an input or that of another input, or if it
        cannot be created.
    """
    if files_from == STREAM and STREAM in names:
        raise click.UsageError("standard input cannot be both an input and the list of --files-from")
    listed = _listed(urls.local_name(files_from)) if files_from is not None else []
    if "" in (*names, files_from, out_dir):
        raise click.UsageError("a name is empty (a variable of the shell that is not set?)")
    names, listed = tuple(map(urls.local_name, names)), list(map(urls.local_name, listed))
    if out_dir is None:
        tasks = [_single(names, listed, direction)]
    else:
        tasks = _into_folder((*names, *listed), urls.local_name(out_dir), direction)
    read = [urls.local_name(name) for name in (files_from, *also_read) if name not in (None, STREAM)]
    _check_destinations(tasks, read)
    return tasks


def _single(names: tuple[str, ...], listed: list[str], direction: Direction) -> Task:
    """The task of a command line without --out-dir: IN OUT, or `-` alone for both streams."""
    if listed or len(names) > 2:
        raise click.UsageError("to work on several files give --out-dir DIR (two names alone are IN and OUT)")
    if not names:
        raise click.UsageError("missing input: give IN and OUT, or IN... and --out-dir DIR")
    source, destination = names if len(names) == 2 else (names[0], None)
    if _is_folder(source, direction):
        raise click.UsageError(f"'{source}' is a folder: give --out-dir DIR to work on the files in it")
    if destination is None:
        if source != STREAM:
            raise click.UsageError(f"where should '{source}' go? Give OUT, - for standard output, or --out-dir")
        destination = STREAM
    if destination == STREAM:
        if sys.stdout is None:
            raise OSError(errno.EBADF, "standard output is closed")
        if is_terminal(sys.stdout):
            raise click.UsageError("standard output is a terminal: redirect it, or give OUT")
        return Task(source, destination)
    if _keys(source) & _keys(destination):
        raise click.UsageError(f"'{destination}' is the input itself: give the output another name")
    if destination.endswith(("/", os.sep)):
        raise click.UsageError(f"'{destination}' is the name of a folder: give it as --out-dir {destination}")
    if suffix(destination) in direction.inputs:
        raise click.UsageError(
            f"'{destination}' stands where OUT is expected, but is not named like {direction.output}; "
            "to work on several files give --out-dir DIR"
        )
    if not urls.is_url(destination) and os.path.isdir(destination):
        raise click.UsageError(f"'{destination}' is a folder: give it as --out-dir {destination}")
    return Task(source, destination)


def _into_folder(names: tuple[str, ...], out_dir: str, direction: Direction) -> list[Task]:
    """The tasks of a command line with --out-dir: every name is an input; a folder stands for all files in it."""
    if STREAM in names:
        raise click.UsageError("standard input has no name to put into --out-dir: give OUT instead")
    if not urls.is_url(out_dir) and os.path.lexists(out_dir) and not os.path.isdir(out_dir):
        raise click.UsageError(f"--out-dir '{out_dir}' is not a folder")
    tasks = []
    for name in names:
        if not _is_folder(name, direction):
            base = urls.file_name(name) if urls.is_url(name) else os.path.basename(name)
            tasks.append(Task(name, _join(out_dir, _renamed(base, direction))))
            continue
        for inner, size in _inside(name, direction.inputs):
            tasks.append(Task(_join(name, inner), _join(out_dir, _renamed(inner, direction)), size))
    if not tasks:
        raise click.UsageError("no input files")
    return tasks


def _is_folder(name: str, direction: Direction) -> bool:
    """Whether an input is a folder. A URL with the suffix of an input is not: to ask the store takes a request each."""
    if not urls.is_url(name):
        return os.path.isdir(name)
    return suffix(urls.file_name(name)) not in direction.inputs and urls.is_folder(name)


def _join(folder: str, name: str) -> str:
    """The name of a file in a local folder or at a URL."""
    return urls.join(folder, name.replace(os.sep, "/")) if urls.is_url(folder) else os.path.join(folder, name)


def _inside(folder: str, suffixes: frozenset[str]) -> list[tuple[str, int | None]]:
    """Regular files with one of the suffixes in a folder and its subfolders, relative to it, sorted, none hidden.

    With each, its size if the store of a URL told it.
    """
    files = urls.inside(folder) if urls.is_url(folder) else dict.fromkeys(_below(folder))
    found = [
        (name, size)
        for name, size in files.items()
        if suffix(name) in suffixes and not any(part.startswith(".") for part in name.replace(os.sep, "/").split("/"))
    ]
    if not found:
        raise click.UsageError(f"no files to work on in the folder '{folder}'")
    return sorted(found, key=lambda entry: entry[0])


def _below(folder: str) -> list[str]:
    try:
        return list(files_below(folder))
    except OSError as error:
        raise click.UsageError(f"the folder '{error.filename}' cannot be read: {error.strerror}") from None


def _listed(files_from: str) -> list[str]:
    """The names in a list: one a line, or separated by NUL characters if there are any."""
    try:
        with opened(files_from) as file:
            data = file.read(_LONGEST_LIST + 1)
    except OSError as error:
        raise click.UsageError(f"--files-from '{files_from}': {error.strerror}") from None
    if len(data) > _LONGEST_LIST:
        raise click.UsageError(f"--files-from '{files_from}': more than {_LONGEST_LIST} bytes are no list of names")
    names = data.split(b"\0") if b"\0" in data else data.splitlines()
    return [os.fsdecode(name) for name in names if name.strip()]


def _renamed(name: str, direction: Direction) -> str:
    stem = os.path.splitext(name)[0] if suffix(name) in direction.inputs else name
    return stem + direction.extension


def _check_destinations(tasks: list[Task], also_read: list[str]) -> None:
    """Find outputs that would overwrite an input or each other, or cannot be created."""
    read: dict[object, str] = {}
    for name in (*also_read, *(task.source for task in tasks if task.source != STREAM)):
        read |= dict.fromkeys(_keys(name), name)
    taken: dict[str, str] = {}
    for task in tasks:
        if task.destination == STREAM:
            continue
        path = _full_path(task.destination)
        if taken.get(path) == task.source:
            raise click.UsageError(f"the input '{task.source}' is given twice")
        if path in taken:
            raise click.UsageError(f"'{taken[path]}' and '{task.source}' would both be written to '{task.destination}'")
        taken[path] = task.source
        overwritten = {read[key] for key in _keys(task.destination) if key in read}
        if overwritten:
            raise click.UsageError(
                f"the output of '{task.source}' would overwrite '{overwritten.pop()}', which this command reads"
            )
        _check_place(task.destination)


def _check_place(destination: str) -> None:
    """Raise a usage error if a file cannot be created here; of a remote store, only the spelling is checked."""
    if urls.is_url(destination):
        if "::" in destination or destination.startswith(("http://", "https://")):
            raise click.UsageError(f"'{destination}' cannot be written")
        return
    if os.path.isdir(destination):
        raise click.UsageError(f"'{destination}' is a folder")
    if os.path.exists(destination) and not os.path.isfile(destination):
        return  # a device or a pipe, which is written directly
    parent = os.path.dirname(os.path.realpath(destination))
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        raise click.UsageError(f"'{destination}' cannot be created: '{parent}' is not a folder")
    if not os.access(parent, os.W_OK):
        raise click.UsageError(f"cannot create files in '{parent}'")


def _full_path(name: str) -> str:
    return urls.canonical(name) if urls.is_url(name) else os.path.normcase(os.path.realpath(name))


def _keys(name: str) -> set[object]:
    """What identifies a file: its full path and, if it exists, its number on the disk, which all its links share."""
    keys: set[object] = {_full_path(name)}
    if urls.is_url(name):
        return keys
    with contextlib.suppress(OSError):
        status = os.stat(name)
        if stat.S_ISREG(status.st_mode):
            keys.add((status.st_dev, status.st_ino))
    return keys
