"""8-bit pixels ↔ tensors.

    Picture.pixels ─ to_tensor ─ pad ─► x (1, 3, H', W') in 0..1
    Picture.pixels ◄────────── to_pixels ◄─────────────── x̂

Pixels are (H, W, 3) uint8. torch is imported only by the functions that take or return tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Convert pixels (H, W, 3) uint8 to a tensor (1, 3, H, W) float32 in 0..1."""
    import torch

    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return torch.from_numpy(planes)[None].to(torch.float32).div_(255)


def window(pixels: np.ndarray, top: int, left: int, bottom: int, right: int) -> Tensor:
    """Cut a rectangle out of a picture, padded by replication beyond its right and bottom edges.

    Parameters
    ----------
    pixels : ndarray
        (H, W, 3) uint8.
    top, left, bottom, right : int
        In pixels; `top` < H and `left` < W.

    Returns
    -------
    Tensor
        (1, 3, bottom − top, right − left) float32 in 0..1.
    """
    from torch.nn import functional

    x = to_tensor(pixels[top:bottom, left:right])
    missing = bottom - top - x.shape[2], right - left - x.shape[3]
    return functional.pad(x, (0, missing[1], 0, missing[0]), mode="replicate") if any(missing) else x


def to_pixels(x: Tensor) -> np.ndarray:
    """Convert a tensor (1, 3, H, W) to pixels (H, W, 3) uint8: clamped to 0..1, rounded half to even."""
    import torch

    planes = x.detach()[0].float().clamp(0, 1).mul_(255).round_().to(torch.uint8)
    return np.ascontiguousarray(planes.permute(1, 2, 0).cpu().numpy())


def pad(x: Tensor, multiple: int) -> Tensor:
    """Extend (..., H, W) to the right and down, repeating the last pixels, to multiples of `multiple`."""
    from torch.nn import functional

    height, width = x.shape[-2:]
    return functional.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")
