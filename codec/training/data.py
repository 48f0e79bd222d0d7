"""Photographs for training and validation, read into memory as uint8."""

from __future__ import annotations

import functools
import hashlib
import logging
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

import torch
from torch import Tensor

from ..folders import IMAGE_SUFFIXES, images_below, suffix
from ..image import read_image
from ..picture import ImageError

log = logging.getLogger(__name__)

HELD_OUT = 40  # about one photograph in 40 is held out for validation


class DataError(ValueError):
    """No usable photograph was found, or a source cannot be read."""


T = TypeVar("T")


@dataclass(frozen=True)
class Photograph:
    """A decoded picture.

    Attributes
    ----------
    name : str
        Path relative to its folder or tar.
    pixels : Tensor (3, H, W) uint8
    """

    name: str
    pixels: Tensor


def _files(source: Path) -> Iterator[tuple[str, Callable[[], BinaryIO]]]:
    """Name of every image file in a folder (recursively), in a tar, or of a single file, and what opens it."""
    if source.is_dir():
        for name in images_below(str(source)):
            yield Path(name).as_posix(), functools.partial(_file, source / name)
    elif tarfile.is_tarfile(source):
        with tarfile.open(source) as tar:
            for member in tar:
                if (member.isfile() or member.islnk()) and suffix(member.name) in IMAGE_SUFFIXES:
                    yield member.name, functools.partial(_member, tar, member)
    else:
        yield source.name, functools.partial(_file, source)


def _file(path: Path) -> BinaryIO:
    return path.open("rb")


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> BinaryIO:
    """Open a file of a tar.

    Raises
    ------
    OSError
        When it is a link to what is not in the tar.
    """
    try:
        stream = tar.extractfile(member)
    except (KeyError, RecursionError):
        stream = None
    if stream is None:
        raise OSError("a link to what is not in the tar")
    return cast(BinaryIO, stream)


def read_photographs(sources: list[Path], min_side: int = 1) -> list[Photograph]:
    """Decode all photographs of `sources`; files that cannot be decoded are skipped with a warning.

    Parameters
    ----------
    sources : list of Path
        Folders (searched recursively), tars, or single image files.
    min_side : int
        Photographs with a shorter side, in pixels, are skipped with a warning.

    Raises
    ------
    DataError
        When a source does not exist or cannot be read, or no photograph is left.
    """
    found: list[Photograph] = []
    for source in sources:
        if not source.exists():
            raise DataError(f"{source}: no such file or folder")
        try:
            for name, opened in _files(source):
                try:
                    with opened() as stream:
                        pixels = read_image(stream).pixels
                except (ImageError, OSError) as error:
                    log.warning("skipped %s: %s", name, getattr(error, "strerror", None) or error)
                    continue
                if min(pixels.shape[:2]) < min_side:
                    log.warning("skipped %s: smaller than %d pixels", name, min_side)
                    continue
                found.append(Photograph(name, torch.from_numpy(pixels).permute(2, 0, 1)))
        except (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError) as error:
            raise DataError(f"{source}: {getattr(error, 'strerror', None) or error}") from None
    if not found:
        raise DataError(f"no photograph in {', '.join(map(str, sources))}")
    return found


def split(photographs: list[Photograph]) -> tuple[list[Photograph], list[Photograph]]:
    """Split into training and validation photographs; about one in `HELD_OUT` is held out for validation.

    The hash of its name decides, so a photograph does not change sides when others are added. The validation set of few
    photographs can be empty; the training set is not.
    """
    training: list[Photograph] = []
    validation: list[Photograph] = []
    for photograph in photographs:
        digest = hashlib.sha256(photograph.name.encode(errors="surrogateescape")).digest()
        held_out = int.from_bytes(digest[:8], "big") % HELD_OUT == 0
        (validation if held_out else training).append(photograph)
    return (training, validation) if training else (validation, [])


def digest(photographs: Sequence[Photograph]) -> str:
    """Identifies a list of photographs by their names."""
    names = "\0".join(photograph.name for photograph in photographs)
    return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()[:16]


def evenly_spaced(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, from the whole sequence."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
