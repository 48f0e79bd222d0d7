"""Photographs for training: read once, kept as uint8, split into those to learn from and those to judge by."""

from __future__ import annotations

import hashlib
import io
import logging
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

log = logging.getLogger(__name__)

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
HELD_OUT = 40  # one photograph in so many is kept for validation


class DataError(ValueError):
    """No usable photograph was found."""


@dataclass(frozen=True)
class Photograph:
    """A decoded picture.

    Attributes
    ----------
    name : str
        Path inside its folder or tar, the same wherever those lie.
    pixels : Tensor (3, H, W) uint8
    """

    name: str
    pixels: Tensor


def _files(source: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of every picture in a folder (recursively), a tar, or a single file."""
    if source.is_dir():
        for path in sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()):
            yield path.relative_to(source).as_posix(), path.read_bytes()
    elif tarfile.is_tarfile(source):
        with tarfile.open(source) as tar:
            for member in tar:
                stream = tar.extractfile(member) if member.isfile() else None
                if stream is not None and Path(member.name).suffix.lower() in SUFFIXES:
                    yield member.name, stream.read()
    else:
        yield source.name, source.read_bytes()


def read_photographs(sources: list[Path], min_side: int = 1) -> list[Photograph]:
    """Decode every photograph of `sources`; one that cannot be read is skipped with a warning.

    Parameters
    ----------
    sources : list of Path
        Folders (searched with their subfolders), tars, or single pictures.
    min_side : int
        Smaller photographs are skipped with a warning.

    Raises
    ------
    DataError
        When a source does not exist or cannot be read, or nothing usable is left.
    """
    found: list[Photograph] = []
    for source in sources:
        if not source.exists():
            raise DataError(f"{source}: no such file or folder")
        try:
            for name, content in _files(source):
                try:
                    with Image.open(io.BytesIO(content)) as opened:
                        pixels = np.array(opened.convert("RGB"))
                except Exception as error:  # a damaged file can make Pillow raise nearly anything
                    log.warning("skipped %s: %s", name, error)
                    continue
                if min(pixels.shape[:2]) < min_side:
                    log.warning("skipped %s: smaller than %d pixels", name, min_side)
                    continue
                found.append(Photograph(name, torch.from_numpy(pixels).permute(2, 0, 1)))
        except (OSError, tarfile.TarError) as error:
            raise DataError(f"{source}: {error}") from None
    if not found:
        raise DataError(f"no photograph in {', '.join(map(str, sources))}")
    return found


def split(photographs: list[Photograph]) -> tuple[list[Photograph], list[Photograph]]:
    """(to learn from, held out): one in about HELD_OUT, chosen by the hash of its name.

    So a photograph stays on its side whatever else is added. With few photographs none may be held out.
    """
    sides: tuple[list[Photograph], list[Photograph]] = ([], [])
    for photograph in photographs:
        digest = hashlib.sha256(photograph.name.encode()).digest()
        sides[int.from_bytes(digest[:8], "big") % HELD_OUT == 0].append(photograph)
    return sides if sides[0] else (sides[1], sides[0])
