"""Image files in folders."""

from __future__ import annotations

import os
from collections.abc import Iterator

_IMAGE_TYPES = (
    "apng avif avifs bmp dds dib gif heic heif hif ico j2c j2k jfif jp2 jpc jpe jpeg jpf jpg jpx jxl mpo pbm pcx pgm "
    "png pnm ppm qoi sgi tga tif tiff webp"
)
IMAGE_SUFFIXES = frozenset("." + kind for kind in _IMAGE_TYPES.split(" "))


def suffix(name: str) -> str:
    """The suffix of a file name, in lower case."""
    return os.path.splitext(name)[1].lower()


def files_below(folder: str) -> Iterator[str]:
    """Regular files in a folder and its subfolders, relative to it.

    Hidden folders and links to folders are not entered. Dangling links are included, so that they fail when read.

    Raises
    ------
    OSError
        When a folder cannot be read.
    """
    for parent, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = os.path.join(parent, name)
            if os.path.isfile(path) or not os.path.exists(path):
                yield os.path.relpath(path, folder)


def images_below(folder: str) -> list[str]:
    """The files of :func:`files_below` that are named like images and not hidden, sorted."""
    return sorted(
        name
        for name in files_below(folder)
        if suffix(name) in IMAGE_SUFFIXES and not os.path.basename(name).startswith(".")
    )


def _refuse(error: OSError) -> None:
    raise error
