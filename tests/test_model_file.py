"""Model files: what is written is read again, and one id stands for one decoder."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_model
import torch

from sgacodec.coding.hyper_decoder import MU_BITS, hyper_decode
from sgacodec.coding.tables import scale_thresholds
from sgacodec.models import catalogue as models
from sgacodec.models import file as model_file
from sgacodec.models.catalogue import (
    ModelError,
    ModelNotFoundError,
    find_model,
    list_models,
    read_by_id,
    read_info,
)
from sgacodec.models.export import export
from sgacodec.models.file import read_model, write_model
from sgacodec.models.level import Model
from sgacodec.models.verify import verify
from sgacodec.networks.architecture import Architecture

BUILT_IN = [*models.builtin_folder().glob("*.safetensors")]

# -------------------------------------------------------------------------------------------------- what is written


def test_round_trip(tiny: Model, tiny_path: Path, tmp_path: Path) -> None:
    """Writing and reading a model again gives the same parameters and id."""
    write_model(tiny, tmp_path / "new" / "copy.safetensors")
    again = read_model(tmp_path / "new" / "copy.safetensors")
    assert read_info(tmp_path / "new" / "copy.safetensors").metadata == read_info(tiny_path).metadata
    for (key, a), (_, b) in zip(tiny.gained.state_dict().items(), again.gained.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
    assert again.id == tiny.id
    assert not list((tmp_path / "new").glob("*.tmp"))
    assert read_info(tmp_path / "new" / "copy.safetensors").id == tiny.id


def test_export_is_sound(photograph: np.ndarray, tmp_path: Path) -> None:
    """Guards against training runs whose models `models verify` or a later version refuses."""
    model = tiny_model.exported(tiny_model.untrained(tiny_model.ARCHITECTURE, photograph, seed=5), photograph, levels=2)
    write_model(model, tmp_path / "m.safetensors")
    assert verify(tmp_path / "m.safetensors") == []
    assert read_model(tmp_path / "m.safetensors").id == model.id


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_export_of_mshyper(photograph: np.ndarray, tmp_path: Path) -> None:
    """Guards against an export that handles only the scales of `lite`, which are log σ."""
    gained = tiny_model.untrained(Architecture("mshyper", N=4, M=6, scale="linear"), photograph)
    model = tiny_model.exported(gained, photograph, levels=2)
    write_model(model, tmp_path / "m.safetensors")
    assert verify(tmp_path / "m.safetensors") == []
    assert read_model(tmp_path / "m.safetensors").h_s.kind == "linear"


def test_float_h_s_is_the_integer_one(tiny: Model) -> None:
    """Guards against refinement whose gradients are those of another hyper-decoder than the exact one."""
    level = tiny.at(1)
    k = torch.randint(-6, 7, (1, 8, 3, 3), generator=torch.Generator().manual_seed(0))
    index, mu = hyper_decode(level.exact.h_s, level.exact.gains, k)
    scale, mean = level.folded.networks.h_s(k + level.folded.density.median[None, :, None, None]).chunk(2, 1)
    assert float((mean - mu / 2**MU_BITS).abs().max()) < 0.02
    near = torch.bucketize(scale.double().contiguous(), torch.from_numpy(scale_thresholds()))
    assert float((near == index).double().mean()) > 0.99


def test_a_device_that_fails_the_self_test_decodes_on_the_cpu(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards against files that no other machine can decode: not every BLAS is exact in float64."""
    tested = []

    def exact_on(model: Model, device: torch.device) -> bool:
        tested.append(device.type)
        return device.type == "cpu"

    monkeypatch.setattr(Model, "exact_on", exact_on)
    model, other = replace(tiny), torch.device("meta")
    levels = [model.at(level, other) for level in (0, 1)]
    assert [level.device for level in levels] == [other, other]
    assert [level.exact.device.type for level in levels] == ["cpu", "cpu"]
    assert next(levels[0].folded.networks.g_s.parameters()).device == other
    assert tested == ["meta", "cpu"]
    assert [record.getMessage() for record in caplog.records] == [
        "meta does not compute exactly; the hyper-decoder runs on the CPU"
    ]


def test_a_model_that_fails_the_self_test_everywhere_is_not_opened(tiny: Model) -> None:
    """Guards against coding with entropy parameters that are not those of the model."""
    with pytest.raises(ModelError, match="recorded result"):
        replace(tiny, fingerprint="0" * 64).at(0)


def test_reading_leaves_the_random_state_alone(tiny_path: Path) -> None:
    """Guards against noise of refinement, and so files, that depend on whether the model was loaded before."""
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    read_model(tiny_path)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.slow  # minutes: a fresh derivation of every table of 64 levels
def test_built_in_models_are_sound() -> None:
    """Guards against releasing weights whose tables or id are wrong."""
    for path in BUILT_IN:
        assert verify(path) == []


def test_ids_of_the_built_in_models() -> None:
    """Guards against weights that are replaced without notice: no file coded with the old ones decodes afterwards."""
    ids = {info.path.stem: info.id for info in map(read_info, BUILT_IN)}
    assert ids == {"lite": "773b111e", "lite-refined": "5709c5cb"}


def test_built_in_models_have_a_digest_of_their_encoder() -> None:
    """Guards against releasing weights whose damage would show as poor files only."""
    for path in BUILT_IN:
        assert "encoder" in read_info(path).metadata


# ------------------------------------------------------------------------------------------------------------ the id


def id_after(tiny: Model, change: Callable[[Model], Model]) -> str:
    changed = change(tiny)
    return model_file.model_id(model_file.tensors_of(changed), changed.metadata)


def with_weight(model: Model, key: str) -> Model:
    gained = tiny_model.GainedHyperprior(model.gained.architecture, model.gained.anchors)
    gained.load_state_dict(model.gained.state_dict())
    gained.state_dict()[key].view(-1)[0] += 1
    return replace(model, gained=gained)


@pytest.mark.parametrize("key", ["g_a.linear.weight", "h_a.0.bias", "log_gain_y", "density.biases.0", "y_unit"])
def test_the_encoder_may_change_under_one_id(tiny: Model, key: str) -> None:
    """Guards against a better encoder for the same decoder that would make all old files undecodable."""
    assert id_after(tiny, lambda m: with_weight(m, key)) == tiny.id


@pytest.mark.parametrize("key", ["g_s.blocks.weight", "g_s.pixels.bias", "log_gain_d"])
def test_the_decoder_cannot_change_under_one_id(tiny: Model, key: str) -> None:
    """Guards against one file that decodes to two pictures."""
    assert id_after(tiny, lambda m: with_weight(m, key)) != tiny.id


@pytest.mark.parametrize("key", ["anchors", "architecture", "levels", "slopes"])
def test_metadata_that_decoding_needs_is_in_the_id(tiny: Model, key: str) -> None:
    """Guards against damaged metadata: decoding depends on these entries, although they are no tensors."""
    assert id_after(tiny, lambda m: replace(m, metadata={**m.metadata, key: [0]})) != tiny.id
    assert id_after(tiny, lambda m: replace(m, metadata={**m.metadata, "licence": "other"})) == tiny.id


def test_the_id_by_the_specification(tiny: Model, tiny_path: Path) -> None:
    """The id in the file is the one that docs/format.md defines."""
    import hashlib

    data = tiny_path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    metadata = json.loads(header.pop("__metadata__")["sgacodec"])
    needed = {key: metadata[key] for key in ("anchors", "architecture", "levels", "slopes")}
    text = json.dumps(needed, sort_keys=True, separators=(",", ":"))
    names = {"F16": "float16", "F32": "float32", "I16": "int16", "I32": "int32", "I64": "int64", "U8": "uint8"}
    digest = hashlib.sha256(text.encode())
    for key in sorted(header):
        if key.startswith(("exact.", "tables.", "trunk.g_s.", "trunk.log_gain_d")):
            shape = header[key]["shape"]
            shape_text = "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"
            begin, end = header[key]["data_offsets"]
            digest.update(f"{key}:torch.{names[header[key]['dtype']]}:{shape_text};".encode())
            digest.update(data[8 + size + begin : 8 + size + end])
    assert digest.hexdigest()[:8] == tiny.id == metadata["id"]


# --------------------------------------------------------------------------------------------------- finding a model


def test_finding_models(tiny: Model, tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against installed models that are not found, or are hidden by a broken file beside them."""
    monkeypatch.setenv("SGACODEC_MODELS", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match="tiny"):
        find_model("tiny")
    with pytest.raises(ModelNotFoundError, match=tiny.id) as error:
        read_by_id(bytes.fromhex(tiny.id), read_model)
    assert str(tmp_path) in str(error.value)
    shutil.copy(tiny_path, tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"not a model")
    assert find_model("tiny") == tmp_path / "tiny.safetensors"
    assert read_by_id(bytes.fromhex(tiny.id), read_model).name == "tiny"
    assert [info.name for info in list_models()][-1] == "tiny"
    assert find_model(str(tiny_path)) == tiny_path
    with pytest.raises(ModelNotFoundError):
        find_model(str(tmp_path / "no.safetensors"))


def test_export_refuses_nothing_silently(photograph: np.ndarray) -> None:
    """Guards against exporting a training run that diverged."""
    gained = tiny_model.untrained(tiny_model.ARCHITECTURE, photograph)
    gained.log_gain_y.data += 20
    with pytest.raises(ValueError, match="gain"):
        export(gained, "bad", {}, [torch.randn(1, 8, 2, 2)], 2)
