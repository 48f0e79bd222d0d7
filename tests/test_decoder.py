"""The decoder without torch against the reference: the same integers, pixels within 1/255."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors
from conftest import GOLDEN
from PIL import Image
from safetensors.numpy import load_file, save_file
from tampering import change_tensor, tampered
from tiny_model import exported, untrained

from sgacodec.api import Codec, Settings
from sgacodec.bitstream import FormatError
from sgacodec.coding import hyper_decoder
from sgacodec.coding.passes import fingerprint as reference_fingerprint
from sgacodec.decoder import layers, prior, synthesis, threads
from sgacodec.decoder import model as reading
from sgacodec.decoder.decode import PictureDecoder
from sgacodec.decoder.layers import layer_of
from sgacodec.decoder.model import read_model
from sgacodec.decoder.prior import fingerprint
from sgacodec.models import file as model_file
from sgacodec.models import recent
from sgacodec.models.catalogue import ModelError, ModelNotFoundError, read_info
from sgacodec.models.file import model_id, write_model
from sgacodec.models.file import read_model as read_reference
from sgacodec.models.level import Model
from sgacodec.networks.architecture import Architecture
from sgacodec.picture import Picture

PLAIN = Settings(method="none")
NETWORKS = ("exp", "linear", "groups")
saves_complex = pytest.mark.skipif(
    tuple(map(int, safetensors.__version__.split(".")[:2])) < (0, 7),
    reason="safetensors before 0.7 cannot save complex tensors",
)


@pytest.fixture(scope="module")
def with_body(photograph: np.ndarray) -> Model:
    """A small `lite` model whose g_s has a body with effect."""
    a = Architecture("lite", N=4, M=6, scale="exp", width=13, hidden=4, inner=4, body_width=4, body_blocks=2)
    model = untrained(a, photograph)
    for branch in (model.g_s.body[-1], model.g_s.filter[-1]):
        branch.weight.data.normal_(std=0.05)
    return exported(model, photograph)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory, contexts: dict[str, Model], with_body: Model) -> Iterator:
    """A function from the name of a small model to its file."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in (contexts | {"body": with_body}).items():
        write_model(model, folder / f"{name}.safetensors")
    return lambda name: folder / f"{name}.safetensors"


def both(path: Path, pixels: np.ndarray, lmbda: float = 0.0075, **fields: object) -> tuple[Picture, Picture]:
    """The picture that each decoder makes of one file; the integers must be equal, the pixels nearly."""
    codec = Codec(str(path), device="cpu")
    data = codec.encode([Picture(pixels, **fields)], Settings(lmbda=lmbda, method="none"))[0].data
    reference, found = codec.decode(data), PictureDecoder(str(path)).decode(data)
    for report in (reference.report, found.report):
        del report["seconds"]
    assert found.report == reference.report
    assert np.abs(found.picture.pixels.astype(int) - reference.picture.pixels).max() <= 1
    return found.picture, reference.picture


@pytest.mark.parametrize("case", ["colour", "grey-alpha", "context", "refined"])
def test_golden_files(case: str, tiny_path: Path, context_path: Path) -> None:
    """Files of format version 1 decode to the recorded integers without torch, too."""
    path = tiny_path if case in ("colour", "grey-alpha") else context_path
    decoded = PictureDecoder(str(path)).decode((GOLDEN / f"{case}.sga").read_bytes())
    assert decoded.report["integers"] == json.loads((GOLDEN / f"{case}.json").read_text("utf-8"))["integers"]
    with Image.open(GOLDEN / f"{case}.png") as shown:
        assert np.abs(np.array(shown).astype(int) - decoded.picture.pixels).max() <= 1


@pytest.mark.parametrize("name", [*NETWORKS, "body"])
@pytest.mark.parametrize("lmbda", [0.0016, 0.045])
def test_both_decoders_agree(name: str, lmbda: float, model_path, photograph: np.ndarray) -> None:
    """Guards against an error in one family, scale or order of passes that golden files do not cover."""
    both(model_path(name), photograph[100:230, 200:401], lmbda)


def test_the_built_in_model(lite_path: Path, photograph: np.ndarray) -> None:
    alpha = np.tile(np.arange(99, dtype=np.uint8), (77, 1))
    found, reference = both(lite_path, photograph[:77, :99], grey=False, alpha=alpha, exif=b"II*\0\x08\0\0\0\0\0")
    assert (found.alpha == reference.alpha).all()
    assert (found.exif, found.grey) == (reference.exif, reference.grey)


@pytest.mark.parametrize("name", [*NETWORKS, "body"])
def test_strips_and_tiles_change_nothing(
    name: str, model_path, photograph: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against seams in pictures of many megapixels, whose strips and tiles are forced on a small one here."""
    path = model_path(name)
    pixels = np.tile(photograph[:100, :90], (3, 3, 1))
    whole, _ = both(path, pixels)
    for tile, block in ((1, 1), (3, 7), (8, 50)):
        monkeypatch.setattr(prior, "_TILE", tile)
        monkeypatch.setattr(prior, "_BLOCK", block)
        both(path, pixels)
    for constant in ("_BODY", "_LATENTS", "_COLUMNS"):
        monkeypatch.setattr(synthesis, constant, 1)
    monkeypatch.setattr(synthesis, "_TILE", 128)
    monkeypatch.setattr(synthesis, "_BLOCK", 7)
    cut, _ = both(path, pixels)
    assert np.abs(cut.pixels.astype(int) - whole.pixels).max() <= 1
    assert (cut.pixels != whole.pixels).mean() < 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_saturated_networks(name: str, model_path, contexts: dict[str, Model]) -> None:
    """The self-test, whose symbols saturate activations, gives the result of the reference at every level."""
    model = read_model(model_path(name))
    for level in range(model.levels):
        assert fingerprint(model.prior(level)) == reference_fingerprint(contexts[name].prior(level))


def test_arithmetic_that_is_not_exact_is_noticed(model_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against pictures of noise on a machine whose GEMM rounds."""
    exact = prior.finished
    monkeypatch.setattr(prior, "finished", lambda layer, sums, bias=None: exact(layer, sums * (1 - 2.0**-20), bias))
    with pytest.raises(ModelError, match="does not give the recorded result"):
        read_model(model_path("exp"))


def test_sums_that_float64_cannot_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound of a layer is the largest that it can have, and no more."""
    monkeypatch.setattr(layers, "ACTIVATION_MAX", 2**37)  # so that three weights suffice
    bias, shift = np.zeros(1, np.int64), np.ones(1, np.uint8)
    fitting = np.full((1, 2, 1, 1), 32767, np.int16)
    layer_of(fitting, bias, shift, 0)
    with pytest.raises(ValueError, match=r"2\^53"):
        layer_of(np.full((1, 3, 1, 1), 32767, np.int16), bias, shift, 0)
    with pytest.raises(ValueError, match=r"2\^63"):
        layer_of(fitting, bias, shift, 1100)
    with pytest.raises(ValueError, match=r"2\^63"):
        layer_of(fitting, np.full(1, -(2**62), np.int64), shift, 0)
    with pytest.raises(ValueError, match="shift"):
        layer_of(fitting, bias, np.zeros(1, np.uint8), 0)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("exact.0.weight", lambda v: v[:-1]),
        ("exact.gains.mean", lambda v: -v),
        ("exact.thresholds", lambda v: v[::-1].copy()),
        ("exact.2.shift", lambda v: v * 0),
        ("tables.z.frequencies", lambda v: v[:-1]),
        ("tables.z.frequencies", lambda v: v + 1),
        ("tables.y.frequencies", lambda v: v[:, None]),
        ("tables.z.frequencies", lambda v: v[:, None]),
        ("trunk.g_s.pixels.weight", lambda v: v[:-1]),
        ("exact.context.1.near.weight", lambda v: v[:-1]),
        ("exact.gains.context", lambda v: v[:, :1]),
        ("exact.context.0.mix.bias", lambda v: v + 1),
    ],
)
def test_damaged_models_are_refused(
    key: str, change, model_path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a traceback, or a picture of noise, where a model of the right id breaks a limit of the format."""
    path = model_path("exp")
    tensors, info = load_file(path), read_info(path)
    tensors[key] = np.ascontiguousarray(change(tensors[key]))
    damaged = tmp_path / "damaged.safetensors"
    save_file(tensors, damaged, metadata={"sgacodec": json.dumps(info.metadata)})
    with pytest.raises(ModelError, match="the id is not that of the tensors"):
        read_model(damaged)
    monkeypatch.setattr(reading, "_id", lambda tensors, metadata: metadata["id"])
    monkeypatch.setattr(reading, "fingerprint", lambda prior: info.metadata["fingerprint"])
    with pytest.raises(ModelError, match="damaged model file"):
        read_model(damaged).at(0)


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E8M0", "F4", "BF16"])
def test_types_that_numpy_lacks_are_refused(kind: str, tiny_path: Path, tmp_path: Path) -> None:
    """Guards against a traceback from the reader of safetensors."""
    data = tiny_path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    entry = header["trunk.g_s.pixels.bias"]
    bits = 8 * (entry["data_offsets"][1] - entry["data_offsets"][0])
    entry |= {"dtype": kind, "shape": [bits // {"F4": 4, "BF16": 16}.get(kind, 8)]}
    changed = json.dumps(header).encode()
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(len(changed).to_bytes(8, "little") + changed + data[end:])
    with pytest.raises(ModelError, match="damaged model file"):
        read_model(damaged)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("pixels.bias", lambda v: v.long()),
        ("pixels.bias", lambda v: v > 0),
        pytest.param("pixels.bias", lambda v: v.cfloat(), marks=saves_complex),
        ("pixels.bias", lambda v: v.double() + 1e300),
        ("pixels.bias", lambda v: v.float() * float("nan")),
        ("unit", lambda v: v * 0),
        ("unit", lambda v: v.half() * 0),
        ("unit", lambda v: v * 0 + 1e13),
    ],
)
def test_both_readers_refuse_a_synthesis_that_the_format_excludes(key: str, change, model_path, tmp_path: Path) -> None:
    """Guards against noise from weights that are infinite in float32, and against models for one decoder only."""
    damaged = tmp_path / "damaged.safetensors"
    tampered(model_path("body"), damaged, change_tensor(f"trunk.g_s.{key}", change), new_id=True)
    for read in (read_model, read_reference):
        with pytest.raises(ModelError, match="damaged model file"):
            read(damaged)


def test_ids_agree(contexts: dict[str, Model], model_path) -> None:
    """Both readers hash the same bytes: a model that one accepts is not refused by the other."""
    tensors = load_file(model_path("groups"))
    metadata = contexts["groups"].metadata
    needed = {key: value for key, value in sorted(tensors.items()) if key.startswith(reading._PREFIXES)}
    import torch

    assert reading._id(needed, metadata) == metadata["id"]
    assert model_id({key: torch.from_numpy(value) for key, value in tensors.items()}, metadata) == metadata["id"]


def test_files_of_another_model_or_level(context_path: Path, tiny_path: Path) -> None:
    data = (GOLDEN / "colour.sga").read_bytes()
    with pytest.raises(ModelNotFoundError, match="the file needs the model with id"):
        PictureDecoder(str(context_path)).decode(data)
    with pytest.raises(ModelNotFoundError, match="which is not installed"):
        PictureDecoder().decode(data)
    with pytest.raises(FormatError, match="limit of 100 "):
        PictureDecoder(str(tiny_path)).decode(data, max_pixels=100)


def test_constants_are_those_of_the_reference() -> None:
    assert prior.MU_BITS == hyper_decoder.MU_BITS
    assert prior.UPSAMPLING == hyper_decoder.UPSAMPLING
    assert (reading._UNITS, reading._MAX_LOG_GAIN) == (model_file._UNITS, model_file._MAX_LOG_GAIN)


def test_decoding_imports_no_torch(tiny_path: Path) -> None:
    """Guards against decoding that takes seconds to start, and cannot without torch."""
    program = f"""
import sys
from sgacodec.decoder.decode import PictureDecoder
PictureDecoder({str(tiny_path)!r}).decode(open({str(GOLDEN / "colour.sga")!r}, "rb").read())
print([name for name in ("torch", "compressai") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", ["linear", "body", "groups"])
@pytest.mark.parametrize("side", [40, 200])
def test_threads_change_nothing(
    name: str, side: int, model_path, photograph: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against races and seams between the parts that threads decode, and against lost exceptions."""
    path, pixels = model_path(name), photograph[:side, :side]
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    assert threads.workers() == 1
    one, _ = both(path, pixels)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(synthesis, "_BODY", 1)
    monkeypatch.setattr(prior, "_TILE", 3)
    monkeypatch.setattr(prior, "_BLOCK", 7)
    assert threads.workers() == 3
    three, _ = both(path, pixels)
    assert np.abs(three.pixels.astype(int) - one.pixels).max() <= 1

    def fail(item: int) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        threads.each(fail, range(7))


def test_several_threads_share_a_decoder(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a race in a program whose threads open many pictures: the levels in memory replace each other."""
    monkeypatch.setattr(recent, "LEVELS_HELD", 1)
    decoder = PictureDecoder(str(tiny_path))
    files = {case: (GOLDEN / f"{case}.sga").read_bytes() for case in ("colour", "grey-alpha")}  # of two levels
    alone = {case: decoder.decode(data).report["integers"] for case, data in files.items()}
    load, loading, most = reading.ModelFile.at, [], []

    def at(self: reading.ModelFile, level: int) -> reading.DecoderModel:
        loading.append(level)
        most.append(len(loading))
        time.sleep(0.002)  # lets other threads run
        loading.pop()
        return load(self, level)

    monkeypatch.setattr(reading.ModelFile, "at", at)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda case: (case, decoder.decode(files[case]).report["integers"]), list(files) * 8))
    assert all(digest == alone[case] for case, digest in found)
    assert max(most) == 1
