"""8-bit pixels ↔ tensors, and the colours nobody sees.

    Picture.pixels ─ fill_transparent ─ to_tensor ─ pad ─► x (1, 3, H', W') in 0..1
    Picture.pixels ◄ to_grey ─ to_pixels ◄─────────────── x̂

Pixels are (H, W, 3) uint8. torch is imported only by the functions that take or return tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor


def fill_transparent(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Replace colours that nobody sees by smooth ones that cost nearly nothing to code.

    Push-pull: means of the visible pixels in ever larger squares fill the invisible ones, coarse to fine.

    Parameters
    ----------
    pixels : ndarray
        (H, W, 3) uint8. Not changed.
    alpha : ndarray
        (H, W) uint8. Pixels are invisible where it is 0.

    Returns
    -------
    ndarray
        (H, W, 3) uint8: `pixels` wherever alpha is above 0.
    """
    visible = alpha > 0
    if visible.all():
        return pixels
    if not visible.any():
        return np.full_like(pixels, 128)
    out = np.empty_like(pixels)
    for c in range(pixels.shape[2]):
        out[..., c] = _fill(pixels[..., c], visible)
    return out


def _fill(plane: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return `plane` (H, W) with its unknown values interpolated from the known ones (at least one)."""
    if known.all():
        return plane
    count = _sum_squares(known)
    guess = _fill(_sum_squares(plane * known) / np.maximum(count, 1), count > 0)
    if plane.dtype == np.uint8:
        guess = np.rint(guess).astype(np.uint8)
    height, width = guess.shape
    doubled = Image.fromarray(guess).resize((2 * width, 2 * height), Image.Resampling.BILINEAR)
    out = np.array(doubled)[: plane.shape[0], : plane.shape[1]]
    np.copyto(out, plane, where=known)
    return out


def _sum_squares(a: np.ndarray) -> np.ndarray:
    """Sum squares of 2 x 2: (H, W) -> (ceil(H / 2), ceil(W / 2)) float32."""
    a = np.pad(a, ((0, a.shape[0] % 2), (0, a.shape[1] % 2)))
    out = a[0::2, 0::2].astype(np.float32)
    for part in (a[0::2, 1::2], a[1::2, 0::2], a[1::2, 1::2]):
        out += part
    return out


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Convert pixels (H, W, 3) uint8 to a tensor (1, 3, H, W) float32 in 0..1."""
    import torch

    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return torch.from_numpy(planes)[None].to(torch.float32).div_(255)


def window(pixels: np.ndarray, top: int, left: int, bottom: int, right: int) -> Tensor:
    """A part of a picture whose last row and column are repeated for ever, as `to_tensor` gives it."""
    from torch.nn import functional

    x = to_tensor(pixels[top:bottom, left:right])
    missing = bottom - top - x.shape[2], right - left - x.shape[3]
    return functional.pad(x, (0, missing[1], 0, missing[0]), mode="replicate") if any(missing) else x


def to_pixels(x: Tensor) -> np.ndarray:
    """Convert a tensor (1, 3, H, W) to pixels (H, W, 3) uint8: clamped to 0..1, rounded half to even."""
    import torch

    planes = x.detach()[0].float().clamp(0, 1).mul_(255).round_().to(torch.uint8)
    return np.ascontiguousarray(planes.permute(1, 2, 0).cpu().numpy())


def to_grey(pixels: np.ndarray) -> np.ndarray:
    """Replace the channels of (H, W, 3) uint8 by their rounded mean: what a grey file decodes to."""
    mean = (pixels.sum(axis=2, dtype=np.uint16) + 1) // 3  # a third is never halfway between integers
    return np.repeat(mean.astype(np.uint8)[..., None], 3, axis=2)


def pad(x: Tensor, multiple: int) -> Tensor:
    """Extend (..., H, W) to the right and down, repeating the last pixels, to multiples of `multiple`."""
    from torch.nn import functional

    height, width = x.shape[-2:]
    return functional.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")
