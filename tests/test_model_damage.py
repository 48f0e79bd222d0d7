"""Model files that are damaged or tampered with: refused in one line, or reported by `models verify`."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model
import torch
from hypothesis import given
from hypothesis import strategies as st
from tampering import CLEAR_PEAK, Change, assert_refused, change_tensor, drop, peak, set_metadata, set_tensor, tampered

from sgacodec.latents import analyse
from sgacodec.models import file as model_file
from sgacodec.models.catalogue import ModelError, read_info
from sgacodec.models.file import read_model
from sgacodec.models.level import Model
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


@pytest.mark.parametrize("missing", [1, 10_000])
def test_a_truncated_model_is_no_model(tiny_path: Path, tmp_path: Path, missing: int) -> None:
    """Guards against `models list` that shows an interrupted download as a model that can be used."""
    data = tiny_path.read_bytes()
    (tmp_path / "m.safetensors").write_bytes(data[:-missing])
    with pytest.raises(ModelError, match=f"truncated, {len(data) - missing} bytes of {len(data)}"):
        read_info(tmp_path / "m.safetensors")


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
    "lengths of another shape": change_tensor("tables.y.lengths", lambda n: n[None]),
    "frequencies of another shape": change_tensor("tables.y.frequencies", lambda f: f[:, None]),
    "64-bit minima": change_tensor("tables.y.minimum", lambda m: torch.full_like(m, -(2**63), dtype=torch.int64)),
    "float minima": change_tensor("tables.z.minimum", lambda m: m.float() * float("nan")),
    "thresholds missing": drop("exact.thresholds"),
    "thresholds whose differences wrap": change_tensor("exact.thresholds", lambda t: wrapping(t)),
    "float thresholds": change_tensor("exact.thresholds", lambda t: t.double()),
    "an unknown tensor": set_tensor("trunk.extra", torch.zeros(1)),
    "a missing tensor": drop("trunk.g_s.pixels.bias"),
    "a tensor of another shape": set_tensor("trunk.g_s.pixels.bias", torch.zeros(5)),
    "slopes that are text": set_metadata("slopes", ["a", "b", "c"]),
    "infinite slope": set_metadata("slopes", [float("inf")] * 3),
    "too many slopes": set_metadata("slopes", [655, 655, 0, 655]),
    "a slope of the last layer": set_metadata("slopes", [655, 655, 655]),
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
    "not a number in the encoder": change_tensor("trunk.g_a.linear.weight", lambda w: w * float("nan")),
    "infinity in the decoder": change_tensor("trunk.g_s.pixels.bias", lambda b: b + float("inf")),
    "infinity in the density": change_tensor("trunk.density.median", lambda m: m - float("inf")),
    "a gain whose exponential is infinite": change_tensor("trunk.log_gain_y", lambda g: g + 100),
    "a unit of 0": change_tensor("trunk.y_unit", torch.zeros_like),
}


def wrapping(thresholds: torch.Tensor) -> torch.Tensor:
    """Not ascending, although all differences are positive in int64."""
    wrapped, base = thresholds.clone(), int(thresholds[-6])
    wrapped[-5:] = torch.tensor([base + 2**62, base - 2**63, base - 2**62, base + 1, base + 2])
    assert bool((wrapped.diff() > 0).all())
    assert not bool((wrapped[1:] > wrapped[:-1]).all())
    return wrapped


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


# ------------------------------------------------------------------------------------------------------- the encoder


@pytest.fixture(scope="module")
def new_path(photograph: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with the digest of its encoder, which the golden one does not have."""
    path = tmp_path_factory.mktemp("model") / "new.safetensors"
    tiny_model.write(path, photograph)
    return path


ENCODING: dict[str, Change] = {
    "a weight of g_a that is 0": change_tensor("trunk.g_a.linear.weight", torch.zeros_like),
    "a bias of h_a": change_tensor("trunk.h_a.0.bias", lambda b: b + 1),
    "a gain": change_tensor("trunk.log_gain_y", lambda g: g + 1),
    "a unit": change_tensor("trunk.y_unit", lambda u: u * 2),
    "bits": lambda _, m: m.update(bits=[b + 1 for b in m["bits"]]),
}


@pytest.mark.parametrize("change", ENCODING.values(), ids=ENCODING.keys())
def test_a_damaged_encoder_is_refused(new_path: Path, tmp_path: Path, change: Change) -> None:
    """Guards against files of 5 dB: what only the encoder needs is not in the id that files name."""
    assert verify(new_path) == []
    path = tampered(new_path, tmp_path / "m.safetensors", change, new_id=False)
    assert_refused(path)
    assert "encoder" in verify(path)[0]


def test_models_without_a_digest_of_the_encoder_are_read(tiny: Model) -> None:
    """Models of earlier versions, and so the files that need them, are still decoded."""
    assert "encoder" not in tiny.metadata


def test_latents_that_are_not_finite_are_an_error(tiny: Model, photograph: np.ndarray) -> None:
    """Guards against noise with exit code 0 from weights that are finite, but too large."""
    level = tiny.at(0)
    weight = level.folded.networks.g_a.linear.weight
    weight.data[0] = 3e38
    with pytest.raises(ModelError, match="not finite"):
        analyse(level, photograph[:64, :64])


HUGE = dict.fromkeys(("N", "M", "width", "hidden", "inner", "deep_width", "body_width"), 1024)


@pytest.mark.skipif(not CLEAR_PEAK.exists(), reason="the peak of the memory can be reset on Linux only")
@pytest.mark.parametrize("family", ["lite", "mshyper", "bmshj"])
def test_a_small_file_of_a_large_architecture(tiny_path: Path, tmp_path: Path, family: str) -> None:
    """Guards against a kilobyte that takes gigabytes and seconds before it is refused."""
    sizes = HUGE | {"deep_blocks": 16, "body_blocks": 16} if family == "lite" else {"N": 1024, "M": 1024}
    context = {"groups": [64] * 16, "checkerboard": True, "past": 1024, "near": 1024, "hidden": 1024}
    architecture = {"family": family, "scale": "exp", "context": context, **sizes}

    def change(tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
        tensors.clear()
        metadata["architecture"] = architecture

    path = tampered(tiny_path, tmp_path / "m.safetensors", change, new_id=True)
    assert path.stat().st_size < 2000
    assert_refused(path)  # imports CompressAI, and what torch needs of its own at the first use
    CLEAR_PEAK.write_text("5")
    before = peak()
    assert_refused(path)
    assert peak() < before + 100
