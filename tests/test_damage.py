"""Files that are damaged, hostile or of another model: refused in one line, in bounded memory."""

from __future__ import annotations

import dataclasses
import random
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest

from sgacodec import api, bitstream
from sgacodec.api import Codec, Settings
from sgacodec.bitstream import FormatError
from sgacodec.models.catalogue import ModelNotFoundError
from sgacodec.models.level import Model
from sgacodec.picture import Picture

PLAIN = Settings(method="none")


def encode(codec: Codec, picture: Picture, settings: Settings = PLAIN) -> api.Encoded:
    return codec.encode([picture], settings)[0]


def sealed(data: bytes) -> bytes:
    """The file with a right checksum, as somebody would craft it."""
    return data[:-4] + zlib.crc32(data[:-4]).to_bytes(4, "little")


def test_every_changed_byte_and_every_truncation(small: Codec, photograph: np.ndarray) -> None:
    """Guards against damaged files that decode to a wrong picture without an error."""
    data = encode(small, Picture(photograph[:40, :50])).data
    assert len(data) < 2000
    for i in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            with pytest.raises(FormatError):
                small.decode(data[:i] + bytes([data[i] ^ flip]) + data[i + 1 :])
        with pytest.raises(FormatError):
            small.decode(data[:i])


def misbehaves(codec: Codec, data: bytes) -> bool:
    """Whether a file is refused in more than one line; any exception but the documented ones passes through."""
    try:
        codec.decode(data, max_pixels=2**18)
    except (FormatError, ModelNotFoundError) as error:
        return "\n" in str(error)
    return False


def test_damage_behind_a_right_checksum(small: Codec, photograph: np.ndarray) -> None:
    """Guards against crafted files that crash a service: anybody can compute the checksum."""
    alpha = np.zeros((40, 50), np.uint8)
    alpha[10:] = 255
    data = encode(small, Picture(photograph[:40, :50], alpha=alpha)).data
    chance = random.Random(4)
    for _ in range(150):
        changed = bytearray(data)
        for _ in range(chance.choice((1, 1, 2, 6))):
            changed[chance.randrange(4, len(changed) - 4)] = chance.randrange(256)
        end = chance.randrange(12, len(changed)) if chance.random() < 0.3 else len(changed)
        assert not misbehaves(small, sealed(bytes(changed[:end])))


@pytest.mark.slow  # 2,000 decodings of a photograph
def test_two_thousand_mutated_files(codec: Codec, photograph: np.ndarray) -> None:
    """Guards against rare damage of a real file that gives a traceback, hangs or takes all memory."""
    data = encode(codec, Picture(photograph[:256, :256])).data
    chance = random.Random(5)
    for i in range(2000):
        changed = bytearray(data)
        for _ in range(chance.choice((1, 1, 2, 6, 40))):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        part = bytes(changed[: chance.randrange(len(changed))]) if chance.random() < 0.3 else bytes(changed)
        assert not misbehaves(codec, sealed(part) if i % 2 and len(part) > 4 else part)


def test_unknown_model(codec: Codec, small: Codec, photograph: np.ndarray, tmp_path: Path, tiny_path: Path,
                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """The error for a model that is not installed names its id; files are never decoded with another model."""
    monkeypatch.setenv("SGACODEC_MODELS", str(tmp_path))
    data = encode(small, Picture(photograph[:30, :30])).data
    with pytest.raises(ModelNotFoundError, match=data[4:8].hex()):
        Codec(device="cpu").decode(data)
    with pytest.raises(ModelNotFoundError, match=data[4:8].hex()):
        codec.decode(data)
    shutil.copy(tiny_path, tmp_path)
    assert Codec(device="cpu").decode(data).picture.pixels.shape == (30, 30, 3)


def test_built_in_model_wins_over_a_user_model_of_its_name(tiny_path: Path, tmp_path: Path, tiny: Model,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Guards against a name that means one model with --model and another without."""
    from sgacodec.models.file import write_model

    write_model(dataclasses.replace(tiny, metadata={**tiny.metadata, "name": "lite"}), tmp_path / "lite.safetensors")
    monkeypatch.setenv("SGACODEC_MODELS", str(tmp_path))
    ids = {Codec(model, device="cpu").levels.for_encoding(PLAIN.lmbda).model_id for model in (None, "lite")}
    assert len(ids) == 1
    assert tiny.id not in ids


def test_level_that_the_model_does_not_have(small: Codec, photograph: np.ndarray) -> None:
    """Guards against tracebacks from a damaged level byte."""
    file = bitstream.read(encode(small, Picture(photograph[:30, :30])).data)
    for level in (3, 63):
        with pytest.raises(FormatError, match=f"level {level}"):
            small.decode(bitstream.write(dataclasses.replace(file, level=level)))


@pytest.mark.parametrize(("width", "height"), [(2**28, 1), (1, 2**28), (2**24, 16)])
def test_slivers(small: Codec, photograph: np.ndarray, width: int, height: int) -> None:
    """Guards against twenty bytes that take 64 times the memory that the pixel limit allows."""
    file = bitstream.read(encode(small, Picture(photograph[:30, :30])).data)
    with pytest.raises(FormatError, match="--max-pixels"):
        small.decode(bitstream.write(dataclasses.replace(file, width=width, height=height)))


def test_pixel_limit(small: Codec, photograph: np.ndarray) -> None:
    """The limit counts the pixels of the image, not those of its padding."""
    data = encode(small, Picture(photograph[:30, :40])).data
    assert small.decode(data, max_pixels=1200).picture.pixels.shape == (30, 40, 3)
    with pytest.raises(FormatError, match="--max-pixels"):
        small.decode(data, max_pixels=1199)


def test_wrong_size_for_the_payload(small: Codec, photograph: np.ndarray) -> None:
    """Guards against a wrong picture where the size in the header is not that of the payload."""
    file = bitstream.read(encode(small, Picture(photograph[:256, :256])).data)
    with pytest.raises(FormatError, match="damaged"):
        small.decode(bitstream.write(dataclasses.replace(file, width=64, height=64)))
