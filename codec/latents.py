"""Between pixels, integers and payload bytes, at one level of a model: what encoder, decoder and refinement share.

x ─analyse─► y, z ─commit─► Latents (integers) ─pack──► z bytes, y bytes
                                ▲  │
                             unpack└──synthesise─► 8-bit pixels
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from . import entropy
from .exact import MU_BITS, hyper_decode
from .model_file import LevelModel
from .networks import HYPER_STRIDE, STRIDE
from .pixels import to_pixels

_TILE = 1024  # pixels a side of what g_a and g_s see at once
_HALO = 64  # pixels around a tile: more than the receptive field of either


@dataclass(frozen=True)
class Latents:
    """The integers of one image.

    Attributes
    ----------
    z : Tensor (1, N, h, w) int32
        round(z − median).
    y : Tensor (1, M, 4h, 4w) int32
        round(y − μ).
    index : Tensor (1, M, 4h, 4w) uint8
        Gaussian table of each symbol of y; determined by z.
    mu : Tensor (1, M, 4h, 4w) int32
        μ with MU_BITS fractional bits; determined by z.
    """

    z: Tensor
    y: Tensor
    index: Tensor
    mu: Tensor

    def y_hat(self) -> Tensor:
        """ŷ = y + μ, float32."""
        return self.y.float() + self.mu.float() / 2**MU_BITS

    def digest(self) -> str:
        """SHA-256 of the symbols of z and y: the same on every machine that decodes the same file."""
        content = hashlib.sha256(self.z.cpu().numpy().astype("<i4").tobytes())
        content.update(self.y.cpu().numpy().astype("<i4").tobytes())
        return content.hexdigest()


def _tiles(height: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    for top in range(0, height, _TILE):
        for left in range(0, width, _TILE):
            yield top, left, min(top + _TILE, height), min(left + _TILE, width)


def _with_halo(top: int, left: int, bottom: int, right: int, height: int, width: int) -> tuple[int, int, int, int]:
    return max(0, top - _HALO), max(0, left - _HALO), min(height, bottom + _HALO), min(width, right + _HALO)


@torch.no_grad()
def analyse(level: LevelModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """y (B, M, H/16, W/16) and z (B, N, H/64, W/64), float32 on the model's device.

    Large images pass g_a in tiles with halos, so the memory for activations is bounded.

    Parameters
    ----------
    x : Tensor (B, 3, H, W) float32 in 0..1
        Padded to multiples of 64.
    """
    networks = level.plain.networks
    height, width = x.shape[2:]
    if height * width <= 2 * _TILE**2:
        y = networks.g_a(x.to(level.device))
    else:
        M = level.plain.architecture.M
        y = torch.empty(x.shape[0], M, height // STRIDE, width // STRIDE, device=level.device)
        for tile in _tiles(height, width):
            t, le, b, r = (v // STRIDE for v in tile)
            t0, l0, b0, r0 = _with_halo(*tile, height, width)
            part = networks.g_a(x[:, :, t0:b0, l0:r0].to(level.device))
            t0, l0 = t0 // STRIDE, l0 // STRIDE
            y[:, :, t:b, le:r] = part[:, :, t - t0 : b - t0, le - l0 : r - l0]
    return y, networks.h_a(y)


@torch.no_grad()
def commit(level: LevelModel, y: Tensor, z: Tensor) -> Latents:
    """Round latents of one image (1, …) hard on the coded grid: z − median and y − μ(ẑ), μ of the exact path."""
    median = level.plain.density.median[None, :, None, None]
    k_z = torch.round(z - median).clamp(-(2.0**30), 2.0**30).to(torch.int32)
    index, mu = hyper_decode(level.h_s, level.gains, k_z.to(level.exact_device))
    index, mu = index.to(level.device), mu.to(level.device)
    k_y = torch.round(y - mu.float() / 2**MU_BITS).clamp(-(2.0**30), 2.0**30).to(torch.int32)
    return Latents(k_z, k_y, index, mu)


def _flat(latents: Latents) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(symbols, table of each) of z, then of y."""
    z = latents.z.cpu().numpy().astype(np.int32)
    channels = np.repeat(np.arange(z.shape[1]), z.shape[2] * z.shape[3])
    y = latents.y.cpu().contiguous().numpy().astype(np.int32)
    index = latents.index.cpu().contiguous().numpy()
    return z.ravel(), channels, y.ravel(), index.ravel()


def code_length(level: LevelModel, latents: Latents) -> float:
    """Bits of z and y under the integer tables, as an ideal coder would spend them."""
    z, z_index, y, y_index = _flat(latents)
    return entropy.cost(z, z_index, level.z_tables) + entropy.cost(y, y_index, level.y_tables)


def pack(level: LevelModel, latents: Latents) -> tuple[bytes, bytes]:
    """Entropy-code the integers: the bytes of z and of y."""
    z, z_index, y, y_index = _flat(latents)
    return entropy.encode(z, z_index, level.z_tables), entropy.encode(y, y_index, level.y_tables)


Trace = Callable[[str, bytes], None]


@torch.no_grad()
def unpack(level: LevelModel, z_bytes: bytes, y_bytes: bytes, height: int, width: int) -> Latents:
    """Decode the integers of an image of height × width pixels.

    Raises
    ------
    FormatError
        When the bytes are not those of an image of this size.
    """
    architecture = level.plain.architecture
    h, w = -(-height // HYPER_STRIDE), -(-width // HYPER_STRIDE)
    channels = np.repeat(np.arange(architecture.N), h * w)
    z = entropy.decode(z_bytes, channels, level.z_tables).reshape(1, architecture.N, h, w)
    k_z = torch.from_numpy(z)
    index, mu = hyper_decode(level.h_s, level.gains, k_z.to(level.exact_device))
    flat = index.cpu().contiguous().numpy().ravel()
    y = entropy.decode(y_bytes, flat, level.y_tables).reshape(tuple(index.shape))
    device = level.device
    return Latents(k_z.to(device), torch.from_numpy(y).to(device), index.to(device), mu.to(device))


@torch.no_grad()
def synthesise(g_s: nn.Module, y_hat: Tensor) -> Tensor:
    """x̂ (B, 3, H, W) float32 of ŷ (B, M, H/16, W/16), not clamped; large images in tiles with halos."""
    height, width = y_hat.shape[2] * STRIDE, y_hat.shape[3] * STRIDE
    if height * width <= 2 * _TILE**2:
        return g_s(y_hat)
    x_hat = torch.empty(y_hat.shape[0], 3, height, width, device=y_hat.device)
    for tile in _tiles(height, width):
        top, left, bottom, right = tile
        t0, l0, b0, r0 = _with_halo(*tile, height, width)
        part = g_s(y_hat[:, :, t0 // STRIDE : b0 // STRIDE, l0 // STRIDE : r0 // STRIDE].contiguous())
        x_hat[:, :, top:bottom, left:right] = part[:, :, top - t0 : bottom - t0, left - l0 : right - l0]
    return x_hat


def render(level: LevelModel, latents: Latents, height: int, width: int) -> np.ndarray:
    """The 8-bit picture that these integers decode to, (height, width, 3) uint8."""
    return to_pixels(synthesise(level.plain.networks.g_s, latents.y_hat())[:, :, :height, :width])
