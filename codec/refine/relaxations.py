"""Relaxed rounding: from real latents to values that an optimiser can pull towards integers.

    v ──► ⌊v⌋, u = v − ⌊v⌋ ──► logits of the classes ──► + noise, / τ ──► softmax ──► v̂ = Σ p_k · class_k
           (grid)                   f(u), f(1 − u)

Two-class rounding chooses between ⌊v⌋ and ⌊v⌋ + 1, three-class rounding between the three integers around
round(v). The temperature τ enters twice, once in the logits and once in the Gumbel-softmax:

    p = softmax((f/τ + G)/τ),   G Gumbel noise

so a small τ makes v̂ an integer and a large one leaves it free.

Two things make it fast. A softmax over two classes is a sigmoid of one difference, and a difference of two
Gumbel variables is one logistic variable, so two-class rounding is

    v̂ = ⌊v⌋ + σ(((f(1−u) − f(u))/τ + L)/τ),   L logistic noise

with a closed form of f(1−u) − f(u) for every method. And the derivative ∂v̂/∂v is elementwise, so it is
computed beside the value and the backward pass is one multiplication.

Everything here is free of host synchronisation and data-dependent shapes, so it can be compiled and captured
in a CUDA graph.

Equations: Perugachi-Diaz, Gansekoele, Bhulai, "Robustly overfitting latents for flexible neural image
compression", 2024 (arXiv 2401.17789), called SGA+ below; Yang, Bamler, Mandt, "Improving inference for neural
image compression", 2020 (arXiv 2006.04240), called SGA.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

METHODS = ("ste", "noise", "danneal", "atanh", "linear", "cosine", "ssl")
THREE_CLASS_METHODS = ("linear", "cosine", "ssl")

EPS = 1e-6  # arguments stay in [EPS, 1 − EPS]; beyond, the gradient is zero
ATANH_EPS = 1e-5  # the same for atanh, as in SGA
LOGIT_FLOOR = -40.0  # e^−40 is nothing beside 1, and far from denormal numbers, which CPUs handle slowly
MAX_A = 20.0  # σ(−a·logit(0.98)) must stay a normal float32
MAX_N = 100.0
BLOCK = 1 << 15  # elements

# The authors' settings, by (method, classes). What does not apply to a method is 1 and has no effect.
_DEFAULTS: dict[tuple[str, int], dict[str, float]] = {
    ("ssl", 2): {"a": 2.3},
    ("linear", 3): {"r": 0.98, "n": 1.5},
    ("cosine", 3): {"r": 0.98, "n": 2.0},
    ("ssl", 3): {"a": 1.4, "r": 0.98, "n": 1.4},
}


@dataclass(frozen=True)
class Rounding:
    """How latents are relaxed. Make one with :func:`rounding`, which fills in the published settings.

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
        """Whether :func:`relax` draws noise."""
        return self.method not in ("ste", "danneal")


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
    bare = Rounding(method, classes)  # says what is wrong with the method or the classes first
    for name, value in (("a", a), ("r", r), ("n", n)):
        if value is None:
            continue
        if name not in values:
            owners = "method ssl" if name == "a" else "three classes"
            raise ValueError(f"{name} is for {owners} only, not for {bare.method} with {bare.classes} classes")
        values[name] = float(value)
    return Rounding(method, classes, **values)


# --- noise -------------------------------------------------------------------


def sample_noise(
    shape: Sequence[int],
    rounding: Rounding,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor | None:
    """Noise as :func:`relax` takes it, for latents of `shape`.

    Returns
    -------
    Tensor or None
        `noise`: U(−½, ½), of `shape`. Two classes: G₂ − G₁ ~ Logistic(0, 1), of `shape`. Three classes:
        (G₋ − G₀, G₊ − G₀) with G₀ of the class in the middle, of (2, *shape). None for `ste` and `danneal`.
    """
    if not rounding.stochastic:
        return None
    size = (2, *shape) if rounding.classes == 3 else tuple(shape)
    u = torch.rand(size, generator=generator, device=device, dtype=dtype)
    if rounding.method == "noise":
        return u.sub_(0.5)
    tiny = 2.0**-53 if dtype == torch.float64 else 2.0**-24  # rand can return 0
    if rounding.classes == 2:
        return torch.logit(u, eps=tiny)
    # The two differences have the joint CDF 1/(1 + e^−x + e^−y): x is logistic, and given x the CDF of y is
    # ((1 + e^−x)/(1 + e^−x + e^−y))². Both are inverted here, with two logarithms instead of six.
    first, second = u.clamp_(tiny, 1 - tiny).unbind(0)
    ratio = (1 - second) / (second.sqrt() + second)  # second^−½ − 1 without cancellation
    return torch.stack((torch.logit(first), (first / ratio).log()))


def noise_pool(
    shape: Sequence[int],
    rounding: Rounding,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor | None:
    """Noise for many steps, drawn once: at least twice what one step on latents of `shape` needs.

    Drawing takes as long as all the rest of a relaxation on a CPU. A window at a random offset
    (:func:`noise_window`) costs nothing, is independent between elements, and repeats a value for one element
    only when an offset is drawn twice.

    Returns
    -------
    Tensor or None
        (samples,), or (2, samples) for three classes; None for `ste` and `danneal`.
    """
    count = math.prod(shape)
    samples = count + max(count, 1 << 16)
    return sample_noise((samples,), rounding, generator=generator, device=device, dtype=dtype)


def noise_window(pool: Tensor, shape: Sequence[int], offset: int) -> Tensor:
    """A view of `pool` as noise for latents of `shape`; `offset` in 0 … samples − numel, both included."""
    count = math.prod(shape)
    if not 0 <= offset <= pool.shape[-1] - count:
        raise ValueError(f"offset must be in 0 … {pool.shape[-1] - count}, not {offset}")
    return pool.narrow(-1, offset, count).view(*pool.shape[:-1], *shape)


# --- the relaxation ----------------------------------------------------------


def relax(
    v: Tensor,
    tau: float | Tensor,
    rounding: Rounding,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Relaxed rounding of latents (SGA+ section 3, SGA section 3.2).

    Parameters
    ----------
    v : Tensor
        Latents on the coded grid (y − μ, z − median), any shape; float32 or float64, others become float32.
    tau : float or Tensor
        Temperature above 0; a tensor is 0-dimensional and on v's device, which is what compiled code and CUDA
        graphs want. A number is a little faster on a CPU.
    rounding : Rounding
        The method.
    generator : torch.Generator, optional
        Source of the noise; torch's default otherwise.
    noise : Tensor, optional
        The noise itself, as :func:`sample_noise` or :func:`noise_window` give it.

    Returns
    -------
    Tensor
        v̂, of v's shape. Differentiable once with respect to v; ⌊v⌋ and round(v) count as constants. Value and
        gradient are finite for every finite v.
    """
    if v.dtype not in (torch.float32, torch.float64):
        v = v.float()
    if not isinstance(tau, Tensor) and not tau > 0:
        raise ValueError(f"the temperature must be above 0, not {tau!r}")
    if noise is None:
        noise = sample_noise(v.shape, rounding, generator=generator, device=v.device, dtype=v.dtype)
    elif not rounding.stochastic:
        raise ValueError(f"method {rounding.method!r} takes no noise")
    if rounding.method == "noise":
        assert noise is not None
        return v + noise
    with_slope = torch.is_grad_enabled() and v.requires_grad
    value, slope = _evaluate(v.detach(), tau, rounding, noise, with_slope)
    return _WithSlope.apply(v, value, slope) if with_slope else value


def value_and_slope(
    v: Tensor, tau: float | Tensor, rounding: Rounding, noise: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """v̂ of :func:`relax` and its elementwise derivative (None: 1), for code that does its own differentiation.

    `noise` is None only where the method has none; v is float32 or float64 and needs no gradient.
    """
    if rounding.method == "noise":
        assert noise is not None
        return v + noise, None
    return _evaluate(v, tau, rounding, noise, True)


class _WithSlope(torch.autograd.Function):
    """`value`, whose elementwise derivative with respect to `v` is `slope` (None: 1)."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, value: Tensor, slope: Tensor | None) -> Tensor:
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return (grad if slope is None else grad * slope), None, None


def _evaluate(
    v: Tensor, tau: float | Tensor, rounding: Rounding, noise: Tensor | None, with_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """v̂ and, if asked for, ∂v̂/∂v. In-place operations only on tensors born here."""
    if rounding.method == "ste":
        return v.round(), None
    cold = 1 / (tau.to(v.dtype) if isinstance(tau, Tensor) else tau)
    if rounding.classes == 3:
        assert noise is not None
        if v.device.type == "cpu" and v.numel() > BLOCK and not torch.compiler.is_compiling():
            return _three_class_in_blocks(v, cold, rounding, noise, with_slope)
        return _three_class(v, cold, rounding, noise, with_slope)
    return _two_class(v, cold, rounding, noise, with_slope)


def _add_scaled(x: Tensor, noise: Tensor, cold: float | Tensor) -> None:
    """x += cold·noise in one pass, for a number and for a scalar on the device."""
    if isinstance(cold, Tensor):
        x.addcmul_(noise, cold)
    else:
        x.add_(noise, alpha=cold)


def _two_class(
    v: Tensor, cold: float | Tensor, rounding: Rounding, noise: Tensor | None, with_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """⌊v⌋ + σ((gain·g(u)·cold + noise)·cold) with gain·g(u) = f(1−u) − f(u) and cold = 1/τ."""
    low = v.floor()
    u = v - low  # [0, 1]: 1 where v is less than half a unit in the last place below an integer
    if rounding.method == "cosine":  # f(1−u) − f(u) = 2·log tan(πu/2)
        gain = 2.0
        u.clamp_(EPS, 1 - EPS)
        g = (u * (math.pi / 2)).tan_().log_()
    elif rounding.method in ("atanh", "danneal"):  # atanh(u) − atanh(1−u) = ½·(logit(u) + logit((1+u)/3))
        gain = 0.5
        third = (u * (1 / 3)).add_(1 / 3)
        g = torch.logit(u, eps=ATANH_EPS).add_(torch.logit(third))
    else:  # logit(u), for ssl times a
        gain = rounding.a
        g = torch.logit(u, eps=EPS)

    g.mul_(gain * cold * cold)
    if noise is not None:
        _add_scaled(g, noise, cold)
    p = g.clamp_(LOGIT_FLOOR, -LOGIT_FLOOR).sigmoid_()  # probability of the upper class

    slope = None
    if with_slope:
        scale = gain * cold * cold
        if not isinstance(scale, Tensor):
            scale = v.new_full((), scale)
        slope = torch.ops.aten.sigmoid_backward(scale.expand_as(p), p)  # scale·p·(1 − p), times g′(u):
        if rounding.method == "cosine":  # π/sin(πu)
            slope = slope.mul_(math.pi).div_((u * math.pi).sin_())
            slope = torch.ops.aten.hardtanh_backward(slope, u, EPS, 1 - EPS)  # 0 where clamped
        elif rounding.method in ("atanh", "danneal"):  # 1/(u(1−u)) + 3/((1+u)(2−u))
            far = torch.ops.aten.logit_backward(slope, third)
            slope = torch.ops.aten.logit_backward(slope, u, ATANH_EPS).add_(far, alpha=1 / 3)
        else:  # 1/(u(1−u))
            slope = torch.ops.aten.logit_backward(slope, u, EPS)
    return low.add_(p), slope


def _three_class(
    v: Tensor, cold: float | Tensor, rounding: Rounding, noise: Tensor, with_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """round(v) − p₋ + p₊; the leading dimension of 3 is the classes −1, 0, +1 around round(v)."""
    centre = v.round()
    w = v - centre  # [−½, ½]
    reach = rounding.r / 1.5 if rounding.method == "ssl" else rounding.r
    q = torch.stack((w + 1, w.abs(), 1 - w)).mul_(reach).clamp_(EPS, 1 - EPS)  # (3, *shape), scaled distances
    if rounding.method == "linear":
        weight = 1 - q
    elif rounding.method == "cosine":
        weight = (q * (math.pi / 2)).cos_()
    else:
        weight = torch.logit(q).mul_(-rounding.a).sigmoid_()

    x = weight.log().mul_(rounding.n * cold * cold)
    _add_scaled(x[0], noise[0], cold)
    _add_scaled(x[2], noise[1], cold)
    p = x.sub_(x.amax(dim=0)).clamp_(min=LOGIT_FLOOR).exp_()
    p.div_(p.sum(dim=0))
    mean = p[2] - p[0]
    value = centre.add_(mean)
    if not with_slope:
        return value, None

    # v̂′ = Σ_k p_k·(k − mean)·x_k′, and x_k′ = −(n/τ²)·(reach·steepness)·d_k′ with d′ = (1, sign w, −1)
    if rounding.method == "ssl":
        steepness = torch.ops.aten.logit_backward((1 - weight).mul_(rounding.a), q, EPS)
    else:
        if rounding.method == "linear":
            steepness = weight.reciprocal_()
        else:
            steepness = (q * (math.pi / 2)).sin_().mul_(math.pi / 2).div_(weight)
        steepness = torch.ops.aten.hardtanh_backward(steepness, q, EPS, 1 - EPS)  # 0 where clamped
    p.mul_(steepness)
    slope = p[0].mul_(mean + 1)
    slope += p[1].mul_(mean).mul_(w.sign())
    slope += p[2].mul_(1 - mean)
    return value, slope * (rounding.n * reach * cold * cold)


def _three_class_in_blocks(
    v: Tensor, cold: float | Tensor, rounding: Rounding, noise: Tensor, with_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """`_three_class` by blocks whose temporaries stay in the CPU's cache: twice as fast."""
    flat, flat_noise = v.reshape(-1), noise.reshape(2, -1)
    value = torch.empty_like(flat)
    slope = torch.empty_like(flat) if with_slope else None
    for start in range(0, flat.numel(), BLOCK):
        part = slice(start, start + BLOCK)
        value[part], part_slope = _three_class(flat[part], cold, rounding, flat_noise[:, part], with_slope)
        if slope is not None and part_slope is not None:
            slope[part] = part_slope
    return value.view(v.shape), None if slope is None else slope.view(v.shape)


# --- reference, for curves and tests -----------------------------------------


def log_weights(distance: Tensor, rounding: Rounding) -> Tensor:
    """Unnormalised log-probability of a class at `distance` from v, as the papers print it.

    Two classes: f(u) for a distance u in [0, 1] (SGA eq. 6 for atanh, SGA+ section 3.2 for the others). Three
    classes: n·log f(r·d) for a distance d in [0, 1½] (SGA+ section 3.3). :func:`relax` uses closed forms of
    differences of these.
    """
    method, a, n = rounding.method, rounding.a, rounding.n
    if method in ("ste", "noise"):
        raise ValueError(f"method {method!r} has no class weights")
    if method in ("atanh", "danneal"):
        return -torch.atanh(distance.clamp(-1 + ATANH_EPS, 1 - ATANH_EPS))
    reach = rounding.r / 1.5 if method == "ssl" and rounding.classes == 3 else rounding.r
    q = (distance * reach).clamp(EPS, 1 - EPS)
    if method == "linear":
        return n * torch.log1p(-q)
    if method == "cosine":
        power = n if rounding.classes == 3 else 2.0
        return power * torch.log(torch.cos(math.pi / 2 * q))
    return n * torch.nn.functional.logsigmoid(-a * torch.logit(q))


def probabilities(v: Tensor, rounding: Rounding, tau: float = 1.0) -> tuple[Tensor, Tensor]:
    """Class values and their probabilities without noise, softmax(f/τ²): the curves of SGA+ figure 1.

    Returns
    -------
    classes, probabilities : Tensor
        Both (classes, *v.shape), v's dtype; ⌊v⌋ and ⌊v⌋ + 1, or the three integers around round(v). `ste` has
        probabilities 0 and 1; `noise` has no classes and raises ValueError.
    """
    offsets = (-1, 0, 1) if rounding.classes == 3 else (0, 1)
    base = v.round() if rounding.classes == 3 else v.floor()
    classes = torch.stack([base + k for k in offsets])
    if rounding.method == "ste":
        return classes, (classes == v.round()).to(v.dtype)
    logits = log_weights((v - classes).abs(), rounding) / tau**2
    return classes, torch.softmax(logits, dim=0)
