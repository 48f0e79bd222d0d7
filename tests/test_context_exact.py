"""The integer context model: equal to docs/format.md for any integers, on every device, in any order of evaluation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_reference import reference_passes

from sgacodec.coding import gemm, hyper_decoder
from sgacodec.coding.context_layers import (
    CONTEXT_SLOPE,
    IntegerContextGroup,
    check_context,
    check_context_biases,
)
from sgacodec.coding.hyper_decoder import BIAS_MAX, IntegerGains, IntegerHyperDecoder, check, check_gains
from sgacodec.coding.integer_layers import IntegerLayer
from sgacodec.coding.passes import run_passes
from sgacodec.coding.prior import ExactPrior
from sgacodec.models.level import Model

INT32 = (-(2**31), 2**31 - 1)
KINDS = ("exp", "linear", "groups")  # the models of the fixture `contexts`

Found = tuple[np.ndarray, np.ndarray]


def found_by(prior: ExactPrior, k: np.ndarray, symbols: np.ndarray) -> Found:
    """Indexes and means of all passes when `symbols` (1, M, 4h, 4w) are coded."""
    given = torch.from_numpy(symbols).to(prior.device)
    coded, index, mu = run_passes(prior, torch.from_numpy(k), lambda one: one.of(given))
    assert torch.equal(coded, given)
    return index.cpu().numpy(), mu.cpu().numpy()


def expected_of(prior: ExactPrior, k: np.ndarray, symbols: np.ndarray) -> Found:
    coded, index, mu = reference_passes(prior, k, lambda i, m, channels, where: symbols[:, channels, where])
    assert np.array_equal(coded, symbols)
    return index, mu


def assert_same(a: Found, b: Found) -> None:
    assert np.array_equal(a[0], b[0])
    assert np.array_equal(a[1], b[1])


def inputs(prior: ExactPrior, seed: int, h: int, w: int, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """Symbols of z (1, N, h, w) and y (1, M, 4h, 4w)."""
    rng = np.random.default_rng(seed)
    N, M = len(prior.gains.z_scale), len(prior.gains.mean)
    k, symbols = (
        rng.integers(-largest, largest, shape, endpoint=True).astype(np.int32)
        for shape in ((1, N, h, w), (1, M, 4 * h, 4 * w))
    )
    return k, symbols


def random_layer(rng: np.random.Generator, out: int, into: int, k: int, slope: int, transposed: bool = False,
                 bias: int = 2**24) -> IntegerLayer:  # fmt: skip
    """Any weights; shifts that give outputs of all sizes, beyond 16 bits as well.

    With the largest biases and shifts a layer needs more than float64.
    """
    large = bool(bias) and rng.random() < 0.2
    weight = rng.integers(-32767, 32767, (into, out, k, k) if transposed else (out, into, k, k), endpoint=True)
    return IntegerLayer(
        transposed=transposed,
        stride=2 if transposed else 1,
        padding=k // 2,
        output_padding=int(transposed),
        weight=torch.from_numpy(weight.astype(np.int16)),
        bias=torch.from_numpy(rng.integers(-bias, bias, out, endpoint=True) << 25 * large),
        shift=torch.from_numpy(rng.integers(13 if slope else 1, 22, out) + 25 * large),
        slope=slope,
    )


def random_prior(seed: int, kind: str, checkerboard: bool) -> ExactPrior:
    """Integer networks without a float model behind them, with the largest gains and biases among others."""
    rng = np.random.default_rng(seed)
    N, F, groups = 2, 3, [1, 2] if seed % 2 else [2, 1, 1]
    M, past, near, hidden = sum(groups), 2, 2, 4
    h_s = (
        random_layer(rng, 3, N, 5, 655, transposed=True),
        random_layer(rng, F, 3, 5, 655, transposed=True),
        random_layer(rng, 2 * M, F, 1 + 2 * (seed % 3 == 0), 0, bias=2**36),
    )
    context, done = [], 0
    for own in groups:
        width = F + past * (done > 0) + near * checkerboard
        context.append(
            IntegerContextGroup(
                past=random_layer(rng, past, done, 3, CONTEXT_SLOPE) if done else None,
                near=random_layer(rng, near, own, 3 + 2 * (own == 1), CONTEXT_SLOPE) if checkerboard else None,
                mix=random_layer(rng, hidden, width, 1, CONTEXT_SLOPE, bias=0),
                out=random_layer(rng, 2 * own, hidden, 1, 0, bias=2**36),
            )
        )
        done += own
    gains = IntegerGains(
        z_scale=torch.from_numpy(rng.integers(0, 2**24, N)),
        z_offset=torch.from_numpy(rng.integers(-(2**30), 2**30, N)),
        scale=torch.from_numpy(
            rng.choice([0, 2**18, 2**20, 2**31] if kind == "linear" else [-(2**31), -(2**19), 0, 2**18], M)
        ),
        mean=torch.from_numpy(rng.choice([0, 1, 2**16, 2**20, 2**26, 2**31], M)),
        context=torch.from_numpy(
            rng.choice([-BIAS_MAX, -(2**30), 0, 2**30, 2**40, BIAS_MAX], (len(groups), 1 + checkerboard, hidden))
        ),
    )
    thresholds = torch.from_numpy(np.sort(rng.choice(2**20, 63, replace=False)) - (2**19 if kind == "exp" else 0))
    prior = ExactPrior(IntegerHyperDecoder(layers=h_s, thresholds=thresholds, kind=kind), gains, tuple(context))
    check(prior.h_s)
    check_gains(gains, N, M)
    check_context(prior.context, prior.h_s, M)
    check_context_biases(prior.context, gains)
    return prior


# ------------------------------------------------------------------------------------------------------- equality


@given(
    st.integers(0, 2**32),
    st.sampled_from(["exp", "linear"]),
    st.booleans(),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 50, 2**31 - 1]),
)
@settings(max_examples=40)
def test_reference_on_any_integers(seed: int, kind: str, checkerboard: bool, h: int, w: int, largest: int) -> None:
    """Guards against a difference between docs/format.md and the program, saturated values included."""
    prior = random_prior(seed, kind, checkerboard)
    k, symbols = inputs(prior, seed, h, w, largest)
    assert_same(found_by(prior, k, symbols), expected_of(prior, k, symbols))


@pytest.mark.parametrize("kind", KINDS)
def test_reference_and_permuted_channels_on_models(contexts: dict[str, Model], kind: str) -> None:
    """Guards against inexact sums: results must not depend on the order of summation."""
    model = contexts[kind]
    for level, largest in ((0, 3), (1, 60)):
        prior = model.prior(level)
        k, symbols = inputs(prior, level, 2, 3, largest)
        expected = expected_of(prior, k, symbols)
        assert_same(found_by(prior, k, symbols), expected)
        assert_same(found_by(permuted(prior, level), k, symbols), expected)
        assert np.ptp(expected[0]) > 5  # not all of one table


def permuted(prior: ExactPrior, seed: int) -> ExactPrior:
    """The same function with the features of h_s and all inner channels of the context model in another order."""
    generator = torch.Generator().manual_seed(seed)

    def order_of(layer: IntegerLayer) -> torch.Tensor:
        return torch.randperm(layer.out_channels, generator=generator)

    def outputs(layer: IntegerLayer, order: torch.Tensor) -> IntegerLayer:
        weight = layer.weight[:, order] if layer.transposed else layer.weight[order]
        return replace(layer, weight=weight, bias=layer.bias[order], shift=layer.shift[order])

    inner, last = prior.h_s.layers[-2:]
    features = order_of(inner)
    h_s = replace(
        prior.h_s,
        layers=(*prior.h_s.layers[:-2], outputs(inner, features), replace(last, weight=last.weight[:, features])),
    )
    assert prior.gains.context is not None
    groups, biases = [], []
    for group, bias in zip(prior.context, prior.gains.context, strict=True):
        moved, columns = {}, [features]
        for name, layer in (("past", group.past), ("near", group.near)):
            if layer is not None:
                order = order_of(layer)
                moved[name] = outputs(layer, order)
                columns.append(order + sum(len(c) for c in columns))
        hidden = order_of(group.mix)
        mix = outputs(replace(group.mix, weight=group.mix.weight[:, torch.cat(columns)]), hidden)
        out = replace(group.out, weight=group.out.weight[:, hidden])
        groups.append(IntegerContextGroup(past=moved.get("past"), near=moved.get("near"), mix=mix, out=out))
        biases.append(bias[:, hidden])
    return ExactPrior(h_s, replace(prior.gains, context=torch.stack(biases)), tuple(groups))


@pytest.mark.parametrize("kind", KINDS)
def test_tiles(contexts: dict[str, Model], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against results that depend on how many rows and columns are evaluated at once."""
    prior = contexts[kind].prior(1)
    k, symbols = inputs(prior, 5, 4, 3, 40)
    whole = found_by(prior, k, symbols)
    for positions, tile in ((1, 16), (4, 16), (6, 32), (14, 16), (24, 48), (24, 96), (72, 200), (500, 32), (4, 500)):
        with monkeypatch.context() as patch:
            patch.setattr(gemm, "_POSITIONS", positions)
            patch.setattr(hyper_decoder, "_TILE", tile)
            assert_same(found_by(prior, k, symbols), whole)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_thread_counts(contexts: dict[str, Model], threads: int) -> None:
    """Guards against results that depend on the number of threads."""
    prior = contexts["exp"].prior(0)
    k, symbols = inputs(prior, 7, 5, 6, 20)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = found_by(prior, k, symbols)
    finally:
        torch.set_num_threads(before)
    assert_same(found, expected_of(prior, k, symbols))


@pytest.mark.cuda
def test_cuda(contexts: dict[str, Model]) -> None:
    """Guards against integers that differ between CUDA and CPU."""
    cuda = torch.device("cuda")
    for model in contexts.values():
        assert model.exact_on(cuda)
    priors = [model.prior(1) for model in contexts.values()]
    priors += [random_prior(seed, kind, checkerboard=True) for seed in range(6) for kind in ("exp", "linear")]
    for prior in priors:
        for largest in (5, 60, 2**31 - 1):
            k, symbols = inputs(prior, 9, 7, 5, largest)
            assert_same(found_by(prior.to(cuda), k, symbols), found_by(prior, k, symbols))


def test_the_first_half_is_not_seen_by_itself(contexts: dict[str, Model]) -> None:
    """Guards against a pass that depends on its own symbols, or on later ones: no decoder would have them."""
    prior = contexts["exp"].prior(1)
    k, symbols = inputs(prior, 3, 2, 2, 20)
    before = found_by(prior, k, symbols)
    odd = np.add.outer(np.arange(8), np.arange(8)) % 2 == 1
    first = 0
    for group in prior.context:
        own = slice(first, first + group.channels)
        for half in (0, 1):
            changed = symbols.copy()
            where = odd == (half == 1)
            changed[:, own, where] += 3
            index, mu = (a != b for a, b in zip(before, found_by(prior, k, changed), strict=True))
            differs = index | mu
            assert not differs[:, : own.start].any()
            assert not differs[:, own, where].any()
            assert differs[:, own, ~where].any() == (half == 0)
            assert differs[:, own.stop :].any() == (own.stop < symbols.shape[1])
        first = own.stop
