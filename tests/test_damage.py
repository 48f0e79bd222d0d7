"""Files that are damaged, hostile or of another model: refused in one line, in bounded memory."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tampering import CLEAR_PEAK, change_tensor, peak, tampered

from sgacodec import api, bitstream
from sgacodec.api import Codec, Settings
from sgacodec.bitstream import FormatError
from sgacodec.coding import context_model, hyper_decoder, range_coder
from sgacodec.decoder import prior
from sgacodec.decoder.decode import PictureDecoder
from sgacodec.memory import release_free_memory
from sgacodec.models.cache import LevelCache
from sgacodec.models.catalogue import ModelError, ModelNotFoundError
from sgacodec.models.level import Model
from sgacodec.picture import Picture

PLAIN = Settings(method="none")


def encode(codec: Codec, picture: Picture, settings: Settings = PLAIN) -> api.Encoded:
    return codec.encode([picture], settings)[0]


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


@pytest.mark.parametrize("decoder", [Codec, PictureDecoder])
def test_a_damaged_model_does_not_stand_before_a_sound_one(
    decoder: type[Codec | PictureDecoder], small: Codec, photograph: np.ndarray, tiny_path: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Guards against files that cannot be decoded because another model file states the id that they name."""
    monkeypatch.setenv("SGACODEC_MODELS", str(tmp_path))
    data = encode(small, Picture(photograph[:30, :30])).data
    tampered(tiny_path, tmp_path / "a.safetensors", change_tensor("exact.2.weight", lambda w: w ^ 1), new_id=False)
    with pytest.raises(ModelError, match="damaged model file"):
        decoder(None).decode(data)
    shutil.copy(tiny_path, tmp_path / "b.safetensors")
    assert decoder(None).decode(data).picture.pixels.shape == (30, 30, 3)


def test_built_in_model_wins_over_a_user_model_of_its_name(tiny_path: Path, tmp_path: Path, tiny: Model,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Guards against a name that means one model with --model and another without."""
    from sgacodec.models.file import write_model

    write_model(dataclasses.replace(tiny, metadata={**tiny.metadata, "name": "lite"}), tmp_path / "lite.safetensors")
    monkeypatch.setenv("SGACODEC_MODELS", str(tmp_path))
    ids = {Codec(model, device="cpu").levels.for_encoding(PLAIN).model_id for model in (None, "lite")}
    assert len(ids) == 1
    assert tiny.id not in ids


def test_only_built_in_models_are_chosen(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a user's model that replaces the built-in one on CUDA because of its name."""
    from sgacodec.models.file import write_model

    for name in ("mshyper-128", "mshyper-192"):
        model = dataclasses.replace(tiny, metadata={**tiny.metadata, "name": name})
        write_model(model, tmp_path / f"{name}.safetensors")
    monkeypatch.setenv("SGACODEC_MODELS", str(tmp_path))
    for device in ("cuda", "cpu"):
        for lmbda in (1e-4, PLAIN.lmbda):  # the first is below the anchors of all
            chosen = {
                method: LevelCache(None, torch.device(device)).model_for(Settings(lmbda=lmbda, method=method)).name
                for method in ("none", "ssl")
            }
            assert chosen == {"none": "lite", "ssl": "lite-refined"}


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


# ------------------------------------------------------------------------------- work that is bounded by the payload


@dataclasses.dataclass
class Work:
    """Positions of y that have been evaluated: by the hyper-decoder, and by all passes of the context model."""

    features: int = 0
    parameters: int = 0


def counted(monkeypatch: pytest.MonkeyPatch) -> Work:
    """Count the work of both decoders from now on."""
    work = Work()
    features, tile, outputs = hyper_decoder._features, prior._fill, context_model._Evaluation.outputs
    evaluation = prior._evaluation

    def count_features(h_s: Any, gains: Any, k: Any, box: hyper_decoder.Box) -> Any:
        work.features += (box[2] - box[0]) * (box[3] - box[1])
        return features(h_s, gains, k, box)

    def count_tiles(*given: Any) -> Iterator[tuple[int, ...]]:
        for box in tile(*given):
            work.features += (box[2] - box[0]) * (box[3] - box[1])
            yield box

    def count_outputs(self: Any, box: hyper_decoder.Box, w: int) -> Any:
        work.parameters += (box[2] - box[0]) * w
        return outputs(self, box, w)

    def count_evaluation(*given: Any) -> Callable[[np.ndarray], Any]:
        evaluate = evaluation(*given)

        def count(where: np.ndarray) -> Any:
            work.parameters += len(where)
            return evaluate(where)

        return count

    monkeypatch.setattr(hyper_decoder, "_features", count_features)
    monkeypatch.setattr(prior, "_fill", count_tiles)
    monkeypatch.setattr(context_model._Evaluation, "outputs", count_outputs)
    monkeypatch.setattr(prior, "_evaluation", count_evaluation)
    return work


def enlarged(codec: Codec, data: bytes, width: int, height: int) -> bytes:
    """A file that claims another size, with z of the right length for it and the y of the small picture."""
    file = bitstream.read(data)
    level = codec.levels.for_decoding(file)
    N, h, w = level.folded.architecture.N, -(-file.height // 64), -(-file.width // 64)
    symbols = range_coder.decode(file.z, np.repeat(np.arange(N), h * w), level.z_tables).reshape(N, h, w)
    H, W = -(-height // 64), -(-width // 64)
    symbols = np.ascontiguousarray(np.tile(symbols, (1, -(-H // h), -(-W // w)))[:, :H, :W])
    z = range_coder.encode(symbols.ravel(), np.repeat(np.arange(N), H * W), level.z_tables)
    return bitstream.write(dataclasses.replace(file, width=width, height=height, z=z))


@pytest.mark.parametrize(("decoder", "count"), [(Codec, 1), (PictureDecoder, 1), (PictureDecoder, 4)])
@pytest.mark.parametrize(("width", "height"), [(4096, 4096), (2**18, 64), (64, 2**18)])
@pytest.mark.parametrize("context", [False, True])
def test_work_is_bounded_by_the_payload(
    decoder: type[Codec | PictureDecoder], count: int, width: int, height: int, context: bool, tiny_path: Path,
    context_path: Path, photograph: np.ndarray, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Guards against a file of some kilobytes that keeps a machine busy for the pixels that it claims.

    Several threads evaluate a block each before the bytes are counted again.
    """
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", str(count))
    path = str(context_path if context else tiny_path)
    codec = Codec(path, device="cpu")
    small = encode(codec, Picture(photograph[:64, :128])).data
    data = enlarged(codec, small, width, height)
    other = decoder(path)
    other.decode(small)
    work = counted(monkeypatch)
    with pytest.raises(FormatError, match="too few entropy-coded bytes"):
        other.decode(data)
    assert 0 < work.features <= count * hyper_decoder._TILE * 1.05  # and what belongs to a margin
    assert work.parameters <= hyper_decoder._TILE
    assert width * height / 256 > 7 * hyper_decoder._TILE


@pytest.mark.parametrize("decoder", [Codec, PictureDecoder])
def test_a_short_z_is_refused_by_its_length(
    decoder: type[Codec | PictureDecoder], tiny_path: Path, photograph: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against memory for the symbols of z that an image of the claimed size would have."""
    path = str(tiny_path)
    data = encode(Codec(path, device="cpu"), Picture(photograph[:64, :64])).data
    file, other = bitstream.read(data), decoder(path)
    other.decode(data)
    work = counted(monkeypatch)
    monkeypatch.setattr(range_coder, "Decoder", None)
    with pytest.raises(FormatError, match="too few entropy-coded bytes"):
        other.decode(bitstream.write(dataclasses.replace(file, width=2**14, height=2**14)))
    assert work == Work()


BYTES_PER_PIXEL = 64  # of memory while a file is decoded, as docs/format.md states it


@pytest.mark.skipif(not CLEAR_PEAK.exists(), reason="the peak of the memory can be reset on Linux only")
@pytest.mark.parametrize(("width", "height"), [(1024, 512), (2**13, 64)])
def test_memory_per_claimed_pixel(width: int, height: int, codec: Codec, lite_path: Path) -> None:
    """Guards against pictures that an encoder makes, and no machine can decode; a flat one has the smallest file."""
    large, small = (
        encode(codec, Picture(np.full((h, w, 3), 128, np.uint8))).data for h, w in ((height, width), (64, 64))
    )
    for decoder in (codec, PictureDecoder(str(lite_path))):
        decoder.decode(small)
        release_free_memory()
        CLEAR_PEAK.write_text("5")
        before = peak()
        decoder.decode(large)
        assert peak() - before < 160 + BYTES_PER_PIXEL * width * height / 2**20
