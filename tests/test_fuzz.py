"""Crafted files and models: refused in one line by both decoders, or decoded by both to the same integers."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from mutation import mutated_file, mutated_model, sealed
from tampering import contents

from sgacodec.api import Codec, Settings
from sgacodec.bitstream import FormatError
from sgacodec.decoder import model as reading
from sgacodec.decoder.decode import PictureDecoder
from sgacodec.models.catalogue import ModelError, ModelNotFoundError, read_info
from sgacodec.models.level import Model
from sgacodec.models.verify import verify
from sgacodec.picture import Picture

REFUSED = FormatError, ModelNotFoundError, ModelError
PLAIN = Settings(method="none")
MAX_PIXELS = 2**18
PARTS = 10  # tests of 30 models each


def refused(error: Exception) -> str:
    assert str(error)
    assert "\n" not in str(error)
    return "refused"


def outcome(decoder: Codec | PictureDecoder, data: bytes) -> str:
    """Digest of the integers, or "refused"; any exception but the documented ones passes through."""
    try:
        decoded = decoder.decode(data, max_pixels=MAX_PIXELS)
    except REFUSED as error:
        return refused(error)
    assert decoded.picture.pixels.size
    return str(decoded.report["integers"])


def check_file(seed: int, files: list[bytes], decoders: list[Codec | PictureDecoder]) -> str:
    chance = random.Random(seed)
    data = mutated_file(chance, chance.choice(files))
    results = {outcome(decoder, data) for decoder in decoders}
    assert len(results) == 1, results
    return results.pop()


@pytest.fixture(scope="module")
def originals(context_path: Path, photograph: np.ndarray) -> list[bytes]:
    """A plain file, and a grey one with all sections."""
    codec = Codec(str(context_path), device="cpu")
    alpha = np.tile(np.arange(70, dtype=np.uint8), (40, 1))
    grey = np.repeat(photograph[:40, :70, :1], 3, 2)
    full = Picture(grey, grey=True, alpha=alpha, icc=None, exif=b"II*\0\x08\0\0\0\0\0\0\0\0\0", xmp=b"<x/>")
    return [codec.encode([p], PLAIN)[0].data for p in (Picture(photograph[:100, :130]), full)]


@pytest.fixture(scope="module")
def decoders(context_path: Path) -> list[Codec | PictureDecoder]:
    return [Codec(str(context_path), device="cpu"), PictureDecoder(str(context_path))]


def test_files(originals: list[bytes], decoders: list[Codec | PictureDecoder]) -> None:
    """Guards against crafted files that crash a service, or that two decoders show differently."""
    results = [check_file(seed, originals, decoders) for seed in range(300)]
    assert 200 < results.count("refused") < 296  # some changes do no harm


@pytest.mark.slow  # minutes: 10,000 files
def test_ten_thousand_files(originals: list[bytes], decoders: list[Codec | PictureDecoder]) -> None:
    for seed in range(1000, 11_000):
        check_file(seed, originals, decoders)


# ------------------------------------------------------------------------------------------------------------ models


@dataclass(frozen=True)
class Sound:
    """A model file before it is changed, and a file that needs it."""

    path: Path
    file: bytes


@pytest.fixture(scope="module")
def sound(tiny_path: Path, context_path: Path, photograph: np.ndarray) -> list[Sound]:
    picture = Picture(photograph[:40, :70])
    paths = tiny_path, context_path
    return [Sound(path, Codec(str(path), device="cpu").encode([picture], PLAIN)[0].data) for path in paths]


def check_model(seed: int, model: Sound, path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The integers of a file under a changed model, or "refused"."""
    path.write_bytes(mutated_model(random.Random(seed), *contents(model.path)))
    with monkeypatch.context() as patch:
        if seed % 3:  # somebody who crafts weights can compute their fingerprint
            patch.setattr(Model, "exact_on", lambda self, device: True)
            patch.setattr(reading, "fingerprint", lambda prior: str(read_info(path).metadata["fingerprint"]))
        reference, found = used(path, model.file, torch=True), used(path, model.file, torch=False)
    assert reference in ("refused", found)  # which also looks at what only the encoder needs
    if seed % 10 == 0:
        assert all("\n" not in problem for problem in verify(path))
    return reference


def used(path: Path, file: bytes, torch: bool) -> str:
    """The outcome of decoding a file with a model; with torch, a picture is also encoded and decoded."""
    try:
        decoder = Codec(str(path), device="cpu") if torch else PictureDecoder(str(path))
        if isinstance(decoder, Codec):
            outcome(decoder, decoder.encode([Picture(np.full((20, 30, 3), 90, np.uint8))], PLAIN)[0].data)
        return outcome(decoder, sealed(file[:4] + bytes.fromhex(read_info(path).id) + file[8:-4]))
    except REFUSED as error:
        return refused(error)


@pytest.mark.parametrize("part", range(PARTS))
def test_models(part: int, sound: list[Sound], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against crafted models that crash a program, or with which two decoders show different pictures."""
    path = tmp_path / "model.safetensors"
    results = [check_model(s, sound[s % 2], path, monkeypatch) for s in range(30 * part, 30 * part + 30)]
    assert results.count("refused") > 10


@pytest.mark.slow  # minutes: 10,000 models
def test_ten_thousand_models(sound: list[Sound], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    for seed in range(1000, 11_000):
        check_model(seed, sound[seed % 2], path, monkeypatch)
