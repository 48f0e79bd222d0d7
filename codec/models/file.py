"""A model as one safetensors file: trunk in fp16, gains, the integer hyper-decoder, the integer tables, metadata.

    GainedHyperprior ─► quantised h_s, gains of 64 levels, tables ─► Model ─► file ─► Model ─► .at(level) ─► LevelModel

h_s is stored once, as integers; its float version, which only gives gradients, is made of them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from ..atomic import atomic_file
from ..coding.hyper_decoder import SCALE_BITS, IntegerGains, IntegerHyperDecoder, check, check_gains, fingerprint
from ..coding.integer_layers import IntegerLayer
from ..coding.quantise import activation_bits, integer_thresholds, quantise_gains, quantise_hyper_decoder
from ..coding.range_coder import Tables
from ..coding.tables import SCALES, factorized_tables, gaussian_tables
from ..hyperprior import GainedHyperprior, Hyperprior, fold, fold_density, level_lambdas
from ..networks.architecture import architecture_from_dict
from ..networks.lite import BlockTranspose
from ..settings import LEVELS
from .catalogue import FORMAT, ModelError, read_info

_PEAK_MARGIN = 4.0  # room above the largest activation seen when h_s is quantised
_DECODING = ("exact.", "tables.", "trunk.g_s.", "trunk.log_gain_d")  # the tensors that decoding needs …
_DECODING_METADATA = ("anchors", "architecture", "levels", "slopes")  # … and the metadata: the id hashes both


@dataclass(frozen=True)
class LevelModel:
    """A model at one level, ready to run on one device.

    Attributes
    ----------
    plain : Hyperprior
        The folded float networks and density on `device`, gradients off.
    h_s, gains : IntegerHyperDecoder, IntegerGains
        The exact path, on `exact_device`.
    y_tables, z_tables : Tables
        Gaussian tables by index; one table a channel of z.
    """

    plain: Hyperprior
    h_s: IntegerHyperDecoder
    gains: IntegerGains
    y_tables: Tables
    z_tables: Tables
    level: int
    lmbda: float
    device: torch.device
    exact_device: torch.device


@dataclass(frozen=True)
class Model:
    """A model as its file holds it, on the CPU."""

    name: str
    id: str
    gained: GainedHyperprior
    h_s: IntegerHyperDecoder
    gains: tuple[IntegerGains, ...]
    y_tables: Tables
    z_tables: tuple[Tables, ...]
    bits: tuple[int, ...]
    fingerprint: str
    metadata: dict[str, Any]

    @property
    def lambdas(self) -> list[float]:
        return level_lambdas(self.gained.anchors, len(self.gains))

    def level_for(self, lmbda: float) -> int:
        """The level whose λ is nearest in the logarithm."""
        logs = np.log(self.lambdas)
        return int(np.argmin(np.abs(logs - np.log(lmbda))))

    def at(self, level: int, device: torch.device, exact_device: torch.device) -> LevelModel:
        """Fold one level and move it to its devices."""
        lmbda = self.lambdas[level]
        plain = fold(self.gained, lmbda)
        for _, network in plain.networks.items():
            network.to(device).to(memory_format=torch.channels_last).eval()
            for module in network.modules():
                if isinstance(module, BlockTranspose):  # its weight is a matrix, not a kernel
                    module.weight.data = module.weight.data.contiguous()
        plain.density.to(device)
        return LevelModel(
            plain,
            self.h_s.to(exact_device),
            self.gains[level].to(exact_device),
            self.y_tables,
            self.z_tables[level],
            level,
            lmbda,
            device,
            exact_device,
        )

    def exact_on(self, device: torch.device) -> bool:
        """Whether the exact path gives the stored fingerprint on this device."""
        return fingerprint(self.h_s.to(device), self.gains[0].to(device)) == self.fingerprint


def asdict_shallow(gains: IntegerGains) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return gains.z_scale, gains.z_offset, gains.scale, gains.mean


# ------------------------------------------------------------------------------------------------------ export


@torch.no_grad()
def export(
    gained: GainedHyperprior,
    name: str,
    record: dict[str, Any],
    z_samples: list[Tensor],
    levels: int,
    as_is: bool = False,
) -> Model:
    """Make a model of a trained GainedHyperprior (on the CPU): round, quantise, tabulate, fingerprint.

    Parameters
    ----------
    record : dict
        The training record and the licence, for the metadata.
    z_samples : list of Tensor (B, N, h, w)
        Ungained ẑ of photographs, on which the range of h_s's activations is measured.
    levels : int
        64 for a ladder, 1 for a model of a single λ.
    as_is : bool
        Keep the weights in fp32 and the stored medians of z: an imported model shall code as the original does.
    """
    if not as_is:
        for module in (gained.g_a, gained.h_a, gained.g_s):
            for p in module.parameters():
                p.data = p.data.half().float()
        gained.density.update_median()
    peaks = [0.0] * sum(isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) for m in gained.h_s)
    for z in z_samples:
        i, a = 0, z
        for layer in gained.h_s:
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                peaks[i] = max(peaks[i], _PEAK_MARGIN * float(a.abs().max()))
                i += 1
            a = layer(a)
    h_s = quantise_hyper_decoder(gained.h_s, peaks, gained.architecture.scale)
    bits = tuple(activation_bits(p) for p in peaks)
    _dequantise(gained.h_s, h_s, bits)
    gains, z_tables = [], []
    for lmbda in level_lambdas(gained.anchors, levels):
        gains.append(_level_gains(gained, h_s.kind, bits[0], lmbda))
        z_tables.append(factorized_tables(fold_density(gained, lmbda)))
    draft = Model(name, "", gained, h_s, tuple(gains), gaussian_tables(), tuple(z_tables), bits, "", {})
    draft = replace(draft, fingerprint=fingerprint(h_s, gains[0]))
    metadata = {
        "format": FORMAT,
        "name": name,
        "architecture": asdict(gained.architecture),
        "anchors": list(gained.anchors),
        "levels": levels,
        "bits": list(bits),
        "slopes": [layer.slope for layer in h_s.layers],
        "fingerprint": draft.fingerprint,
        **record,
    }
    model_id = _model_id(_tensors(draft), metadata)
    return replace(draft, id=model_id, metadata={**metadata, "id": model_id})


def _level_gains(gained: GainedHyperprior, kind: str, bits: int, lmbda: float) -> IntegerGains:
    g_y, g_z, _ = gained.gains(lmbda)
    gain = g_y * gained.y_unit
    return quantise_gains(kind, bits, g_z, gained.density.median, gain, gain)


def _dequantise(float_h_s: nn.Sequential, h_s: IntegerHyperDecoder, bits: tuple[int, ...]) -> None:
    """Set the float h_s to exactly what its integers stand for."""
    convolutions = [m for m in float_h_s if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    for i, (conv, layer) in enumerate(zip(convolutions, h_s.layers, strict=True)):
        target = float(bits[i + 1]) if i + 1 < len(bits) else float(SCALE_BITS)
        exponent = layer.shift.double() + target - bits[i]
        shape = (1, -1, 1, 1) if layer.transposed else (-1, 1, 1, 1)
        conv.weight.data = (layer.weight.double() * torch.exp2(-exponent).view(shape)).float()
        assert conv.bias is not None
        conv.bias.data = (layer.bias.double() * torch.exp2(-exponent - bits[i])).float()


# -------------------------------------------------------------------------------------------------- the tensors


def _tensors(model: Model) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for key, value in model.gained.state_dict().items():
        if not key.startswith("h_s."):
            half = key.startswith(("g_a.", "h_a.", "g_s.")) and torch.equal(value.half().float(), value)
            tensors["trunk." + key] = value.half() if half else value.float()
    for i, layer in enumerate(model.h_s.layers):
        tensors[f"exact.{i}.weight"] = layer.weight
        tensors[f"exact.{i}.bias"] = layer.bias
        tensors[f"exact.{i}.shift"] = layer.shift.to(torch.uint8)
    tensors["exact.thresholds"] = model.h_s.thresholds
    columns = zip(*(asdict_shallow(g) for g in model.gains), strict=True)
    for key, values in zip(("z_scale", "z_offset", "scale", "mean"), columns, strict=True):
        tensors[f"exact.gains.{key}"] = torch.stack(list(values))  # (levels, channels) int64
    tensors.update(_table_tensors("tables.y", [model.y_tables]))
    tensors.update(_table_tensors("tables.z", list(model.z_tables)))
    return {key: value.contiguous() for key, value in sorted(tensors.items())}


def _table_tensors(prefix: str, tables: list[Tables]) -> dict[str, Tensor]:
    return {
        f"{prefix}.frequencies": torch.from_numpy(np.concatenate([t.frequencies for t in tables])),
        f"{prefix}.lengths": torch.from_numpy(np.stack([np.diff(t.starts) for t in tables]).astype(np.int32)),
        f"{prefix}.minimum": torch.from_numpy(np.stack([t.minimum for t in tables]).astype(np.int32)),
    }


def _read_tables(tensors: dict[str, Tensor], prefix: str) -> list[Tables]:
    frequencies = tensors[f"{prefix}.frequencies"].numpy()
    lengths = tensors[f"{prefix}.lengths"].numpy().astype(np.int64)
    minimum = tensors[f"{prefix}.minimum"].numpy().astype(np.int64)
    tables, position = [], 0
    for length, first in zip(lengths, minimum, strict=True):
        starts = np.concatenate([[0], np.cumsum(length)])
        tables.append(Tables(frequencies[position : position + starts[-1]], starts, first))
        tables[-1].check()
        position += int(starts[-1])
    if position != len(frequencies):
        raise ValueError("probability tables do not fit together")
    return tables


def _model_id(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str:
    """First four bytes, as hex, of SHA-256 over all that decoding needs: see docs/format.md."""
    needed = {key: metadata[key] for key in _DECODING_METADATA}
    digest = hashlib.sha256(json.dumps(needed, sort_keys=True, separators=(",", ":")).encode())
    for key in sorted(tensors):
        if key.startswith(_DECODING):
            value = tensors[key]
            digest.update(f"{key}:{value.dtype}:{tuple(value.shape)};".encode())
            digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]


def write_model(model: Model, path: Path) -> None:
    """Write the file beside `path` and rename it."""
    data = to_safetensors(_tensors(model), metadata={"sgacodec": json.dumps(model.metadata)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(data)


def read_model(path: Path) -> Model:
    """Read a model file and prove its bounds.

    Raises
    ------
    ModelError
        When it is not a model file, is damaged, or a bound of the exact path does not hold.
    """
    metadata = read_info(path).metadata
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        return _assemble(tensors, metadata)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path}: damaged model file ({reason})") from None


def _assemble(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> Model:
    if _model_id(tensors, metadata) != metadata["id"]:
        raise ValueError("the id is not that of the tensors")
    architecture = architecture_from_dict(metadata["architecture"])
    with torch.random.fork_rng(devices=[]):  # building the empty networks draws initial weights
        gained = GainedHyperprior(architecture, tuple(float(a) for a in metadata["anchors"]))
    prefix = "trunk."
    state = {k[len(prefix) :]: v.float() for k, v in tensors.items() if k.startswith(prefix)}
    missing, unexpected = gained.load_state_dict(state, strict=False)
    if unexpected or any(not key.startswith("h_s.") for key in missing):
        raise ValueError("the tensors are not those of the architecture")
    convolutions = [m for m in gained.h_s if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    layers = tuple(
        IntegerLayer(
            isinstance(conv, nn.ConvTranspose2d),
            conv.stride[0],
            int(conv.padding[0]),
            int(conv.output_padding[0]),
            tensors[f"exact.{i}.weight"],
            tensors[f"exact.{i}.bias"],
            tensors[f"exact.{i}.shift"].to(torch.int64),
            int(metadata["slopes"][i]),
        )
        for i, conv in enumerate(convolutions)
    )
    h_s = IntegerHyperDecoder(layers, tensors["exact.thresholds"], architecture.scale)
    check(h_s)
    bits = tuple(int(b) for b in metadata["bits"])
    if len(bits) != len(layers) or any(
        layer.weight.shape != conv.weight.shape for layer, conv in zip(layers, convolutions, strict=True)
    ):
        raise ValueError("the integer hyper-decoder is not that of the architecture")
    _dequantise(gained.h_s, h_s, bits)
    rows = zip(*(tensors[f"exact.gains.{k}"] for k in ("z_scale", "z_offset", "scale", "mean")), strict=True)
    gains = tuple(IntegerGains(*row) for row in rows)
    (y_tables,) = _read_tables(tensors, "tables.y")
    z_tables = tuple(_read_tables(tensors, "tables.z"))
    if not 1 <= len(gains) <= LEVELS or len(gains) != metadata["levels"] or len(z_tables) != len(gains):
        raise ValueError("the number of levels is not the same everywhere")
    for level_gains in gains:
        check_gains(level_gains, architecture.N, architecture.M)
    if len(y_tables) != SCALES or any(len(tables) != architecture.N for tables in z_tables):
        raise ValueError("the number of probability tables is wrong")
    gained.requires_grad_(False)
    return Model(
        str(metadata["name"]),
        str(metadata["id"]),
        gained,
        h_s,
        gains,
        y_tables,
        z_tables,
        bits,
        str(metadata["fingerprint"]),
        metadata,
    )


def verify(path: Path) -> list[str]:
    """Check the id, the fingerprint, every table, threshold and integer gain against a fresh derivation.

    A frequency may differ by a few counts in 2²⁴ (another machine's exp), an integer gain by one.
    """
    try:
        model = read_model(path)
    except ModelError as error:
        return [str(error)]
    problems = []
    if not model.exact_on(torch.device("cpu")):
        problems.append("the exact path does not give the stored fingerprint")
    if int((model.h_s.thresholds - integer_thresholds(model.h_s.kind)).abs().max()) > 1:
        problems.append("the thresholds of the scales are not those of the tables")
    pairs = [("y", model.y_tables, gaussian_tables())]
    for level, lmbda in enumerate(model.lambdas):
        fresh = factorized_tables(fold_density(model.gained, lmbda))
        pairs.append((f"z, level {level}", model.z_tables[level], fresh))
        gains = _level_gains(model.gained, model.h_s.kind, model.bits[0], lmbda)
        for stored, derived in zip(asdict_shallow(model.gains[level]), asdict_shallow(gains), strict=True):
            if stored.shape != derived.shape or int((stored - derived).abs().max()) > 1 + int(derived.abs().max()) // (
                1 << 20
            ):
                problems.append(f"the integer gains of level {level} are not those of the model")
    for label, stored_tables, derived_tables in pairs:
        same = all(
            np.array_equal(getattr(stored_tables, key), getattr(derived_tables, key)) for key in ("starts", "minimum")
        )
        if not same or np.abs(stored_tables.frequencies - derived_tables.frequencies).max() > 64:
            problems.append(f"the probability tables of {label} are not those of the model")
    return problems
