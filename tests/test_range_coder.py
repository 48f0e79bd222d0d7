"""The range coder: round trips, rate, damaged bytes, and bytes that never change."""

from __future__ import annotations

import json
import math
import re

import constriction
import numpy as np
import pytest
from conftest import GOLDEN, ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from range_reference import ReferenceDecoder, reference_decode, reference_pull

from sgacodec.bitstream import FormatError
from sgacodec.coding import range_coder
from sgacodec.coding.range_coder import PRECISION, Decoder, Encoder, Tables, cost, decode, encode
from sgacodec.coding.tables import gaussian_tables, scale_table
from sgacodec.models.level import LevelModel

GAUSSIAN = gaussian_tables()
FORMAT_MD = ROOT / "docs" / "format.md"
LOW, HIGH = -(2**31), 2**31 - 1


def table(frequencies: list[int], minimum: int) -> tuple[np.ndarray, int]:
    return np.array(frequencies, dtype=np.int32), minimum


def join(*parts: tuple[np.ndarray, int]) -> Tables:
    starts = np.cumsum([0, *(len(f) for f, _ in parts)])
    tables = Tables(np.concatenate([f for f, _ in parts]), starts, np.array([m for _, m in parts], dtype=np.int64))
    tables.check()
    return tables


@st.composite
def random_tables(draw: st.DrawFn) -> Tables:
    """One to five tables of any shape, extreme ones included."""
    parts = []
    for _ in range(draw(st.integers(1, 5))):
        weights = np.array(draw(st.lists(st.integers(0, 1000), min_size=2, max_size=40)), dtype=np.float64) + 1e-9
        counts = np.floor(weights / weights.sum() * (2**PRECISION - len(weights))).astype(np.int64) + 1
        counts[draw(st.integers(0, len(counts) - 1))] += 2**PRECISION - counts.sum()
        parts.append(table(counts.tolist(), draw(st.integers(-(2**20), 2**20))))
    return join(*parts)


EXTREMES = st.sampled_from([0, 1, -1, LOW, LOW + 1, HIGH, HIGH - 1, 2**16, -(2**16), 2**20])
SYMBOLS = npst.arrays(
    np.int32, st.integers(0, 200), elements=st.one_of(st.integers(-40, 40), st.integers(LOW, HIGH), EXTREMES)
)


# ------------------------------------------------------------------------------------------------------ round trip


@given(SYMBOLS, st.data())
@example(np.zeros(0, dtype=np.int32), None)
def test_round_trip_with_the_gaussian_tables(symbols: np.ndarray, draw: st.DataObject | None) -> None:
    """Guards against symbols that are not decoded as they were encoded, or that cannot be encoded."""
    shape = len(symbols)
    indexes = (
        np.zeros(0, np.uint8) if draw is None else draw.draw(npst.arrays(np.uint8, shape, elements=st.integers(0, 63)))
    )
    data = encode(symbols, indexes, GAUSSIAN)
    assert np.array_equal(decode(data, indexes, GAUSSIAN), symbols)
    assert not data.endswith(b"\0")
    assert 8 * len(data) <= cost(symbols, indexes, GAUSSIAN) * 1.001 + 72


@given(random_tables(), SYMBOLS, st.data())
def test_round_trip_with_any_tables(tables: Tables, symbols: np.ndarray, draw: st.DataObject) -> None:
    """Guards against the same with tables of unusual sizes, minima and probabilities."""
    indexes = draw.draw(npst.arrays(np.int64, len(symbols), elements=st.integers(0, len(tables) - 1)))
    data = encode(symbols, indexes, tables)
    decoded = decode(data, indexes, tables)
    assert decoded.dtype == np.int32
    assert np.array_equal(decoded, symbols)
    assert 8 * len(data) <= cost(symbols, indexes, tables) * 1.001 + 72


def test_a_stream_of_zeros_decodes() -> None:
    """Guards against refusing a valid stream whose bytes are all zero as too short for its symbols."""
    half = Tables(np.array([1 << 23, 1 << 23], np.int32), np.array([0, 2]), np.array([0]))
    for count in (1, 64, 65, 1000):
        symbols, indexes = np.zeros(count, np.int32), np.zeros(count, np.uint8)
        data = encode(symbols, indexes, half)
        assert data == b"\0" * max(0, -((64 - count) // 8))
        assert np.array_equal(decode(data, indexes, half), symbols)
        with pytest.raises(FormatError, match="zero byte"):
            decode(data + b"\0", indexes, half)


@given(st.integers(0, 2**32), st.integers(1, 60))
def test_blocks_do_not_change_the_bytes(seed: int, block: int) -> None:
    """Guards against bytes that depend on the block size, which only bounds the memory."""
    rng = np.random.default_rng(seed)
    indexes = rng.integers(0, 64, 100).astype(np.uint8)
    symbols = rng.integers(-300, 300, 100).astype(np.int32)
    whole = encode(symbols, indexes, GAUSSIAN), cost(symbols, indexes, GAUSSIAN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(range_coder, "_BLOCK", block)
        patch.setattr(range_coder, "_COST_BLOCK", block)
        parts = encode(symbols, indexes, GAUSSIAN), cost(symbols, indexes, GAUSSIAN)
        assert np.array_equal(decode(whole[0], indexes, GAUSSIAN), symbols)
    assert parts[0] == whole[0]
    assert parts[1] == pytest.approx(whole[1], rel=1e-12)


def test_every_symbol_escaped() -> None:
    """Guards against failure or unbounded size where all symbols are far outside their tables."""
    rng = np.random.default_rng(1)
    symbols = rng.integers(LOW, HIGH, 20_000, endpoint=True).astype(np.int32)
    symbols[:4] = LOW, HIGH, LOW, HIGH
    indexes = np.zeros(20_000, dtype=np.uint8)
    data = encode(symbols, indexes, GAUSSIAN)
    assert np.array_equal(decode(data, indexes, GAUSSIAN), symbols)
    assert len(data) < 8 * len(symbols)


@given(st.lists(SYMBOLS, max_size=3), st.integers(0, 2**32))
@settings(max_examples=15)  # each one is also decoded in Python
def test_passes_share_one_stream(parts: list[np.ndarray], seed: int) -> None:
    """Guards against a stream of several passes that is not the concatenation the specification describes."""
    rng = np.random.default_rng(seed)
    own = join(table([2**23, 2**22, 2**22], -1), table([5, 2**24 - 6, 1], 2))
    passes = [(v, rng.integers(0, 2, len(v)).astype(np.uint8), own if i % 2 else GAUSSIAN) for i, v in enumerate(parts)]
    encoder = Encoder()
    for symbols, indexes, tables in passes:
        encoder.push(symbols, indexes, tables)
    data = encoder.finish()
    decoder, reference = Decoder(data), ReferenceDecoder(data)
    for symbols, indexes, tables in passes:
        assert np.array_equal(decoder.pull(indexes, tables), symbols)
        assert reference_pull(reference, indexes, tables) == symbols.tolist()
    decoder.finish()
    assert 8 * len(data) <= sum(cost(*one) for one in passes) * 1.001 + 72


def test_missing_or_additional_passes_are_refused() -> None:
    """Guards against a file whose passes end early, or that has fewer bytes than its passes need, being accepted."""
    indexes = np.full(1000, 30, dtype=np.uint8)
    encoder = Encoder()
    for offset in (0, 1, 2):
        encoder.push((np.arange(1000, dtype=np.int32) + offset) % 7, indexes, GAUSSIAN)
    decoder = Decoder(encoder.finish())
    for _ in range(2):
        decoder.pull(indexes, GAUSSIAN)
    with pytest.raises(FormatError, match="bytes are left"):
        decoder.finish()
    decoder.pull(indexes, GAUSSIAN)
    decoder.finish()
    with pytest.raises(FormatError, match="too few"):
        decoder.pull(indexes, GAUSSIAN)


# ------------------------------------------------------------------------------------------------------------ rate


def quantile(model: object, q: int) -> int:
    """The entry whose interval of the cumulative distribution holds q, as constriction sees it."""
    coder = constriction.stream.stack.AnsCoder(np.array([q, 1], dtype=np.uint32))  # decoding takes the low 24 bits
    return int(coder.decode(model, 1)[0])


def assert_exact_intervals(tables: Tables, t: int) -> None:
    frequencies = tables.frequencies[tables.starts[t] : tables.starts[t + 1]]
    ends = np.cumsum(frequencies)
    model = tables.model(t)
    for entry, (end, frequency) in enumerate(zip(ends.tolist(), frequencies.tolist(), strict=True)):
        assert quantile(model, end - frequency) == entry
        assert quantile(model, end - 1) == entry


def test_constriction_uses_exactly_our_frequencies(lite_level: LevelModel) -> None:
    """Guards against a version of constriction that rounds the stored frequencies."""
    for t in (0, 1, 20, 40, 63):
        assert_exact_intervals(GAUSSIAN, t)
    for t in (0, 17, 50):
        assert_exact_intervals(lite_level.z_tables, t)


@given(random_tables())
def test_constriction_uses_any_frequencies_exactly(tables: Tables) -> None:
    """Guards against the same with unusual tables."""
    assert_exact_intervals(tables, 0)


def test_extreme_frequencies() -> None:
    """Guards against failure where one symbol has nearly all of the probability."""
    tables = join(
        table([2**PRECISION - 1, 1], 0), table([1, 2**PRECISION - 1], 5), table([1] * 65535 + [2**24 - 65535], 0)
    )
    for t in range(2):
        assert_exact_intervals(tables, t)
    symbols = np.array([0, 7, 0, 5, 65534, 65535, -1], dtype=np.int32)
    indexes = np.array([0, 0, 0, 1, 2, 2, 2])
    assert np.array_equal(decode(encode(symbols, indexes, tables), indexes, tables), symbols)


def test_bytes_are_the_cost() -> None:
    """Guards against an estimated rate that is not the size of the payload."""
    rng = np.random.default_rng(2)
    indexes = rng.integers(0, 64, 200_000).astype(np.uint8)
    symbols = np.rint(rng.normal(size=200_000) * scale_table()[indexes]).astype(np.int32)
    symbols[::1000] *= 50  # escapes
    assert 8 * len(encode(symbols, indexes, GAUSSIAN)) == pytest.approx(cost(symbols, indexes, GAUSSIAN), rel=0.005)


def test_cost_of_single_symbols() -> None:
    """Guards against a constant error of the estimated rate."""
    tables = join(table([2**23, 2**22, 2**22], -1))
    for symbol, bits in (
        (-1, 1),
        (0, 2),
        (1, 2 + math.log2(34)),
        (2, 2 + math.log2(34) + 1),
        (-2, 2 + math.log2(34) + 1),
    ):
        assert cost(np.array([symbol], np.int32), np.array([0]), tables) == pytest.approx(bits)
    assert cost(np.zeros(0, np.int32), np.zeros(0, np.int64), tables) == 0


# ---------------------------------------------------------------------------------------------------------- damage


def attempt(data: bytes, indexes: np.ndarray, tables: Tables) -> None:
    """Decode damaged bytes: either FormatError or as many symbols as were asked for."""
    try:
        symbols = decode(data, indexes, tables)
    except FormatError:
        return
    assert symbols.shape == indexes.shape
    assert symbols.dtype == np.int32


@given(st.binary(max_size=200), st.integers(0, 300), st.integers(0, 2**32))
def test_arbitrary_bytes(data: bytes, count: int, seed: int) -> None:
    """Guards against errors other than FormatError for arbitrary bytes, as in a crafted file."""
    attempt(data, np.random.default_rng(seed).integers(0, 64, count).astype(np.uint8), GAUSSIAN)


@given(random_tables(), st.binary(max_size=100), st.integers(0, 100))
def test_arbitrary_bytes_and_tables(tables: Tables, data: bytes, count: int) -> None:
    """Guards against the same where many symbols escape and distances are arbitrary."""
    attempt(data, np.arange(count) % len(tables), tables)


@given(st.integers(0, 2**32), st.data())
def test_damaged_payload(seed: int, draw: st.DataObject) -> None:
    """Guards against the same where a valid payload is changed or cut."""
    rng = np.random.default_rng(seed)
    indexes = rng.integers(0, 64, 300).astype(np.uint8)
    symbols = (rng.normal(size=300) * scale_table()[indexes] * 2).astype(np.int32)
    data = bytearray(encode(symbols, indexes, GAUSSIAN))
    for _ in range(draw.draw(st.integers(1, 4))):
        data[draw.draw(st.integers(0, len(data) - 1))] ^= draw.draw(st.integers(1, 255))
    end = draw.draw(st.integers(0, len(data)))
    attempt(bytes(data[:end]), indexes, GAUSSIAN)
    attempt(bytes(data), indexes[:end], GAUSSIAN)


def test_more_bytes_than_symbols_are_refused() -> None:
    """Guards against accepting the payload of an image of another size."""
    indexes = np.full(1000, 30, dtype=np.uint8)
    symbols = np.arange(1000, dtype=np.int32) % 7
    data = encode(symbols, indexes, GAUSSIAN)
    for extra in (b"\0", bytes(8), b"x" * 12):
        with pytest.raises(FormatError):
            decode(data + extra, indexes, GAUSSIAN)
    with pytest.raises(FormatError, match="bytes are left"):
        decode(data, indexes[:500], GAUSSIAN)


@pytest.mark.parametrize(
    ("frequencies", "starts", "minimum"),
    [
        (np.array([2**24], np.int32), [0, 1], [0]),  # no escape
        (np.array([2**24, 0], np.int32), [0, 2], [0]),
        (np.array([2**24 + 1, -1], np.int32), [0, 2], [0]),
        (np.array([2**23, 2**22], np.int32), [0, 2], [0]),
        (np.array([2.0**23, 2.0**23]), [0, 2], [0]),
        (np.array([2**23, 2**23], np.int64), [0, 2], [0]),
        (np.array([2**23, 2**23], np.int32), [0, 2], [2**40]),
        (np.array([2**23, 2**23], np.int32), [0, 2], [-(2**40)]),
        (np.array([2**23, 2**23], np.int32), [0, 1], [0]),
        (np.array([2**23, 2**23], np.int32), [1, 2], [0]),
        (np.array([2**23, 2**23], np.int32), [0, 2], [0, 0]),
        (np.array([2**23, 2**23], np.int32), [0, 4, 2], [0, 0]),
        (np.array([[2**23], [2**23]], np.int32), [0, 2], [0]),
        (np.array(2**24, np.int32), [0, 1], [0]),
        (np.array([2**23, 2**23], np.int32), [0], []),
        (np.full(2**24, 1, np.int32), [0, 2**24], [0]),
    ],
)
def test_malformed_tables(frequencies: np.ndarray, starts: list[int], minimum: list[int]) -> None:
    """Guards against tables of a damaged model file that crash the coder or cannot be decoded."""
    with pytest.raises(ValueError, match="probability table"):
        Tables(frequencies, np.array(starts), np.array(minimum, dtype=np.int64)).check()


# ------------------------------------------------------------------------------------------- stability of the format


def fixed_input() -> tuple[Tables, np.ndarray, np.ndarray]:
    """Integers only, so that every machine has the same input: three tables, all kinds of symbols."""
    tables = join(
        table([2**20 * (1 + i % 3) for i in range(7)] + [2**24 - 13 * 2**20], -3),
        table([2**23, 2**22, 2**21, 2**20, 2**20], 0),
        table([5, 2**24 - 6, 1], -1),
    )
    i = np.arange(60, dtype=np.int64)
    symbols = (i * i * 7919 % 11 - 5).astype(np.int32)
    symbols[[7, 19, 31, 43]] = LOW, HIGH, 70_000, -70_000
    return tables, symbols, (i * 31 % 3).astype(np.uint8)


def test_recorded_bytes(regenerate: bool) -> None:
    """Guards against a release, or a version of constriction, that cannot read earlier files."""
    path = GOLDEN / "entropy.json"
    tables, symbols, indexes = fixed_input()
    data = encode(symbols, indexes, tables)
    if regenerate:
        record = {"bytes": data.hex(), "symbols": symbols.tolist(), "indexes": indexes.tolist()}
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    recorded = json.loads(path.read_text("utf-8"))
    assert symbols.tolist() == recorded["symbols"]
    assert data.hex() == recorded["bytes"]
    assert decode(bytes.fromhex(recorded["bytes"]), indexes, tables).tolist() == recorded["symbols"]


def test_worked_example_of_the_specification() -> None:
    """Guards against a wrong example in docs/format.md."""
    (text,) = re.findall(r"```symbols\n(.*?)```", FORMAT_MD.read_text("utf-8"), re.S)
    fields = {line.split()[0]: line.split()[1:] for line in text.splitlines()}
    tables = join(table([int(f) for f in fields["frequencies"]], int(fields["minimum"][0])))
    symbols = np.array([int(v) for v in fields["symbols"]], dtype=np.int32)
    assert encode(symbols, np.zeros(len(symbols), np.uint8), tables).hex() == fields["bytes"][0]


def test_range_coder_by_the_specification() -> None:
    """Guards against a difference between docs/format.md and the range coder."""
    tables, symbols, indexes = fixed_input()
    data = encode(symbols, indexes, tables)
    assert reference_decode(data, indexes, tables) == symbols.tolist()


@given(SYMBOLS, st.integers(0, 2**32))
@settings(max_examples=40)  # each one walks through tables in Python
def test_range_coder_by_the_specification_on_any_input(symbols: np.ndarray, seed: int) -> None:
    """Guards against the same for any symbols."""
    indexes = np.random.default_rng(seed).integers(0, 30, len(symbols)).astype(np.uint8)
    assert reference_decode(encode(symbols, indexes, GAUSSIAN), indexes, GAUSSIAN) == symbols.tolist()
