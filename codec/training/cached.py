"""Latents of all photographs, computed once: what stage "prior" is trained on, as the analysis transform is frozen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..hyperprior import GainedHyperprior
from ..networks.architecture import STRIDE
from .objective import apply_transform
from .recipe import TrainingError

SCALES = (1.0, 0.62)  # of the photographs; crops of pixels are down-scaled by 1 to 2


class CachedLatents:
    """A source of random square windows of y₀; the generator alone determines them, on any device.

    The latents are held in float16, about as many bytes as the pixels: 3.5 per pixel of the photographs for M = 320.

    Parameters
    ----------
    images : list of Tensor (3, H, W) uint8
        Those with a side of less than `side` pixels are left out, at each scale.
    side : int
        Side of the largest windows in pixels.
    bf16 : bool
        Run the convolutions of g_a in bfloat16.

    Raises
    ------
    TrainingError
        When all images are too small.
    """

    def __init__(
        self, model: GainedHyperprior, images: list[Tensor], side: int, bf16: bool, device: torch.device
    ) -> None:
        self.latents: list[Tensor] = []  # (h, w, M) float16
        for image in images:
            for scale in SCALES:
                size = [int(length * scale) for length in image.shape[1:]]
                if min(size) >= side:
                    self.latents.append(_analyse(model, image.to(device), size, bf16))
        if not self.latents:
            raise TrainingError(f"no photograph has {side} pixels on its shorter side; use a smaller --crop")

    def sample(self, batch: int, size: int, generator: torch.Generator) -> Tensor:
        """Draw windows (B, M, size/16, size/16) float32, channels-last, with a generator of the CPU."""
        side = size // STRIDE
        windows = []
        for pick, top, left in torch.rand(batch, 3, generator=generator).tolist():
            latents = self.latents[int(pick * len(self.latents))]
            y, x = (int(v * (length - side + 1)) for v, length in zip((top, left), latents.shape, strict=False))
            windows.append(latents[y : y + side, x : x + side])
        return torch.stack(windows).float().permute(0, 3, 1, 2)


@torch.no_grad()
def _analyse(model: GainedHyperprior, image: Tensor, size: list[int], bf16: bool) -> Tensor:
    """y₀ of an image scaled to `size` and cropped to multiples of the stride, (h, w, M) float16."""
    x = image[None].float() / 255
    if size != list(image.shape[1:]):
        x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
    height, width = (length // STRIDE * STRIDE for length in size)
    x = x[:, :, :height, :width].contiguous(memory_format=torch.channels_last)
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=bf16):
        y = apply_transform(model.g_a, x)
    return y[0].permute(1, 2, 0).half().contiguous()
