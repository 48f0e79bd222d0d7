"""How latents are relaxed: the rounding methods of SGA+, their classes and their published hyperparameters.

Sources: SGA+ is Perugachi-Diaz et al. 2024 (arXiv 2401.17789), SGA is Yang et al. 2020 (arXiv 2006.04240). The
relaxations themselves are in `refine/relaxations.py`; nothing here imports torch.
"""

from dataclasses import dataclass

METHODS = ("ste", "noise", "danneal", "atanh", "linear", "cosine", "ssl")
THREE_CLASS_METHODS = ("linear", "cosine", "ssl")

MAX_A = 20.0  # σ(−a·logit(0.98)) must stay a normal float32
MAX_N = 100.0

# The authors' settings, by (method, classes). A hyperparameter that a method does not have is 1 and has no effect.
_DEFAULTS: dict[tuple[str, int], dict[str, float]] = {
    ("ssl", 2): {"a": 2.3},
    ("linear", 3): {"r": 0.98, "n": 1.5},
    ("cosine", 3): {"r": 0.98, "n": 2.0},
    ("ssl", 3): {"a": 1.4, "r": 0.98, "n": 1.4},
}


@dataclass(frozen=True)
class Rounding:
    """A relaxation of rounding. Make one with :func:`rounding`, which fills in the published settings.

    Attributes
    ----------
    method : str
        One of `METHODS`.
    classes : int
        2 or 3; 3 only for `THREE_CLASS_METHODS`.
    a : float
        Slope of the sigmoid scaled logit (ssl).
    r, n : float
        Scale of the distance and power of the weight (three classes).
    """

    method: str
    classes: int = 2
    a: float = 1.0
    r: float = 1.0
    n: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}; allowed: {', '.join(METHODS)}")
        if self.classes not in (2, 3):
            raise ValueError(f"classes must be 2 or 3, not {self.classes!r}")
        if self.classes == 3 and self.method not in THREE_CLASS_METHODS:
            allowed = ", ".join(THREE_CLASS_METHODS)
            raise ValueError(f"method {self.method!r} has two classes only; three classes: {allowed}")
        for name, value, limit in (("a", self.a, MAX_A), ("r", self.r, 1.0), ("n", self.n, MAX_N)):
            if not 0 < value <= limit:
                raise ValueError(f"{name} must be above 0 and at most {limit:g}, not {value!r}")

    @property
    def stochastic(self) -> bool:
        """Whether the relaxation draws noise."""
        return self.method not in ("ste", "danneal")

    @property
    def annealed(self) -> bool:
        """Whether the relaxation depends on a temperature."""
        return self.method not in ("ste", "noise")


def rounding(
    method: str,
    classes: int = 2,
    a: float | None = None,
    r: float | None = None,
    n: float | None = None,
) -> Rounding:
    """A checked `Rounding`, with the published setting for everything left out.

    Raises
    ------
    ValueError
        For an unknown method, an option that the method does not have, or a value out of range; the message
        says what is allowed.
    """
    values = dict(_DEFAULTS.get((method, classes), {}))
    bare = Rounding(method, classes)  # an unknown method or number of classes is the first error to report
    for name, value in (("a", a), ("r", r), ("n", n)):
        if value is None:
            continue
        if name not in values:
            setting, owners = ("ssl_a", "method ssl") if name == "a" else (name, "three classes")
            raise ValueError(f"{setting} is for {owners} only, not for {bare.method} with {bare.classes} classes")
        values[name] = float(value)
    return Rounding(method, classes, **values)
