"""Model files that are damaged or tampered with: refused in one line, or reported by `models verify`."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tampering import Change, assert_refused, change_tensor, drop, set_metadata, set_tensor, tampered

from sgacodec.models import file as model_file
from sgacodec.models.catalogue import ModelError
from sgacodec.models.file import read_model
from sgacodec.models.verify import verify


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
    "endless branches": lambda _, m: m["architecture"].update(deep_width=1024, deep_blocks=1024),
    "branches without channels": lambda _, m: m["architecture"].update(body_width=0, body_blocks=2),
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
