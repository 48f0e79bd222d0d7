"""Which pictures can be refined together as one batch."""

from __future__ import annotations

from .networks.architecture import padded_size
from .picture import Picture


def batch_key(picture: Picture) -> tuple[int, int, bool]:
    """Padded height, padded width and greyness: pictures that agree in all three can form one batch."""
    height, width = picture.pixels.shape[:2]
    return *padded_size(height, width), picture.grey
