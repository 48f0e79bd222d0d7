"""The integer networks in numpy: symbols of z and of earlier passes of y to table indexes and means of the next pass.

    z ─► features ─► last layer ─────────────────────► + ─► index, μ of the pass
             └────► mix ─► out ────────────────────────▲
    earlier groups ─► past ─► ▲
    first half ─► near ───────┘

An implementation of docs/format.md that shares no code with `coding/`, which needs torch.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from .grid import Grid, columns, positions, taps
from .layers import ACTIVATION_MAX, OUTPUT_MAX, Layer, finished, multiplied, upsampled
from .threads import each, workers

UPSAMPLING = 4  # positions of y for each position of z, along both axes
MU_BITS = 10  # fractional bits of μ
_MU_MAX = 2**23
_SYMBOL_MAX = 2**20  # of z: more saturates
_INPUT_BITS, _SCALE_SHIFT, _MEAN_SHIFT, _INVERSE_SHIFT = 12, 20, 26, 16
_INVERSE_BITS = 37
_HALO = 2  # positions of z on each side, on which the features of a tile depend
_TILE = 2**9  # positions of z whose features are computed at once
_BLOCK = 2**9  # positions of y evaluated at once


@dataclass(frozen=True)
class Group:
    """The layers of one channel group of the context model; `past` and `near` where the group has them."""

    channels: slice
    past: Layer | None
    near: Layer | None
    mix: Layer
    out: Layer


@dataclass(frozen=True)
class Gains:
    """The integer gains of one level, int64: (N,), (N,), (M,), (M,), and (groups, halves, hidden)."""

    z_scale: np.ndarray
    z_offset: np.ndarray
    scale: np.ndarray
    mean: np.ndarray
    context: np.ndarray | None = None


@dataclass(frozen=True)
class Prior:
    """The integer networks of one level.

    Attributes
    ----------
    layers : tuple of Layer
        Of the hyper-decoder: two transposed convolutions, then one that gives scales and means of all channels.
    thresholds : ndarray (63,) int64
    kind : {"exp", "linear"}
        Whether scales are logarithms.
    groups : tuple of Group
        Empty without a context model.
    """

    layers: tuple[Layer, ...]
    thresholds: np.ndarray
    kind: str
    groups: tuple[Group, ...]
    gains: Gains


@dataclass(frozen=True)
class Pass:
    """Table indexes (h·w', C) uint8 and means (h·w', C) int32 with MU_BITS of the symbols of one pass."""

    channels: slice
    half: int | None
    index: np.ndarray
    mu: np.ndarray


@dataclass(frozen=True)
class _Block:
    """Positions of a pass that are evaluated at once.

    `rows` are those of the arrays of a `Pass`, `where` (n,) indexes into `Grid.flat`; `bottom` and `right` are the ends
    of the rows and columns of y in which they are.
    """

    rows: slice
    where: np.ndarray
    bottom: int
    right: int


def decode_passes(
    prior: Prior,
    k_z: np.ndarray,
    symbols_of: Callable[[Pass], np.ndarray],
    seen: Callable[[np.ndarray], None] = lambda index: None,
) -> np.ndarray:
    """Run all passes.

    Parameters
    ----------
    k_z : ndarray (N, h, w) int32
        Symbols of z.
    symbols_of : callable
        Gives the symbols of a pass, (h·w', C) int32.
    seen : callable
        Called with the indexes of each block of a pass before the next ones are evaluated; what it raises ends the
        work.

    Returns
    -------
    ndarray (2, 4h, 4w, M) int32
        Symbols and means of y.
    """
    _, h, w = k_z.shape
    h, w = UPSAMPLING * h, UPSAMPLING * w
    found = np.empty((2, h, w, len(prior.gains.mean)), np.int32)
    features = Grid.zeros(h, w, prior.layers[-1].inputs)
    margin, tiles = prior.layers[-1].side // 2, _fill(features, prior, k_z)
    reached: tuple[int, ...] = 0, 0, 0, 0  # the tile that was evaluated last
    coded: list[Grid] = []
    for number, group in enumerate(prior.groups or (_all_channels(prior),)):
        size = len(range(*group.channels.indices(found.shape[-1])))
        own = Grid.zeros(h, w, size)
        last_group = group.channels.stop == found.shape[-1]
        for half in (None,) if group.near is None else (0, 1):
            evaluate = _evaluation(prior, number, group, half, features, coded, own)
            count = h * (w if half is None else w // 2)
            index = np.empty((count, size), np.uint8)
            mu, mu_h = np.empty((2, count, size), np.int32)
            blocks = _blocks(h, w, half)
            for at_once in (blocks[i : i + workers()] for i in range(0, len(blocks), workers())):
                for block in at_once:
                    below, right = min(h, block.bottom + margin), min(w, block.right + margin)
                    while reached[0] < below and (reached[2] < below or reached[3] < right):
                        reached = next(tiles)
                results = each(evaluate, [block.where for block in at_once])
                for block, result in zip(at_once, results, strict=True):
                    index[block.rows], mu[block.rows], mu_h[block.rows] = result
                    seen(result[0])
            symbols = symbols_of(Pass(group.channels, half, index, mu))
            inside = own.inside
            for target, values in ((found[0], symbols), (found[1], mu)):
                _place(target[..., group.channels], half, values)
            if not last_group or half == 0:
                _place(inside, half, _residual(symbols, mu, mu_h, prior.gains.mean[group.channels]))
        coded.append(own)
    return found


def fingerprint(prior: Prior) -> str:
    """SHA-256 of the entropy parameters for the fixed input of docs/format.md."""
    digest = hashlib.sha256()

    def symbols_of(one: Pass) -> np.ndarray:
        digest.update(one.index.T.tobytes())
        digest.update(one.mu.T.astype("<i4").tobytes())
        return np.ascontiguousarray(_test_symbols(one.mu.size).reshape(one.mu.shape[::-1]).T)

    decode_passes(prior, _test_symbols(15 * len(prior.gains.z_scale)).reshape(-1, 3, 5), symbols_of)
    return digest.hexdigest()


def _test_symbols(count: int) -> np.ndarray:
    j = np.arange(count)
    return (((7919 * j + 104729) % 31 - 15) * np.where(j % 17 == 0, 100, 1)).astype(np.int32)


def _all_channels(prior: Prior) -> Group:
    """The only group of a prior without a context model; its layers are not used."""
    last = prior.layers[-1]
    return Group(slice(0, len(prior.gains.mean)), None, None, last, last)


def _fill(features: Grid, prior: Prior, k_z: np.ndarray) -> Iterator[tuple[int, ...]]:
    """Evaluate the input of the last layer of the hyper-decoder tile by tile, in the order of rows, then columns.

    Yields
    ------
    tuple of int
        Top, left, bottom, right of each tile when it is done, in positions of y; half open.
    """
    gains = prior.gains
    _, h, w = k_z.shape
    columns = min(w, _TILE)
    for (top, bottom), (left, right) in itertools.product(_parts(h, _TILE // columns), _parts(w, columns)):
        y, end, x, edge = max(0, top - _HALO), min(h, bottom + _HALO), max(0, left - _HALO), min(w, right + _HALO)
        k = np.clip(k_z[:, y:end, x:edge].transpose(1, 2, 0).astype(np.int64), -_SYMBOL_MAX, _SYMBOL_MAX)
        a = np.clip((k * gains.z_scale + gains.z_offset) >> _INPUT_BITS, -ACTIVATION_MAX, ACTIVATION_MAX)
        for layer in prior.layers[:-1]:
            a = upsampled(layer, a.astype(np.float64))
        a = a[UPSAMPLING * (top - y) : UPSAMPLING * (bottom - y), UPSAMPLING * (left - x) : UPSAMPLING * (right - x)]
        box = tuple(UPSAMPLING * v for v in (top, left, bottom, right))
        features.inside[box[0] : box[2], box[1] : box[3]] = a
        yield box


def _parts(length: int, size: int) -> list[tuple[int, int]]:
    return [(first, min(first + size, length)) for first in range(0, length, size)]


def _blocks(h: int, w: int, half: int | None) -> list[_Block]:
    """The positions of a pass, row by row: whole rows, or parts of a row that is longer than a block."""
    row = w if half is None else w // 2
    size = min(_BLOCK, -(-h * row // workers()))
    step, found = max(1, size // row), []
    for top in range(0, h, step):
        bottom = min(top + step, h)
        where = positions(w, top, bottom, half).ravel()
        for first, end in _parts(len(where), size):
            rows = slice(top * row + first, top * row + end)
            found.append(_Block(rows, where[first:end], bottom, min(w, w // row * end)))
    return found


def _evaluation(
    prior: Prior, number: int, group: Group, half: int | None, features: Grid, coded: list[Grid], own: Grid
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """A function of positions (n,) that gives index (n, C) uint8, μ and μ without context (n, C) int64 of one pass."""
    gains, M, width = prior.gains, len(prior.gains.mean), features.width
    outputs = np.r_[group.channels, slice(M + group.channels.start, M + group.channels.stop)]
    last = prior.layers[-1]
    whole = Layer(last.weight[..., outputs], last.bias[outputs], last.shift[outputs], last.slope)
    size = len(outputs) // 2
    scale_gain, mean_gain = gains.scale[group.channels], gains.mean[group.channels]

    def convolution(layer: Layer, grids: list[Grid], odd: bool = False) -> Callable[[np.ndarray], np.ndarray]:
        numbers, offsets = taps(width, layer.side, odd)
        weight = layer.weight.reshape(-1, layer.inputs, layer.outputs)[numbers]
        ends = np.cumsum([0, *(grid.flat.shape[1] for grid in grids)])
        parts = [weight[:, a:b].reshape(-1, layer.outputs) for a, b in itertools.pairwise(ends)]
        matrix = np.concatenate(parts)
        return lambda where: finished(layer, columns(grids, where, offsets) @ matrix)

    base_of = convolution(whole, [features])
    context = [] if not prior.groups else [(group.past, coded, False)]
    if half == 1:
        context.append((group.near, [own], True))
    contexts = [convolution(layer, grids, odd) for layer, grids, odd in context if layer is not None]
    mix, out = group.mix.weight[0, 0], group.out.weight[0, 0]
    bias = None if gains.context is None else gains.context[number, half or 0]

    def evaluate(where: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        base = base_of(where)
        total = base
        if prior.groups:
            inputs = np.concatenate([features.flat[where], *(found(where) for found in contexts)], 1, dtype=np.float64)
            hidden = finished(group.mix, inputs @ mix[: inputs.shape[1]], bias)
            change = finished(group.out, hidden.astype(np.float64) @ out)
            total = np.clip(change + base, -OUTPUT_MAX, OUTPUT_MAX)
        index = _tables(prior, total[:, :size], scale_gain)
        return index, _mean(total[:, size:], mean_gain), _mean(base[:, size:], mean_gain)

    return evaluate


def _tables(prior: Prior, scale: np.ndarray, gain: np.ndarray) -> np.ndarray:
    p = scale + gain if prior.kind == "exp" else multiplied(scale, gain, _SCALE_SHIFT)
    index: np.ndarray = np.searchsorted(prior.thresholds, p).astype(np.uint8)  # thresholds that are less
    return index


def _mean(mean: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return np.clip(multiplied(mean, gain, _MEAN_SHIFT), -_MU_MAX, _MU_MAX)


def _residual(symbols: np.ndarray, mu: np.ndarray, mu_h: np.ndarray, gain: np.ndarray) -> np.ndarray:
    inverse = np.minimum((1 << _INVERSE_BITS) // np.maximum(gain, 1), OUTPUT_MAX)
    difference = (symbols.astype(np.int64) << MU_BITS) + mu - mu_h
    found = (np.clip(difference, -OUTPUT_MAX, OUTPUT_MAX) * inverse) >> _INVERSE_SHIFT
    return np.clip(found, -ACTIVATION_MAX, ACTIVATION_MAX)


def _place(grid: np.ndarray, half: int | None, values: np.ndarray) -> None:
    """Write values (h·w', C) into one half of the checkerboard of a grid (h, w, C), or into all of it."""
    h, w, _ = grid.shape
    if half is None:
        grid[:] = values.reshape(grid.shape)
        return
    values = values.reshape(h, w // 2, -1)
    grid[0::2, half::2] = values[0::2]
    grid[1::2, 1 - half :: 2] = values[1::2]
