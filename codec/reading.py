"""Steps common to both decoders, before and after the networks: parse a .sga file, assemble the picture; no torch."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .alpha import decode_alpha
from .bitstream import DEFAULT_MAX_PIXELS, FormatError, SgaFile, read
from .networks.architecture import HYPER_STRIDE, padded_size
from .picture import Picture, to_grey

log = logging.getLogger(__name__)

_PADDED_MINIMUM = 2**20  # padded pixels that are decoded whatever `max_pixels` is, so that 1 allows an image of 1 × 1


@dataclass(frozen=True)
class Decoded:
    """A decoded picture, and the report of its decoder (see `Codec.decode`)."""

    picture: Picture
    report: dict[str, Any]


def read_file(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> SgaFile:
    """Parse a .sga file whose pixels are to be decoded.

    Raises
    ------
    FormatError
        When it is not a .sga file, is damaged, or has more than `max_pixels` pixels, or with padding more than twice as
        many: 1 × 2²⁸ pixels take the memory of 64 × 2²⁸.
    """
    file = read(data, max_pixels)
    if math.prod(padded_size(file.height, file.width)) > max(2 * max_pixels, _PADDED_MINIMUM):
        raise FormatError(
            f"{file.width} x {file.height} pixels, padded to multiples of {HYPER_STRIDE}, are more than twice the "
            f"limit of {max_pixels} (--max-pixels raises it)"
        )
    return file


def picture_of(file: SgaFile, pixels: np.ndarray) -> Picture:
    """The picture of a file with its decoded pixels (H, W, 3) uint8.

    Raises
    ------
    FormatError
        When the alpha section is damaged.
    """
    alpha = None if file.alpha is None else decode_alpha(file.alpha, file.width, file.height)
    return Picture(to_grey(pixels) if file.grey else pixels, file.grey, alpha, file.icc, file.exif, file.xmp)


def log_hash(stage: str, content: bytes) -> None:
    """Log a hash of the result of a decoding stage, to compare two machines whose pictures differ."""
    if log.isEnabledFor(logging.DEBUG):
        import hashlib

        log.debug("%s %s", stage, hashlib.sha256(content).hexdigest())
