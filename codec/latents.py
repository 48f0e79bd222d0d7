"""Between pixels, integers and payload bytes, at one level of a model: what encoder, decoder and refinement share.

x ─analyse─► y, z ─quantize─► Latents (integers) ─pack──► z bytes, y bytes
                                ▲  │
                             unpack└──render─► 8-bit pixels

Large pictures pass the networks in tiles with halos, so the memory for activations is bounded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .coding import range_coder as entropy
from .coding.hyper_decoder import MU_BITS, hyper_decode
from .models.level import LevelModel
from .networks.architecture import HYPER_STRIDE, STRIDE, padded_size
from .pixels import to_pixels, window
from .tiling import Box, cut, slices, tiles, with_halo

_TILE = 1024  # pixels a side of what g_a, h_a and h_s see at once
_SHOWN = 512  # … and g_s, which has most of its channels at half the resolution of the picture
_CHANNELS = 16  # of y rounded at once


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

    def y_hat(self, box: Box | None = None) -> Tensor:
        """ŷ = y + μ of all or of a box of the picture, float32."""
        y, mu = (v if box is None else cut(v, box, STRIDE) for v in (self.y, self.mu))
        return y.float() + mu.float() / 2**MU_BITS

    def digest(self) -> str:
        """SHA-256 of the symbols of z and y: the same on every machine that decodes the same file."""
        content = hashlib.sha256()
        for v in (self.z, self.y):
            content.update(np.ascontiguousarray(v.cpu().numpy(), "<i4").data)
        return content.hexdigest()


def _size(y: Tensor) -> tuple[int, int]:
    """Height and width of the padded picture that latents (1, M, h, w) belong to."""
    return STRIDE * y.shape[2], STRIDE * y.shape[3]


# --------------------------------------------------------------------------------------------------------- encoding


@torch.no_grad()
def analyse(level: LevelModel, pixels: np.ndarray) -> tuple[Tensor, Tensor]:
    """y (1, M, H/16, W/16) and z (1, N, H/64, W/64), float32 on the model's device.

    Parameters
    ----------
    pixels : ndarray (h, w, 3) uint8
        Taken as padded by replication to H × W, multiples of 64.
    """
    networks, architecture = level.folded.networks, level.folded.architecture
    height, width = padded_size(*pixels.shape[:2])
    y = torch.empty(1, architecture.M, height // STRIDE, width // STRIDE, device=level.device)
    z = torch.empty(1, architecture.N, height // HYPER_STRIDE, width // HYPER_STRIDE, device=level.device)
    for tile in tiles((0, 0, height, width), _TILE, height, width):
        box = with_halo(tile, architecture.reach.g_a, height, width)
        cut(y, tile, STRIDE)[:] = cut(networks.g_a(window(pixels, *box).to(level.device)), tile, STRIDE, box)
    for tile in tiles((0, 0, height, width), _TILE, height, width):
        box = with_halo(tile, architecture.reach.h_a, height, width)
        cut(z, tile, HYPER_STRIDE)[:] = cut(networks.h_a(cut(y, box, STRIDE)), tile, HYPER_STRIDE, box)
    return y, z


@torch.no_grad()
def quantize(level: LevelModel, y: Tensor, z: Tensor) -> Latents:
    """Round latents of one image (1, …) hard on the coded grid: z − median and y − μ(ẑ), μ of the exact path."""
    median = level.folded.density.median[None, :, None, None]
    k_z = torch.round(z - median).clamp(-(2.0**30), 2.0**30).to(torch.int32)
    index, mu = hyper_decode(level.exact.h_s, level.exact.gains, k_z.to(level.exact.device))
    index, mu = index.to(level.device), mu.to(level.device)
    k_y = torch.empty_like(mu)
    for k, v, m in zip(*(t.split(_CHANNELS, 1) for t in (k_y, y, mu)), strict=True):
        k.copy_(torch.round(v - m.float() / 2**MU_BITS).clamp(-(2.0**30), 2.0**30))
    return Latents(k_z, k_y, index, mu)


def preview(level: LevelModel, y: Tensor, z: Tensor) -> Iterator[tuple[Box, np.ndarray, float]]:
    """What the latents of one image would become in a file, tile by tile, so that memory is bounded.

    Yields
    ------
    box : Box
    pixels : ndarray (h, w, 3) uint8
        As the decoder will show the box, padding included.
    bits : float
        Of the latents in the box.
    """
    height, width = _size(y)
    for tile in tiles((0, 0, height, width), _TILE, height, width):
        box = with_halo(tile, level.folded.architecture.reach.h_s, height, width)
        around = quantize(level, cut(y, box, STRIDE), cut(z, box, HYPER_STRIDE))
        own = Latents(
            cut(around.z, tile, HYPER_STRIDE, box),
            *(cut(v, tile, STRIDE, box) for v in (around.y, around.index, around.mu)),
        )
        top, left, bottom, right = tile
        inner = top - box[0], left - box[1], bottom - box[0], right - box[1]
        yield tile, _shown(level, around, inner), code_length(level, own)


def _flat(latents: Latents) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(symbols, table of each) of z, then of y."""
    z, y, index = (v.cpu().contiguous().numpy() for v in (latents.z, latents.y, latents.index))
    channels = np.repeat(np.arange(z.shape[1]), z.shape[2] * z.shape[3])
    return z.ravel(), channels, y.ravel(), index.ravel()


def code_length(level: LevelModel, latents: Latents) -> float:
    """Bits of z and y under the integer tables, as an ideal coder would spend them."""
    z, z_index, y, y_index = _flat(latents)
    return entropy.cost(z, z_index, level.z_tables) + entropy.cost(y, y_index, level.y_tables)


def pack(level: LevelModel, latents: Latents) -> tuple[bytes, bytes]:
    """Entropy-code the integers: the bytes of z and of y."""
    z, z_index, y, y_index = _flat(latents)
    return entropy.encode(z, z_index, level.z_tables), entropy.encode(y, y_index, level.y_tables)


# --------------------------------------------------------------------------------------------------------- decoding


@torch.no_grad()
def unpack(level: LevelModel, z_bytes: bytes, y_bytes: bytes, height: int, width: int) -> Latents:
    """Decode the integers of an image of height × width pixels.

    Raises
    ------
    FormatError
        When the bytes are not those of an image of this size.
    """
    architecture = level.folded.architecture
    h, w = (side // HYPER_STRIDE for side in padded_size(height, width))
    channels = np.repeat(np.arange(architecture.N), h * w)
    z = entropy.decode(z_bytes, channels, level.z_tables).reshape(1, architecture.N, h, w)
    k_z = torch.from_numpy(z)
    index, mu = hyper_decode(level.exact.h_s, level.exact.gains, k_z.to(level.exact.device))
    flat = index.cpu().contiguous().numpy().ravel()
    y = entropy.decode(y_bytes, flat, level.y_tables).reshape(tuple(index.shape))
    device = level.device
    return Latents(k_z.to(device), torch.from_numpy(y).to(device), index.to(device), mu.to(device))


def render(level: LevelModel, latents: Latents, height: int, width: int) -> np.ndarray:
    """The 8-bit picture that these integers decode to, (height, width, 3) uint8."""
    return np.ascontiguousarray(_shown(level, latents, (0, 0, *_size(latents.y)))[:height, :width])


@torch.no_grad()
def _shown(level: LevelModel, latents: Latents, box: Box) -> np.ndarray:
    """The 8-bit pixels of a box, (h, w, 3) uint8."""
    size = _size(latents.y)
    pixels = np.empty((box[2] - box[0], box[3] - box[1], 3), np.uint8)
    for tile in tiles(box, _SHOWN, *size):
        around = with_halo(tile, level.folded.architecture.reach.g_s, *size)
        found = cut(level.folded.networks.g_s(latents.y_hat(around)), tile, 1, around)
        pixels[slices(tile, 1, box)] = to_pixels(found)
    return pixels
