"""The integer networks of docs/format.md, written from it in int64 numpy: loops over kernel taps, whole grids."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sgacodec.coding.hyper_decoder import IntegerGains, IntegerHyperDecoder
from sgacodec.coding.integer_layers import IntegerLayer
from sgacodec.coding.prior import ExactPrior

Pair = tuple[np.ndarray, np.ndarray]
COLUMN = (None, slice(None), None, None)


def reference_layer(layer: IntegerLayer, a: np.ndarray) -> np.ndarray:
    """The sums of one layer: (B, in, H, W) → (B, out, H', W'), both int64."""
    weight = layer.weight.numpy().astype(np.int64)
    B, _, H, W = a.shape
    k, s, p = layer.weight.shape[-1], layer.stride, layer.padding
    if not layer.transposed:
        padded = np.pad(a, ((0, 0), (0, 0), (p, p), (p, p)))
        out = np.zeros((B, weight.shape[0], H, W), dtype=np.int64)
        for u in range(k):
            for v in range(k):
                out += np.einsum("oi,bihw->bohw", weight[:, :, u, v], padded[:, :, u : u + H, v : v + W])
        return out
    full = np.zeros((B, weight.shape[1], (H - 1) * s + k, (W - 1) * s + k), dtype=np.int64)
    for u in range(k):
        for v in range(k):
            part = np.einsum("io,bihw->bohw", weight[:, :, u, v], a)
            full[:, :, u : u + s * (H - 1) + 1 : s, v : v + s * (W - 1) + 1 : s] += part
    extra = layer.output_padding
    return np.pad(full, ((0, 0), (0, 0), (0, extra), (0, extra)))[:, :, p : full.shape[2] - p + extra][
        ..., p : full.shape[3] - p + extra
    ]


def rounded_shift(value: np.ndarray, by: np.ndarray | int) -> np.ndarray:
    return (value + (np.int64(1) << (np.int64(by) - 1))) >> by


def activated(layer: IntegerLayer, sums: np.ndarray, slope: int) -> np.ndarray:
    """LeakyReLU and rounding shift of sums with their bias, not clamped."""
    sums = np.where(sums < 0, (sums * slope) >> 16, sums) if slope else sums
    return rounded_shift(sums, layer.shift.numpy()[COLUMN])


def run(layer: IntegerLayer, a: np.ndarray, slope: int) -> np.ndarray:
    return activated(layer, reference_layer(layer, a) + layer.bias.numpy()[COLUMN], slope)


def features(h_s: IntegerHyperDecoder, gains: IntegerGains, k: np.ndarray) -> np.ndarray:
    """The input of the last layer of the hyper-decoder."""
    z_scale, z_offset = gains.z_scale.numpy()[COLUMN], gains.z_offset.numpy()[COLUMN]
    a = (np.clip(k.astype(np.int64), -(2**20), 2**20) * z_scale + z_offset) >> 12
    a = np.clip(a, -32767, 32767)
    for layer in h_s.layers[:-1]:
        a = np.clip(run(layer, a, layer.slope), -32767, 32767)
    return a


def entropy_parameters(h_s: IntegerHyperDecoder, gains: IntegerGains, p: np.ndarray, m: np.ndarray,
                       channels: slice = slice(None)) -> Pair:  # fmt: skip
    """Index and μ of the scale and mean outputs of some channels."""
    scale_gain, mean_gain = (v.numpy().astype(np.int64)[channels][COLUMN] for v in (gains.scale, gains.mean))
    p = p + scale_gain if h_s.kind == "exp" else rounded_shift(p * scale_gain, 20)
    index = sum((p > t).astype(np.uint8) for t in h_s.thresholds.numpy())
    mu = np.clip(rounded_shift(m * mean_gain, 26), -(2**23), 2**23)
    return np.asarray(index), mu.astype(np.int32)


def outputs(layer: IntegerLayer, a: np.ndarray) -> Pair:
    """Scale and mean outputs of a last layer."""
    p, m = np.split(np.clip(run(layer, a, 0), -(2**31), 2**31), 2, axis=1)
    return p, m


def reference(h_s: IntegerHyperDecoder, gains: IntegerGains, k: np.ndarray) -> Pair:
    """Indexes and means of y from the symbols of z, without a context model."""
    return entropy_parameters(h_s, gains, *outputs(h_s.layers[-1], features(h_s, gains, k)))


SymbolsOf = Callable[[np.ndarray, np.ndarray, slice, np.ndarray], np.ndarray]


def reference_passes(prior: ExactPrior, k: np.ndarray, symbols_of: SymbolsOf) -> tuple[np.ndarray, ...]:
    """Symbols, indexes and means of y, (1, M, 4h, 4w), with a context model.

    `symbols_of(index, mu, channels, where)` gives the symbols of a pass for the positions `where` (4h, 4w) of all its
    channels, in the order in which they are numbered. `index` and `mu` are (n,) in the same order.
    """
    h_s, gains = prior.h_s, prior.gains
    f = features(h_s, gains, k)
    p_h, m_h = outputs(h_s.layers[-1], f)
    _, mu_h = entropy_parameters(h_s, gains, p_h, m_h)
    _, M, H, W = p_h.shape
    odd = np.add.outer(np.arange(H), np.arange(W)) % 2 == 1
    symbols, index, mu = (np.zeros((1, M, H, W), dtype=t) for t in (np.int64, np.uint8, np.int64))
    r = np.zeros((1, M, H, W), dtype=np.int64)
    first = 0
    for g, group in enumerate(prior.context):
        own = slice(first, first + group.channels)
        for half in (0,) if group.near is None else (0, 1):
            where = np.ones((H, W), bool) if group.near is None else odd == (half == 1)
            a = [f]
            if group.past is not None:
                a.append(np.clip(run(group.past, r[:, :first], 655), -32767, 32767))
            if group.near is not None:
                near = np.clip(run(group.near, r[:, own], 655), -32767, 32767)
                a.append(near if half == 1 else np.zeros_like(near))
            bias = gains.context.numpy().astype(np.int64)[g, half][COLUMN]
            sums = reference_layer(group.mix, np.concatenate(a, axis=1)) + bias
            hidden = np.clip(activated(group.mix, sums, 655), -32767, 32767)
            p, m = outputs(group.out, hidden)
            p, m = np.clip(p_h[:, own] + p, -(2**31), 2**31), np.clip(m_h[:, own] + m, -(2**31), 2**31)
            index_k, mu_k = entropy_parameters(h_s, gains, p, m, own)
            index[:, own, where], mu[:, own, where] = index_k[:, :, where], mu_k[:, :, where]
            given = symbols_of(index_k[:, :, where].ravel(), mu_k[:, :, where].ravel(), own, where)
            symbols[:, own, where] = np.asarray(given, dtype=np.int64).reshape(1, group.channels, -1)
            inverse = np.minimum(2**37 // np.maximum(gains.mean.numpy().astype(np.int64)[own], 1), 2**31)[COLUMN]
            d = np.clip(1024 * symbols[:, own] + mu[:, own] - mu_h[:, own], -(2**31), 2**31)
            coded = np.clip((d * inverse) >> 16, -32767, 32767)
            r[:, own, where] = coded[:, :, where]
        first = own.stop
    return symbols, index, mu
