"""Names of inputs and outputs, and writing.

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

from ..atomic import atomic_file
from .streams import binary_input, binary_output, is_terminal

STREAM = "-"
_IMAGE_TYPES = (
    "apng avif avifs bmp dds dib gif heic heif hif ico j2c j2k jfif jp2 jpc jpe jpeg jpf jpg jpx jxl mpo pbm pcx pgm "
    "png pnm ppm qoi sgi tga tif tiff webp"
)
IMAGE_SUFFIXES = frozenset("." + kind for kind in _IMAGE_TYPES.split(" "))
SGA_SUFFIXES = frozenset({".sga"})
_LONGEST_LIST = 2**26  # bytes


@dataclass(frozen=True)
class Task:
    """One input and where its output goes; `-` is standard input or output."""

    source: str
    destination: str


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


def shown(name: str, stream: str = "standard input") -> str:
    """The name of an input or output, for messages."""
    return stream if name == STREAM else name


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
    listed = _listed(files_from) if files_from is not None else []
    if out_dir is None:
        tasks = [_single(names, listed, direction)]
    else:
        tasks = _into_folder((*names, *listed), out_dir, direction)
    _check_destinations(tasks, [name for name in (files_from, *also_read) if name not in (None, STREAM)])
    return tasks


def _single(names: tuple[str, ...], listed: list[str], direction: Direction) -> Task:
    """The task of a command line without --out-dir: IN OUT, or `-` alone for both streams."""
    if listed or len(names) > 2:
        raise click.UsageError("to work on several files give --out-dir DIR (two names alone are IN and OUT)")
    if not names:
        raise click.UsageError("missing input: give IN and OUT, or IN... and --out-dir DIR")
    source, destination = names if len(names) == 2 else (names[0], None)
    if os.path.isdir(source):
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
    if _suffix(destination) in direction.inputs:
        raise click.UsageError(
            f"'{destination}' stands where OUT is expected, but is not named like {direction.output}; "
            "to work on several files give --out-dir DIR"
        )
    if os.path.isdir(destination):
        raise click.UsageError(f"'{destination}' is a folder: give it as --out-dir {destination}")
    return Task(source, destination)


def _into_folder(names: tuple[str, ...], out_dir: str, direction: Direction) -> list[Task]:
    """The tasks of a command line with --out-dir: every name is an input; a folder stands for all files in it."""
    if STREAM in names:
        raise click.UsageError("standard input has no name to put into --out-dir: give OUT instead")
    if os.path.lexists(out_dir) and not os.path.isdir(out_dir):
        raise click.UsageError(f"--out-dir '{out_dir}' is not a folder")
    tasks = []
    for name in names:
        if not os.path.isdir(name):
            tasks.append(Task(name, os.path.join(out_dir, _renamed(os.path.basename(name), direction))))
            continue
        for inner in _inside(name, direction.inputs):
            target = os.path.join(out_dir, _renamed(inner, direction))
            tasks.append(Task(os.path.join(name, inner), target))
    if not tasks:
        raise click.UsageError("no input files")
    return tasks


def _inside(folder: str, suffixes: frozenset[str]) -> list[str]:
    """Regular files with one of the suffixes in a folder and its subfolders, relative to it, sorted, none hidden."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = os.path.join(parent, name)
            if _suffix(name) in suffixes and not name.startswith(".") and os.path.isfile(path):
                found.append(os.path.relpath(path, folder))
    if not found:
        raise click.UsageError(f"no files to work on in the folder '{folder}'")
    return sorted(found)


def _listed(files_from: str) -> list[str]:
    """The names in a list: one a line, or separated by NUL characters if there are any."""
    try:
        with contextlib.nullcontext(binary_input()) if files_from == STREAM else open(files_from, "rb") as file:
            data = file.read(_LONGEST_LIST + 1)
    except OSError as error:
        raise click.UsageError(f"--files-from '{files_from}': {error.strerror}") from None
    if len(data) > _LONGEST_LIST:
        raise click.UsageError(f"--files-from '{files_from}': more than {_LONGEST_LIST} bytes are no list of names")
    names = data.split(b"\0") if b"\0" in data else data.splitlines()
    return [os.fsdecode(name) for name in names if name.strip()]


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _renamed(name: str, direction: Direction) -> str:
    stem = os.path.splitext(name)[0] if _suffix(name) in direction.inputs else name
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
    """Raise a usage error if a file cannot be created here."""
    if os.path.isdir(destination):
        raise click.UsageError(f"'{destination}' is a folder")
    parent = os.path.dirname(os.path.abspath(destination))
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        raise click.UsageError(f"'{destination}' cannot be created: '{parent}' is not a folder")
    if not os.access(parent, os.W_OK):
        raise click.UsageError(f"cannot create files in '{parent}'")


def _full_path(name: str) -> str:
    return os.path.normcase(os.path.realpath(name))


def _keys(name: str) -> set[object]:
    """What identifies a file: its full path and, if it exists, its number on the disk, which all its links share."""
    keys: set[object] = {_full_path(name)}
    with contextlib.suppress(OSError):
        status = os.stat(name)
        if stat.S_ISREG(status.st_mode):
            keys.add((status.st_dev, status.st_ino))
    return keys


# ------------------------------------------------------------------------------------------- reading, writing


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

    if source == STREAM:
        return read_stream(binary_input(), max_pixels)
    with open(source, "rb") as file:
        return read_stream(file, max_pixels)


def write_bytes(destination: str, data: bytes) -> None:
    """Write an output, whole or not at all.

    A failure or a signal before all of it was written leaves the old file. Missing folders are made. What is no
    regular file (a device, a pipe) is written directly, and a symbolic link is followed.

    Raises
    ------
    OSError
        If writing fails; no temporary file is left.
    """
    if destination == STREAM:
        stream = binary_output()
        stream.write(data)
        stream.flush()
        return
    path = os.path.realpath(destination)
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            with open(path, "wb") as file:
                file.write(data)
            return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        with atomic_file(path) as file:
            file.write(data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, destination) from None
