"""Integers ↔ bytes: range coding with constriction under integer probability tables.

Symbols that share a table are coded together, in the order of the tables, which avoids a Python loop over symbols. A
symbol outside its table is coded as the table's last entry (the escape); its distance from the table follows after all
symbols of the pass, in an exponential Golomb code, so every int32 can be coded. Specified in docs/format.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import constriction
import numpy as np

from ..bitstream import FormatError

PRECISION = 24  # bits of a probability: the frequencies of a table sum up to 2²⁴, as constriction needs
_CHUNK = 16  # bits of an escaped distance per uniform symbol
_MAX_BITS = 33  # the largest distance of an int32 from a table has 33 bits
_BLOCK = 1 << 22  # symbols sorted at once, to bound the memory
_COST_BLOCK = 1 << 16  # symbols whose cost is computed at once: intermediate arrays fit into a CPU's cache
_MAX_ENTRIES = 1 << 16  # of a table: with more, 24 bits would not resolve the probabilities
_NONE = np.zeros(0, dtype=np.int64)

_uniform = constriction.stream.model.Uniform


@dataclass(frozen=True)
class Tables:
    """Integer probability tables: table t has one entry for each symbol from minimum[t] on, then the escape.

    Attributes
    ----------
    frequencies : ndarray (total,) int32
        Frequencies of all tables one after another, positive; those of a table sum up to 2²⁴.
    starts : ndarray (T + 1,) int64
        First position of each table in `frequencies`, and their length.
    minimum : ndarray (T,) int64
        The first symbol of each table.
    """

    frequencies: np.ndarray
    starts: np.ndarray
    minimum: np.ndarray
    _models: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.minimum)

    def check(self) -> None:
        """Raise ValueError unless sizes, frequencies and minima are within the limits of docs/format.md."""
        starts, lengths = self.starts, np.diff(self.starts)
        if (
            len(self.minimum) < 1
            or starts[0] != 0
            or self.frequencies.shape != (starts[-1],)
            or len(starts) != len(self.minimum) + 1
        ):
            raise ValueError("the sizes of the probability tables are inconsistent")
        if self.frequencies.dtype != np.int32 or self.frequencies.min() < 1:
            raise ValueError("a frequency of a probability table is not a positive int32")
        low, high = self.minimum.min(), self.minimum.max()
        if lengths.min() < 2 or lengths.max() > _MAX_ENTRIES or low < -(1 << 20) or high > 1 << 20:
            raise ValueError("a probability table is too short, too long or out of range")
        if (np.add.reduceat(self.frequencies.astype(np.int64), starts[:-1]) != 1 << PRECISION).any():
            raise ValueError("the frequencies of a probability table do not sum up to 2^24")

    def escape(self) -> np.ndarray:
        """Position of the escape within each table, (T,)."""
        return np.diff(self.starts) - 1

    def bits(self) -> np.ndarray:
        """−log₂ of the probability of each entry, (total,) float64."""
        bits: np.ndarray = PRECISION - np.log2(self.frequencies)
        return bits

    def model(self, table: int) -> Any:
        """constriction's model of one table, with exactly these frequencies.

        constriction gives each of n entries one count and distributes the remaining 2²⁴ − n in proportion to float
        weights. The weights `frequency − 1` sum up to 2²⁴ − n, so each entry gets exactly its weight.
        """
        if table not in self._models:
            counts = self.frequencies[self.starts[table] : self.starts[table + 1]]
            self._models[table] = constriction.stream.model.Categorical((counts - 1).astype(np.float64), perfect=False)
        return self._models[table]


def _groups(indexes: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(table, positions of its symbols), tables and positions ascending; a table with many symbols in several parts."""
    if not len(indexes):
        return
    tables = int(indexes.max()) + 1
    blocks = []
    for start in range(0, len(indexes), _BLOCK):
        block = indexes[start : start + _BLOCK]
        ends = np.cumsum(np.bincount(block, minlength=tables))
        blocks.append((start, np.argsort(block, kind="stable").astype(np.uint32), ends))
    for table in range(tables):
        for start, order, ends in blocks:
            positions = order[ends[table - 1] if table else 0 : ends[table]]
            if positions.size:
                yield table, positions.astype(np.int64) + start


def _split(values: np.ndarray, tables: Tables, table: int | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entry of each symbol in its table (int64), whether it escapes (bool), and the escaped distances (int64)."""
    escape = np.broadcast_to(tables.escape()[table], values.shape)
    entries = values.astype(np.int64) - tables.minimum[table]
    escaped = (entries < 0) | (entries >= escape)
    outside, escape = entries[escaped], escape[escaped]
    distances = np.where(outside < 0, -2 * outside - 1, 2 * (outside - escape))  # odd below, even above
    entries[escaped] = escape
    return entries, escaped, distances


class Encoder:
    """One range-coded stream that is written in several steps, the passes of y."""

    def __init__(self) -> None:
        self._coder = constriction.stream.queue.RangeEncoder()
        self._least = 0

    def push(self, symbols: np.ndarray, indexes: np.ndarray, tables: Tables) -> None:
        """Append int32 symbols (n,), symbol i under table indexes[i]; escaped distances directly after them."""
        self._least += shortest(np.bincount(indexes, minlength=len(tables)), tables)
        where, distances = [_NONE], [_NONE]
        for table, positions in _groups(indexes):
            entries, escaped, beyond = _split(symbols[positions], tables, table)
            self._coder.encode(entries.astype(np.int32), tables.model(table))
            where.append(positions[escaped])
            distances.append(beyond)
        order = np.argsort(np.concatenate(where))
        if order.size:
            _encode_distances(self._coder, np.concatenate(distances)[order])

    def finish(self) -> bytes:
        """The stream, big-endian words without the zero bytes at its end that exceed `smallest_size`."""
        data: bytes = self._coder.get_compressed().astype(">u4").tobytes().rstrip(b"\0")
        return data.ljust(smallest_size(self._least), b"\0")


class Decoder:
    """Reads what an `Encoder` wrote: one `pull` for each `push`, with the same indexes and tables.

    All methods raise FormatError when the bytes cannot have come from an `Encoder`.
    """

    def __init__(self, data: bytes) -> None:
        words = np.frombuffer(data + b"\0" * (-len(data) % 4), dtype=">u4").astype(np.uint32)
        self._coder = constriction.stream.queue.RangeDecoder(words)
        self._data = data
        self._least = 0

    def pull(self, indexes: np.ndarray, tables: Tables) -> np.ndarray:
        """Decode the next symbols, (n,) int32."""
        self._least += shortest(np.bincount(indexes, minlength=len(tables)), tables)
        check_size(self._data, self._least)
        symbols = np.empty(len(indexes), dtype=np.int32)
        where = [_NONE]
        try:
            for table, positions in _groups(indexes):
                entries = self._coder.decode(tables.model(table), len(positions))
                where.append(positions[entries == tables.escape()[table]])
                symbols[positions] = entries + np.int32(tables.minimum[table])
            escaped = np.sort(np.concatenate(where))
            distances = _decode_distances(self._coder, len(escaped))
        except (AssertionError, ValueError) as error:
            raise FormatError(f"damaged: invalid entropy-coded bytes ({error})") from None
        if escaped.size:
            table_of = indexes[escaped]
            above = tables.escape()[table_of] + distances // 2
            outside = np.where(distances % 2 == 1, -1 - distances // 2, above) + tables.minimum[table_of]
            if outside.max() > 2**31 - 1 or outside.min() < -(2**31):
                raise FormatError("damaged: an entropy-coded symbol exceeds 32 bits")
            symbols[escaped] = outside
        return symbols

    def finish(self) -> None:
        """Check that all bytes have been used, and that no zero bytes follow them."""
        if self._data.endswith(b"\0") and len(self._data) > smallest_size(self._least):
            raise FormatError("damaged: an entropy-coded stream ends with a zero byte")
        if not self._coder.maybe_exhausted():
            raise FormatError("damaged: bytes are left after the last entropy-coded symbol")


def encode(symbols: np.ndarray, indexes: np.ndarray, tables: Tables) -> bytes:
    """A stream of int32 symbols (n,), symbol i under table indexes[i]."""
    encoder = Encoder()
    encoder.push(symbols, indexes, tables)
    return encoder.finish()


def decode(data: bytes, indexes: np.ndarray, tables: Tables) -> np.ndarray:
    """The int32 symbols (n,) of a stream that :func:`encode` made with the same indexes and tables.

    Raises
    ------
    FormatError
        When the bytes cannot have come from `encode`.
    """
    decoder = Decoder(data)
    symbols = decoder.pull(indexes, tables)
    decoder.finish()
    return symbols


def shortest(counts: np.ndarray, tables: Tables) -> int:
    """Lower bound of the code length of counts[t] symbols of each table, in 1/256 bit.

    All symbols are taken as the most probable ones, whose code lengths are rounded down: integers, so that encoder and
    decoder agree.
    """
    largest = np.maximum.reduceat(tables.frequencies, tables.starts[:-1])
    return int((counts * np.floor(256 * (PRECISION - np.log2(largest))).astype(np.int64)).sum())


def smallest_size(least: int) -> int:
    """Bytes that a stream has at least whose symbols have the lower bound `least` (see `shortest`).

    64 bits of tolerance are more than the range coder's state.
    """
    return max(0, -((64 * 256 - least) // (8 * 256)))


def check_size(data: bytes, least: int) -> None:
    """Refuse a stream that is too short for symbols of the lower bound `least`, some of those of the image or all.

    Raises
    ------
    FormatError
    """
    if len(data) < smallest_size(least):
        raise FormatError("damaged: too few entropy-coded bytes for an image of this size")


def cost(symbols: np.ndarray, indexes: np.ndarray, tables: Tables) -> float:
    """Bits of int32 symbols (n,) under tables indexes (n,) for an ideal entropy coder, escapes included."""
    bits = tables.bits()
    total = 0.0
    for start in range(0, len(symbols), _COST_BLOCK):
        table = indexes[start : start + _COST_BLOCK]
        entries, _, distances = _split(symbols[start : start + _COST_BLOCK], tables, table)
        total += float(bits[tables.starts[table] + entries].sum())
        total += float((np.log2(_MAX_BITS + 1) + _bit_length(distances + 1)).sum())
    return total


def bits_of(symbol: int, tables: Tables) -> np.ndarray:
    """Bits of one symbol under each table, (T,) float64; of its escape where the table does not have it."""
    entries, _, _ = _split(np.full(len(tables), symbol), tables, np.arange(len(tables)))
    bits: np.ndarray = tables.bits()[tables.starts[:-1] + entries]
    return bits


def _bit_length(values: np.ndarray) -> np.ndarray:
    """⌊log₂ v⌋ of positive int64 below 2⁵³, exactly."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64) - 1


def _chunks(lengths: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(shift, positions, sizes) of the bits below the leading one of numbers with `lengths` such bits, 16 at a time."""
    for shift in range(0, _MAX_BITS, _CHUNK):
        positions = np.flatnonzero(lengths > shift)
        if positions.size:
            width = np.minimum(lengths[positions] - shift, _CHUNK)
            yield shift, positions, (1 << width).astype(np.int32)


def _encode_distances(encoder: Any, distances: np.ndarray) -> None:
    values = distances + 1
    lengths = _bit_length(values)
    encoder.encode(lengths.astype(np.int32), _uniform(_MAX_BITS + 1))
    rest = values - (np.int64(1) << lengths)
    for shift, positions, sizes in _chunks(lengths):
        encoder.encode(((rest[positions] >> shift) % sizes).astype(np.int32), _uniform(), sizes)


def _decode_distances(decoder: Any, count: int) -> np.ndarray:
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    lengths = decoder.decode(_uniform(_MAX_BITS + 1), count).astype(np.int64)
    values = np.int64(1) << lengths
    for shift, positions, sizes in _chunks(lengths):
        values[positions] += decoder.decode(_uniform(), sizes).astype(np.int64) << shift
    return values - 1
