"""Weights and probabilities of the classes by the formulas of the papers: the curves of SGA+ figure 1.

Sources: SGA+ is Perugachi-Diaz et al. 2024 (arXiv 2401.17789), SGA is Yang et al. 2020 (arXiv 2006.04240).
"""

import math

import torch
from torch import Tensor

from ..rounding import Rounding
from .relaxations import ATANH_EPS, EPS


def log_weights(distance: Tensor, rounding: Rounding) -> Tensor:
    """Unnormalized log-probability of a class at `distance` from v.

    Two classes: f(u) for a distance u in [0, 1] (SGA eq. 6 for atanh, SGA+ section 3.2 for the others). Three
    classes: n·log f(r·d) for a distance d in [0, 1½] (SGA+ section 3.3). `relaxations.relax` uses closed
    forms of their differences.
    """
    method, a, n = rounding.method, rounding.a, rounding.n
    if method in ("ste", "noise"):
        raise ValueError(f"method {method!r} has no class weights")
    if method in ("atanh", "danneal"):
        return -torch.atanh(distance.clamp(-1 + ATANH_EPS, 1 - ATANH_EPS))
    scale_d = rounding.r / 1.5 if method == "ssl" and rounding.classes == 3 else rounding.r
    q = (distance * scale_d).clamp(EPS, 1 - EPS)
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
