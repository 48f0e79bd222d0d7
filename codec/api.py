"""The library: encode and decode, from pictures to files and back.

encode   picture ─► x ─analyse─► y, z ─refine─► y, z ─pack─► bytes ─► checked ─► .sga
decode   .sga ─read─► bytes ─unpack─► integers ─render─► pixels ─► picture
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np

from . import bitstream, latents
from .batching import batch_key, batch_size
from .bitstream import DEFAULT_MAX_PIXELS
from .device import device_of
from .encoding import encode_batch, encode_to_target
from .image import read_image
from .models.cache import LevelCache
from .networks.architecture import padded_size
from .picture import Picture, check_picture
from .rate_control import search
from .reading import Decoded, log_hash, picture_of, read_file
from .refine.loop import Progress, Trace, TracePoint
from .refine.steer import MissedLevelError
from .refine.tiles import needs_tiles
from .reports import decoding_report, encoding_report
from .settings import Settings
from .targets import Figures, has_target

__all__ = ["Codec", "Decoded", "Encoded", "Picture", "Progress", "Settings", "Trace", "TracePoint", "encode"]


@dataclass(frozen=True)
class Encoded:
    """The content of a .sga file, and the report of `Codec.encode`; `warnings` are one line each."""

    data: bytes
    report: dict[str, Any]
    warnings: tuple[str, ...] = ()


class Codec:
    """Encoder and decoder on one device, for any number of images: models and levels stay loaded between calls.

    Parameters
    ----------
    model : str, optional
        Name or path of the model. None: the best built-in one for the device and the method when encoding, the one
        that the file names when decoding.
    device : str
        "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:1".

    Attributes
    ----------
    levels : LevelCache
        Opens the level for settings (`for_encoding`) or for a parsed file (`for_decoding`).

    Raises
    ------
    ModelNotFoundError, ModelError
        When the named model does not exist or is damaged.
    ValueError
        When there is no such device.
    """

    def __init__(self, model: str | None = None, device: str = "auto") -> None:
        self.device = device_of(device)
        self.levels = LevelCache(model, self.device)

    def encode(
        self,
        pictures: Sequence[Picture],
        settings: Settings | None = None,
        *,
        rois: Sequence[np.ndarray | None] | None = None,
        progress: Callable[[Progress], None] | None = None,
        trace: Trace | None = None,
    ) -> list[Encoded]:
        """Encode pictures; those of one padded size are refined together as one batch.

        Parameters
        ----------
        pictures : sequence of Picture
            Of any sizes.
        settings : Settings, optional
            Default: `Settings()`.
        rois : sequence of ndarray (H, W) float or None
            Region of interest of each picture: weights of its pixels' distortion. With metric ms-ssim, pixels of weight
            0 are left out, and all others count alike.
        progress : callable
            Called with the state of the refinement every few steps.
        trace : Trace
            Records losses of one picture.

        Returns
        -------
        list of Encoded
            In the order of `pictures`. Reports hold width, height, bytes, bpp (of the whole file), psnr (dB, of the
            decoded 8-bit picture where alpha is not 0; None when lossless), lambda, level, model, model_id, method,
            classes, steps, seconds (of the whole batch, divided by its pictures), device, rd_loss and
            rd_loss_unrefined (λ·255²·MSE + payload bits per pixel; the latter of the file with method none, or where λ
            is steered to a target, of the latents that the refinement starts from).

        Raises
        ------
        ValueError
            When the settings contradict each other, or a weight map does not fit.
        ModelNotFoundError, ModelError
            When there is no model for λ, or it is damaged.
        ImageError
            When a picture's arrays have other types or shapes than `Picture` says.
        TargetError
            When a target cannot be reached. A `target_bpp` or `target_size` of more bits than the picture can use is a
            warning only.
        """
        settings = settings or Settings()
        settings.validate()
        for picture in pictures:
            check_picture(picture)
        maps = [None] * len(pictures) if rois is None else list(rois)
        if len(maps) != len(pictures):
            raise ValueError(f"{len(maps)} weight maps for {len(pictures)} pictures")
        if trace is not None and (
            len(pictures) != 1 or has_target(settings) or needs_tiles(*padded_size(*pictures[0].pixels.shape[:2]))
        ):
            raise ValueError("a trace is of one picture, refined without tiles and without a target")
        if trace is not None and trace.every < 1:
            raise ValueError(f"a trace is of every step or fewer, not {trace.every}")
        if has_target(settings):
            return [
                self._search(p, self._with_default_steps(settings, p), roi, progress)
                for p, roi in zip(pictures, maps, strict=True)
            ]
        level, plain = self.levels.for_encoding(settings), self.levels.for_encoding(settings.unrefined)
        results: dict[int, Encoded] = {}
        for group in _batches(pictures, settings, self.device.type == "cuda"):
            start = time.perf_counter()
            chosen = [pictures[i] for i in group]
            own = self._with_default_steps(settings, chosen[0])
            coded = encode_batch(level, chosen, [maps[i] for i in group], own, progress, trace, plain)
            seconds = (time.perf_counter() - start) / len(group)
            for i, (data, refinement) in zip(group, coded, strict=True):
                report = encoding_report(pictures[i], settings, refinement, data, seconds)
                results[i] = Encoded(data, report)
        return [results[i] for i in range(len(pictures))]

    def _with_default_steps(self, settings: Settings, picture: Picture) -> Settings:
        return settings.on_device(self.device.type, math.prod(padded_size(*picture.pixels.shape[:2])))

    def _search(
        self,
        picture: Picture,
        settings: Settings,
        roi: np.ndarray | None,
        progress: Callable[[Progress], None] | None,
    ) -> Encoded:
        def encode_at(chosen: Settings) -> Encoded:
            start = time.perf_counter()
            level = self.levels.for_encoding(chosen)

            def has_other_level(lmbda: float) -> bool:
                return self.levels.for_encoding(replace(chosen, lmbda=lmbda)) is not level

            try:
                if not has_target(chosen):
                    plain = self.levels.for_encoding(chosen.unrefined)
                    ((data, refinement),) = encode_batch(level, [picture], [roi], chosen, progress, plain=plain)
                else:
                    data, refinement = encode_to_target(level, picture, roi, chosen, progress, has_other_level)
            except MissedLevelError as missed:
                chosen = replace(chosen, lmbda=missed.lmbda)
                level = self.levels.for_encoding(chosen)
                if chosen.time_limit is not None:
                    left = chosen.time_limit - (time.perf_counter() - start)
                    chosen = replace(chosen, time_limit=max(1e-3, left))
                data, refinement = encode_to_target(level, picture, roi, chosen, progress, None, missed.begun)
            seconds = time.perf_counter() - start
            return Encoded(data, encoding_report(picture, chosen, refinement, data, seconds))

        def level_lambda(result: Encoded) -> float:
            return self.levels.for_encoding(replace(settings, lmbda=result.report["lambda"]).unrefined).lmbda

        def figures(result: Encoded) -> Figures:
            psnr = result.report["psnr"]
            file = bitstream.read(result.data, math.prod(picture.pixels.shape[:2]))
            metadata_bytes = sum(len(v) for v in (file.alpha, file.icc, file.exif, file.xmp) if v is not None)
            return Figures(
                size=len(result.data),
                bpp=result.report["bpp"],
                psnr=math.inf if psnr is None else psnr,
                metadata_bytes=metadata_bytes,
                overhead_bytes=len(result.data) - len(file.z) - len(file.y),
                level_lambda=level_lambda(result) if result.report["method"] == "none" else None,
                final_lambda=result.report["lambda"] if steered and result.report["method"] != "none" else None,
            )

        start = time.perf_counter()
        # With weights the changes that lower the loss are not those that lower the visible error.
        weighted_psnr = settings.target_psnr is not None and roi is not None
        tiled = needs_tiles(*padded_size(*picture.pixels.shape[:2]))
        has_last_pass = settings.refines and settings.has_default_schedule and settings.rounds != 0
        steered = (
            has_last_pass and not weighted_psnr and not (tiled and settings.rounds_after(settings.annealing_steps))
        )
        found, warning = search(settings, encode_at, figures, steered=steered)
        report = {**found.report, "seconds": round(time.perf_counter() - start, 3)}
        return Encoded(found.data, report, (warning,) if warning else ())

    def decode(self, data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Decoded:
        """Decode a .sga file.

        Parameters
        ----------
        data : bytes
            The content of the file.
        max_pixels : int
            Refuse a picture with more pixels.

        Returns
        -------
        Decoded
            The report holds width, height, model, model_id, level, lambda, integers (SHA-256 of the symbols of z and
            y, the same on every device), seconds and device.

        Raises
        ------
        FormatError
            When it is not a .sga file, is damaged, or has more than `max_pixels` pixels.
        ModelNotFoundError, ModelError
            When the model it needs is not there.
        """
        start = time.perf_counter()
        file = read_file(data, max_pixels)
        level = self.levels.for_decoding(file)
        received = latents.unpack(level, file.z, file.y, file.height, file.width)
        pixels = latents.render(level, received, file.height, file.width)
        log_hash("z, y", received.digest().encode())
        log_hash("pixels", pixels.tobytes())
        picture = picture_of(file, pixels)
        report = decoding_report(level, file, received.digest(), time.perf_counter() - start)
        return Decoded(picture, report)


def encode(
    source: str | os.PathLike[str] | BinaryIO | Picture, settings: Settings | None = None, *, model: str | None = None
) -> bytes:
    """Encode one image, a path, a file object or a Picture, to the content of a .sga file.

    `Codec` also takes batches and devices.

    Raises
    ------
    TypeError
        When `source` is none of these.
    ImageError
        When the image cannot be read.
    ValueError, TargetError, ModelNotFoundError, ModelError
        As `Codec.encode`.
    """
    if not isinstance(source, (str, os.PathLike, Picture)) and not hasattr(source, "read"):
        raise TypeError(f"encode takes a path, a file object or a Picture, not {type(source).__name__}")
    picture = source if isinstance(source, Picture) else read_image(source)
    return Codec(model).encode([picture], settings)[0].data


def _batches(pictures: Sequence[Picture], settings: Settings, cuda: bool) -> list[list[int]]:
    """Indexes of the pictures of each batch, of one padded size, and as many as `batch_size` says."""
    groups: dict[tuple[int, int, bool], list[int]] = {}
    for i, picture in enumerate(pictures):
        groups.setdefault(batch_key(picture), []).append(i)
    found = []
    for (height, width, _), group in groups.items():
        most = batch_size(height, width, cuda, settings)
        found += [group[first : first + most] for first in range(0, len(group), most)]
    return found
