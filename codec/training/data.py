"""Photographs for training and validation, read into memory as uint8."""

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
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..pillow import refuse_programs, silent_libtiff

log = logging.getLogger(__name__)

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
HELD_OUT = 40  # about one photograph in 40 is held out for validation


class DataError(ValueError):
    """No usable photograph was found, or a source cannot be read."""


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


def _files(source: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of every image file in a folder (recursively), in a tar, or of a single file."""
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
            for name, content in _files(source):
                try:
                    with Image.open(io.BytesIO(content)) as opened, silent_libtiff(opened):
                        refuse_programs(opened)
                        pixels = np.array(opened.convert("RGB"))
                except UnidentifiedImageError:
                    log.warning("skipped %s: not an image of a known format", name)
                    continue
                except Exception as error:  # damaged files raise many types of error in Pillow
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
    """Split into training and validation photographs; about one in `HELD_OUT` is held out for validation.

    The hash of its name decides, so a photograph does not change sides when others are added. The validation set of few
    photographs can be empty; the training set is not.
    """
    training: list[Photograph] = []
    validation: list[Photograph] = []
    for photograph in photographs:
        digest = hashlib.sha256(photograph.name.encode()).digest()
        held_out = int.from_bytes(digest[:8], "big") % HELD_OUT == 0
        (validation if held_out else training).append(photograph)
    return (training, validation) if training else (validation, [])
