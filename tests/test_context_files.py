"""Files of models with a context model: round trips, an independent decoder, damage, the true loss, hostile models."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny_model
import torch
from integer_reference import reference_passes
from range_reference import ReferenceDecoder, reference_pull
from tampering import Change, assert_refused, change_tensor, drop, set_metadata, set_tensor, tampered

from sgacodec import latents
from sgacodec.api import Codec, Settings
from sgacodec.bitstream import FormatError
from sgacodec.models.export import export
from sgacodec.models.file import read_model, write_model
from sgacodec.models.level import Model
from sgacodec.models.verify import verify
from sgacodec.picture import Picture
from sgacodec.refine.problem import Problem

KINDS = ("exp", "linear", "groups")  # the models of the fixture `contexts`
PLAIN = Settings(method="none", lmbda=0.0016)


@pytest.fixture(scope="module")
def codec(context_path: Path) -> Codec:
    return Codec(str(context_path), device="cpu")


# ----------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(contexts: dict[str, Model], kind: str, photograph: np.ndarray) -> None:
    """Guards against an encoder and a decoder whose passes are not the same."""
    for at, (height, width) in ((0, (1, 1)), (1, (130, 70)), (1, (64, 200))):
        level = contexts[kind].at(at)
        y, z = latents.analyse(level, photograph[:height, :width])
        payload = latents.pack(level, y, z)
        found = latents.unpack(level, payload.z, payload.y, height, width)
        expected = latents.quantize(level, y, z)
        assert found.digest() == payload.digest == expected.digest()
        assert torch.equal(found.index, expected.index)
        assert torch.equal(found.mu, expected.mu)
        assert torch.equal(latents.quantize(level, found.y_hat(), z).y, found.y)


def test_files_of_extreme_latents(contexts: dict[str, Model]) -> None:
    """Guards against residuals or escapes of a later pass that overflow."""
    for kind in KINDS:
        level = contexts[kind].at(1)
        y = torch.randn(1, 12, 8, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, 11, 8)
        z = 30 * torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(1))
        payload = latents.pack(level, y, z)
        assert latents.unpack(level, payload.z, payload.y, 128, 128).digest() == payload.digest


@pytest.mark.parametrize("kind", KINDS)
def test_an_independent_decoder(contexts: dict[str, Model], kind: str, photograph: np.ndarray) -> None:
    """Guards against files that only this program can decode: docs/format.md alone must suffice."""
    level = contexts[kind].at(1)
    y, z = latents.analyse(level, photograph[100:164, 60:188])
    payload, expected = latents.pack(level, y, z), latents.quantize(level, y, z)
    of_z = ReferenceDecoder(payload.z)
    k_z = np.array(reference_pull(of_z, np.repeat(np.arange(4), 2), level.z_tables)).reshape(1, 4, 1, 2)
    assert np.array_equal(k_z, expected.z.numpy())
    of_y = ReferenceDecoder(payload.y)
    symbols, index, mu = reference_passes(
        level.exact, k_z, lambda index, mu, channels, where: reference_pull(of_y, index, level.y_tables)
    )
    assert np.array_equal(symbols, expected.y.numpy())
    assert np.array_equal(index, expected.index.numpy())
    assert np.array_equal(mu, expected.mu.numpy())
    for decoder in (of_z, of_y):
        assert decoder.at >= len(decoder.data)
        assert (decoder.point - decoder.low) % 2**64 < 2**33 - 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_true_loss_has_the_bits_of_the_file(contexts: dict[str, Model], kind: str, photograph: np.ndarray) -> None:
    """Guards against refinement that minimizes another rate than that of its file."""
    level = contexts[kind].at(0)
    problem = Problem.of(level, Picture(photograph[:200, :300]), None, 0.01, "mse")
    y, z = latents.analyse(level, problem.original)
    generator = torch.Generator().manual_seed(2)
    for noise in (0.0, 0.7, 10.0):
        moved = y + noise * torch.randn(y.shape, generator=generator)
        candidate, payload = problem.evaluate(moved, z), latents.pack(level, moved, z)
        found = latents.unpack(level, payload.z, payload.y, 200, 300)
        assert candidate.bits == pytest.approx(latents.code_length(level, found), rel=1e-9)
        assert 8 * (len(payload.z) + len(payload.y)) == pytest.approx(candidate.bits, rel=0.001, abs=72)
        pixels = latents.render(level, found, 200, 300).astype(float)
        mse = np.mean((pixels - problem.original) ** 2) / 255**2
        assert candidate.mse == pytest.approx(mse, rel=1e-6)
        assert candidate.loss == pytest.approx(0.01 * 255**2 * mse + candidate.bits / 60_000, rel=1e-6)


# --------------------------------------------------------------------------------------------------------- damage


def test_every_changed_byte_and_every_truncation(codec: Codec, photograph: np.ndarray) -> None:
    """Guards against damage that gives a traceback: anybody can compute the checksum of a changed file."""
    data = codec.encode([Picture(photograph[:20, :30])], PLAIN)[0].data
    assert len(data) < 300
    messages = []
    for i in range(len(data)):
        changed = data[:i] + bytes([data[i] ^ (1 << i % 8)]) + data[i + 1 :]
        with pytest.raises(FormatError):
            codec.decode(changed)
        with pytest.raises(FormatError):
            codec.decode(data[:i])
        if 8 <= i < len(data) - 4:  # behind the id of the model
            for crafted in (changed[:-4], data[:i]):
                try:
                    codec.decode(crafted + zlib.crc32(crafted).to_bytes(4, "little"), max_pixels=2**16)
                except FormatError as error:
                    messages.append(str(error))
    assert messages
    assert not any("\n" in message for message in messages)


def test_a_pass_too_few_or_too_many(contexts: dict[str, Model], photograph: np.ndarray) -> None:
    """Guards against accepting the payload of another image, whose later passes are missing or left over."""
    level = contexts["linear"].at(0)
    sizes = ((64, 64), (128, 64))
    small, large = (latents.pack(level, *latents.analyse(level, photograph[:h, :w])) for h, w in sizes)
    for payload, (h, w) in ((small, sizes[1]), (large, sizes[0])):
        with pytest.raises(FormatError):
            latents.unpack(level, payload.z, payload.y, h, w)
    for data in (large.y[: len(large.y) // 2].rstrip(b"\0"), large.y + bytes(range(1, 13))):
        with pytest.raises(FormatError):
            latents.unpack(level, large.z, data, *sizes[1])


# --------------------------------------------------------------------------------------------------- model files


@pytest.mark.parametrize("kind", KINDS)
def test_model_files(contexts: dict[str, Model], kind: str, tmp_path: Path) -> None:
    """Guards against models that decode otherwise after they are written and read, or that `models verify` refuses."""
    path = tmp_path / "m.safetensors"
    write_model(contexts[kind], path)
    again = read_model(path)
    assert verify(path) == []
    assert again.id == contexts[kind].id
    for key, value in contexts[kind].gained.state_dict().items():
        torch.testing.assert_close(again.gained.state_dict()[key], value, rtol=0, atol=0)
    write_model(again, tmp_path / "again.safetensors")
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_gains_are_stored_in_32_bits_where_they_fit(contexts: dict[str, Model]) -> None:
    """Guards against gains that are cut off, and against a model file that is larger than it need be."""
    types = {kind: {n: v.dtype for n, v in contexts[kind].gains[0].tensors().items()} for kind in KINDS}
    assert set(types["exp"].values()) == {torch.int32}
    assert types["linear"]["context"] == torch.int64  # features of random weights are small, their units fine
    for model in contexts.values():
        assert {v.dtype for v in model.prior(0).gains.tensors().values()} == {torch.int64}


def resized(change: dict[str, object]) -> Change:
    return lambda _, metadata: metadata["architecture"]["context"].update(change)


HOSTILE: dict[str, Change] = {
    "a sum that overflows": set_tensor("exact.context.1.past.bias", torch.full((5,), 2**62)),
    "a sum of the last layer that overflows": set_tensor("exact.context.2.out.bias", torch.full((12,), -(2**62))),
    "a bias out of range": change_tensor("exact.gains.context", lambda b: b.to(torch.int64) - 2**49),
    "float biases": change_tensor("exact.gains.context", lambda b: b.double()),
    "biases of mix": change_tensor("exact.context.0.mix.bias", lambda b: b + 1),
    "biases of one half": change_tensor("exact.gains.context", lambda b: b[:, :, :1]),
    "biases of a level too few": change_tensor("exact.gains.context", lambda b: b[1:]),
    "float weights": change_tensor("exact.context.1.near.weight", lambda w: w.float()),
    "float shifts": change_tensor("exact.context.1.near.shift", lambda s: s + 0.5),
    "shift 0": change_tensor("exact.context.1.mix.shift", torch.zeros_like),
    "shift 63": change_tensor("exact.context.1.out.shift", lambda s: torch.full_like(s, 63)),
    "another kernel": set_tensor("exact.context.0.near.weight", torch.zeros(3, 2, 3, 3, dtype=torch.int16)),
    "a channel too few": change_tensor("exact.context.2.past.weight", lambda w: w[:, 1:]),
    "past in the first group": resized({"groups": [4, 2, 6]}),
    "groups that do not add up": resized({"groups": [2, 4, 5]}),
    "a group of no channels": resized({"groups": [0, 6, 6]}),
    "a negative group": resized({"groups": [-2, 8, 6]}),
    "groups that are text": resized({"groups": "246"}),
    "too many groups": resized({"groups": [1] * 12 + [0] * 5}),
    "another width": resized({"hidden": 9}),
    "an endless width": resized({"past": 2**40}),
    "a checkerboard that is a number": resized({"checkerboard": 1}),
    "no checkerboard": resized({"checkerboard": False}),
    "an unknown field": resized({"dilation": 2}),
    "no context model": lambda _, metadata: metadata["architecture"].update(context=None),
    "context as a list": lambda _, metadata: metadata["architecture"].update(context=[1]),
    "a missing weight": drop("exact.context.1.near.weight"),
    "a missing bias": drop("exact.context.2.mix.bias"),
    "a missing shift": drop("exact.context.0.out.shift"),
    "missing biases": drop("exact.gains.context"),
    "a missing float bias": drop("trunk.context.groups.1.bias_by_anchor"),
    "no fractional bits": lambda _, metadata: metadata.__delitem__("context_bits"),
    "too few fractional bits": set_metadata("context_bits", [12]),
    "absurd fractional bits": set_metadata("context_bits", [12, 10**5, 12]),
    "fractional bits that are text": set_metadata("context_bits", "abc"),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_models_are_refused(context_path: Path, tmp_path: Path, change: Change) -> None:
    """Guards against overflow in the context model, from hostile files or faulty exporters."""
    assert_refused(tampered(context_path, tmp_path / "m.safetensors", change, new_id=True))


def test_verify_derives_the_biases_anew(context_path: Path, tmp_path: Path) -> None:
    """Guards against trusting a recomputed id: the biases of a level must be those of the float parameters."""
    change = change_tensor("exact.gains.context", lambda b: b + (1 << 24) * (torch.arange(2) == 1).view(2, 1, 1, 1))
    problems = verify(tampered(context_path, tmp_path / "m.safetensors", change, new_id=True))
    assert problems == ["the integer gains of level 1 are not those of the model"]


def test_export_needs_samples_of_y(photograph: np.ndarray) -> None:
    """Guards against a context model whose activations are not calibrated."""
    model = tiny_model.with_context("lite", photograph).gained
    with pytest.raises(ValueError, match="samples of y"):
        export(model, "bad", {}, [torch.randn(1, 4, 2, 2)], 2)
