"""Decode with the decoder that is done first: numpy for some megapixels, torch for many and for CUDA.

Importing torch takes longer than decoding several pictures with numpy, and a receiver may not have it; but once it is
loaded, it decodes a photograph in three quarters of the time.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import TYPE_CHECKING, BinaryIO

from .bitstream import read_stream
from .decoder.decode import PictureDecoder
from .device import check_device_name
from .picture import Picture

if TYPE_CHECKING:
    from .api import Codec

MANY = 2**24  # pixels for which it is worth waiting for torch: benchmarks/processes.py measures both


def open_decoder(model: str | None = None, device: str = "auto", pixels: int = 0) -> PictureDecoder | Codec:
    """A decoder for a number of pixels; both kinds have `decode`, with the same parameters, result and errors.

    Parameters
    ----------
    model : str, optional
        Name or path of the only model to use. None: the one that a file names.
    device : str
        "auto" (CUDA where there is one, for at least `MANY` pixels), "cpu", "cuda" or "cuda:1".
    pixels : int
        How many there are to decode in this process, at least.

    Raises
    ------
    ModelNotFoundError, ModelError
        When the named model does not exist or is damaged.
    ModuleNotFoundError
        When CUDA is asked for, and torch is not installed.
    ValueError
        When there is no such device.
    """
    check_device_name(device)
    if device.startswith("cuda") or (pixels >= MANY and importlib.util.find_spec("torch") is not None):
        from .api import Codec

        return Codec(model, device)
    return PictureDecoder(model)


def decode(
    source: str | os.PathLike[str] | BinaryIO | bytes | bytearray | memoryview, *, model: str | None = None
) -> Picture:
    """Decode a .sga file, given by its path, a file object or its content, on the CPU; `Codec.decode` also uses CUDA.

    Raises
    ------
    TypeError
        When `source` is none of these.
    OSError
        When the file cannot be read.
    FormatError
        When it is not a .sga file, or damaged.
    ModelNotFoundError, ModelError
        When its model is not installed or damaged.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    elif isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            data = read_stream(file)
    elif hasattr(source, "read"):
        data = read_stream(source)
    else:
        raise TypeError(f"decode takes a path, a file object or bytes, not {type(source).__name__}")
    return shared_decoder(model).decode(data).picture


@functools.lru_cache(maxsize=4)
def shared_decoder(model: str | None = None) -> PictureDecoder:
    """The decoder of this process for a model, made once: its models stay loaded."""
    return PictureDecoder(model)
