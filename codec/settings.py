"""Settings of one encoding, and the ladder of λ that models share.

The command line reads its choices here, so nothing that is imported loads torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral

from .annealing import SCHEDULES, Annealing
from .rounding import METHODS as ROUNDINGS
from .rounding import Rounding, rounding

METHODS = ("none", *ROUNDINGS)  # of `Settings.method`
CLASSES = 2
STEPS = 500  # default on CUDA, and the most with a time limit
CPU_STEPS = 75  # default on a CPU for pictures of at most CPU_PIXELS; for larger ones fewer, in proportion
CPU_PIXELS = 4 * 2**20
_CPU_LEAST = 25
EFFORTS = (0, 50, 150, 500, 2000)  # steps of --effort 0 … 4
ANCHORS = (0.0016, 0.0032, 0.0075, 0.015, 0.03, 0.045)  # the λ at which gains are trained: those of SGA+
LADDER = (ANCHORS[0], ANCHORS[-1])  # λ of a model's lowest and highest level, unless the model says otherwise
LEVELS = 64
LAMBDA_RANGE = (1e-4, 1.0)  # of λ where a target decides on it

_REFINED_LEVEL = 0.75  # λ of the level of a refined file, relative to λ; for larger λ the factor rises to 1:
_REFINED_RANGE = 0.015, 0.07  # the λ where it begins to rise, and where it is 1
_LARGEST = 1e12  # of a real setting
_MOST_STEPS = 10**6


def refined_lambda(coding: float) -> float:
    """The λ of which refined files have the level of `coding`: the inverse of `Settings.coding_lambda`."""
    low, high = _REFINED_RANGE
    if coding >= high:
        return coding
    part = max(0.0, math.log(coding / (_REFINED_LEVEL * low)) / math.log(high / (_REFINED_LEVEL * low)))
    return float(coding / _REFINED_LEVEL ** (1 - part))


def level_lambda(level: int, ladder: tuple[float, float] = LADDER, levels: int = LEVELS) -> float:
    """λ of a level: geometric from the low end of the ladder (level 0) to the high one (level `levels` − 1)."""
    low, high = ladder
    return low if levels <= 1 else low * math.exp(math.log(high / low) * level / (levels - 1))


def anchor_weights(lmbda: float, anchors: Sequence[float]) -> tuple[int, int, float]:
    """Anchors i and j around λ and the weight t of j, linear in log λ: a value at λ is (1 − t)·v_i + t·v_j.

    Outside the anchors the value is that of the nearest.
    """
    logs = [math.log(anchor) for anchor in anchors]
    position = min(max(math.log(lmbda), logs[0]), logs[-1])
    i = max(k for k in range(len(logs)) if logs[k] <= position)
    j = min(i + 1, len(logs) - 1)
    return i, j, 0.0 if i == j else (position - logs[i]) / (logs[j] - logs[i])


@dataclass(frozen=True)
class Settings:
    """Settings of one encoding. What is None has the default of the codec, or of the method.

    Attributes
    ----------
    lmbda : float
        λ of the loss λ·255²·MSE + bpp: any positive number. `coding_lambda` derives the level of the model from it.
    level_lambda : float, optional
        λ that selects the level (the paper's semi-multi-rate experiment). None: `coding_lambda`.
    target_bpp, target_size, target_psnr : float, int, float, optional
        Search the λ that gives this many bits per pixel of the whole file, bytes of the whole file, or dB; at most one.
    method : str
        "none", or a relaxation of SGA+: ste, noise, danneal, atanh, linear, cosine, ssl.
    classes : int, optional
        Classes of the relaxation: 2 (default) or 3 (linear, cosine and ssl only).
    steps : int, optional
        Steps of the whole annealing. None: 500 on CUDA and with a time limit, at most 75 on a CPU (`on_device`).
    time_limit : float, optional
        Seconds for the refinement of one image: as many steps as fit, at most `steps`.
    seed : int
        Seed of the noise: the same seed gives the same bytes on the same device, for the same batch of pictures.
    schedule, tau_max, rate, lr : optional
        Annealing: temperature schedule "cold" (default), "exp" or "sga"; highest temperature; rate per step (exp and
        sga); learning rate. With exp and sga the learning rate is by default the paper's, constant 0.005.
    rounds : int, optional
        Rounds of the last pass, a coordinate descent over single integers; default as `rounds_after` returns it. Where
        a target is met within one refinement, there are further ones until it is met.
    ssl_a, r, n : float, optional
        Hyperparameters of the relaxation; default as published.
    metric : {"mse", "ms-ssim"}
        Distortion of the loss.
    """

    lmbda: float = 0.0075
    level_lambda: float | None = None
    target_bpp: float | None = None
    target_size: int | None = None
    target_psnr: float | None = None
    method: str = "ssl"
    classes: int | None = None
    steps: int | None = None
    time_limit: float | None = None
    seed: int = 0
    schedule: str | None = None
    tau_max: float | None = None
    rate: float | None = None
    lr: float | None = None
    rounds: int | None = None
    ssl_a: float | None = None
    r: float | None = None
    n: float | None = None
    metric: str = "mse"

    def validate(self) -> None:
        """Raise ValueError, with one line that says what is allowed, for settings that are invalid or contradictory."""
        for name in ("lmbda", "level_lambda", "target_bpp", "target_size", "target_psnr", "time_limit"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= _LARGEST:
                name = name.replace("lmbda", "lambda")
                raise ValueError(f"{name} must be a positive number of at most {_LARGEST:g}, not {value!r:.20}")
        for name, most in (
            ("steps", _MOST_STEPS),
            ("rounds", _MOST_STEPS),
            ("seed", 2**63 - 1),
            ("target_size", 2**63),
        ):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Integral) and 0 <= int(value) <= most):
                raise ValueError(f"{name} must be an integer from 0 to {most}, not {value!r:.20}")
        if sum(t is not None for t in (self.target_bpp, self.target_size, self.target_psnr)) > 1:
            raise ValueError("only one of target_bpp, target_size and target_psnr can be given")
        if self.metric not in ("mse", "ms-ssim"):
            raise ValueError(f"metric must be mse or ms-ssim, not {self.metric!r}")
        if self.metric == "ms-ssim" and self.rounds:
            raise ValueError("rounds has no meaning with metric ms-ssim: its change by one integer is not predicted")
        if self.method == "none":
            refining = (
                "classes",
                "steps",
                "time_limit",
                "schedule",
                "tau_max",
                "rate",
                "lr",
                "rounds",
                "ssl_a",
                "r",
                "n",
            )
            for name in refining:
                value = getattr(self, name)
                if value is not None and not (name == "steps" and value == 0):
                    raise ValueError(f"{name} has no meaning with method none")
            return
        if self.method not in ROUNDINGS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, not {self.method!r}")
        if self.schedule is not None and self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}")
        self.rounding()
        self.annealing(max(1, self.annealing_steps))

    @property
    def annealing_steps(self) -> int:
        """Steps of the annealing where no time limit shortens it; 0 with method none, 500 where `steps` is None."""
        if self.method == "none":
            return 0
        return STEPS if self.steps is None else self.steps

    @property
    def refines(self) -> bool:
        """Whether there is any step or round of refinement."""
        return self.method != "none" and (self.annealing_steps > 0 or self.rounds_after(0) > 0)

    @property
    def unrefined(self) -> Settings:
        """The settings of unrefined latents at the same λ."""
        return Settings(lmbda=self.lmbda, level_lambda=self.level_lambda, method="none", metric=self.metric)

    @property
    def has_default_schedule(self) -> bool:
        """Whether schedule and metric are the default ones, which the refined level and the last pass suit."""
        return self.schedule in (None, "cold") and self.metric == "mse"

    @property
    def coding_lambda(self) -> float:
        """λ that selects the level.

        By default λ, or for a refinement with the default annealing 0.75 λ up to 0.015, rising to λ at 0.07 and above.
        """
        if self.level_lambda is not None:
            return self.level_lambda
        if not (self.has_default_schedule and self.refines):
            return self.lmbda
        low, high = _REFINED_RANGE
        part = math.log(self.lmbda / low) / math.log(high / low)
        return float(self.lmbda * _REFINED_LEVEL ** (1 - min(1.0, max(0.0, part))))

    def on_device(self, kind: str, pixels: int = 0) -> Settings:
        """These settings with the default number of steps for a picture on a device, if they have none.

        The steps of a CPU have almost nine tenths of the gain of 500 in a sixth of their time (docs/refinement.md).

        Parameters
        ----------
        kind : str
            Type of the device, "cpu" or "cuda".
        pixels : int
            Of the padded picture.
        """
        if self.steps is not None or self.method == "none" or self.time_limit is not None:
            return self
        fitting = min(CPU_STEPS, max(_CPU_LEAST, CPU_STEPS * CPU_PIXELS // max(1, pixels)))
        return replace(self, steps=fitting if kind == "cpu" else STEPS)

    @property
    def rounding_classes(self) -> int:
        """Classes of the relaxation."""
        return CLASSES if self.classes is None else self.classes

    def rounding(self) -> Rounding:
        """The relaxation; ValueError for a combination of settings that does not exist."""
        return rounding(self.method, self.rounding_classes, a=self.ssl_a, r=self.r, n=self.n)

    def annealing(self, steps: int) -> Annealing:
        """Temperature and learning rate for an annealing of `steps` steps."""
        if self.schedule in (None, "cold"):
            annealing = Annealing.default(self.method, steps, self.rounding_classes, self.metric == "mse")
            if self.rate is not None:
                raise ValueError("rate belongs to the schedules exp and sga")
        else:
            annealing = replace(Annealing.published(self.method), schedule=str(self.schedule))
        changes = {k: v for k in ("tau_max", "rate", "lr") if (v := getattr(self, k)) is not None}
        for name in ("tau_max", "rate"):
            if name in changes and not self.rounding().annealed:
                raise ValueError(f"{name} has no meaning with method {self.method}")
        if self.tau_max is not None:
            changes["tau_end"] = min(annealing.tau_end, self.tau_max)
        return replace(annealing, **changes)

    def rounds_after(self, steps: int) -> int:
        """Rounds of the last pass after an annealing of `steps` steps, without a target.

        By default none with expected bits, with the schedules of the papers, and for MS-SSIM; else ⌊√(2·steps)⌋: 10
        after 50 steps, 31 after 500.
        """
        if self.rounds is not None:
            return self.rounds
        none = not self.has_default_schedule or self.annealing(max(1, steps)).variance is not None
        return 0 if none else math.isqrt(2 * steps)

    def steps_and_rounds(self, fitting: int | None = None) -> tuple[int, int]:
        """Steps of the annealing and rounds of the last pass.

        Parameters
        ----------
        fitting : int, optional
            Steps that fit into the time limit; a round takes about as long as a step. None: there is no limit.
        """
        steps = self.annealing_steps
        if fitting is None:
            return steps, self.rounds_after(steps)
        rounds = self.rounds_after(min(steps, fitting))
        return min(steps, max(0, fitting - rounds)), rounds

    def deadline(self, begin: float) -> float:
        """When the time limit of a refinement that began at `begin` (seconds) is over; infinity without a limit."""
        return math.inf if self.time_limit is None else begin + self.time_limit
