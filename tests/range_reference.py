"""The range decoder of docs/format.md, written from it in Python's integers."""

from __future__ import annotations

import numpy as np

from sgacodec.coding.range_coder import Tables


class ReferenceDecoder:
    """Reads one entry after the other."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        self.low, self.range = 0, 2**64 - 1
        self.point = self.word() << 32 | self.word()

    def word(self) -> int:
        part, self.at = self.data[self.at : self.at + 4], self.at + 4
        return int.from_bytes(part.ljust(4, b"\0"), "big")

    def entry(self, frequencies: list[int]) -> int:
        scale = self.range >> 24
        quantile = (self.point - self.low) % 2**64 // scale
        assert quantile < 2**24
        entry, cumulative = 0, 0
        while quantile >= cumulative + frequencies[entry]:
            cumulative += frequencies[entry]
            entry += 1
        self.low = (self.low + scale * cumulative) % 2**64
        self.range = scale * frequencies[entry]
        if self.range < 2**32:
            self.low = (self.low << 32) % 2**64
            self.range <<= 32
            self.point = (self.point << 32) % 2**64 | self.word()
        return entry

    def uniform(self, size: int) -> int:
        share = 2**24 // size
        return self.entry([share] * (size - 1) + [2**24 - share * (size - 1)])


def reference_decode(data: bytes, indexes: np.ndarray, tables: Tables) -> list[int]:
    return reference_pull(ReferenceDecoder(data), indexes, tables)


def reference_pull(decoder: ReferenceDecoder, indexes: np.ndarray, tables: Tables) -> list[int]:
    symbols, escaped = [0] * len(indexes), []
    for t in range(len(tables)):
        frequencies = tables.frequencies[tables.starts[t] : tables.starts[t + 1]].tolist()
        for i in np.flatnonzero(indexes == t).tolist():
            entry = decoder.entry(frequencies)
            symbols[i] = int(tables.minimum[t]) + entry
            if entry == len(frequencies) - 1:
                escaped.append(i)
    escaped.sort()
    lengths = [decoder.uniform(34) for _ in escaped]
    values = [1 << length for length in lengths]
    for shift in (0, 16, 32):
        for j, length in enumerate(lengths):
            if length > shift:
                values[j] += decoder.uniform(1 << min(16, length - shift)) << shift
    for i, value in zip(escaped, values, strict=True):
        distance, t = value - 1, int(indexes[i])
        first = int(tables.minimum[t])
        beyond = first + int(tables.escape()[t])
        symbols[i] = first - 1 - distance // 2 if distance % 2 else beyond + distance // 2
    return symbols
