"""Model files: damage is refused in one line, and one id stands for one decoder."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from sgacodec.coding.hyper_decoder import MU_BITS, hyper_decode
from sgacodec.coding.tables import scale_thresholds
from sgacodec.models import catalogue as models
from sgacodec.models import file as model_file
from sgacodec.models.catalogue import (
    ModelError,
    ModelNotFoundError,
    find_model,
    find_model_by_id,
    list_models,
    read_info,
)
from sgacodec.models.export import export
from sgacodec.models.file import read_model, write_model
from sgacodec.models.level import Model
from sgacodec.models.verify import verify
from sgacodec.networks.architecture import Architecture

Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], None]


def contents(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with safe_open(str(path), "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["sgacodec"])  # noqa: SIM118


def tampered(path: Path, target: Path, change: Change, *, new_id: bool) -> Path:
    """A changed copy; with `new_id` under the right id, as by somebody who knows how it is computed."""
    tensors, metadata = contents(path)
    change(tensors, metadata)
    if new_id:
        with contextlib.suppress(KeyError):  # no id can be computed
            metadata["id"] = model_file.model_id(tensors, metadata)
    data = save({k: v.contiguous() for k, v in sorted(tensors.items())}, metadata={"sgacodec": json.dumps(metadata)})
    target.write_bytes(data)
    return target


# -------------------------------------------------------------------------------------------------- what is written


def test_round_trip(tiny: Model, tiny_path: Path, tmp_path: Path) -> None:
    """Writing and reading a model again gives the same parameters and id."""
    write_model(tiny, tmp_path / "new" / "copy.safetensors")
    again = read_model(tmp_path / "new" / "copy.safetensors")
    assert contents(tmp_path / "new" / "copy.safetensors")[1] == contents(tiny_path)[1]
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
    for path in models.builtin_folder().glob("*.safetensors"):
        assert verify(path) == []


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


# ------------------------------------------------------------------------------------------------- damage, tampering


def assert_refused(path: Path) -> None:
    with pytest.raises(ModelError) as error:
        read_model(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@given(st.data())
def test_changed_bytes(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject) -> None:
    """Guards against damage that crashes with a traceback, or changes what every file decodes to."""
    data = bytearray(tiny_path.read_bytes())
    (size,) = struct.unpack("<Q", data[:8])
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    at = draw.draw(st.one_of(st.integers(0, 8 + size - 1), st.integers(0, len(data) - 1)))
    data[at] ^= draw.draw(st.integers(1, 255))
    path.write_bytes(data)
    try:
        model = read_model(path)
        model.at(0)  # whatever is left unnoticed does not concern decoding
    except ModelError:
        return
    assert model.id == model_file.model_id(model_file.tensors_of(model), model.metadata)


def test_truncated_foreign_empty_missing(tiny_path: Path, tmp_path: Path) -> None:
    """Guards against tracebacks after a broken download or a wrong path."""
    data = tiny_path.read_bytes()
    path = tmp_path / "bad.safetensors"
    pieces = [data[:n] for n in (0, 1, 7, 8, 9, 100, 5000, 20_000, len(data) // 2, len(data) - 1)]
    foreign = [b"\x89PNG\r\n\x1a\n" + bytes(100), b"\xff" * 100, bytes(100), data + b"more"]
    header = json.dumps({"__metadata__": {"sgacodec": "[]"}}).encode()
    foreign += [struct.pack("<Q", len(header)) + header, struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 2) + b"[]"]
    foreign += [struct.pack("<Q", 4_000_000) + b"[" * 4_000_000]
    for content in pieces + foreign:
        path.write_bytes(content)
        assert_refused(path)
    assert_refused(tmp_path / "missing.safetensors")
    assert_refused(tmp_path)


def set_tensor(key: str, value: torch.Tensor) -> Change:
    return lambda tensors, _: tensors.__setitem__(key, value)


def change_tensor(key: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors, _: tensors.__setitem__(key, function(tensors[key]))


def set_metadata(key: str, value: Any) -> Change:
    return lambda _, metadata: metadata.__setitem__(key, value)


def drop(key: str) -> Change:
    return lambda tensors, _: tensors.__delitem__(key)


INVALID: dict[str, Change] = {
    "float weights": change_tensor("exact.0.weight", lambda w: w.float() + 0.5),
    "a sum that overflows": set_tensor("exact.0.bias", torch.full((8,), 2**62)),
    "shift 0": change_tensor("exact.1.shift", torch.zeros_like),
    "another kernel": set_tensor("exact.0.weight", torch.zeros(8, 8, 3, 3, dtype=torch.int16)),
    "huge gain": change_tensor("exact.gains.mean", lambda g: g + 2**40),
    "huge offset": change_tensor("exact.gains.z_offset", lambda g: g - 2**60),
    "gains of another size": change_tensor("exact.gains.scale", lambda g: g[:, 1:]),
    "one level too few": change_tensor("exact.gains.scale", lambda g: g[1:]),
    "float frequencies": change_tensor("tables.y.frequencies", lambda f: f.float()),
    "negative lengths": change_tensor("tables.z.lengths", lambda n: -n),
    "a table too few": lambda t, _: t.update({k: v[:, 1:] for k, v in t.items() if k in ("tables.y.minimum",)}),
    "a frequency moved": change_tensor("tables.y.frequencies", lambda f: f.roll(1)),
    "thresholds missing": drop("exact.thresholds"),
    "float thresholds": change_tensor("exact.thresholds", lambda t: t.double()),
    "an unknown tensor": set_tensor("trunk.extra", torch.zeros(1)),
    "a missing tensor": drop("trunk.g_s.pixels.bias"),
    "a tensor of another shape": set_tensor("trunk.g_s.pixels.bias", torch.zeros(5)),
    "slopes that are text": set_metadata("slopes", ["a", "b", "c"]),
    "infinite slope": set_metadata("slopes", [float("inf")] * 3),
    "too few slopes": set_metadata("slopes", [655]),
    "too few bits": set_metadata("bits", [9]),
    "absurd bits": set_metadata("bits", [10**400, 1, 1]),
    "anchors that descend": set_metadata("anchors", [0.045, 0.0075, 0.0016]),
    "anchors that are text": set_metadata("anchors", "abc"),
    "too few anchors": set_metadata("anchors", [0.01]),
    "levels": set_metadata("levels", 4),
    "architecture": set_metadata("architecture", {"family": "lite"}),
    "architecture that is a list": set_metadata("architecture", [1]),
    "another architecture": lambda _, m: m["architecture"].update(N=9),
    "no architecture": lambda _, m: m.__delitem__("architecture"),
}


@pytest.mark.parametrize("change", INVALID.values(), ids=INVALID.keys())
@pytest.mark.parametrize("new_id", [False, True], ids=["old id", "right id"])
def test_invalid_models_are_refused(tiny_path: Path, tmp_path: Path, change: Change, new_id: bool) -> None:
    """Guards against overflow in the integer networks, from hostile files or faulty exporters."""
    path = tampered(tiny_path, tmp_path / "m.safetensors", change, new_id=new_id)
    assert_refused(path)
    assert verify(path)


TAMPERED: dict[str, Change] = {
    "a weight of g_s": change_tensor("trunk.g_s.blocks.weight", lambda w: w + 1),
    "an integer weight": change_tensor("exact.2.weight", lambda w: w ^ 1),
    "a frequency": change_tensor("tables.y.frequencies", lambda f: f + swap(f)),
    "a minimum": change_tensor("tables.z.minimum", lambda m: m + 1),
    "a threshold": change_tensor("exact.thresholds", lambda t: t + 100),
    "a gain": change_tensor("exact.gains.mean", lambda g: g + 100_000),
    "a slope": set_metadata("slopes", [656, 655, 0]),
}


def swap(frequencies: torch.Tensor) -> torch.Tensor:
    """A change that leaves the first table's sum as it is."""
    change = torch.zeros_like(frequencies)
    change[1], change[2] = -100, 100
    return change


@pytest.mark.parametrize("change", TAMPERED.values(), ids=TAMPERED.keys())
def test_verify_finds_what_was_tampered_with(tiny_path: Path, tmp_path: Path, change: Change) -> None:
    """`models verify` reports every change of a tensor or a decoding parameter."""
    assert verify(tiny_path) == []
    path = tampered(tiny_path, tmp_path / "old.safetensors", change, new_id=False)
    assert_refused(path)
    assert verify(path)


@pytest.mark.parametrize("name", [n for n in TAMPERED if n not in ("a weight of g_s",)])
def test_verify_derives_anew(tiny_path: Path, tmp_path: Path, name: str) -> None:
    """Guards against trusting a recomputed id: tables and gains must be those of the densities in the file."""
    path = tampered(tiny_path, tmp_path / "new.safetensors", TAMPERED[name], new_id=True)
    problems = verify(path)
    assert problems
    assert all("\n" not in problem for problem in problems)


# --------------------------------------------------------------------------------------------------- finding a model


def test_finding_models(tiny: Model, tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against installed models that are not found, or are hidden by a broken file beside them."""
    monkeypatch.setenv("SGACODEC_MODELS", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match="tiny"):
        find_model("tiny")
    with pytest.raises(ModelNotFoundError, match=tiny.id) as error:
        find_model_by_id(bytes.fromhex(tiny.id))
    assert str(tmp_path) in str(error.value)
    shutil.copy(tiny_path, tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"not a model")
    assert find_model("tiny") == tmp_path / "tiny.safetensors"
    assert find_model_by_id(bytes.fromhex(tiny.id)).path == tmp_path / "tiny.safetensors"
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
