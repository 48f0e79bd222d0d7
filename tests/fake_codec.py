"""A codec that keeps the contract of sgacodec.api without torch and weights: pixels are deflated.

The command line is tested with it, since what is asked there is names, streams, signals and exit codes. Run
as a script, this file is the command line with it: `python tests/fake_codec.py encode in.png out.sga`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import types
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from sgacodec import bitstream
from sgacodec.bitstream import FormatError, SgaFile
from sgacodec.models.catalogue import ModelNotFoundError
from sgacodec.picture import ImageError, Picture
from sgacodec.settings import Settings

MODEL_ID = b"\x01\x02\x03\x04"
DEADLY_ONCE_RED = 12  # the same, if the file named FAKE_DEAD does not exist; it is made
DEADLY_RED = 13  # value of the first pixel that kills the process, as running out of memory does
BAD_RED = 14  # value of the first pixel that cannot be encoded


@dataclass(frozen=True)
class Encoded:
    data: bytes
    report: dict[str, Any]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decoded:
    picture: Picture
    report: dict[str, Any]


@dataclass(frozen=True)
class Progress:
    step: int
    steps: int
    bpp: float
    psnr: float
    images: int = 1


CALLS: list[tuple[Settings, int, Any, Any]] = []  # settings, number of pictures, rois and pictures of encode's calls
OPENED: list[tuple[str | None, str]] = []


class Codec:
    def __init__(self, model: str | None = None, device: str = "auto") -> None:
        OPENED.append((model, device))
        self.device = types.SimpleNamespace(type=device.partition(":")[0].replace("auto", "cpu"))
        if model == "missing":
            raise ModelNotFoundError("no model named 'missing' (looked in /nowhere)")

    def encode(self, pictures: Any, settings: Settings, *, rois: Any = None, progress: Any = None) -> list[Encoded]:
        CALLS.append((settings, len(pictures), rois, pictures))
        if "FAKE_READY" in os.environ:
            open(os.environ["FAKE_READY"], "w").close()
        for step in range(int(os.environ.get("FAKE_STEPS", "0"))):
            if progress is not None:
                progress(Progress(step, 100, 0.5, 30.0, len(pictures)))
            time.sleep(0.1)  # longer than the progress bar takes to be drawn again
        return [_encode(picture, settings) for picture in pictures]

    def decode(self, data: bytes, *, max_pixels: int) -> Decoded:
        file = bitstream.read(data, max_pixels)
        if file.model_id != MODEL_ID:
            raise ModelNotFoundError(f"no model with id {file.model_id.hex()} (looked in /nowhere)")
        try:
            pixels = np.frombuffer(zlib.decompress(file.y), np.uint8).reshape(file.height, file.width, 3)
        except (ValueError, zlib.error):
            raise FormatError("the payload of y is damaged") from None
        report = {
            "width": file.width,
            "height": file.height,
            "model": "fake",
            "model_id": "01020304",
            "level": 0,
        }
        return Decoded(Picture(pixels), {**report, "seconds": 0.0, "device": "cpu"})


def _encode(picture: Picture, settings: Settings) -> Encoded:
    if picture.pixels[0, 0, 0] == DEADLY_RED:
        os._exit(9)
    if picture.pixels[0, 0, 0] == DEADLY_ONCE_RED:
        with contextlib.suppress(FileExistsError):
            open(os.environ["FAKE_DEAD"], "x").close()
            os._exit(9)
    if picture.pixels[0, 0, 0] == BAD_RED:
        raise ImageError("this picture cannot be encoded")
    height, width = picture.pixels.shape[:2]
    data = bitstream.write(SgaFile(MODEL_ID, 0, width, height, b"z", zlib.compress(picture.pixels.tobytes())))
    report: dict[str, Any] = {"width": width, "height": height, "bytes": len(data)}
    report |= {"bpp": 8 * len(data) / (width * height), "psnr": float("inf"), "lambda": settings.lmbda}
    report |= {"level": 0, "model": "fake", "model_id": "01020304", "method": settings.method}
    report |= {"classes": settings.rounding_classes, "steps": settings.annealing_steps, "seconds": 0.0, "device": "cpu"}
    return Encoded(data, {**report, "rd_loss": np.float32(1.5), "rd_loss_unrefined": 2.0})


def decoding() -> types.ModuleType:
    """Return a module to stand in for sgacodec.decoding."""
    module = types.ModuleType("sgacodec.decoding")
    module.MANY = 1000  # type: ignore[attr-defined]
    module.open_decoder = lambda model, device, pixels: Codec(model, device)  # type: ignore[attr-defined]
    return module


def install() -> types.ModuleType:
    """Return a module to stand in for sgacodec.api."""
    module = types.ModuleType("sgacodec.api")
    for value in (Settings, Encoded, Decoded, Progress, Codec):
        setattr(module, value.__name__, value)
    return module


def stand_in() -> None:
    """Replace sgacodec.api, and torch, in this process."""
    for value in (Settings, Encoded, Decoded, Progress, Codec):
        value.__module__ = "sgacodec.api"  # so that they can be pickled
    sys.modules["sgacodec.api"] = install()
    sys.modules["sgacodec.decoding"] = decoding()
    sys.modules["torch"] = torch = types.ModuleType("torch")  # importing the real one takes seconds
    torch.get_num_threads, torch.set_num_threads = lambda: 2, lambda count: None  # type: ignore[attr-defined]


if __name__ in ("__main__", "__mp_main__"):  # also in the processes of --jobs
    stand_in()

if __name__ == "__main__":
    from sgacodec.cli import main

    main(prog_name="sgacodec")
