"""The synthesis transforms in numpy: ŷ to 8-bit pixels, as GEMMs in float32, in tiles of bounded memory.

    lite      ŷ ─► body ─► blocks (12×12, stride 8) ─► + filter (3×3, 3×3) ─► pixels (3×3) ─► pixel shuffle ─► x̂
    mshyper   ŷ ─► 5×5 up ─► inverse GDN ─► 5×5 up ─► inverse GDN ─► 5×5 up ─► inverse GDN ─► 5×5 up ─► x̂

Pixels may differ by 1/255 from those of another implementation; nothing depends on them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.lib.stride_tricks import as_strided

from ..networks.architecture import STRIDE
from ..tiling import Box, slices, tiles, with_halo
from .model import DecoderModel, Tensors
from .prior import MU_BITS
from .threads import each, workers

_TILE = 512  # pixels a side
_BODY = 2**11  # latents that pass the body at once
_BLOCK = 2**9  # positions of a convolution at once: their columns fit into a CPU's cache
_LATENTS = 2**11  # latents of the transposed convolution of `lite` at once
_COLUMNS = 2**22  # values of the columns of a transposed convolution at once


def render(model: DecoderModel, y: np.ndarray, height: int, width: int) -> np.ndarray:
    """The decoded pixels, (height, width, 3) uint8; y (2, h, w, M) int32 are symbols and means."""
    size = STRIDE * y.shape[1], STRIDE * y.shape[2]
    synthesis, halo, y_hat = _FAMILIES[model.architecture.family](model, y)
    pixels = np.empty((*size, 3), np.uint8)

    def run(tile: Box) -> None:
        around = with_halo(tile, halo, *size)
        rows, cols = slices(tile, 1, around[:2])
        with np.errstate(over="ignore", invalid="ignore"):  # a crafted file may have latents of 2³¹
            pixels[slices(tile, 1)] = synthesis(y_hat(slices(around, STRIDE)))[rows, cols]

    each(run, _tiles(*size))
    return np.ascontiguousarray(pixels[:height, :width])


def _tiles(height: int, width: int) -> list[Box]:
    """Tiles of a picture; strips of rows where tiles would be fewer than threads."""
    found = list(tiles((0, 0, height, width), _TILE, height, width))
    if len(found) >= workers():
        return found
    rows = STRIDE * -(-height // (STRIDE * workers()))
    return [(top, 0, min(top + rows, height), width) for top in range(0, height, rows)]


Synthesis = Callable[[np.ndarray], np.ndarray]  # ŷ (h, w, M) → pixels (16h, 16w, 3) uint8
Source = Callable[[tuple[slice, slice]], np.ndarray]  # ŷ of a box of latents


def _eight_bits(x: np.ndarray) -> np.ndarray:
    """x̂ as 8-bit samples: clamped to 0..1, rounded half to even."""
    x = np.clip(x, 0, 1)
    x *= np.float32(255)
    return np.rint(x, out=x).astype(np.uint8)


def _scaled(model: DecoderModel, y: np.ndarray, box: tuple[slice, slice]) -> np.ndarray:
    """(symbol + μ) · gain of a box of latents, float32."""
    symbols, mu = y[:, box[0], box[1]].astype(np.float32)
    mu *= np.float32(2.0**-MU_BITS)
    symbols += mu
    symbols *= model.gain
    return symbols


# ------------------------------------------------------------------------------------------------------------- lite


def _lite(model: DecoderModel, y: np.ndarray) -> tuple[Synthesis, int, Source]:
    w, architecture = model.synthesis, model.architecture
    halo = replace(architecture, body_blocks=0, body_width=0).reach.g_s  # of what follows the body
    blocks = w["blocks.weight"].reshape(architecture.M, -1)
    order = np.arange(12).reshape(3, 2, 2).transpose(1, 2, 0).ravel()  # (u, v, colour)
    filters = [_kernel(w, "filter.0"), _kernel(w, "filter.2"), _kernel(w, "pixels", order)]

    def synthesis(y_hat: np.ndarray) -> np.ndarray:
        t = _overlap_added(y_hat, blocks, w["blocks.bias"])
        inner = _convolved(t, *filters[0], slope=0.1)
        inner = _convolved(inner, *filters[1], added=t)
        out = _eight_bits(_convolved(inner, *filters[2]))[1:-1, 1:-1]
        height, width, _ = out.shape
        return out.reshape(height, width, 2, 6).transpose(0, 2, 1, 3).reshape(2 * height, 2 * width, 3)

    if not architecture.body_blocks:
        return synthesis, halo, lambda box: _scaled(model, y, box)
    refined = _after_body(model, y)
    return synthesis, halo, lambda box: refined[box]


def _after_body(model: DecoderModel, y: np.ndarray) -> np.ndarray:
    """ŷ + unit · body(ŷ / unit) of the whole picture, (h, w, M) float32, in strips of rows."""
    w, blocks = model.synthesis, model.architecture.body_blocks
    _, height, width, M = y.shape
    out = np.empty((height, width, M), np.float32)
    rows = max(1, min(_BODY // width, -(-height // workers())))

    def run(top: int) -> None:
        bottom = min(top + rows, height)
        first, end = max(0, top - blocks), min(height, bottom + blocks)  # a block sees one row further
        y_hat = _scaled(model, y, (slice(first, end), slice(None)))
        v = _mixed(y_hat / w["unit"], w, "body.0")
        for i in range(1, blocks + 1):
            t = _depthwise(v, w[f"body.{i}.depthwise.weight"], w[f"body.{i}.depthwise.bias"])
            t = _mixed(t, w, f"body.{i}.expand")
            np.maximum(t, np.float32(0.1) * t, out=t)
            v += _mixed(t, w, f"body.{i}.project")
        y_hat += _mixed(v, w, f"body.{blocks + 1}") * w["unit"]
        out[top:bottom] = y_hat[top - first : bottom - first]

    each(run, range(0, height, rows))
    return out


def _mixed(v: np.ndarray, w: Tensors, name: str) -> np.ndarray:
    """A 1×1 convolution, (…, in) → (…, out)."""
    weight = w[f"{name}.weight"][:, :, 0, 0]
    out = v.reshape(-1, weight.shape[1]) @ weight.T
    out += w[f"{name}.bias"]
    return out.reshape(*v.shape[:-1], -1)


def _depthwise(v: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """A depthwise 3×3 convolution of (h, w, C); weight (C, 1, 3, 3)."""
    h, w, _ = v.shape
    padded = np.pad(v, ((1, 1), (1, 1), (0, 0)))
    out = np.broadcast_to(bias, v.shape).copy()
    for i in range(3):
        for j in range(3):
            out += padded[i : i + h, j : j + w] * weight[:, 0, i, j]
    return out


def _overlap_added(y_hat: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """The transposed convolution 12×12, stride 8, padding 2: (h, w, M) → (8h + 2, 8w + 2, C), in a margin of zeros.

    What latents give is 12 × 12 values that overlap with the next 8 × 8 block by 4, row by row of blocks.
    """
    h, w, M = y_hat.shape
    C = len(bias)
    out = np.zeros((8 * h + 8, 8 * w + 8, C), np.float32)
    rows = max(1, _LATENTS // w)
    for top in range(0, h, rows):
        n = min(rows, h - top)
        parts = (y_hat[top : top + n].reshape(-1, M) @ weight).reshape(n, w, 12, 12, C)
        for (u, us), (v, vs) in itertools.product(((0, 8), (8, 4)), repeat=2):
            target = out[8 * top + u : 8 * (top + n) + u, v : 8 * w + v].reshape(n, 8, w, 8, C)[:, :us, :, :vs]
            target += parts[:, :, u : u + us, v : v + vs].transpose(0, 2, 1, 3, 4)
    planes = out[1 : 8 * h + 3, 1 : 8 * w + 3]
    planes += bias
    _clear_margin(planes)
    return np.ascontiguousarray(planes)


def _kernel(w: Tensors, name: str, order: np.ndarray | slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """Weights (9 · in, out), the former in the order of taps, then channels, and biases (out,) of a 3×3 convolution."""
    weight, bias = w[f"{name}.weight"][order], w[f"{name}.bias"][order]
    return np.ascontiguousarray(weight.transpose(2, 3, 1, 0).reshape(-1, len(weight))), bias


def _convolved(
    v: np.ndarray, weight: np.ndarray, bias: np.ndarray, slope: float | None = None, added: np.ndarray | None = None
) -> np.ndarray:
    """A 3×3 convolution of (H + 2, W + 2, C) within a margin of zeros, which the result has, too.

    A LeakyReLU with `slope` follows, and `added` is added, of the shape of the result.
    Positions are numbered through rows with their margins: the window of each is three runs of memory.
    """
    height, width, C = v.shape
    out = np.empty((height, width, len(bias)), np.float32)
    flat = out.reshape(height * width, -1)
    begin, end = width + 1, height * width - width - 1
    step = v.itemsize * C
    windows = as_strided(v, (end - begin, 3, 3 * C), (step, width * step, v.itemsize), writeable=False)
    for first in range(0, end - begin, _BLOCK):
        columns = windows[first : first + _BLOCK].reshape(-1, 9 * C)
        block = flat[begin + first : begin + first + len(columns)]
        np.matmul(columns, weight, out=block)
        block += bias
        if slope is not None:
            np.maximum(block, np.float32(slope) * block, out=block)
        if added is not None:
            block += added.reshape(flat.shape)[begin + first : begin + first + len(columns)]
    _clear_margin(out)
    return out


def _clear_margin(v: np.ndarray) -> None:
    v[(0, -1), :] = 0
    v[:, (0, -1)] = 0


# ---------------------------------------------------------------------------------------------------------- mshyper


def _mshyper(model: DecoderModel, y: np.ndarray) -> tuple[Synthesis, int, Source]:
    w = model.synthesis
    ups = [_up_kernel(w, f"{i}") for i in (0, 2, 4, 6)]
    norms = [_inverse_norm(w, f"{i}") for i in (1, 3, 5)]

    def synthesis(y_hat: np.ndarray) -> np.ndarray:
        v = y_hat
        for up, norm in zip(ups[:3], norms, strict=True):
            v = _upsampled(v, *up)
            squares = (v * v).reshape(-1, v.shape[-1]) @ norm[0]
            squares += norm[1]
            v *= np.sqrt(squares, out=squares).reshape(v.shape)
        return _eight_bits(_upsampled(v, *ups[3]))

    return synthesis, model.architecture.reach.g_s, lambda box: _scaled(model, y, box)


def _up_kernel(w: Tensors, name: str) -> tuple[np.ndarray, np.ndarray]:
    weight = w[f"{name}.weight"]  # (in, out, 5, 5)
    return np.ascontiguousarray(weight.transpose(0, 2, 3, 1)), w[f"{name}.bias"]


def _inverse_norm(w: Tensors, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Γᵀ and β of an inverse GDN, from CompressAI's reparametrization: max(stored, bound)² − pedestal."""
    values = []
    for kind in ("gamma", "beta"):
        prefix = f"{name}.{kind}_reparam"
        bounded = np.maximum(w[f"{name}.{kind}"], w[f"{prefix}.lower_bound.bound"])
        values.append(bounded**2 - w[f"{prefix}.pedestal"])
    return np.ascontiguousarray(values[0].T), values[1]


def _upsampled(v: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """A transposed convolution 5×5 of stride 2, (H, W, in) → (2H, 2W, out), in blocks of rows."""
    H, W, channels = v.shape
    k, out = weight.shape[1], len(bias)
    sums = np.zeros((2 * H + k - 2, 2 * W + k - 2, out), np.float32)
    rows = max(1, _COLUMNS // (W * k * k * out))
    for top in range(0, H, rows):
        part = v[top : top + rows]
        h = len(part)
        parts = (part.reshape(-1, channels) @ weight.reshape(channels, -1)).reshape(h, W, k, k, out)
        for i in range(k):
            for j in range(k):
                sums[2 * top + i : 2 * (top + h) + i - 1 : 2, j : j + 2 * W - 1 : 2] += parts[:, :, i, j]
    inner = sums[k // 2 : k // 2 + 2 * H, k // 2 : k // 2 + 2 * W]
    inner += bias
    return inner


_FAMILIES: dict[str, Callable[[DecoderModel, np.ndarray], tuple[Synthesis, int, Source]]] = {
    "lite": _lite,
    "mshyper": _mshyper,
    "bmshj": _mshyper,
}
