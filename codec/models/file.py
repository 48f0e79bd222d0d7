"""A model as one safetensors file: float16 trunk, gains, integer hyper-decoder, integer tables, metadata.

h_s is stored as integers only. Its float version, which refinement needs for gradients, is derived from them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from ..atomic import write_whole
from ..coding.context_layers import CONTEXT_SLOPE, IntegerContextGroup, check_context, check_context_biases
from ..coding.hyper_decoder import IntegerGains, IntegerHyperDecoder, check, check_gains
from ..coding.integer_layers import IntegerLayer
from ..coding.quantize import dequantize_hyper_decoder
from ..coding.quantize_context import dequantize_context
from ..coding.range_coder import Tables
from ..coding.tables import SCALES
from ..hyperprior import GainedHyperprior
from ..networks.architecture import Architecture, architecture_from_dict
from ..networks.blank import Uninitialized
from ..settings import LEVELS
from .catalogue import ModelError, read_info
from .level import Model

_GAINS = tuple(f.name for f in fields(IntegerGains))
_MAX_BITS = 64  # fractional bits of an activation
_DECODING = ("exact.", "tables.", "trunk.g_s.", "trunk.log_gain_d")  # prefixes of the tensors that decoding needs
_DECODING_METADATA = ("anchors", "architecture", "levels", "slopes")
_ENCODING_METADATA = ("bits", "context_bits")
_INTEGERS, _FLOATS = (torch.int16, torch.int32, torch.int64, torch.uint8), (torch.float16, torch.float32)
_MAX_LOG_GAIN = 32.0  # of float parameters; their exponentials and products stay far from the limits of float32
_UNITS = 1e-12, 1e12  # limits of natural units of channels, which are divided by


def tensors_of(model: Model) -> dict[str, Tensor]:
    """All tensors of a model file, as docs/format.md lists them."""
    tensors: dict[str, Tensor] = {}
    for key, value in model.gained.state_dict().items():
        if not _from_integers(key):
            half = key.startswith(("g_a.", "h_a.", "g_s.")) and torch.equal(value.half().float(), value)
            tensors["trunk." + key] = value.half() if half else value.float()
    layers = {f"exact.{i}": layer for i, layer in enumerate(model.h_s.layers)}
    for k, group in enumerate(model.context):
        layers |= {f"exact.context.{k}.{name}": layer for name, layer in group.layers().items()}
    for prefix, layer in layers.items():
        tensors[f"{prefix}.weight"] = layer.weight
        tensors[f"{prefix}.bias"] = layer.bias
        tensors[f"{prefix}.shift"] = layer.shift.to(torch.uint8)
    tensors["exact.thresholds"] = model.h_s.thresholds
    gains = [level.tensors() for level in model.gains]
    for key in gains[0]:
        tensors[f"exact.gains.{key}"] = torch.stack([level[key] for level in gains])  # (levels, …)
    tensors.update(_table_tensors("tables.y", [model.y_tables]))
    tensors.update(_table_tensors("tables.z", list(model.z_tables)))
    return {key: value.contiguous() for key, value in sorted(tensors.items())}


def _from_integers(key: str) -> bool:
    """Whether a float parameter has the values of the integer networks, so that it is not stored."""
    return key.startswith("h_s.") or (key.startswith("context.") and not key.endswith(".bias_by_anchor"))


def _table_tensors(prefix: str, tables: list[Tables]) -> dict[str, Tensor]:
    return {
        f"{prefix}.frequencies": torch.from_numpy(np.concatenate([t.frequencies for t in tables])),
        f"{prefix}.lengths": torch.from_numpy(np.stack([np.diff(t.starts) for t in tables]).astype(np.int32)),
        f"{prefix}.minimum": torch.from_numpy(np.stack([t.minimum for t in tables]).astype(np.int32)),
    }


def model_id(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str:
    """The first 8 hexadecimal digits of SHA-256 over all that decoding depends on, as docs/format.md defines it."""
    needed = {key: metadata[key] for key in _DECODING_METADATA}
    return _digest({key: value for key, value in tensors.items() if key.startswith(_DECODING)}, needed)[:8]


def encoder_digest(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str:
    """SHA-256, in hexadecimal digits, over what only the encoder depends on, as docs/format.md defines it."""
    needed = {key: metadata.get(key, []) for key in _ENCODING_METADATA}
    return _digest({key: value for key, value in tensors.items() if not key.startswith(_DECODING)}, needed)


def _digest(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode())
    for key in sorted(tensors):
        value = tensors[key]
        digest.update(f"{key}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(value.contiguous().numpy().data)
    return digest.hexdigest()


def write_model(model: Model, path: Path) -> None:
    """Write a model file, atomically; missing folders are made."""
    data = to_safetensors(tensors_of(model), metadata={"sgacodec": json.dumps(model.metadata)})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data)


# -------------------------------------------------------------------------------------------------------- reading


def read_model(path: Path) -> Model:
    """Read a model file, and prove that its integer networks cannot overflow.

    Raises
    ------
    ModelError
        When it is not a model file, is damaged, or a bound does not hold.
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
    if model_id(tensors, metadata) != metadata["id"]:
        raise ValueError("the id is not that of the tensors")
    if "encoder" in metadata and encoder_digest(tensors, metadata) != metadata["encoder"]:
        raise ValueError("the digest of the encoder is not that of its tensors")
    for key, value in tensors.items():
        if value.dtype not in (_FLOATS if key.startswith("trunk.") else _INTEGERS):
            raise ValueError(f"{key}: not of a type that the format allows")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{key}: values that are not finite")
    architecture = architecture_from_dict(metadata["architecture"])
    gained = _read_trunk(tensors, architecture, metadata["anchors"])
    h_s = _read_hyper_decoder(tensors, gained, metadata["slopes"])
    bits = _read_bits(metadata, "bits", len(h_s.layers))
    dequantize_hyper_decoder(h_s, bits, gained.h_s)
    context = _read_context(gained, h_s, tensors)
    context_bits = _read_bits(metadata, "context_bits", len(context)) if context else ()
    if gained.context is not None:
        dequantize_context(gained.context, context, bits[-1], context_bits)
    gained.requires_grad_(False)
    names = [name for name in _GAINS if name != "context" or context]
    rows = zip(*(tensors[f"exact.gains.{name}"] for name in names), strict=True)
    gains = tuple(IntegerGains(**dict(zip(names, row, strict=True))) for row in rows)
    (y_tables,) = _read_tables(tensors, "tables.y")
    z_tables = tuple(_read_tables(tensors, "tables.z"))
    if not 1 <= len(gains) <= LEVELS or len(gains) != metadata["levels"] or len(z_tables) != len(gains):
        raise ValueError("the number of levels is not the same everywhere")
    for level_gains in gains:
        check_gains(level_gains, architecture.N, architecture.M)
        check_context_biases(context, level_gains)
    if len(y_tables) != SCALES or any(len(tables) != architecture.N for tables in z_tables):
        raise ValueError("the number of probability tables is wrong")
    return Model(
        name=str(metadata["name"]),
        id=str(metadata["id"]),
        gained=gained,
        h_s=h_s,
        gains=gains,
        context=context,
        y_tables=y_tables,
        z_tables=z_tables,
        bits=bits,
        context_bits=context_bits,
        fingerprint=str(metadata["fingerprint"]),
        metadata=metadata,
    )


def _read_trunk(tensors: dict[str, Tensor], architecture: Architecture, anchors: list[float]) -> GainedHyperprior:
    """All float parameters but those that `_from_integers` gives, which are not initialized."""
    with Uninitialized():
        gained = GainedHyperprior(architecture, tuple(float(a) for a in anchors))
    prefix = "trunk."
    state = {key[len(prefix) :]: value.float() for key, value in tensors.items() if key.startswith(prefix)}
    missing, unexpected = gained.load_state_dict(state, strict=False)
    if unexpected or any(not _from_integers(key) for key in missing):
        raise ValueError("the tensors are not those of the architecture")
    for gains in (gained.log_gain_y, gained.log_gain_z, gained.log_gain_d):
        if float(gains.detach().abs().max()) > _MAX_LOG_GAIN:
            raise ValueError("a gain is out of range")
    units = [gained.y_unit, *(value for key, value in gained.named_buffers() if key.endswith(".unit"))]
    if any(not _UNITS[0] <= float(unit.min()) <= float(unit.max()) <= _UNITS[1] for unit in units):
        raise ValueError("the natural unit of a channel is out of range")
    return gained


def _read_layer(tensors: dict[str, Tensor], prefix: str, like: nn.Module, slope: int) -> IntegerLayer:
    """An integer layer of the shape of the float layer `like`: a (transposed) convolution, or a linear one as 1×1."""
    weight, bias, shift = (tensors[f"{prefix}.{name}"] for name in ("weight", "bias", "shift"))
    float_weight: Any = like.weight
    if weight.shape != (*float_weight.shape, 1, 1)[:4] or shift.dtype != torch.uint8:
        raise ValueError(f"{prefix}: not a layer of the architecture")
    up = like if isinstance(like, nn.ConvTranspose2d) else None
    return IntegerLayer(
        transposed=up is not None,
        stride=up.stride[0] if up else 1,
        padding=int(up.padding[0]) if up else weight.shape[-1] // 2,
        output_padding=int(up.output_padding[0]) if up else 0,
        weight=weight,
        bias=bias,
        shift=shift.to(torch.int64),
        slope=slope,
    )


def _read_hyper_decoder(tensors: dict[str, Tensor], gained: GainedHyperprior, slopes: list[int]) -> IntegerHyperDecoder:
    """The integer hyper-decoder, its bounds proved."""
    convolutions = [m for m in gained.h_s if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    if len(slopes) != len(convolutions) or slopes[-1] != 0 or not all(slopes[:-1]):
        raise ValueError("the slopes of the hyper-decoder are out of range")
    layers = tuple(_read_layer(tensors, f"exact.{i}", conv, int(slopes[i])) for i, conv in enumerate(convolutions))
    h_s = IntegerHyperDecoder(layers=layers, thresholds=tensors["exact.thresholds"], kind=gained.architecture.scale)
    check(h_s)
    return h_s


def _read_context(
    gained: GainedHyperprior, h_s: IntegerHyperDecoder, tensors: dict[str, Tensor]
) -> tuple[IntegerContextGroup, ...]:
    """The integer context model, its bounds proved; empty where the architecture has none."""
    groups = []
    for k, group in enumerate([] if gained.context is None else gained.context.members):
        layers = {
            name: _read_layer(tensors, f"exact.context.{k}.{name}", like, 0 if name == "out" else CONTEXT_SLOPE)
            for name, like in group.named_children()
        }
        groups.append(
            IntegerContextGroup(past=layers.get("past"), near=layers.get("near"), mix=layers["mix"], out=layers["out"])
        )
    if groups:
        check_context(tuple(groups), h_s, gained.architecture.M)
    return tuple(groups)


def _read_bits(metadata: dict[str, Any], key: str, count: int) -> tuple[int, ...]:
    bits = tuple(int(b) for b in metadata[key])
    if len(bits) != count or any(abs(b) > _MAX_BITS for b in bits):
        raise ValueError(f"{key}: not {count} numbers of fractional bits")
    return bits


def _read_tables(tensors: dict[str, Tensor], prefix: str) -> list[Tables]:
    frequencies = tensors[f"{prefix}.frequencies"].numpy()
    if frequencies.ndim != 1 or any(tensors[f"{prefix}.{name}"].dim() != 2 for name in ("lengths", "minimum")):
        raise ValueError("the probability tables have a wrong shape")
    sizes = tensors[f"{prefix}.lengths"], tensors[f"{prefix}.minimum"]
    if any(v.dtype != torch.int32 for v in sizes):  # the magnitude of −2⁶³ is negative
        raise ValueError("the sizes of the probability tables are not int32 numbers")
    lengths, minimum = (v.numpy().astype(np.int64) for v in sizes)
    tables, position = [], 0
    for length, first in zip(lengths, minimum, strict=True):
        starts = np.concatenate([[0], np.cumsum(length)])
        tables.append(Tables(frequencies[position : position + starts[-1]], starts, first))
        tables[-1].check()
        position += int(starts[-1])
    if position != len(frequencies):
        raise ValueError("the sizes of the probability tables are inconsistent")
    return tables
