"""A model as one safetensors file: float16 trunk, gains, integer hyper-decoder, integer tables, metadata.

h_s is stored as integers only. Its float version, which refinement needs for gradients, is derived from them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from ..atomic import atomic_file
from ..coding.context_layers import CONTEXT_SLOPE, IntegerContextGroup, check_context, check_context_biases
from ..coding.hyper_decoder import IntegerGains, IntegerHyperDecoder, check, check_gains
from ..coding.integer_layers import IntegerLayer
from ..coding.quantise import dequantise_hyper_decoder
from ..coding.quantise_context import dequantise_context
from ..coding.range_coder import Tables
from ..coding.tables import SCALES
from ..hyperprior import GainedHyperprior
from ..networks.architecture import Architecture, architecture_from_dict
from ..settings import LEVELS
from .catalogue import ModelError, read_info
from .level import Model

_GAINS = tuple(f.name for f in fields(IntegerGains) if f.name != "context")
_DECODING = ("exact.", "tables.", "trunk.g_s.", "trunk.log_gain_d")  # prefixes of the tensors that decoding needs
_DECODING_METADATA = ("anchors", "architecture", "levels", "slopes")


def tensors_of(model: Model) -> dict[str, Tensor]:
    """All tensors of a model file, as docs/format.md lists them."""
    tensors: dict[str, Tensor] = {}
    for key, value in model.gained.state_dict().items():
        if not _from_integers(key):
            half = key.startswith(("g_a.", "h_a.", "g_s.")) and torch.equal(value.half().float(), value)
            tensors["trunk." + key] = value.half() if half else value.float()
    for i, layer in enumerate(model.h_s.layers):
        tensors[f"exact.{i}.weight"] = layer.weight
        tensors[f"exact.{i}.bias"] = layer.bias
        tensors[f"exact.{i}.shift"] = layer.shift.to(torch.uint8)
    tensors["exact.thresholds"] = model.h_s.thresholds
    for key in _GAINS:
        tensors[f"exact.gains.{key}"] = torch.stack([getattr(g, key) for g in model.gains])  # (levels, C) int64
    for k, group in enumerate(model.context):
        for name, layer in group.layers().items():
            tensors[f"exact.context.{k}.{name}.weight"] = layer.weight
            tensors[f"exact.context.{k}.{name}.bias"] = layer.bias
            tensors[f"exact.context.{k}.{name}.shift"] = layer.shift.to(torch.uint8)
    if model.context:  # (levels, groups, halves, hidden)
        biases = [g.context for g in model.gains if g.context is not None]
        tensors["exact.gains.context"] = torch.stack(biases).to(torch.int32)
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
    digest = hashlib.sha256(json.dumps(needed, sort_keys=True, separators=(",", ":")).encode())
    for key in sorted(tensors):
        if key.startswith(_DECODING):
            value = tensors[key]
            digest.update(f"{key}:{value.dtype}:{tuple(value.shape)};".encode())
            digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]


def write_model(model: Model, path: Path) -> None:
    """Write a model file, atomically; missing folders are made."""
    data = to_safetensors(tensors_of(model), metadata={"sgacodec": json.dumps(model.metadata)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(data)


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
    architecture = architecture_from_dict(metadata["architecture"])
    gained = _read_trunk(tensors, architecture, metadata["anchors"])
    bits = tuple(int(b) for b in metadata["bits"])
    h_s = _read_hyper_decoder(tensors, gained, metadata["slopes"])
    if len(bits) != len(h_s.layers):
        raise ValueError("the integer hyper-decoder is not that of the architecture")
    dequantise_hyper_decoder(h_s, bits, gained.h_s)
    context, context_bits = _read_context(gained, h_s, tensors, metadata)
    if gained.context is not None:
        dequantise_context(gained.context, context, bits[-1], context_bits)
    gained.requires_grad_(False)
    rows = zip(*(tensors[f"exact.gains.{key}"] for key in _GAINS), strict=True)
    gains = tuple(IntegerGains(**dict(zip(_GAINS, row, strict=True))) for row in rows)
    if context:
        biases = tensors["exact.gains.context"].to(torch.int64)
        gains = tuple(replace(g, context=bias) for g, bias in zip(gains, biases, strict=True))
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
    """All float parameters but those of h_s, which stay random."""
    with torch.random.fork_rng(devices=[]):  # the initial weights are random
        gained = GainedHyperprior(architecture, tuple(float(a) for a in anchors))
    prefix = "trunk."
    state = {key[len(prefix) :]: value.float() for key, value in tensors.items() if key.startswith(prefix)}
    missing, unexpected = gained.load_state_dict(state, strict=False)
    if unexpected or any(not _from_integers(key) for key in missing):
        raise ValueError("the tensors are not those of the architecture")
    return gained


def _read_hyper_decoder(tensors: dict[str, Tensor], gained: GainedHyperprior, slopes: list[int]) -> IntegerHyperDecoder:
    """The integer hyper-decoder, its bounds proved; strides and paddings are those of the float h_s."""
    convolutions = [m for m in gained.h_s if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    layers = tuple(
        IntegerLayer(
            transposed=isinstance(conv, nn.ConvTranspose2d),
            stride=conv.stride[0],
            padding=int(conv.padding[0]),
            output_padding=int(conv.output_padding[0]),
            weight=tensors[f"exact.{i}.weight"],
            bias=tensors[f"exact.{i}.bias"],
            shift=tensors[f"exact.{i}.shift"].to(torch.int64),
            slope=int(slopes[i]),
        )
        for i, conv in enumerate(convolutions)
    )
    h_s = IntegerHyperDecoder(layers=layers, thresholds=tensors["exact.thresholds"], kind=gained.architecture.scale)
    check(h_s)
    if any(layer.weight.shape != conv.weight.shape for layer, conv in zip(layers, convolutions, strict=True)):
        raise ValueError("the integer hyper-decoder is not that of the architecture")
    return h_s


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
        raise ValueError("the sizes of the probability tables are inconsistent")
    return tables


def _read_context(
    gained: GainedHyperprior, h_s: IntegerHyperDecoder, tensors: dict[str, Tensor], metadata: dict[str, Any]
) -> tuple[tuple[IntegerContextGroup, ...], tuple[int, ...]]:
    """The integer context model, of the shapes of the float one, and the bits of its hidden activations."""
    if gained.context is None:
        return (), ()
    groups = []
    for k, group in enumerate(gained.context.members):
        layers: dict[str, IntegerLayer] = {}
        for name, module in group.named_children():
            prefix = f"exact.context.{k}.{name}"
            weight = tensors[f"{prefix}.weight"]
            shape: Any = module.weight.shape
            expected = (*shape, 1, 1)[:4]  # `mix` and `out` are linear
            if weight.shape != expected:
                raise ValueError("the integer context model is not that of the architecture")
            layers[name] = IntegerLayer(
                transposed=False,
                stride=1,
                padding=weight.shape[-1] // 2,
                output_padding=0,
                weight=weight,
                bias=tensors[f"{prefix}.bias"],
                shift=tensors[f"{prefix}.shift"].to(torch.int64),
                slope=0 if name == "out" else CONTEXT_SLOPE,
            )
        groups.append(
            IntegerContextGroup(past=layers.get("past"), near=layers.get("near"), mix=layers["mix"], out=layers["out"])
        )
    context = tuple(groups)
    check_context(context, h_s, gained.architecture.M)
    bits = tuple(int(b) for b in metadata["context_bits"])
    if len(bits) != len(context):
        raise ValueError("the integer context model is not that of the architecture")
    return context, bits
