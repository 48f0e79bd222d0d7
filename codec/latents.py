"""Pixels, integers and payload bytes at one level of a model: what encoder, decoder and refinement share.

    x ─analyse─► y, z ─quantize─► Latents (integers) ─► code_length, render
                   └────pack────► z bytes, y bytes ─unpack─► Latents ─render─► 8-bit pixels

Large pictures pass the networks in tiles with halos, which bounds the memory for activations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .coding.hyper_decoder import MU_BITS
from .coding.passes import Pass, run_passes
from .coding.prior import part_of
from .coding.range_coder import Decoder, Encoder, bits_of, check_size, cost, decode, encode, shortest
from .models.catalogue import ModelError
from .models.level import LevelModel
from .networks.architecture import HYPER_STRIDE, STRIDE, padded_size
from .pixels import to_pixels, window
from .tiling import Box, cut, slices, tiles, with_halo

_TILE = 1024  # pixels a side of the tiles of g_a and h_a
_SYNTHESIS_TILE = 512  # … of g_s, which has most of its channels at half the resolution of the picture
_CHANNELS = 16  # of y rounded at once
_SYMBOL_MAX = 2.0**30  # symbols are clamped to ±2³⁰ when they are rounded
_DEAD_ZONE = 3e-4  # what a dead zone exceeds ½ by, over the cube of the bits that a 1 takes more than a 0


@dataclass(frozen=True)
class Latents:
    """The integers of one image and the entropy parameters of y that follow from them.

    Attributes
    ----------
    z : Tensor (1, N, h, w) int32
        round(z − median).
    y : Tensor (1, M, 4h, 4w) int32
        round(y − μ).
    index : Tensor (1, M, 4h, 4w) uint8
        Gaussian table of each symbol of y.
    mu : Tensor (1, M, 4h, 4w) int32
        μ with MU_BITS fractional bits.
    passes : tuple of (slice, int or None)
        Channels of y and half of the checkerboard of each pass, in coding order; empty in a part of a picture.
    """

    z: Tensor
    y: Tensor
    index: Tensor
    mu: Tensor
    passes: tuple[tuple[slice, int | None], ...] = ()

    def y_hat(self, box: Box | None = None) -> Tensor:
        """ŷ = y + μ of the picture, or of a box of it, float32."""
        y, mu = (v if box is None else cut(v, box, STRIDE) for v in (self.y, self.mu))
        return y.float() + mu.float() / 2**MU_BITS

    def digest(self) -> str:
        """SHA-256 of the symbols of z and y: the same on every machine that decodes the same file."""
        content = hashlib.sha256()
        for v in (self.z, self.y):
            content.update(np.ascontiguousarray(v.cpu().numpy(), "<i4").data)
        return content.hexdigest()


@dataclass(frozen=True)
class Payload:
    """The entropy-coded z and y of one image, and the digest of their symbols."""

    z: bytes
    y: bytes
    digest: str


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

    Raises
    ------
    ModelError
        When the weights of the model give values that are not finite.
    """
    networks, architecture = level.folded.networks, level.folded.architecture
    height, width = padded_size(*pixels.shape[:2])
    y = torch.empty(1, architecture.M, height // STRIDE, width // STRIDE, device=level.device)
    for tile in tiles((0, 0, height, width), _TILE, height, width):
        box = with_halo(tile, architecture.reach.g_a, height, width)
        cut(y, tile, STRIDE)[:] = cut(networks.g_a(window(pixels, *box).to(level.device)), tile, STRIDE, box)
    z = hyper_analyse(level, y)
    if not bool(torch.isfinite(y).all() & torch.isfinite(z).all()):
        raise ModelError(f"{level.model_name}: the latents are not finite numbers (is the model damaged?)")
    return y, z


@torch.no_grad()
def hyper_analyse(level: LevelModel, y: Tensor) -> Tensor:
    """z (1, N, H/64, W/64) of y (1, M, H/16, W/16), float32."""
    networks, architecture = level.folded.networks, level.folded.architecture
    height, width = _size(y)
    z = torch.empty(1, architecture.N, height // HYPER_STRIDE, width // HYPER_STRIDE, device=level.device)
    for tile in tiles((0, 0, height, width), _TILE, height, width):
        box = with_halo(tile, architecture.reach.h_a, height, width)
        cut(z, tile, HYPER_STRIDE)[:] = cut(networks.h_a(cut(y, box, STRIDE)), tile, HYPER_STRIDE, box)
    return z


@torch.no_grad()
def quantize(level: LevelModel, y: Tensor, z: Tensor, dead_zone: bool = False) -> Latents:
    """Round latents of one image (1, …) to the symbols that are coded: round(z − median), round(y − μ).

    With a dead zone, the symbol is 0 where |y − μ| < t; all y whose symbol is 0 are then set to μ, in place.
    """
    if not dead_zone:
        return _quantize(level, y, z)
    saved = torch.from_numpy(bits_of(1, level.y_tables) - bits_of(0, level.y_tables))
    found = _quantize(level, y, z, zones=dead_zone_of(saved).float().to(level.device))
    for v, k, m in zip(*(t.split(_CHANNELS, 1) for t in (y, found.y, found.mu)), strict=True):
        v.copy_(torch.where(k == 0, m.float() / 2**MU_BITS, v))
    return found


def dead_zone_of(saved: Tensor) -> Tensor:
    """The dead zone t of `quantize` where a 1 takes `saved` bits more than a 0 (docs/refinement.md)."""
    return (0.5 + _DEAD_ZONE * saved.clamp(min=0) ** 3).clamp(max=1)


@torch.no_grad()
def zero_padding(level: LevelModel, y: Tensor, z: Tensor, height: int, width: int) -> Tensor:
    """y, with μ in place of the latents whose 16×16 pixels are all padding: their symbols become 0.

    Parameters
    ----------
    height, width : int
        Size of the picture without padding.
    """
    inside = torch.zeros(1, 1, *y.shape[2:], dtype=torch.bool, device=y.device)
    inside[:, :, : -(-height // STRIDE), : -(-width // STRIDE)] = True
    mu = _quantize(level, y, z, inside.expand_as(y)).mu
    return torch.where(inside, y, mu.float() / 2**MU_BITS)


@torch.no_grad()
def pack(level: LevelModel, y: Tensor, z: Tensor, quantized: Latents | None = None) -> Payload:
    """Quantize latents of one image (1, …) and entropy-code them; `quantized` is `quantize` of them if it is known.

    Raises
    ------
    ValueError
        When `quantized` is a part of a picture, whose passes are not known.
    """
    found = quantized or _quantize(level, y, z)
    if not found.passes:
        raise ValueError("latents without passes cannot be coded")
    k_z, k_y, index, passes, digest = found.z, found.y, found.index, found.passes, found.digest()
    del found  # frees μ of a large picture before its symbols are sorted
    encoder = Encoder()
    for one in passes:
        encoder.push(_flat(part_of(k_y, *one)), _flat(part_of(index, *one)), level.y_tables)
    return Payload(z=encode(_flat(k_z), _channel_indexes(k_z.shape), level.z_tables), y=encoder.finish(), digest=digest)


def _quantize(
    level: LevelModel, y: Tensor, z: Tensor, inside: Tensor | None = None, zones: Tensor | None = None
) -> Latents:
    """As :func:`quantize`; outside the mask `inside` (1, M, H/16, W/16) and in the dead zones (T,) symbols are 0."""
    k_z = torch.round(z - level.folded.density.median[None, :, None, None])
    k_z = k_z.clamp(-_SYMBOL_MAX, _SYMBOL_MAX).to(torch.int32)

    def symbols_of(one: Pass) -> Tensor:
        mu, index = one.mu.to(level.device), one.index.to(level.device)
        symbols = torch.empty_like(mu)
        for k, v, m, i in zip(*(t.split(_CHANNELS, 1) for t in (symbols, one.of(y), mu, index)), strict=True):
            v = v - m.float() / 2**MU_BITS
            if zones is not None:
                v.masked_fill_(v.abs() < zones[i.long()], 0)
            k.copy_(torch.round(v).clamp(-_SYMBOL_MAX, _SYMBOL_MAX))
        if inside is not None:
            symbols.masked_fill_(~one.of(inside), 0)
        passes.append((one.channels, one.half))
        return symbols

    passes: list[tuple[slice, int | None]] = []
    k_y, index, mu = (v.to(level.device) for v in run_passes(level.exact, k_z, symbols_of))
    return Latents(z=k_z, y=k_y, index=index, mu=mu, passes=tuple(passes))


def preview(level: LevelModel, found: Latents) -> Iterator[tuple[Box, np.ndarray, float]]:
    """Pixels and bits of the file that has these integers, tile by tile.

    Yields
    ------
    box : Box
    pixels : ndarray (h, w, 3) uint8
        Decoded pixels of the box, padding included.
    bits : float
        Bits of the latents in the box.
    """
    height, width = _size(found.y)
    for tile in tiles((0, 0, height, width), _TILE, height, width):
        own = Latents(
            z=cut(found.z, tile, HYPER_STRIDE),
            y=cut(found.y, tile, STRIDE),
            index=cut(found.index, tile, STRIDE),
            mu=cut(found.mu, tile, STRIDE),
        )
        yield tile, _synthesize(level, found, tile), code_length(level, own)


def code_length(level: LevelModel, latents: Latents) -> float:
    """Bits of z and y under the integer tables, for an ideal entropy coder."""
    z_bits = cost(_flat(latents.z), _channel_indexes(latents.z.shape), level.z_tables)
    return z_bits + cost(_flat(latents.y), _flat(latents.index), level.y_tables)


def _flat(v: Tensor) -> np.ndarray:
    """The values in the order in which symbols are numbered: by channel, row, column."""
    flat: np.ndarray = v.cpu().contiguous().numpy().ravel()
    return flat


def _channel_indexes(shape: torch.Size) -> np.ndarray:
    """The table of each symbol of z (1, N, h, w): that of its channel, (N·h·w,)."""
    return np.repeat(np.arange(shape[1]), shape[2] * shape[3])


# --------------------------------------------------------------------------------------------------------- decoding


@torch.no_grad()
def unpack(level: LevelModel, z_bytes: bytes, y_bytes: bytes, height: int, width: int) -> Latents:
    """Decode the integers of an image of height × width pixels.

    Nothing is evaluated, and no memory written, for a part of the image whose symbols cannot be in the bytes: z is
    refused by its length alone, y at the first part of a pass with which the shortest code of all parts so far is
    longer than its bytes.

    Raises
    ------
    FormatError
        When the bytes are not those of an image of this size.
    """
    h, w = (side // HYPER_STRIDE for side in padded_size(height, width))
    shape = torch.Size((1, level.folded.architecture.N, h, w))
    check_size(z_bytes, shortest(np.full(shape[1], h * w), level.z_tables))
    k_z = torch.from_numpy(decode(z_bytes, _channel_indexes(shape), level.z_tables)).reshape(shape)
    decoder = Decoder(y_bytes)
    least = 0

    def seen(index: Tensor) -> None:
        nonlocal least
        least += shortest(np.bincount(_flat(index), minlength=len(level.y_tables)), level.y_tables)
        check_size(y_bytes, least)

    def symbols_of(one: Pass) -> Tensor:
        passes.append((one.channels, one.half))
        return torch.from_numpy(decoder.pull(_flat(one.index), level.y_tables)).reshape(one.index.shape)

    passes: list[tuple[slice, int | None]] = []

    k_y, index, mu = (v.to(level.device) for v in run_passes(level.exact, k_z, symbols_of, seen))
    decoder.finish()
    return Latents(z=k_z.to(level.device), y=k_y, index=index, mu=mu, passes=tuple(passes))


def render(level: LevelModel, latents: Latents, height: int, width: int) -> np.ndarray:
    """The decoded pixels, (height, width, 3) uint8."""
    return np.ascontiguousarray(_synthesize(level, latents, (0, 0, *_size(latents.y)))[:height, :width])


@torch.no_grad()
def _synthesize(level: LevelModel, latents: Latents, box: Box) -> np.ndarray:
    """The decoded pixels of a box, (h, w, 3) uint8."""
    size = _size(latents.y)
    pixels = np.empty((box[2] - box[0], box[3] - box[1], 3), np.uint8)
    for tile in tiles(box, _SYNTHESIS_TILE, *size):
        around = with_halo(tile, level.folded.architecture.reach.g_s, *size)
        x_hat = cut(level.folded.networks.g_s(latents.y_hat(around)), tile, 1, around)
        pixels[slices(tile, 1, box)] = to_pixels(x_hat)
    return pixels
