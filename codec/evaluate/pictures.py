"""Pictures of a report: each image as the codecs show it at one λ, peers at the size of our smallest file."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, features

from .. import metrics
from . import peers
from .coders import Coder
from .curves import named_groups
from .rows import CURVE, Row, key, means
from .sweep import FILES, file_of, picture_of

_LOSSLESS = 6_000_000  # pixels of all pictures of a report, up to which they are shown without loss
_SHOWN = {"jpeg": "jpeg", "webp": "webp", "avif": "avif"}  # peers whose files browsers show


@dataclass(frozen=True)
class Variant:
    """An image as one codec shows it.

    Attributes
    ----------
    label : str
        Name of the curve; of a peer, with its quality.
    lmbda : float, optional
        λ of our variants.
    bpp, psnr : float, optional
        Of the file; None for the original, and the PSNR of a lossless file.
    source : str
        The picture as a data URL.
    """

    label: str
    lmbda: float | None
    bpp: float | None
    psnr: float | None
    source: str


@dataclass(frozen=True)
class View:
    """The variants of an image, the original first."""

    name: str
    width: int
    height: int
    variants: list[Variant]


def views_of(
    rows: Sequence[Row],
    coders: Sequence[Coder],
    images: Mapping[str, Path],
    out: Path,
    lmbda: float,
    progress: Callable[[], None] = lambda: None,
) -> tuple[list[View], bool]:
    """The views of all images that were measured at λ, and whether their pictures are lossless.

    Our files are those of the sweep. Peers are encoded at the quality whose file is nearest to the smallest of ours.
    """
    own = [coder for coder in coders if coder.setting["lambda"] == lmbda]
    chroma = {
        (coder.setting["method"], coder.setting["options"].split()[0].partition("=")[2]): None
        for coder in coders
        if coder.setting["lambda"] is None
    }
    names = {tuple(group[0][c] for c in CURVE): curve.name for curve, group in named_groups(means(rows))}
    measured = {key(row): row for row in rows}
    identities = {row["name"]: {"name": row["name"], "image_id": row["image_id"]} for row in rows}
    sizes = {row["name"]: row["pixels"] for row in rows}
    lossless = sum(sizes.values()) * (1 + len(own)) <= _LOSSLESS
    views = []
    for name in images.keys() & identities.keys() if own else ():
        original = picture_of(images[name], own[0].setting["crop"]).pixels
        variants = [Variant("original", None, None, None, _url(original, lossless))]
        smallest = math.inf
        for coder in own:
            row = measured.get(key(identities[name] | coder.setting))
            file = file_of(out / FILES, coder, name)
            if row is not None and file.exists():
                shown = _url(coder.decode(file.read_bytes(), row["pixels"]), lossless)
                label = names[tuple(row[c] for c in CURVE)]
                variants.append(Variant(label, lmbda, row["bpp"], row["psnr"], shown))
                smallest = min(smallest, row["bytes"])
        if smallest < math.inf:
            variants += [_peer(method, sampling, original, int(smallest), lossless) for method, sampling in chroma]
            views.append(View(name, original.shape[1], original.shape[0], variants))
        progress()
    return sorted(views, key=lambda view: view.name), lossless


def _peer(name: str, subsampling: str, original: np.ndarray, size: int, lossless: bool) -> Variant:
    quality, data = peers.matching(peers.PEERS[name], subsampling, original, size)
    shown = peers.decode(data)
    psnr = metrics.psnr(original, shown)
    label = f"{name} {subsampling}, quality {quality}"
    source = _data_url(_SHOWN[name], data) if name in _SHOWN else _url(shown, lossless)
    bpp = 8 * len(data) / (shown.shape[0] * shown.shape[1])
    return Variant(label, None, bpp, psnr if math.isfinite(psnr) else None, source)


def _url(pixels: np.ndarray, lossless: bool) -> str:
    """A picture as a data URL: lossless WebP, or AVIF of quality 90 without chroma subsampling."""
    stream = io.BytesIO()
    if lossless or not features.check("avif"):
        Image.fromarray(pixels).save(stream, "webp", lossless=True, method=3)
        return _data_url("webp", stream.getvalue())
    Image.fromarray(pixels).save(stream, "avif", quality=90, subsampling="4:4:4", speed=8, max_threads=1)
    return _data_url("avif", stream.getvalue())


def _data_url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
