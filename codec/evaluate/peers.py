"""Peers: the encoders of Pillow, measured over the same images as our own.

JPEG, WebP and AVIF are Pillow's; JPEG XL needs the package pillow-jxl-plugin (``pip install 'sgacodec[peers]'``). All
run on one thread, so that their seconds are comparable.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any

import numpy as np
from PIL import Image, features


class PeerUnavailableError(RuntimeError):
    """An encoder is not installed; the message is one line that says what to install."""


@dataclass(frozen=True)
class Peer:
    """A format of Pillow and how it is encoded.

    Attributes
    ----------
    name : str
        As in `--peers`; also Pillow's name of the format.
    encoder : str
        The library that encodes.
    qualities : tuple of int
        Points of the curve.
    subsamplings : tuple of str
        Chroma formats to measure.
    effort : dict
        Options that trade time for size.
    hidden : dict
        Further options of Pillow, which do not change the size by much: numbers of threads.
    find_version : callable
        Returns the version of the encoder, None if it is not installed.
    """

    name: str
    encoder: str
    qualities: tuple[int, ...]
    subsamplings: tuple[str, ...]
    effort: dict[str, Any]
    hidden: dict[str, Any]
    find_version: Callable[[], str | None]

    def options(self, subsampling: str) -> dict[str, Any]:
        """The options that identify a curve of this peer: chroma format and effort."""
        return {"subsampling": subsampling, **self.effort}

    def save_options(self, subsampling: str) -> dict[str, Any]:
        """Options of `PIL.Image.Image.save`. A format of one chroma format has no option for it."""
        chroma = {"subsampling": subsampling} if len(self.subsamplings) > 1 else {}
        return chroma | self.effort | self.hidden


def _avif_version() -> str | None:
    if not features.check("avif"):
        return None
    avif: Any = import_module("PIL._avif")
    encoders = [part for part in avif.codec_versions().split(", ") if "[enc" in part]
    return f"{features.version('avif')} {' '.join(encoders)}".replace(" [enc]:", " ").replace("[enc/dec]:", " ")


def _jxl_version() -> str | None:
    try:
        import_module("pillow_jxl")
    except ImportError:
        return None
    return version("pillow-jxl-plugin")


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            name="jpeg",
            encoder="libjpeg-turbo" if features.check("libjpeg_turbo") else "libjpeg",
            qualities=(3, 6, 10, 15, 20, 30, 40, 50, 60, 70, 80, 90, 95),
            subsamplings=("4:4:4", "4:2:0"),
            effort={"optimize": True, "progressive": True},
            hidden={},
            find_version=lambda: features.version("libjpeg_turbo") or features.version("jpg"),
        ),
        Peer(
            name="webp",
            encoder="libwebp",
            qualities=(0, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95),
            subsamplings=("4:2:0",),
            effort={"method": 6},
            hidden={},
            find_version=lambda: features.version("webp"),
        ),
        Peer(
            name="avif",
            encoder="libavif",
            qualities=(10, 20, 30, 40, 50, 60, 70, 80, 90),
            subsamplings=("4:4:4", "4:2:0"),
            effort={"speed": 6},
            hidden={"max_threads": 1},
            find_version=_avif_version,
        ),
        Peer(
            name="jxl",
            encoder="pillow-jxl-plugin",
            qualities=(5, 15, 25, 35, 45, 55, 65, 75, 85, 92),
            subsamplings=("4:4:4",),
            effort={"effort": 7},
            hidden={"num_threads": 0},  # 0: the calling thread
            find_version=_jxl_version,
        ),
    )
}


def available(name: str) -> tuple[Peer, str]:
    """A peer and the version of its encoder.

    Raises
    ------
    PeerUnavailableError
        If its encoder is not installed.
    """
    peer = PEERS[name]
    found = peer.find_version()
    if found is None:
        advice = "pip install 'sgacodec[peers]'" if name == "jxl" else "this build of Pillow lacks it"
        raise PeerUnavailableError(f"peer {name} is not available ({advice})")
    return peer, found


def encode(peer: Peer, subsampling: str, quality: int, pixels: np.ndarray) -> bytes:
    """The file of an image (H, W, 3) uint8, without metadata; of a grey one if its channels are equal."""
    stream = io.BytesIO()
    grey = bool((pixels == pixels[..., :1]).all())
    image = Image.fromarray(pixels[..., 0] if grey else pixels)
    image.save(stream, peer.name, quality=quality, **peer.save_options(subsampling))
    return stream.getvalue()


def decode(data: bytes) -> np.ndarray:
    """The pixels (H, W, 3) uint8 of a file."""
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))


def matching(peer: Peer, subsampling: str, pixels: np.ndarray, size: int) -> tuple[int, bytes]:
    """The quality, 0 … 100, whose file is nearest to `size` bytes, and the file; sizes rise with the quality."""
    low, high = 0, 100
    while low < high:
        middle = (low + high) // 2
        if len(encode(peer, subsampling, middle, pixels)) < size:
            low = middle + 1
        else:
            high = middle
    found = [(q, encode(peer, subsampling, q, pixels)) for q in range(max(0, low - 1), low + 1)]
    return min(found, key=lambda pair: abs(len(pair[1]) - size))
