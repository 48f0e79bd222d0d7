"""Random crops, flipped, transposed and down-scaled: one at a time on a CPU, batched on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class _Window:
    """A square of an image in pixels; beyond the right and the lower edge it is padded by replication.

    `turn`, 0 to 7, has a bit for a flip of left and right (1), a flip of top and bottom (2), and, after these, a
    transposition (4).
    """

    image: int
    top: int
    left: int
    side: int
    turn: int


class Crops:
    """A source of random square crops; the generator alone determines them, on any device.

    Half of the crops are down-scaled by a factor of 1 to 2, and each has one of the eight orientations. Images smaller
    than a crop are padded by replication.

    Parameters
    ----------
    images : list of Tensor (3, H, W) uint8
    device : device
        Where the images are stored and crops are computed.
    """

    def __init__(self, images: list[Tensor], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.images = images
        self.packed = None if self.device.type == "cpu" else _pack(images, self.device)

    def sample(self, batch: int, size: int, generator: torch.Generator) -> Tensor:
        """Draw a batch (B, 3, size, size) float32 in 0..1, channels-last, with a generator of the CPU."""
        windows = self._draw(batch, size, generator)
        if self.packed is not None:
            return cut_batch(self.packed, self._table(windows), size)
        crops = [cut(self.images[w.image], w, size) for w in windows]
        return torch.cat(crops).contiguous(memory_format=torch.channels_last)

    def _draw(self, batch: int, size: int, generator: torch.Generator) -> list[_Window]:
        windows = []
        draws = torch.rand(batch, 6, generator=generator).tolist()
        for pick, scaled, scale, top, left, turn in draws:
            image = int(pick * len(self.images))
            height, width = self.images[image].shape[1:]
            factor = 1 + scale if scaled < 0.5 else 1.0
            side = max(size, min(int(size * factor), height, width))
            y, x = int(top * (max(height, side) - side + 1)), int(left * (max(width, side) - side + 1))
            windows.append(_Window(image, y, x, side, int(8 * turn)))
        return windows

    def _table(self, windows: list[_Window]) -> Tensor:
        """The table of `cut_batch`, (B, 7) int64, copied to the device without synchronization."""
        assert self.packed is not None
        rows = []
        for w in windows:
            height, width = self.images[w.image].shape[1:]
            rows.append([self.packed.offsets[w.image], height, width, w.top, w.left, w.side, w.turn])
        return upload(torch.tensor(rows, dtype=torch.int64), self.device)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small CPU tensor to `device` without synchronization."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def cut(image: Tensor, w: _Window, size: int) -> Tensor:
    """One crop of an image (3, H, W) uint8 → (1, 3, size, size) float32 in 0..1."""
    crop = image[None, :, w.top : w.top + w.side, w.left : w.left + w.side].float() / 255
    pad_h, pad_w = w.side - crop.shape[2], w.side - crop.shape[3]
    if pad_h or pad_w:
        crop = F.pad(crop, (0, pad_w, 0, pad_h), mode="replicate")
    if w.side != size:
        crop = F.interpolate(crop, size=(size, size), mode="bilinear", antialias=True)
    crop = crop.flip([axis for axis, bit in ((3, 1), (2, 2)) if w.turn & bit])
    return crop.transpose(2, 3) if w.turn & 4 else crop


# ----------------------------------------------------------------------------------------------------- batched


@dataclass(frozen=True)
class Packed:
    """All images as one list of pixels (P, 3) uint8; `offsets` holds the index of each image's first pixel."""

    pixels: Tensor
    offsets: list[int]


def _pack(images: list[Tensor], device: torch.device) -> Packed:
    offsets, position = [], 0
    for image in images:
        offsets.append(position)
        position += image.shape[1] * image.shape[2]
    pixels = torch.empty(position, 3, dtype=torch.uint8, device=device)
    for offset, image in zip(offsets, images, strict=True):
        flat = image.permute(1, 2, 0).reshape(-1, 3)
        pixels[offset : offset + len(flat)] = flat.to(device)
    return Packed(pixels, offsets)


def cut_batch(packed: Packed, table: Tensor, size: int) -> Tensor:
    """Cut and scale crops in a batch: a gather, then down-scaling by triangle filters as two batched products.

    Parameters
    ----------
    table : Tensor (B, 7) int64
        Offset, height and width of the image; top, left, side and turn of the window; size ≤ side ≤ 2·size.

    Returns
    -------
    Tensor (B, 3, size, size) float32 in 0..1
        Channels-last; equal to the results of `cut` up to rounding.
    """
    offset, height, width, top, left, side, turn = table.unbind(1)
    span = torch.arange(2 * size, device=table.device)
    rows = torch.minimum(top[:, None] + span, height[:, None] - 1)  # (B, 2·size)
    columns = torch.minimum(left[:, None] + span, width[:, None] - 1)
    index = (offset[:, None] + rows * width[:, None])[:, :, None] + columns[:, None, :]
    pixels = packed.pixels[index].float()  # (B, 2·size, 2·size, 3)

    scale = (side.float() / size)[:, None, None]
    centers = (torch.arange(size, device=table.device)[:, None] + 0.5) * scale  # (B, size, 1)
    filters = (1 - ((span + 0.5) - centers).abs() / scale).clamp(min=0) * (span < side[:, None, None])
    filters = filters / filters.sum(2, keepdim=True)  # (B, size, 2·size)
    turn = turn[:, None, None]
    across, down = (torch.where((turn & bit) > 0, filters.flip(1), filters) for bit in (1, 2))
    rows_done = torch.bmm(down, pixels.flatten(2)).view(len(table), size, 2 * size, 3)
    out = torch.einsum("bkl,bilc->bcik", across, rows_done) / 255
    out = torch.where((turn[..., None] & 4) > 0, out.transpose(2, 3), out)
    return out.contiguous(memory_format=torch.channels_last)
