"""The integer hyper-decoder: equal to the specification, on every device; overflow proof; quantization error."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_reference import Pair, reference, reference_layer
from torch import nn

from sgacodec import latents
from sgacodec.coding import hyper_decoder
from sgacodec.coding.gemm import Matrix, matrix_of, run
from sgacodec.coding.hyper_decoder import (
    MU_BITS,
    IntegerGains,
    IntegerHyperDecoder,
    check,
    check_gains,
    hyper_decode,
)
from sgacodec.coding.integer_layers import ACTIVATION_MAX, IntegerLayer, input_rows
from sgacodec.coding.passes import fingerprint
from sgacodec.coding.quantize import activation_bits, quantize_gains, quantize_hyper_decoder
from sgacodec.coding.tables import scale_thresholds
from sgacodec.models.level import LevelModel, Model

INT32 = (-(2**31), 2**31 - 1)


# --------------------------------------------------------------------------------------------- reference evaluations


def permuted(
    h_s: IntegerHyperDecoder, gains: IntegerGains, seed: int
) -> tuple[IntegerHyperDecoder, IntegerGains, list]:
    """The same function with all input channels of all layers in another order; and the order of the first."""
    generator = torch.Generator().manual_seed(seed)
    layers = list(h_s.layers)
    first = torch.randperm(layers[0].weight.shape[0 if layers[0].transposed else 1], generator=generator)
    order = first
    for i, layer in enumerate(layers):
        weight = layer.weight[order] if layer.transposed else layer.weight[:, order]
        out = weight.shape[1 if layer.transposed else 0]
        order = torch.randperm(out, generator=generator) if i + 1 < len(layers) else torch.arange(out)
        weight = weight[:, order] if layer.transposed else weight[order]
        layers[i] = replace(layer, weight=weight, bias=layer.bias[order], shift=layer.shift[order])
    moved = replace(gains, z_scale=gains.z_scale[first], z_offset=gains.z_offset[first])
    return replace(h_s, layers=tuple(layers)), moved, first.tolist()


def decode(h_s: IntegerHyperDecoder, gains: IntegerGains, k: np.ndarray) -> Pair:
    index, mu = hyper_decode(h_s, gains, torch.from_numpy(k))
    return index.numpy(), mu.numpy()


def assert_same(a: Pair, b: Pair) -> None:
    assert np.array_equal(a[0], b[0])
    assert np.array_equal(a[1], b[1])


def symbols(seed: int, shape: tuple[int, ...], largest: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-largest, largest, shape, endpoint=True).astype(np.int32)


@pytest.fixture(scope="module")
def linear(photograph: np.ndarray) -> tuple[IntegerHyperDecoder, IntegerGains]:
    """An h_s as in `mshyper`: a 3×3 convolution at the end, and a scale that is σ itself."""
    torch.manual_seed(3)
    N, M = 6, 5
    h_s = nn.Sequential(
        nn.ConvTranspose2d(N, M, 5, stride=2, padding=2, output_padding=1),
        nn.LeakyReLU(),
        nn.ConvTranspose2d(M, 7, 5, stride=2, padding=2, output_padding=1),
        nn.LeakyReLU(),
        nn.Conv2d(7, 2 * M, 3, padding=1),
    )
    h_s[-1].weight.data *= 10
    integer = quantize_hyper_decoder(h_s, [20.0, 10.0, 5.0], "linear")
    ones = torch.linspace(0.5, 2, M)
    gains = quantize_gains("linear", activation_bits(20.0), torch.linspace(1, 3, N), torch.randn(N), ones, ones)
    return integer, gains


# ------------------------------------------------------------------------------------------------------- equality


def test_int64_reference_and_permuted_channels_on_the_real_model(lite: Model) -> None:
    """Guards against inexact sums: results must not depend on the order of summation."""
    for level in (0, 40, 63):
        k = symbols(level, (1, lite.gained.architecture.N, 3, 2), 30)
        expected = reference(lite.h_s, lite.gains[level], k)
        assert_same(decode(lite.h_s, lite.gains[level], k), expected)
        moved, gains, order = permuted(lite.h_s, lite.gains[level], level)
        assert_same(decode(moved, gains, k[:, order]), expected)


@given(
    st.integers(0, 2**32),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from([1, 9, 500, 2**31 - 1]),
)
@settings(max_examples=40)
def test_reference_on_any_input(tiny: Model, seed: int, B: int, h: int, w: int, largest: int) -> None:
    """Guards against a difference between docs/format.md and the program, for any batch, size and symbols."""
    level = seed % len(tiny.gains)
    k = symbols(seed, (B, tiny.gained.architecture.N, h, w), largest)
    expected = reference(tiny.h_s, tiny.gains[level], k)
    assert_same(decode(tiny.h_s, tiny.gains[level], k), expected)
    moved, gains, order = permuted(tiny.h_s, tiny.gains[level], seed)
    assert_same(decode(moved, gains, k[:, order]), expected)


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 9, 500, 2**31 - 1]))
@settings(max_examples=40)
def test_reference_with_linear_scales(
    linear: tuple[IntegerHyperDecoder, IntegerGains], seed: int, h: int, w: int, largest: int
) -> None:
    """Guards against the same where the scale output is σ, as in imported models, and not log σ."""
    k = symbols(seed, (1, 6, h, w), largest)
    assert_same(decode(*linear, k), reference(*linear, k))


def test_batch_memory_layout_and_tiles(
    tiny: Model, linear: tuple[IntegerHyperDecoder, IntegerGains], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against results that depend on batch, memory format, integer type or evaluation in tiles."""
    for (h_s, gains), N in (((tiny.h_s, tiny.gains[1]), 8), (linear, 6)):
        k = torch.from_numpy(symbols(5, (3, N, 11, 4), 40))
        index, mu = hyper_decode(h_s, gains, k)
        others = [hyper_decode(h_s, gains, k.contiguous(memory_format=torch.channels_last))]
        singles = [hyper_decode(h_s, gains, k[i : i + 1]) for i in range(3)]
        others.append((torch.cat([s[0] for s in singles]), torch.cat([s[1] for s in singles])))
        others.append(hyper_decode(h_s, gains, k.to(torch.int64)))
        for positions in (1, 2, 3, 4, 8, 12, 40):
            with monkeypatch.context() as patch:
                patch.setattr(hyper_decoder, "_TILE", positions * 16 * 3)
                others.append(hyper_decode(h_s, gains, k))
        for other in others:
            assert torch.equal(other[0], index)
            assert torch.equal(other[1], mu)


def test_input_rows_are_the_rows_an_output_depends_on(
    tiny: Model, linear: tuple[IntegerHyperDecoder, IntegerGains]
) -> None:
    """Guards against strips of a large image that lack a row: their entropy parameters would be wrong."""
    for layer in {layer.weight.shape[2:]: layer for layer in (*tiny.h_s.layers, *linear[0].layers)}.values():
        a = torch.from_numpy(symbols(1, (1, 12, 3, layer.in_channels), 1000)).double()
        matrix = matrix_of(replace(layer, shift=torch.ones_like(layer.shift), slope=0))
        whole = run(matrix, a, clamp=False)
        for changed in range(12):
            other = a.clone()
            other[:, changed] += 100
            affected = (run(matrix, other, clamp=False) != whole).any(3).any(2)[0]
            for first, end in ((0, 1), (7, 8), (4, 9), (whole.shape[1] - 1, whole.shape[1])):
                low, high = input_rows(layer, first, end)
                assert bool(affected[first:end].any()) == (low <= changed < high)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_thread_counts(lite: Model, threads: int) -> None:
    """Guards against results that depend on the number of threads."""
    k = symbols(7, (1, lite.gained.architecture.N, 6, 7), 40)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = decode(lite.h_s, lite.gains[1], k)
    finally:
        torch.set_num_threads(before)
    assert_same(found, reference(lite.h_s, lite.gains[1], k))


@pytest.mark.cuda
def test_cuda(lite: Model, linear: tuple[IntegerHyperDecoder, IntegerGains]) -> None:
    """Guards against integers that differ between CUDA and CPU."""
    cuda = torch.device("cuda")
    assert lite.exact_on(cuda)
    for (h_s, gains), N in (((lite.h_s, lite.gains[30]), lite.gained.architecture.N), (linear, 6)):
        for largest in (5, 60, 2**31 - 1):
            k = torch.from_numpy(symbols(9, (2, N, 12, 16), largest))
            expected = hyper_decode(h_s, gains, k)
            found = hyper_decode(h_s.to(cuda), gains.to(cuda), k.cuda())
            assert torch.equal(found[0].cpu(), expected[0])
            assert torch.equal(found[1].cpu(), expected[1])


# --------------------------------------------------------------------------------------------------------- bounds


@given(st.integers(0, 2**32))
@settings(max_examples=20)
def test_extreme_symbols_saturate(tiny: Model, seed: int) -> None:
    """Guards against overflow by the symbols of a crafted file."""
    k = np.random.default_rng(seed).choice(np.array([*INT32, 2**20, -(2**20), 0], dtype=np.int32), (1, 8, 3, 3))
    index, mu = decode(tiny.h_s, tiny.gains[0], k)
    assert_same((index, mu), decode(tiny.h_s, tiny.gains[0], np.clip(k, -(2**20), 2**20)))
    assert_same((index, mu), reference(tiny.h_s, tiny.gains[0], k))
    assert index.max() <= 63
    assert np.abs(mu).max() <= 2**23


def test_a_scale_on_a_threshold(tiny: Model) -> None:
    """Guards against another table for a scale that equals a threshold."""
    thresholds = tiny.h_s.thresholds
    zero = torch.zeros(1, dtype=torch.int64)
    gains = IntegerGains(zero, zero, zero, zero)
    for i in (0, 17, 62):
        for beside in (-1, 0, 1):
            bias = torch.stack([2 * (thresholds[i] + beside), zero[0]])
            weight = torch.zeros(2, 1, 1, 1, dtype=torch.int16)
            layer = IntegerLayer(False, 1, 0, 0, weight, bias, torch.ones(2, dtype=torch.int64), 0)
            index, _ = decode(IntegerHyperDecoder((layer,), thresholds, "exp"), gains, np.zeros((1, 1, 1, 1), np.int32))
            assert index.item() == i + (beside > 0)


def test_largest_allowed_integers_do_not_overflow() -> None:
    """Guards against a bound in `check` or `check_gains` that is too loose."""
    weight = torch.full((2, 4, 5, 5), 32767, dtype=torch.int16)
    layer = IntegerLayer(True, 2, 2, 1, weight, torch.full((4,), 2**45), torch.tensor([1, 20, 40, 62]), 2**16 - 1)
    last = IntegerLayer(False, 1, 0, 0, weight.reshape(-1, 4, 5, 5)[:, :, :1, :1], torch.zeros(2, dtype=torch.int64),
                        torch.tensor([1, 62]), 0)  # fmt: skip
    h_s = IntegerHyperDecoder((layer, last), torch.arange(63) * 2**25, "linear")
    big = torch.tensor([2**31])
    gains = IntegerGains(big.expand(2).clone(), torch.tensor([2**52, -(2**52)]), big, big)
    check(h_s)
    check_gains(gains, 2, 1)
    for value in INT32:
        k = np.full((1, 2, 2, 2), value, dtype=np.int32)
        expected = object_reference(h_s, gains, k)
        assert_same(decode(h_s, gains, k), expected)


def object_reference(h_s: IntegerHyperDecoder, gains: IntegerGains, k: np.ndarray) -> Pair:
    """`reference` for one input channel pattern with Python's unbounded integers: what cannot overflow."""
    a = [[[(min(max(int(v), -(2**20)), 2**20) * int(gains.z_scale[c]) + int(gains.z_offset[c])) >> 12 for v in row]
          for row in k[0, c]] for c in range(k.shape[1])]  # fmt: skip
    for i, layer in enumerate(h_s.layers):
        a = [[[min(max(v, -32767), 32767) for v in row] for row in channel] for channel in a]
        sums = reference_layer(layer, np.array(a, dtype=np.int64)[None])[0]
        out = []
        for c in range(sums.shape[0]):
            values = [[int(v) + int(layer.bias[c]) for v in row] for row in sums[c]]
            if i + 1 < len(h_s.layers):
                values = [[(v * layer.slope) >> 16 if v < 0 else v for v in row] for row in values]
            by = int(layer.shift[c])
            out.append([[(v + (1 << (by - 1))) >> by for v in row] for row in values])
        a = out
    clamped = [[[min(max(v, -(2**31)), 2**31) for v in row] for row in channel] for channel in a]
    M = len(clamped) // 2
    index = [[[sum((v * int(gains.scale[c]) + 2**19) >> 20 > int(t) for t in h_s.thresholds) for v in row]
              for row in clamped[c]] for c in range(M)]  # fmt: skip
    mu = [[[min(max((v * int(gains.mean[c]) + 2**25) >> 26, -(2**23)), 2**23) for v in row]
           for row in clamped[M + c]] for c in range(M)]  # fmt: skip
    return np.array([index], dtype=np.uint8), np.array([mu], dtype=np.int32)


def _changed(h_s: IntegerHyperDecoder, at: int, **changes: object) -> IntegerHyperDecoder:
    layers = list(h_s.layers)
    layers[at] = replace(layers[at], **changes)  # type: ignore[arg-type]
    return replace(h_s, layers=tuple(layers))


def test_check_refuses_what_is_not_proved(tiny: Model) -> None:
    """Guards against a damaged or crafted model file whose sums could be inexact."""
    h_s = tiny.h_s
    check(h_s)
    wide = torch.full((2**12, 3, 5, 5), 32767, dtype=torch.int16)  # 2^12 · 25 · 2^15 · 2^15 < 2^53
    bias, shift = torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64)
    huge = IntegerLayer(True, 2, 2, 1, wide, bias, shift, 0)
    check(replace(h_s, layers=(huge,)))
    one_more = IntegerLayer(True, 2, 2, 1, wide.repeat(84, 1, 1, 1), bias, shift, 0)
    with pytest.raises(ValueError, match=r"2\^53"):
        check(replace(h_s, layers=(one_more,)))
    layer = h_s.layers[0]
    int64 = torch.iinfo(torch.int64)
    for bad, message in (
        (_changed(h_s, 0, weight=layer.weight.float() + 0.5), "int16"),
        (_changed(h_s, 0, weight=layer.weight.to(torch.int64)), "int16"),
        (_changed(h_s, 0, bias=layer.bias.double()), "int64"),
        (_changed(h_s, 0, bias=torch.full_like(layer.bias, int64.min)), r"2\^63"),
        (_changed(h_s, 0, bias=torch.full_like(layer.bias, int64.max)), r"2\^63"),
        (_changed(h_s, 0, bias=layer.bias[1:]), "channels"),
        (_changed(h_s, 0, shift=layer.shift[1:]), "channels"),
        (_changed(h_s, 0, shift=torch.zeros_like(layer.shift)), "shift"),
        (_changed(h_s, 0, shift=torch.full_like(layer.shift, 63)), "shift"),
        (_changed(h_s, 0, slope=-1), "shift"),
        (_changed(h_s, 0, slope=2**16), "shift"),
        (_changed(h_s, 1, weight=h_s.layers[1].weight[1:]), "channels"),
        (replace(h_s, thresholds=h_s.thresholds[1:]), "thresholds"),
        (replace(h_s, thresholds=h_s.thresholds.double()), "thresholds"),
        (replace(h_s, thresholds=h_s.thresholds.flip(0)), "ascend"),
        (replace(h_s, thresholds=h_s.thresholds + 2**32), "range"),
        (replace(h_s, thresholds=h_s.thresholds - 2**33), "range"),
    ):
        with pytest.raises(ValueError, match=message):
            check(bad)


@pytest.mark.parametrize(
    "change",
    [
        {"z_scale": torch.full((8,), 2**31 + 1)},
        {"z_scale": torch.full((8,), -1)},
        {"z_offset": torch.full((8,), 2**53)},
        {"scale": torch.full((16,), 2**32)},
        {"mean": torch.full((16,), 2**32)},
        {"mean": torch.full((16,), -1)},
        {"mean": torch.ones(15, dtype=torch.int64)},
        {"mean": torch.ones(16)},
    ],
)
def test_check_gains_refuses(tiny: Model, change: dict) -> None:
    """Guards against gains whose products overflow."""
    check_gains(tiny.gains[0], 8, 16)
    with pytest.raises(ValueError, match="gain"):
        check_gains(replace(tiny.gains[0], **change), 8, 16)


def test_quantize_refuses_what_does_not_fit() -> None:
    """Guards against weights or gains of an imported model that are clipped without an error."""
    layer = nn.Conv2d(2, 4, 1)
    layer.weight.data.fill_(1e6)
    with pytest.raises(ValueError, match="too large"):
        quantize_hyper_decoder(nn.Sequential(layer), [1e4], "exp")
    ones = torch.ones(3)
    with pytest.raises(ValueError, match="out of range"):
        quantize_gains("exp", 9, ones, ones, ones, 5000 * ones)


# ------------------------------------------------------------------------------------------------------ precision


@torch.no_grad()
def test_quantization_error_is_small(lite_level: LevelModel, photograph: np.ndarray) -> None:
    """Guards against a quantization of h_s that changes tables or means enough to cost rate."""
    y, z = latents.analyse(lite_level, photograph)
    level = replace(
        lite_level,
        folded=replace(lite_level.folded, context=None),
        exact=replace(lite_level.exact, context=()),
    )
    found = latents.quantize(level, y, z)
    z_hat = found.z + lite_level.folded.density.median[None, :, None, None]
    scale, mean = lite_level.folded.networks.h_s(z_hat).chunk(2, 1)
    thresholds = torch.from_numpy(scale_thresholds())
    index = torch.bucketize(scale.double().contiguous(), thresholds)
    assert float((index == found.index).double().mean()) > 0.98
    assert int((index - found.index.long()).abs().max()) <= 1
    error = (mean - found.mu / 2**MU_BITS).abs()
    assert float(error.square().mean().sqrt()) < 0.005  # in steps of y
    assert float(error.max()) < 0.2  # the means of blocks, which reach tens of steps
    rounded = torch.round(y - mean).to(torch.int32)
    unquantized = replace(found, y=rounded, index=index.to(torch.uint8))
    assert latents.code_length(lite_level, found) < 1.002 * latents.code_length(lite_level, unquantized)


@torch.no_grad()
@given(st.integers(0, 2**32), st.floats(0.3, 50), st.floats(0.05, 4))
@settings(max_examples=20)
def test_quantization_follows_any_float_network(seed: int, peak: float, spread: float) -> None:
    """Guards against a quantization that suits only the magnitudes of the built-in model."""
    torch.manual_seed(seed % 2**32)
    h_s = nn.Sequential(
        nn.ConvTranspose2d(4, 6, 5, stride=2, padding=2, output_padding=1), nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(6, 6, 5, stride=2, padding=2, output_padding=1), nn.LeakyReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
    )  # fmt: skip
    for p in h_s.parameters():
        p.mul_(spread)
    k = torch.randint(-9, 10, (1, 4, 4, 4))
    gain = torch.full((4,), 9 / peak)
    peaks, a = [], k / gain.view(1, -1, 1, 1)
    for layer in h_s:
        if not isinstance(layer, nn.LeakyReLU):
            peaks.append(float(a.abs().max()) * 1.1)
        a = layer(a)
    ones = torch.ones(4)
    h_i = quantize_hyper_decoder(h_s, peaks, "exp")
    gains = quantize_gains("exp", activation_bits(peaks[0]), gain, torch.zeros(4), ones, ones)
    index, mu = hyper_decode(h_i, gains, k)
    scale, mean = a.chunk(2, 1)
    tolerance = 0.002 * float(a.abs().max()) + 2**-10
    assert float((mu / 2**MU_BITS - mean).abs().max()) <= tolerance
    thresholds = torch.from_numpy(scale_thresholds())
    low, high = (torch.bucketize((scale + d).double().contiguous(), thresholds) for d in (-tolerance, tolerance))
    assert bool(((low <= index) & (index <= high)).all())


# ---------------------------------------------------------------------------------------------------- fingerprint


def test_fingerprint_notices_one_weight(tiny: Model) -> None:
    """Guards against a self-test that a wrong weight or bias passes."""
    assert fingerprint(tiny.prior(0)) == tiny.fingerprint
    for i, layer in enumerate(tiny.h_s.layers):
        weight = layer.weight.clone()
        middle = tuple(s // 2 for s in weight.shape)
        weight[middle] ^= 0x100
        assert fingerprint(replace(tiny.prior(0), h_s=_changed(tiny.h_s, i, weight=weight))) != tiny.fingerprint
        bias = layer.bias.clone()
        bias += 1 << (layer.shift + 4)
        assert fingerprint(replace(tiny.prior(0), h_s=_changed(tiny.h_s, i, bias=bias))) != tiny.fingerprint


def test_fingerprint_tries_large_sums(lite: Model) -> None:
    """Guards against a self-test that a device with less than float64's 53 bits passes."""
    largest: list[float] = []

    def watch(matrix: Matrix, a: torch.Tensor, clamp: bool = True) -> torch.Tensor:
        largest.append(float(a.abs().max()))
        return run(matrix, a, clamp)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hyper_decoder, "run", watch)
        fingerprint(lite.prior(0))
    assert max(largest) == ACTIVATION_MAX
