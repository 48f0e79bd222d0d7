"""A codec and images for sweeps, which take no time."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from sgacodec import bitstream, metrics
from sgacodec.api import Settings, Trace, TracePoint
from sgacodec.bitstream import SgaFile
from sgacodec.picture import Picture

UNREADABLE_RED = 14  # value of the first pixel that the fake cannot encode


class FakeCodec:
    """Has the interface of sgacodec.api.Codec: quantizes pixels by a step that depends on λ, and deflates them.

    Files of method "none" are padded by one byte, so that "refinement" has a gain.
    """

    def __init__(self, model: str | None = None, device: str = "auto", model_id: str = "01020304") -> None:
        self.model_id = model_id
        self.device = SimpleNamespace(type="cpu")
        model = SimpleNamespace(name="fake", id=model_id)
        self.levels = SimpleNamespace(model_for=lambda settings: model)
        self.encoded: list[tuple[int, Settings]] = []  # sum of the pixels, settings
        self.stop_after = math.inf

    def encode(self, pictures: Sequence[Picture], settings: Settings, trace: Trace | None = None) -> list[Any]:
        if trace is not None:
            trace.record(0, TracePoint(step=0, true_loss=2.0, relaxed_loss=None, bpp=1.0, psnr=30.0))
            trace.record(0, TracePoint(step=10, true_loss=1.0, relaxed_loss=2.5, bpp=0.5, psnr=30.0))
        return [self._encode(picture, settings) for picture in pictures]

    def _encode(self, picture: Picture, settings: Settings) -> Any:
        pixels = picture.pixels
        if len(self.encoded) >= self.stop_after:
            raise KeyboardInterrupt
        self.encoded.append((int(pixels.sum()), settings))
        if pixels[0, 0, 0] == UNREADABLE_RED:
            raise RuntimeError("not enough\nmemory")
        step = round(0.3 / math.sqrt(settings.lmbda))
        level = int(1000 * settings.lmbda)
        packed = zlib.compress(bytes([step]) + (pixels // step).tobytes())
        packed += b"\0" * (1 if settings.method == "none" else 0)
        height, width = pixels.shape[:2]
        file = SgaFile(bytes.fromhex(self.model_id), level, width, height, b"z", packed, icc=picture.icc)
        decoded = np.clip((pixels // step).astype(int) * step + step // 2, 0, 255).astype(np.uint8)
        bare = 8 * (1 + len(packed)) / (height * width)
        loss = metrics.rd_loss(bare, metrics.mse(pixels, decoded), settings.lmbda)
        wasted = 0 if settings.method == "none" else 8 / (height * width)
        figures = {"rd_loss": loss, "rd_loss_unrefined": loss + wasted, "device": "cpu", "level": level}
        return SimpleNamespace(data=bitstream.write(file), report=figures)

    def decode(self, data: bytes, *, max_pixels: int) -> Any:
        file = bitstream.read(data, max_pixels)
        stored = zlib.decompressobj().decompress(file.y)
        step = stored[0]
        coarse = np.frombuffer(stored[1:], np.uint8).reshape(file.height, file.width, 3).astype(int)
        return SimpleNamespace(picture=Picture(np.clip(coarse * step + step // 2, 0, 255).astype(np.uint8)), report={})


def write_image(path: Path, seed: int, height: int = 48, width: int = 40, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(20, 236, (height // 4, width // 4, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(path, **options)
    return path
