"""Schedules of a refinement: the temperature and the learning rate of every step.

The default schedule is scaled to the number of steps. Schedules are lists of floats that are computed before the loop
starts, so that a CUDA graph can read them from device memory.

Sources: SGA+ is Perugachi-Diaz et al. 2024 (arXiv 2401.17789), SGA is Yang et al. 2020 (arXiv 2006.04240).
"""

import math
from dataclasses import dataclass, replace

from .rounding import METHODS

SCHEDULES = ("exp", "sga", "cold")
LR_SCHEDULES = ("constant", "cosine")

PAPER_STEPS = 2000  # the number of steps that the constants of SGA are for
SGA_START = 700  # t₀ of SGA at PAPER_STEPS
TAU_MIN = 1e-6  # lowest temperature: 1/τ, its square and its cube are within the range of float32
LR_FLOOR = 0.2  # last learning rate of the cosine, relative to the first

# Constants of Annealing.default; docs/refinement.md has the measurements they were chosen by. The learning rate is
# proportional to 1/√steps, DEFAULT_LR at DEFAULT_LR_STEPS, within limits.
DEFAULT_TAU = (1.5, 0.3)  # first and last temperature, except for these methods and classes:
DEFAULT_TAU_OF = {
    ("danneal", 2): (0.5, 0.3),
    ("atanh", 2): (0.4, 0.2),
    ("linear", 2): (0.7, 0.2),
    ("ssl", 3): (0.5, 0.1),
}
EXPECTED = ("ssl", 2)  # method and classes whose bits are expected values by default (`Annealing.variance`), with:
EXPECTED_TAU = (0.8, 0.3)
EXPECTED_VARIANCE = (0.5, 1.0)
EXPECTED_NOISE = 0.5  # with EXPECTED_NOISE_STEPS and more; with fewer it is proportional to √steps
EXPECTED_NOISE_STEPS = 150
DEFAULT_LR = 0.02
DEFAULT_LR_STEPS = 100
DEFAULT_LR_MIN = 5e-3
DEFAULT_LR_MAX = 3e-2
DEFAULT_Z_PART = 0.4  # part of the steps that refine z: more does not lower the loss, and steps without z are faster
DEFAULT_NOISE_PERIOD = 8
DEFAULT_LR_MAX_OF = {"ste": 5e-3, "noise": 2e-2}  # methods without a temperature


def _check_name(what: str, name: str, allowed: tuple[str, ...]) -> None:
    if name not in allowed:
        raise ValueError(f"unknown {what} {name!r}; allowed: {', '.join(allowed)}")


@dataclass(frozen=True)
class Annealing:
    """Temperature and learning rate of a refinement.

    Attributes
    ----------
    schedule : str
        Temperature: `exp`, `sga` or `cold` (see :func:`temperature`).
    tau_max : float
        Highest temperature; where `cold` starts.
    rate : float
        Rate c per step of `exp` and `sga`; `cold` has none.
    tau_end : float
        Temperature of the last step of `cold`.
    lr : float
        Learning rate of Adam (first step).
    lr_schedule : str
        `constant` or `cosine`.
    z_part : float
        Part of the steps that refine y and z; then z is rounded, and the remaining steps refine y only.
    noise : float
        Factor of the noise of the rounding.
    variance : pair of float, optional
        The bits of y are expected values over its two classes, and this part of the variance of the rounding, in the
        first and in the last step, is added to the squared error. None: the bits are those of the relaxed y.
    """

    schedule: str = "exp"
    tau_max: float = 1.0
    rate: float = 1e-3
    tau_end: float = 0.1
    lr: float = 5e-3
    lr_schedule: str = "constant"
    z_part: float = 1.0
    noise: float = 1.0
    variance: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        _check_name("schedule", self.schedule, SCHEDULES)
        _check_name("learning-rate schedule", self.lr_schedule, LR_SCHEDULES)
        for name in ("tau_max", "tau_end", "lr"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a number above 0, not {value!r}")
        for name in ("tau_max", "tau_end"):
            if getattr(self, name) < TAU_MIN:
                raise ValueError(f"{name} must be at least {TAU_MIN:g}, not {getattr(self, name)!r}")
        if not (self.rate >= 0 and math.isfinite(self.rate)):
            raise ValueError(f"rate must be a number of at least 0, not {self.rate!r}")
        if not 0 <= self.z_part <= 1:
            raise ValueError(f"z_part must be in 0 … 1, not {self.z_part!r}")
        if self.schedule == "cold" and self.tau_end > self.tau_max:
            raise ValueError(f"tau_end {self.tau_end!r} is above tau_max {self.tau_max!r}")

    @classmethod
    def published(cls, method: str) -> "Annealing":
        """The papers' settings for a rounding method: constant learning rate 0.005, rate 0.001.

        `atanh` is SGA's: schedule `sga`, τmax ½. `linear`, `cosine` and `ssl` are SGA+'s: `exp`, τmax 1.
        `danneal` is SGA's deterministic annealing, whose authors divide by min(0.2, e^(−0.004·t)) once; here
        the temperature enters twice, so this is its square root. `ste` and `noise` have no temperature.
        """
        _check_name("method", method, METHODS)
        return _PUBLISHED.get(method, cls())

    @classmethod
    def default(cls, method: str, steps: int, classes: int = 2, expected: bool = True) -> "Annealing":
        """The default settings for a rounding method and a number of steps: schedule `cold`.

        If `expected`, the bits of the method `EXPECTED` are expected values.
        """
        _check_name("method", method, METHODS)
        _check_steps(steps)
        lr = DEFAULT_LR * math.sqrt(DEFAULT_LR_STEPS / max(steps, 1))
        lr = min(DEFAULT_LR_MAX_OF.get(method, DEFAULT_LR_MAX), max(DEFAULT_LR_MIN, lr))
        tau_max, tau_end = DEFAULT_TAU_OF.get((method, classes), DEFAULT_TAU)
        found = cls("cold", tau_max=tau_max, tau_end=tau_end, lr=lr, lr_schedule="cosine", z_part=DEFAULT_Z_PART)
        if not expected or (method, classes) != EXPECTED:
            return found
        tau_max, tau_end = EXPECTED_TAU
        return replace(
            found,
            tau_max=tau_max,
            tau_end=tau_end,
            noise=EXPECTED_NOISE * min(1.0, math.sqrt(steps / EXPECTED_NOISE_STEPS)),
            variance=EXPECTED_VARIANCE,
        )

    @property
    def noise_period(self) -> int:
        """Period of `refine.noise.NoiseSequence`: the published schedules have independent noise in each step."""
        return DEFAULT_NOISE_PERIOD if self.schedule == "cold" else 1

    def steps_of_z(self, steps: int) -> int:
        """How many of `steps` refine z."""
        return math.ceil(self.z_part * steps)

    def temperatures(self, steps: int) -> list[float]:
        """τ of steps 0 … steps − 1."""
        return [
            temperature(self.schedule, t, steps, tau_max=self.tau_max, rate=self.rate, tau_end=self.tau_end)
            for t in range(_check_steps(steps))
        ]

    def variances(self, steps: int) -> list[float]:
        """The part of the variance of the rounding in steps 0 … steps − 1, linear; a single step has the last one."""
        first, last = self.variance or (0.0, 0.0)
        return [last + (first - last) * (steps - 1 - t) / max(1, steps - 1) for t in range(_check_steps(steps))]

    def learning_rates(self, steps: int) -> list[float]:
        """Learning rate of steps 0 … steps − 1."""
        return [learning_rate(self.lr_schedule, t, steps, self.lr) for t in range(_check_steps(steps))]


_PUBLISHED = {
    "atanh": Annealing("sga", tau_max=0.5),
    "danneal": Annealing("exp", tau_max=math.sqrt(0.2), rate=0.002),
}


def temperature(
    schedule: str,
    step: int,
    steps: int,
    tau_max: float = 1.0,
    rate: float = 1e-3,
    tau_end: float = 0.1,
) -> float:
    """Temperature of step `step` of `steps`.

    * `exp` (SGA+): min(τmax, e^(−c·t)), for any number of steps.
    * `sga` (SGA): min(τmax, τmax·e^(−c·(t − t₀))), where t₀ = 700 and c are for 2000 steps and are scaled to the
      number of steps.
    * `cold` (ours): geometric from τmax at step 0 to `tau_end` at the last step; a single step is at
      `tau_end`.

    It is never below TAU_MIN, which `exp` would reach after 14,000 steps.

    Raises
    ------
    ValueError
        For an unknown schedule or a step outside 0 … steps − 1.
    """
    _check_name("schedule", schedule, SCHEDULES)
    _check_step(step, steps)
    if schedule == "exp":
        return max(TAU_MIN, min(tau_max, math.exp(-rate * step)))
    if schedule == "sga":
        paper_step = step * PAPER_STEPS / steps
        return max(TAU_MIN, tau_max * math.exp(-rate * max(0.0, paper_step - SGA_START)))
    if step == steps - 1:
        return tau_end
    return tau_max * (tau_end / tau_max) ** (step / (steps - 1))


def learning_rate(schedule: str, step: int, steps: int, lr: float) -> float:
    """Learning rate of step `step` of `steps`.

    * `constant`: `lr` throughout.
    * `cosine`: half a cosine from `lr` at step 0 to `LR_FLOOR`·lr at the last step; a single step has `lr`.

    Raises
    ------
    ValueError
        For an unknown schedule or a step outside 0 … steps − 1.
    """
    _check_name("learning-rate schedule", schedule, LR_SCHEDULES)
    _check_step(step, steps)
    if schedule == "constant" or steps == 1:
        return lr
    return lr * (LR_FLOOR + (1 - LR_FLOOR) * 0.5 * (1 + math.cos(math.pi * step / (steps - 1))))


def _check_steps(steps: int) -> int:
    if steps < 0:
        raise ValueError(f"the number of steps must be at least 0, not {steps}")
    return steps


def _check_step(step: int, steps: int) -> None:
    if not 0 <= step < steps:
        raise ValueError(f"step must be in 0 … {steps - 1}, not {step}")
