"""sgacodec as a library: the two pipelines, readable top to bottom.

encode   picture ─► x ─analyse─► y, z ─refine─► y, z ─quantize─► integers ─pack─► bytes ─► checked ─► .sga
decode   .sga ─read─► bytes ─unpack─► integers ─render─► pixels ─► picture
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import bitstream, latents
from .alpha import decode_alpha, encode_alpha
from .batching import batch_key
from .bitstream import DEFAULT_MAX_PIXELS, SgaFile
from .device import device_of
from .image import read_image
from .metrics import psnr_of_mse
from .models.cache import LevelCache
from .models.level import LevelModel
from .networks.architecture import HYPER_STRIDE, padded_size
from .picture import Picture
from .pixels import to_grey
from .rate_control import has_target, search
from .refine.loop import Progress, refine
from .refine.problem import Problem
from .refine.tiles import needs_tiles, refine_tiles
from .settings import Settings

__all__ = ["Codec", "Decoded", "Encoded", "Picture", "Progress", "Settings", "decode", "encode"]

log = logging.getLogger(__name__)

_PADDED_MINIMUM = 2**20  # padded pixels that are decoded whatever the limit: a limit of 1 allows an image of 1 x 1


@dataclass(frozen=True)
class Encoded:
    """A finished .sga file and what is to be said of it (see `Codec.encode`)."""

    data: bytes
    report: dict[str, Any]


@dataclass(frozen=True)
class Decoded:
    """A picture and what is to be said of its decoding (see `Codec.decode`)."""

    picture: Picture
    report: dict[str, Any]


class Codec:
    """A model on a device, held for many images. Folded levels are kept, so the second image starts at once.

    Parameters
    ----------
    model : str, optional
        Name or path of a model. None: encoding takes the best built-in one for the device, decoding the one
        that the file names.
    device : str
        "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:1".

    Raises
    ------
    ModelNotFoundError, ModelError
        When a model is named that does not exist or is damaged.
    ValueError
        When there is no such device.
    """

    def __init__(self, model: str | None = None, device: str = "auto") -> None:
        self.device = device_of(device)
        self.levels = LevelCache(model, self.device)

    # ------------------------------------------------------------------------------------------------- encode

    def encode(
        self,
        pictures: Sequence[Picture],
        settings: Settings | None = None,
        *,
        rois: Sequence[np.ndarray | None] | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> list[Encoded]:
        """Encode pictures; those of one padded shape are refined together as one batch.

        Parameters
        ----------
        rois : sequence of ndarray (H, W) float or None
            Weight of each pixel's distortion, one map a picture.
        progress : callable
            Told the state of the refinement now and then.

        Returns
        -------
        list of Encoded
            Reports hold width, height, bytes, bpp (of the whole file), psnr (dB, of the decoded 8-bit picture where
            alpha is not 0; None when lossless), lambda, level, model, model_id, method, classes, steps, seconds (of
            the whole batch, divided by its images), device, rd_loss and rd_loss_unrefined (λ·255²·MSE + payload bits
            a pixel).

        Raises
        ------
        ValueError
            When the settings contradict each other.
        TargetError
            When a target cannot be reached.
        """
        settings = settings or Settings()
        settings.validate()
        if has_target(settings):
            maps = rois or [None] * len(pictures)
            return [self._search(p, settings, roi, progress) for p, roi in zip(pictures, maps, strict=True)]
        level = self.levels.for_encoding(settings.lmbda, settings.level_lambda)
        results: dict[int, Encoded] = {}
        for group in _batches(pictures):
            start = time.perf_counter()
            chosen = [pictures[i] for i in group]
            weights = [None if rois is None else rois[i] for i in group]
            coded = self._encode_group(level, chosen, weights, settings, progress)
            seconds = (time.perf_counter() - start) / len(group)
            for i, (data, figures) in zip(group, coded, strict=True):
                results[i] = Encoded(data, self._report(level, pictures[i], data, settings, seconds, figures))
        return [results[i] for i in range(len(pictures))]

    def _search(
        self,
        picture: Picture,
        settings: Settings,
        roi: np.ndarray | None,
        progress: Callable[[Progress], None] | None,
    ) -> Encoded:
        def encode_at(chosen: Settings) -> Encoded:
            return self.encode([picture], chosen, rois=[roi], progress=progress)[0]

        def figures(result: Encoded) -> tuple[int, float, float]:
            psnr = result.report["psnr"]
            return len(result.data), result.report["bpp"], math.inf if psnr is None else psnr

        start = time.perf_counter()
        found = search(settings, encode_at, figures)
        return Encoded(found.data, {**found.report, "seconds": round(time.perf_counter() - start, 3)})

    def _encode_group(
        self,
        level: LevelModel,
        pictures: list[Picture],
        rois: list[np.ndarray | None],
        settings: Settings,
        progress: Callable[[Progress], None] | None,
    ) -> list[tuple[bytes, dict[str, Any]]]:
        problems = [
            Problem.of(level, p, roi, settings.lmbda, settings.metric) for p, roi in zip(pictures, rois, strict=True)
        ]
        best = [problem.start() for problem in problems]
        before = [candidate.loss for candidate in best]
        steps = 0
        if settings.method != "none":
            if needs_tiles(*problems[0].shape):
                best[0], steps = refine_tiles(level, problems[0], best[0], settings, progress)
            else:
                best, steps = refine(level, problems, best, settings, progress)
        coded = []
        for picture, loss in zip(pictures, before, strict=True):
            after = best.pop(0)
            figures = {"mse": after.mse, "rd_loss": after.loss, "rd_loss_unrefined": loss, "steps": steps}
            sent = latents.quantize(level, after.y, after.z)
            del after  # a large picture's floats take more memory than its pixels
            payload, digest = latents.pack(level, sent), sent.digest()
            del sent
            self._check(level, digest, payload, picture)
            file = SgaFile(
                model_id=bytes.fromhex(level.model_id),
                level=level.level,
                width=picture.pixels.shape[1],
                height=picture.pixels.shape[0],
                z=payload[0],
                y=payload[1],
                grey=picture.grey,
                alpha=None if picture.alpha is None else encode_alpha(picture.alpha),
                icc=picture.icc,
                exif=picture.exif,
                xmp=picture.xmp,
            )
            coded.append((bitstream.write(file), figures))
        return coded

    def _check(self, level: LevelModel, digest: str, payload: tuple[bytes, bytes], picture: Picture) -> None:
        """Decode our own bytes to the same integers, or fail before anything is written."""
        height, width = picture.pixels.shape[:2]
        if latents.unpack(level, *payload, height, width).digest() != digest:
            raise RuntimeError("internal error: the coded bytes do not decode to the same integers")

    def _report(
        self,
        level: LevelModel,
        picture: Picture,
        data: bytes,
        settings: Settings,
        seconds: float,
        figures: dict[str, Any],
    ) -> dict[str, Any]:
        height, width = picture.pixels.shape[:2]
        return {
            "width": width,
            "height": height,
            "bytes": len(data),
            "bpp": 8 * len(data) / (width * height),
            "psnr": psnr_of_mse(figures["mse"]) if figures["mse"] > 0 else None,
            "lambda": settings.lmbda,
            "level": level.level,
            "model": level.model_name,
            "model_id": level.model_id,
            "method": settings.method,
            "classes": settings.classes if settings.method != "none" else None,
            "steps": figures["steps"],
            "seconds": round(seconds, 3),
            "device": str(self.device),
            "rd_loss": figures["rd_loss"],
            "rd_loss_unrefined": figures["rd_loss_unrefined"],
        }

    # ------------------------------------------------------------------------------------------------- decode

    def decode(self, data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Decoded:
        """Decode a .sga file.

        Raises
        ------
        FormatError
            When it is not a .sga file, is damaged, or has more than `max_pixels` pixels.
        ModelNotFoundError, ModelError
            When the model it needs is not there.
        """
        start = time.perf_counter()
        file = bitstream.read(data, max_pixels)
        _check_padded_size(file.width, file.height, max_pixels)
        level = self.levels.for_decoding(file)
        received = latents.unpack(level, file.z, file.y, file.height, file.width)
        pixels = latents.render(level, received, file.height, file.width)
        _trace("z, y", received.digest().encode())
        _trace("pixels", pixels.tobytes())
        alpha = None if file.alpha is None else decode_alpha(file.alpha, file.width, file.height)
        picture = Picture(to_grey(pixels) if file.grey else pixels, file.grey, alpha, file.icc, file.exif, file.xmp)
        report = {
            "width": file.width,
            "height": file.height,
            "model": level.model_name,
            "model_id": level.model_id,
            "level": file.level,
            "lambda": level.lmbda,
            "integers": received.digest(),
            "seconds": round(time.perf_counter() - start, 3),
            "device": str(self.device),
        }
        return Decoded(picture, report)


def encode(
    source: str | os.PathLike[str] | Picture, settings: Settings | None = None, *, model: str | None = None
) -> bytes:
    """The .sga file of one image: a path or a Picture; see `Codec` for many images or a choice of device."""
    picture = source if isinstance(source, Picture) else read_image(source)
    return Codec(model).encode([picture], settings)[0].data


def decode(source: str | os.PathLike[str] | bytes, *, model: str | None = None) -> Picture:
    """The picture in a .sga file: a path, or its content."""
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    return Codec(model).decode(data).picture


def _check_padded_size(width: int, height: int, max_pixels: int) -> None:
    """Refuse slivers: 1 x 2²⁸ pixels are within the limit, but take the memory of 64 x 2²⁸."""
    if math.prod(padded_size(height, width)) > max(2 * max_pixels, _PADDED_MINIMUM):
        raise bitstream.FormatError(
            f"{width} x {height} pixels, padded to multiples of {HYPER_STRIDE}, are more than twice the limit of "
            f"{max_pixels} (--max-pixels raises it)"
        )


def _batches(pictures: Sequence[Picture]) -> list[list[int]]:
    """Indexes of the pictures that are refined together; one that needs tiles is alone."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, picture in enumerate(pictures):
        height, width, grey = batch_key(picture)
        alone = i if needs_tiles(height, width) else -1
        groups.setdefault((height, width, grey, alone), []).append(i)
    return list(groups.values())


def _trace(stage: str, content: bytes) -> None:
    """Log a hash of a decoding stage: what two machines compare when their pictures differ."""
    if log.isEnabledFor(logging.DEBUG):
        import hashlib

        log.debug("%s %s", stage, hashlib.sha256(content).hexdigest())
