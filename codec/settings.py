"""Settings of one encoding, and the ladder of λ that models share.

The command line reads its choices here, so nothing that is imported loads torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .annealing import SCHEDULES, Annealing
from .rounding import METHODS as ROUNDINGS
from .rounding import Rounding, rounding

METHODS = ("none", *ROUNDINGS)  # of `Settings.method`
EFFORTS = (0, 50, 150, 500, 2000)  # steps of --effort 0 … 4
ANCHORS = (0.0016, 0.0032, 0.0075, 0.015, 0.03, 0.045)  # the λ at which gains are trained: those of SGA+
LADDER = (ANCHORS[0], ANCHORS[-1])  # λ of a model's lowest and highest level, unless the model says otherwise
LEVELS = 64

_FEW = 20  # steps: where no more fit into the time, rounds alone gain more


def level_lambda(level: int, ladder: tuple[float, float] = LADDER, levels: int = LEVELS) -> float:
    """λ of a level: geometric from the low end of the ladder (level 0) to the high one (level `levels` − 1)."""
    low, high = ladder
    return low if levels <= 1 else low * math.exp(math.log(high / low) * level / (levels - 1))


@dataclass(frozen=True)
class Settings:
    """Settings of one encoding; the defaults are the product's.

    Attributes
    ----------
    lmbda : float
        λ of λ·255²·MSE + bpp; any positive number. The level of the model is the nearest on its ladder …
    level_lambda : float, optional
        … unless this pins the level apart from λ (the paper's semi-multi-rate experiment).
    target_bpp, target_size, target_psnr : float, int, float, optional
        Find λ for bits a pixel of the whole file, bytes of the whole file, or dB; at most one of them.
    method : str
        "none", or a rounding of SGA+: ste, noise, danneal, atanh, linear, cosine, ssl.
    classes : int
        2 or 3 (linear, cosine, ssl).
    steps : int
        Iterations of a whole annealing.
    time_limit : float, optional
        Seconds: as many steps as fit, at most `steps`.
    seed : int
        Of the noise: the same seed gives the same bytes on the same device.
    schedule, tau_max, rate, lr : optional
        Annealing: "cold" (the default), "exp" or "sga"; highest temperature; rate a step of exp and sga; learning
        rate. Where a schedule of the paper is named, the learning rate is the paper's 0.005, constant.
    rounds : int, optional
        Rounds of the last pass, over single integers (see `rounds_after`).
    ssl_a, r, n : float, optional
        Hyperparameters of the rounding, the paper's where not given.
    metric : {"mse", "ms-ssim"}
        What refinement minimises beside the rate.
    """

    lmbda: float = 0.0075
    level_lambda: float | None = None
    target_bpp: float | None = None
    target_size: int | None = None
    target_psnr: float | None = None
    method: str = "ssl"
    classes: int = 2
    steps: int = 500
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
        """Raise ValueError, one line that says what is allowed, when the settings make no sense."""
        for name in ("lmbda", "level_lambda", "target_bpp", "target_size", "target_psnr", "time_limit"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name.replace('lmbda', 'lambda')} must be a positive number, not {value}")
        for name in ("steps", "rounds"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if sum(t is not None for t in (self.target_bpp, self.target_size, self.target_psnr)) > 1:
            raise ValueError("only one of target_bpp, target_size and target_psnr can be given")
        if self.metric not in ("mse", "ms-ssim"):
            raise ValueError(f"metric must be mse or ms-ssim, not {self.metric!r}")
        if self.metric == "ms-ssim" and self.rounds:
            raise ValueError("rounds belong to the metric mse: what a change does to MS-SSIM is not predicted")
        if self.method == "none":
            tuned = ("schedule", "tau_max", "rate", "lr", "rounds", "ssl_a", "r", "n")
            given = [name for name in tuned if getattr(self, name) is not None]
            if given:
                raise ValueError(f"{given[0]} has no meaning with method none")
            return
        if self.method not in ROUNDINGS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, not {self.method!r}")
        if self.schedule is not None and self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}")
        self.rounding()
        self.annealing(max(1, self.steps))

    def rounding(self) -> Rounding:
        """The rounding these settings ask for; ValueError for combinations that do not exist."""
        return rounding(self.method, self.classes, a=self.ssl_a, r=self.r, n=self.n)

    def annealing(self, steps: int) -> Annealing:
        """Temperature and learning rate for a run of `steps`."""
        if self.schedule in (None, "cold"):
            annealing = Annealing.default(self.method, steps, self.classes)
            if self.rate is not None:
                raise ValueError("rate belongs to the schedules exp and sga")
        else:
            annealing = replace(Annealing.published(self.method), schedule=str(self.schedule))
        changes = {k: v for k in ("tau_max", "rate", "lr") if (v := getattr(self, k)) is not None}
        if self.tau_max is not None:
            changes["tau_end"] = min(annealing.tau_end, self.tau_max)
        return replace(annealing, **changes)

    def rounds_after(self, steps: int) -> int:
        """Rounds of the last pass: by default 10 after 50 steps, 31 after 500, none with a schedule of the papers.

        None for MS-SSIM either.
        """
        if self.rounds is not None:
            return self.rounds
        return math.isqrt(2 * steps) if self.schedule in (None, "cold") and self.metric == "mse" else 0

    def shared_out(self, fitting: int) -> tuple[int, int]:
        """Steps and rounds, about as long as each other, where time is limited to `fitting` of them."""
        rounds = self.rounds_after(min(self.steps, fitting))
        if fitting <= _FEW and rounds and self.rounds is None:
            return 0, fitting
        return min(self.steps, max(0, fitting - rounds)), rounds
