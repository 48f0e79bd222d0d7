"""Import CompressAI's published checkpoints, mbt2018-mean and bmshj2018-hyperprior, as models of one level.

    .pth, .pth.tar ─► state_dict ─► current parameter names ─► GainedHyperprior (unit gains, one λ) ─► export

Nothing in the file is executed: torch reads it with `weights_only=True`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ..density import FactorizedDensity
from ..hyperprior import GainedHyperprior
from ..networks.architecture import Architecture, architecture_from_dict
from .catalogue import ANCHOR_RANGE, SUFFIX, ModelError, user_folder
from .export import export
from .file import write_model

LAMBDAS = (0.0018, 0.0035, 0.0067, 0.0130, 0.0250, 0.0483, 0.0932, 0.1800)  # of CompressAI's qualities 1 to 8
DEFAULT_LAMBDA = 0.0067

_PARTS = ("g_a", "h_a", "h_s", "g_s")
_WRAPPERS = ("state_dict", "model_state_dict", "model", "network", "net")
_PREFIXES = ("module.", "network.", "net.", "model.")
_OLD_DENSITY = re.compile(r"_?(matrix|matrices|bias|biases|factor|factors)\.?(\d)$")
_DENSITY = {"matrix": "matrices", "bias": "biases", "factor": "factors"}
_RECOMPUTED = re.compile(r"(_reparam\.|_quantized_cdf$|_offset$|_cdf_length$|target$|likelihood_lower_bound)")
_SAMPLES = 64


def import_compressai(path: Path, name: str, lmbda: float | None = None) -> Path:
    """Convert a CompressAI checkpoint to a model in the user's folder.

    Parameters
    ----------
    name : str
        Name of the model, and stem of its file, which is replaced if it exists.
    lmbda : float, optional
        λ of the training loss λ·255²·MSE + bpp, which checkpoints do not record. Default: that of the quality in the
        file's name, as in mbt2018-mean-3-….pth.tar, or else 0.0067.

    Returns
    -------
    Path
        The model file.

    Raises
    ------
    ModelError
        When it is not a checkpoint of mbt2018-mean or bmshj2018-hyperprior.
    """
    weights = _read(path)
    try:
        gained = _hyperprior(weights, lmbda or lambda_of_name(path.name) or DEFAULT_LAMBDA)
    except (KeyError, ValueError, RuntimeError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path}: not a checkpoint of mbt2018-mean or bmshj2018-hyperprior ({reason})") from None
    record = {
        "licence": "that of the imported checkpoint",
        "training": {"imported": path.name, "lambda": gained.anchors[0]},
    }
    try:
        model = export(gained, name, record, density_samples(gained.density), levels=1, as_is=True)
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from None
    target = user_folder() / f"{name}{SUFFIX}"
    write_model(model, target)
    return target


def lambda_of_name(name: str) -> float | None:
    """The λ of the quality 1..8 in a name like `mbt2018-mean-3-5f51b5f1.pth.tar` or `bmshj_q3.pth`, if there is one."""
    stem = re.sub(r"(\.pth|\.tar|\.pt)+$", "", name)
    found = re.search(r"(?:^|[-_ .])(?:q|quality)?[-_]?([1-8])(?:[-_][0-9a-f]{8})?$", stem)
    return LAMBDAS[int(found[1]) - 1] if found else None


# --------------------------------------------------------------------------------------------------- the weights


def _read(path: Path) -> dict[str, Tensor]:
    """The parameters of a checkpoint, float32, under the names of the current CompressAI."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from None
    except Exception:  # torch, pickle and zipfile each have their own, with pages of advice
        raise ModelError(f"{path}: not a checkpoint, or damaged") from None
    for _ in range(2):
        for key in _WRAPPERS:
            if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
                content = content[key]
    if not isinstance(content, Mapping):
        raise ModelError(f"{path}: not a checkpoint of weights")
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if not all(map(_is_stored, tensors.values())):
        raise ModelError(f"{path}: not a checkpoint, or damaged")
    weights = {_current_name(k): v.float() for k, v in tensors.items()}
    if not all(bool(torch.isfinite(v).all()) for v in weights.values()):
        raise ModelError(f"{path}: some of its weights are not numbers")
    return weights


def _is_stored(v: Tensor) -> bool:
    """Whether the file holds each element, so that a copy takes no more memory than the file."""
    plain = v.layout == torch.strided and v.device.type == "cpu" and not v.is_quantized
    return plain and v.untyped_storage().nbytes() >= v.numel() * v.element_size()


def _current_name(key: str) -> str:
    """Name of a parameter in the current CompressAI, without prefixes of wrappers such as DataParallel."""
    while key.startswith(_PREFIXES):
        key = key.split(".", 1)[1]
    if key.startswith("entropy_bottleneck."):
        old = _OLD_DENSITY.match(key.removeprefix("entropy_bottleneck."))
        if old:
            return f"entropy_bottleneck.{_DENSITY.get(old[1], old[1])}.{old[2]}"
    return key


def _hyperprior(weights: dict[str, Tensor], lmbda: float) -> GainedHyperprior:
    """The hyperprior with these weights, with unit gains, and the medians of the checkpoint.

    Raises
    ------
    ValueError
        When names or shapes are not those of the two architectures.
    """
    if not ANCHOR_RANGE[0] <= lmbda <= ANCHOR_RANGE[1]:
        raise ValueError(f"λ must be from {ANCHOR_RANGE[0]:g} to {ANCHOR_RANGE[1]:g}, not {lmbda}")
    foreign = {key.split(".")[0] for key in weights} - {*_PARTS, "entropy_bottleneck", "gaussian_conditional"}
    if foreign:
        raise ValueError(f"it has {', '.join(sorted(foreign))}")
    N, M = weights["g_a.0.weight"].shape[0], weights["g_s.0.weight"].shape[0]
    outputs = weights["h_s.4.weight"].shape[0]
    if outputs not in (M, 2 * M):
        raise ValueError(f"h_s has {outputs} outputs, not {M} or {2 * M}")
    family = "mshyper" if outputs == 2 * M else "bmshj"
    architecture = architecture_from_dict(asdict(Architecture(family, N=N, M=M, scale="linear")))
    with torch.random.fork_rng(devices=[]):  # the initial weights are random
        gained = GainedHyperprior(architecture, (lmbda,))
    gained.requires_grad_(False)

    state: dict[str, Tensor] = {}
    for key, value in weights.items():
        part, _, rest = key.partition(".")
        if _RECOMPUTED.search(key) or part == "gaussian_conditional":
            continue
        if part == "entropy_bottleneck":
            if rest == "quantiles":
                state["density.median"] = value[:, 0, 1]
            else:
                state[f"density.{rest}"] = value
        elif family == "bmshj" and part == "h_a":  # its first layer is the absolute value
            index, _, kind = rest.partition(".")
            state[f"h_a.{int(index) + 1}.{kind}"] = value
        elif family == "bmshj" and key.startswith("h_s.4."):
            state[key] = torch.cat([value, torch.zeros_like(value)])
        else:
            state[key] = value
    missing, unexpected = gained.load_state_dict(state, strict=False)
    own = ("log_gain_", "y_unit")
    missing = [key for key in missing if not key.startswith(own) and not _RECOMPUTED.search(key)]
    if missing or unexpected:
        raise ValueError(f"unexpected or missing: {', '.join([*unexpected, *missing][:3])}")
    return gained


# --------------------------------------------------------------------------------------------- calibration


@torch.no_grad()
def density_samples(density: FactorizedDensity) -> list[Tensor]:
    """ẑ (1, N, 4, 4) sampled from the density, to calibrate h_s without photographs.

    In every other sample the 16 positions have the same value, as in smooth regions, where activations are largest.
    """
    generator = torch.Generator().manual_seed(0)
    channels = len(density.median)
    p = torch.rand(channels, 1, _SAMPLES * 16, generator=generator).clamp(1e-5, 1 - 1e-5)
    flat = p.view(channels, _SAMPLES, 16)[:, ::2]
    flat.copy_(flat[:, :, :1].clone().expand_as(flat))
    values = density.inverse_logits_cumulative(torch.log(p / (1 - p)))
    median = density.median.view(-1, 1, 1)
    z_hat = torch.round(values - median) + median
    return list(z_hat.view(channels, _SAMPLES, 1, 4, 4).permute(1, 2, 0, 3, 4))
