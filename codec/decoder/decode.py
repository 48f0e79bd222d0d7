"""Decode .sga files with numpy: no torch, ready in a fraction of the time that importing torch takes.

.sga ─ reading ─► bytes ─ range coder, prior ─► integers ─ synthesis ─► pixels ─ reading ─► picture
"""

from __future__ import annotations

import hashlib
import threading
import time
from pathlib import Path

import numpy as np

from ..bitstream import DEFAULT_MAX_PIXELS, FormatError, SgaFile
from ..coding import range_coder
from ..models.catalogue import ModelNotFoundError, find_model, read_by_id
from ..models.recent import RecentlyUsed
from ..networks.architecture import HYPER_STRIDE, padded_size
from ..reading import Decoded, log_hash, picture_of, read_file
from .model import DecoderModel, ModelFile, read_model
from .prior import Pass, decode_passes
from .synthesis import render


class PictureDecoder:
    """A decoder on the CPU, for any number of files and threads: models and levels stay loaded between calls.

    Parameters
    ----------
    model : str, optional
        Name or path of the only model to use. None (or "auto"): the one that the file names.

    Raises
    ------
    ModelNotFoundError, ModelError
        When the named model does not exist or is damaged.
    """

    def __init__(self, model: str | None = None) -> None:
        self._lock = threading.Lock()
        self._files: dict[tuple[Path, int], ModelFile] = {}  # by path and time of change
        self._levels: RecentlyUsed[DecoderModel] = RecentlyUsed()
        self._named = None if model in (None, "auto") else self._read(find_model(str(model)))

    def decode(self, data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Decoded:
        """Decode a .sga file; parameters, result and errors are those of `Codec.decode`."""
        start = time.perf_counter()
        file = read_file(data, max_pixels)
        with self._lock:
            model = self._level(file)
        k_z, y = unpack(model, file.z, file.y, file.height, file.width)
        digest = digest_of(k_z, y[0])
        log_hash("z, y", digest.encode())
        pixels = render(model, y, file.height, file.width)
        log_hash("pixels", pixels.tobytes())
        report = {
            "width": file.width,
            "height": file.height,
            "model": model.name,
            "model_id": model.id,
            "level": file.level,
            "lambda": model.lmbda,
            "integers": digest,
        }
        picture = picture_of(file, pixels)
        report |= {"seconds": round(time.perf_counter() - start, 3), "device": "cpu"}
        return Decoded(picture, report)

    def _level(self, file: SgaFile) -> DecoderModel:
        wanted = file.model_id.hex()
        model = self._named or read_by_id(file.model_id, self._read)
        if model.id != wanted:
            raise ModelNotFoundError(
                f"the file needs the model with id {wanted}, but {model.metadata['name']} has id {model.id}"
            )
        if file.level >= model.levels:
            raise FormatError(f"damaged: level {file.level} of a model with {model.levels} levels")
        return self._levels.get((model.id, file.level), lambda: model.at(file.level))

    def _read(self, path: Path) -> ModelFile:
        key = path, path.stat().st_mtime_ns
        if key not in self._files:
            self._files[key] = read_model(path)
        return self._files[key]


def unpack(model: DecoderModel, z: bytes, y: bytes, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Decode the integers of an image: symbols of z (N, h, w) int32; symbols and means of y (2, 4h, 4w, M) int32.

    Refuses bytes that are too few for the claimed size as early as `latents.unpack` does.

    Raises
    ------
    FormatError
        When the bytes are not those of an image of this size.
    """
    h, w = (side // HYPER_STRIDE for side in padded_size(height, width))
    N = model.architecture.N
    range_coder.check_size(z, range_coder.shortest(np.full(N, h * w), model.z_tables))
    k_z = range_coder.decode(z, np.repeat(np.arange(N), h * w), model.z_tables).reshape(N, h, w)
    decoder, least = range_coder.Decoder(y), 0

    def seen(index: np.ndarray) -> None:
        nonlocal least
        least += range_coder.shortest(np.bincount(index.ravel(), minlength=len(model.y_tables)), model.y_tables)
        range_coder.check_size(y, least)

    def symbols_of(one: Pass) -> np.ndarray:
        index = np.ascontiguousarray(one.index.T)
        return decoder.pull(index.ravel(), model.y_tables).reshape(index.shape).T

    found = decode_passes(model.prior, k_z, symbols_of, seen)
    decoder.finish()
    return k_z, found


def digest_of(k_z: np.ndarray, k_y: np.ndarray) -> str:
    """SHA-256 of the symbols of z (N, h, w) and y (4h, 4w, M), as `Latents.digest`."""
    content = hashlib.sha256(np.ascontiguousarray(k_z, "<i4").data)
    content.update(np.ascontiguousarray(k_y.transpose(2, 0, 1), "<i4").data)
    return content.hexdigest()
