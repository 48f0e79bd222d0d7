"""Which pictures can be refined together as one batch."""

from __future__ import annotations

from .networks.architecture import padded_size
from .picture import Picture
from .settings import Settings
from .targets import has_target

_CUDA_IMAGES = 4
_CUDA_PIXELS = 2**20  # of a picture: larger ones are refined in tiles, one by one
_CPU_IMAGES = 8
_CPU_PIXELS = 2**18  # of a batch: beyond, a step has as much to do for each picture as for one alone


def batch_key(picture: Picture) -> tuple[int, int, bool]:
    """Padded height, padded width and greyness: pictures that agree in all three can form one batch."""
    height, width = picture.pixels.shape[:2]
    return *padded_size(height, width), picture.grey


def batch_size(height: int, width: int, cuda: bool, settings: Settings) -> int:
    """Images of a padded size to encode as one batch: as many as make it quicker for each (benchmarks/batch.py).

    One where there is nothing to gain, or with a time limit or target.
    """
    if settings.time_limit is not None or has_target(settings) or not (cuda or settings.refines):
        return 1
    if cuda:
        return _CUDA_IMAGES if height * width <= _CUDA_PIXELS else 1
    return max(1, min(_CPU_IMAGES, _CPU_PIXELS // (height * width)))
