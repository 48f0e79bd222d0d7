"""A wanted rate or quality, and how λ is steered towards it within one refinement."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..settings import LAMBDA_RANGE

SLACK_RATE = 0.009  # a rate is met by at least 99 % of it, also if the size in bytes was rounded down
SLACK_MSE = 0.05 * math.log(10) / 10  # a quality is met by at most 0.05 dB more


@dataclass(frozen=True)
class Aim:
    """Bits or a mean squared error that a refinement must not exceed, and should come close to; one of the two.

    Attributes
    ----------
    bits : float, optional
        Code length of z and y.
    mse : float, optional
        Of the visible 8-bit pixels, for pixels scaled to 0..1.
    """

    bits: float | None = None
    mse: float | None = None

    @property
    def slack(self) -> float:
        """How far below the aim a result may be, as a logarithm."""
        return SLACK_RATE if self.bits is not None else SLACK_MSE

    def excess(self, bits: float, mse: float) -> float:
        """Logarithm of the ratio to the aim: above 0 where it is not met."""
        if self.bits is not None:
            return math.log(max(bits, 1e-9) / self.bits)
        assert self.mse is not None
        return math.log(max(mse, 1e-12) / self.mse)

    def is_met(self, excess: float) -> bool:
        """Whether a result neither exceeds the aim nor stays further below it than the slack."""
        return -self.slack <= excess <= 0

    def distance(self, excess: float) -> float:
        """How far a result is from meeting the aim with a tenth of the slack to spare; exceeding it is further."""
        margin = self.slack / 10
        if excess > -margin:
            return 1 + excess
        return max(0.0, -(self.slack - margin) - excess)

    def steered(self, lmbda: float, excess: float, gain: float, most: float = 1.0) -> float:
        """λ changed against the excess by `gain` times it, in log λ, at most by `most`; aims at half of the slack."""
        change = gain * (excess + self.slack / 2) * (-1 if self.bits is not None else 1)
        low, high = LAMBDA_RANGE
        return min(high, max(low, lmbda * math.exp(min(most, max(-most, change)))))
