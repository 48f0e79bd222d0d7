"""The proof that a context model cannot overflow, and the self-test of devices that run it."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from integer_reference import reference_passes

from sgacodec.coding import context_model
from sgacodec.coding.context_layers import CONTEXT_SLOPE, IntegerContextGroup, check_context, check_context_biases
from sgacodec.coding.context_model import residual
from sgacodec.coding.integer_layers import ACTIVATION_MAX, IntegerLayer
from sgacodec.coding.passes import fingerprint
from sgacodec.coding.prior import ExactPrior
from sgacodec.models.level import Model


def changed_group(prior: ExactPrior, k: int, **changes: IntegerLayer | None) -> tuple[IntegerContextGroup, ...]:
    groups = list(prior.context)
    groups[k] = replace(groups[k], **changes)
    return tuple(groups)


def test_check_context_refuses_what_is_not_proved(contexts: dict[str, Model]) -> None:
    """Guards against a damaged or crafted model file whose sums could be inexact, or whose layers do not fit."""
    prior, M = contexts["exp"].prior(0), 12
    check_context(prior.context, prior.h_s, M)
    past, near, mix, out = (prior.context[1].layers()[name] for name in ("past", "near", "mix", "out"))
    wide = torch.full((1, 2**23 + 2**10, 1, 1), 32767, dtype=torch.int16)
    wide = replace(out, weight=wide, bias=out.bias[:1], shift=out.shift[:1])
    for name, layer, message in (
        ("out", wide, r"2\^53"),
        ("near", replace(near, bias=torch.full_like(near.bias, 2**62)), r"2\^63"),
        ("past", replace(past, shift=torch.zeros_like(past.shift)), "shift"),
        ("past", replace(past, weight=past.weight.float()), "int16"),
        ("past", replace(past, weight=past.weight[:, 1:]), "channels"),
        ("past", replace(past, weight=past.weight[..., :2, :2]), "kernel"),
        ("past", replace(past, padding=0), "kernel"),
        ("near", replace(near, weight=near.weight[:, 1:]), "channels"),
        ("near", replace(near, transposed=True), "channels|kernel"),
        ("near", None, "channels"),
        ("mix", replace(mix, weight=mix.weight[:, 1:]), "channels"),
        ("mix", replace(mix, bias=torch.ones_like(mix.bias)), "fit"),
        ("mix", replace(mix, slope=2**16), "slope"),
        ("near", replace(near, slope=0), "slope"),
        ("out", replace(out, slope=CONTEXT_SLOPE), "slope"),
        ("out", replace(out, weight=out.weight[:, 1:]), "fit"),
        ("out", replace(out, weight=out.weight[2:], bias=out.bias[2:], shift=out.shift[2:]), "channels"),
    ):
        with pytest.raises(ValueError, match=message):
            check_context(changed_group(prior, 1, **{name: layer}), prior.h_s, M)
    with pytest.raises(ValueError, match="groups"):
        check_context(prior.context[:-1], prior.h_s, M)
    with pytest.raises(ValueError, match="channels"):
        check_context(prior.context[::-1], prior.h_s, M)


def test_check_context_biases_refuses(contexts: dict[str, Model]) -> None:
    """Guards against biases that overflow, or are not those of the context model."""
    model = contexts["exp"]
    prior = model.prior(0)
    gains, biases = prior.gains, prior.gains.context
    check_context_biases(prior.context, gains)
    check_context_biases((), replace(gains, context=None))
    assert biases is not None
    for bad in (None, biases[1:], biases[:, :1], biases[..., 1:], biases.double(), biases + 2**49, biases - 2**49):
        with pytest.raises(ValueError, match="context biases"):
            check_context_biases(prior.context, replace(gains, context=bad))
    with pytest.raises(ValueError, match="no context model"):
        check_context_biases((), gains)
    with pytest.raises(ValueError, match="alike"):
        check_context_biases(changed_group(prior, 1, near=None), gains)


@pytest.mark.parametrize("kind", ["exp", "linear", "groups"])
def test_fingerprint_notices_one_weight(contexts: dict[str, Model], kind: str) -> None:
    """Guards against a self-test that a wrong weight or bias of the context model passes."""
    model = contexts[kind]
    prior = model.prior(0)
    assert fingerprint(prior) == model.fingerprint
    for k, group in enumerate(prior.context):
        for name, layer in group.layers().items():
            weight = layer.weight.clone()
            out, into, rows, columns = (size // 2 for size in weight.shape)
            weight[out, into, rows, max(0, columns - 1)] ^= 0x1000  # of `near` the tap in the middle sees zeros only
            changed = [replace(layer, weight=weight)]
            if name != "mix":
                changed.append(replace(layer, bias=layer.bias + (1 << (layer.shift + 4))))
            for other in changed:
                context = changed_group(prior, k, **{name: other})
                assert fingerprint(replace(prior, context=context)) != model.fingerprint, (k, name)
        assert prior.gains.context is not None
        for half in range(prior.gains.context.shape[1]):
            biases = prior.gains.context.clone()
            biases[k, half] += 1 << (group.mix.shift + 4)
            gains = replace(prior.gains, context=biases)
            assert fingerprint(replace(prior, gains=gains)) != model.fingerprint, (k, half)


@pytest.mark.parametrize("kind", ["linear", "groups"])
def test_the_fingerprint_by_the_specification(contexts: dict[str, Model], kind: str) -> None:
    """Guards against a fingerprint that differs from the one that docs/format.md defines."""
    model = contexts[kind]
    content = hashlib.sha256()

    def numbered(n: int) -> np.ndarray:
        return np.array([((7919 * j + 104729) % 31 - 15) * (100 if j % 17 == 0 else 1) for j in range(n)])

    def symbols_of(index: np.ndarray, mu: np.ndarray, channels: slice, where: np.ndarray) -> np.ndarray:
        content.update(index.astype("u1").tobytes() + mu.astype("<i4").tobytes())
        return numbered(len(index))

    reference_passes(model.prior(0), numbered(4 * 3 * 5).reshape(1, 4, 3, 5), symbols_of)
    assert content.hexdigest() == model.fingerprint


def test_the_fingerprint_tries_large_residuals(contexts: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a self-test that only small values enter, for which inexact arithmetic would do."""
    largest = []

    def watch(*given: torch.Tensor) -> torch.Tensor:
        found = residual(*given)
        largest.append(int(found.abs().max()))
        return found

    monkeypatch.setattr(context_model, "residual", watch)
    fingerprint(contexts["exp"].prior(0))
    assert len(largest) == 5  # nothing follows the last of six passes
    assert min(largest) == ACTIVATION_MAX
