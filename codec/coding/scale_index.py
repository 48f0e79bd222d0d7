"""Which Gaussian table codes a latent: the number of thresholds that are less than its scale, by look-up.

The range of the thresholds is cut into cells of equal width, so narrow that none holds two thresholds. A cell gives the
number of thresholds below it, and the one that may lie in it. That is exact, and several times faster than a search.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MAX_CELLS = 2**16
MAX_THRESHOLD = 2**32 - 1  # up to here, scales that float64 rounds are beyond all thresholds and stay there


@dataclass(frozen=True)
class ScaleIndex:
    """Cells of thresholds.

    Attributes
    ----------
    thresholds : Tensor (n,) int64
        Strictly ascending.
    origin, width : float
        Where cell 1 begins, and the width of all cells, a power of two; cell 0 and the last one have no other end.
    below : Tensor (cells,) uint8
        Thresholds below each cell.
    following : Tensor (cells,) float64
        The first threshold that is not below the cell.
    """

    thresholds: Tensor
    origin: float
    width: float
    below: Tensor
    following: Tensor

    def __call__(self, scale: Tensor) -> Tensor:
        """The index of each scale, float64 integers; uint8."""
        if not len(self.below):
            return torch.bucketize(scale.to(torch.int64), self.thresholds).to(torch.uint8)
        scale = scale.contiguous()
        cell = ((scale - (self.origin - self.width)) * (1 / self.width)).floor_().clamp_(0, len(self.below) - 1)
        cell = cell.flatten().to(torch.int32)
        index = self.below.index_select(0, cell)
        return index.add_(scale.flatten() > self.following.index_select(0, cell)).view(scale.shape)


def scale_index(thresholds: Tensor) -> ScaleIndex:
    """Prepare strictly ascending thresholds (n,) int64; they are searched where cells would be too many."""
    first, last = int(thresholds[0]), int(thresholds[-1])
    width = 1 << (int(thresholds.diff().min()).bit_length() - 1)
    cells = (last - first) // width + 3
    if cells > _MAX_CELLS or max(-first, last) > MAX_THRESHOLD:
        cells = 0
    begin = first + width * (torch.arange(cells, device=thresholds.device) - 1)
    below = torch.bucketize(begin, thresholds)
    following = torch.cat([thresholds.double(), thresholds.new_full((1,), torch.inf, dtype=torch.float64)])[below]
    return ScaleIndex(thresholds, float(first), float(width), below.to(torch.uint8), following)
