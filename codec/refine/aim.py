"""A wanted rate or quality, and how λ is steered towards it within one refinement.

Bits and squared error respond to λ with a lag: latents "suit" a λ if they are those of an annealing with this λ alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..settings import LAMBDA_RANGE

SLACK_RATE = 0.009  # a rate is met by at least 99 % of it, also if the size in bytes was rounded down
SLACK_MSE = 0.05 * math.log(10) / 10  # a quality is met by at most 0.05 dB more
LEVEL_SLOPE = 0.25  # d log(bits) / d log λ, and −d log(squared error) / d log λ, of refined latents at one level
_LAG = 0.75  # the latents approach those that suit a new λ as e^(−t/lag), where t is a part of the annealing
_MOST_LEAD = 0.4  # most difference of log λ to that which the latents suit
_FALL, _FALL_POWER = 0.088, 2.0  # from a part t on, the log squared error falls by _FALL·(1 − t)^_FALL_POWER


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

    @property
    def slope(self) -> float:
        """d log(amount) / d log λ at one level, of the amount that is limited."""
        return LEVEL_SLOPE if self.bits is not None else -LEVEL_SLOPE

    def fall(self, part: float) -> float:
        """By how much the logarithm of the amount will fall after a part of an annealing, at a constant λ."""
        return 0.0 if self.bits is not None else _FALL * (1 - part) ** _FALL_POWER

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

    def steered(self, lmbda: float, excess: float, gain: float) -> float:
        """λ changed against the excess by `gain` times it, in log λ; the middle of the slack is aimed at."""
        change = gain * (excess + self.slack / 2) * (-1 if self.bits is not None else 1)
        return in_range(lmbda * math.exp(min(1.0, max(-1.0, change))))


def followed(reached: float, lmbda: float, part: float) -> float:
    """log λ that the latents suit after a part of the annealing with λ, if they suited `reached` before."""
    return reached + (math.log(lmbda) - reached) * _response(part)


def leading(reached: float, wanted: float, part: float) -> float:
    """λ for the steps after a part of them, so that the latents, which suit the log λ `reached`, suit `wanted`."""
    lead = (wanted - reached) / _response(1 - part)
    return in_range(math.exp(reached + min(_MOST_LEAD, max(-_MOST_LEAD, lead))))


def _response(part: float) -> float:
    """The part of a change of log λ that the latents have followed after a part of the annealing."""
    return 1 - math.exp(-part / _LAG)


def in_range(lmbda: float) -> float:
    """λ, or the nearest one that is allowed."""
    low, high = LAMBDA_RANGE
    return min(high, max(low, lmbda))
