"""Read what decoding needs of a model file, without torch: integer networks, probability tables, synthesis weights.

Everything is checked as docs/format.md demands before it is used: id, sizes, and the bounds of the integer networks.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ..coding.range_coder import Tables
from ..models.catalogue import ModelError, read_info
from ..networks.architecture import Architecture, architecture_from_dict
from ..settings import LEVELS, anchor_weights, level_lambda
from .layers import BIAS_MAX, OUTPUT_MAX, SLOPE_BITS, Layer, check_layer, layer_of
from .prior import Gains, Group, Prior, fingerprint
from .shapes import synthesis_shapes

Tensors = dict[str, np.ndarray]
_PREFIXES = ("exact.", "tables.", "trunk.g_s.", "trunk.log_gain_d")  # of the tensors that decoding needs
_METADATA = ("anchors", "architecture", "levels", "slopes")
_INTEGERS, _FLOATS = ("I16", "I32", "I64", "U8"), ("F16", "F32")  # types of tensors, as safetensors names them
_SCALES = 64  # tables of y
_MAX_THRESHOLD = 2**32 - 1
_MAX_LOG_GAIN = 32.0
_UNITS = 1e-12, 1e12  # limits of natural units of channels
_CONTEXT_SLOPE = 655
_SIDES = (1, 3, 5)


@dataclass(frozen=True)
class DecoderModel:
    """A model at one level.

    Attributes
    ----------
    name, id : str
    level, lmbda : int, float
    architecture : Architecture
    prior : Prior
    y_tables, z_tables : Tables
        Of y by table index, of z by channel.
    synthesis : dict of str to ndarray
        The tensors of g_s, float32, by their names there.
    gain : ndarray (M,) float32
        What ŷ is multiplied by before g_s.
    """

    name: str
    id: str
    level: int
    lmbda: float
    architecture: Architecture
    prior: Prior
    y_tables: Tables
    z_tables: Tables
    synthesis: Tensors
    gain: np.ndarray


@dataclass(frozen=True)
class ModelFile:
    """The content of a model file, checked, for all levels."""

    path: Path
    metadata: dict[str, Any]
    architecture: Architecture
    tensors: Tensors
    layers: tuple[Layer, ...]
    groups: tuple[Group, ...]

    @property
    def id(self) -> str:
        return str(self.metadata["id"])

    @property
    def levels(self) -> int:
        return int(self.metadata["levels"])

    def at(self, level: int) -> DecoderModel:
        """One of its levels.

        Raises
        ------
        ModelError
            When its probability tables are damaged.
        """
        anchors = [float(a) for a in self.metadata["anchors"]]
        lmbda = level_lambda(level, (anchors[0], anchors[-1]), self.levels)
        (i, j, t), log_gain = anchor_weights(lmbda, anchors), self.tensors["trunk.log_gain_d"].astype(np.float64)
        try:
            (y_tables,) = _tables(self.tensors, "tables.y", 0, 1)
            (z_tables,) = _tables(self.tensors, "tables.z", level, level + 1)
        except (ValueError, LookupError) as error:
            raise ModelError(f"{self.path}: damaged model file ({error})") from None
        return DecoderModel(
            name=str(self.metadata["name"]),
            id=self.id,
            level=level,
            lmbda=lmbda,
            architecture=self.architecture,
            prior=self.prior(level),
            y_tables=y_tables,
            z_tables=z_tables,
            synthesis={name: value.astype(np.float32) for name, value in _synthesis(self.tensors).items()},
            gain=np.exp((1 - t) * log_gain[i] + t * log_gain[j]).astype(np.float32),
        )

    def prior(self, level: int) -> Prior:
        """The integer networks of a level."""
        names = ["z_scale", "z_offset", "scale", "mean", *(["context"] if self.groups else [])]
        return Prior(
            layers=self.layers,
            thresholds=self.tensors["exact.thresholds"],
            kind=self.architecture.scale,
            groups=self.groups,
            gains=Gains(**{name: self.tensors[f"exact.gains.{name}"][level].astype(np.int64) for name in names}),
        )


def read_model(path: Path) -> ModelFile:
    """Read a model file, prove that its integer networks cannot overflow, and test this machine's arithmetic.

    Raises
    ------
    ModelError
        When it is not a model file, is damaged, or the integer networks do not give the recorded result.
    """
    metadata = read_info(path).metadata
    try:
        with safe_open(str(path), framework="np") as file:
            tensors = {key: _tensor(file, key) for key in sorted(file.keys()) if key.startswith(_PREFIXES)}
        model = _assembled(path, tensors, metadata)
        expected = str(metadata["fingerprint"])
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path}: damaged model file ({reason})") from None
    if fingerprint(model.prior(0)) != expected:
        raise ModelError(
            f"{path}: integer arithmetic does not give the recorded result on this machine; "
            "its files cannot be decoded here (is the model file damaged?)"
        )
    return model


def _tensor(file: Any, key: str) -> np.ndarray:
    if file.get_slice(key).get_dtype() not in (_FLOATS if key.startswith("trunk.") else _INTEGERS):
        raise ValueError(f"{key}: not of a type that the format allows")
    value: np.ndarray = file.get_tensor(key)
    return value


def _assembled(path: Path, tensors: Tensors, metadata: dict[str, Any]) -> ModelFile:
    if _id(tensors, metadata) != metadata["id"]:
        raise ValueError("the id is not that of the tensors")
    architecture = architecture_from_dict(metadata["architecture"])
    slopes = [int(slope) for slope in metadata["slopes"]]
    if len(slopes) != 3 or slopes[2] != 0 or not all(0 < slope < 2**SLOPE_BITS for slope in slopes[:2]):
        raise ValueError("the slopes of the hyper-decoder are out of range")
    layers = tuple(_layer(tensors, f"exact.{i}", slopes[i], transposed=i < 2) for i in range(3))
    model = ModelFile(path, metadata, architecture, tensors, layers, _groups(tensors, architecture))
    sizes = [layer.inputs for layer in layers], [layer.outputs for layer in layers]
    if sizes[0] != [architecture.N, *sizes[1][:2]] or sizes[1][2] != 2 * architecture.M:
        raise ValueError("the layers of the hyper-decoder do not fit together")
    if [layer.side for layer in layers[:2]] != [5, 5] or layers[2].side > 3:
        raise ValueError("a kernel of the hyper-decoder is wrong")
    _check_context(model)
    _check_gains(model)
    thresholds = tensors["exact.thresholds"]
    if thresholds.dtype != np.int64 or thresholds.shape != (_SCALES - 1,) or (thresholds[1:] <= thresholds[:-1]).any():
        raise ValueError(f"the scale thresholds are not {_SCALES - 1} ascending int64 numbers")
    if max(-int(thresholds[0]), int(thresholds[-1])) > _MAX_THRESHOLD:
        raise ValueError("the scale thresholds are out of range")
    for key, value in tensors.items():
        if value.dtype.kind not in "iu" and not np.isfinite(value).all():
            raise ValueError(f"{key}: values that are not finite")
    shape, log_gain = (len(metadata["anchors"]), architecture.M), tensors["trunk.log_gain_d"]
    if log_gain.shape != shape or np.abs(log_gain).max() > _MAX_LOG_GAIN:
        raise ValueError("the gains are not those of the architecture, or out of range")
    if {name: value.shape for name, value in _synthesis(tensors).items()} != synthesis_shapes(architecture):
        raise ValueError("the tensors are not those of the architecture")
    unit = tensors.get("trunk.g_s.unit", np.ones(1))
    if not _UNITS[0] <= float(unit.min()) <= float(unit.max()) <= _UNITS[1]:
        raise ValueError("the natural unit of a channel is out of range")
    lengths = tensors["tables.y.lengths"], tensors["tables.z.lengths"]
    if lengths[0].shape != (1, _SCALES) or lengths[1].shape != (model.levels, architecture.N):
        raise ValueError("the number of probability tables is wrong")
    return model


def _synthesis(tensors: Tensors) -> Tensors:
    prefix = "trunk.g_s."
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def _id(tensors: Tensors, metadata: dict[str, Any]) -> str:
    needed = {key: metadata[key] for key in _METADATA}
    digest = hashlib.sha256(json.dumps(needed, sort_keys=True, separators=(",", ":")).encode())
    for key, value in tensors.items():  # in the order of the names
        digest.update(f"{key}:torch.{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()[:8]


def _layer(tensors: Tensors, prefix: str, slope: int, transposed: bool = False) -> Layer:
    weight, bias, shift = (tensors[f"{prefix}.{name}"] for name in ("weight", "bias", "shift"))
    layer = layer_of(weight, bias, shift, slope, transposed)
    if layer.side not in _SIDES:
        raise ValueError(f"{prefix}: a kernel of side {layer.side}")
    return layer


def _groups(tensors: Tensors, architecture: Architecture) -> tuple[Group, ...]:
    context = architecture.context
    groups, done = [], 0
    for k, size in enumerate(() if context is None else context.groups):
        layers = {
            name: _layer(tensors, f"exact.context.{k}.{name}", 0 if name == "out" else _CONTEXT_SLOPE)
            for name in ("past", "near", "mix", "out")
            if f"exact.context.{k}.{name}.weight" in tensors
        }
        past, near = layers.get("past"), layers.get("near")
        groups.append(Group(slice(done, done + size), past, near, layers["mix"], layers["out"]))
        done += size
    return tuple(groups)


def _check_context(model: ModelFile) -> None:
    """Check that the layers of the context model fit together, and its biases.

    Raises
    ------
    ValueError
    """
    context, features = model.architecture.context, model.layers[-1].inputs
    for k, group in enumerate(model.groups):
        assert context is not None
        size = context.groups[k]
        expected = {"mix": (1, features, context.hidden), "out": (1, context.hidden, 2 * size)}
        if k:
            expected["past"] = (3, group.channels.start, context.past)
        if context.checkerboard:
            expected["near"] = (context.kernel(k), size, context.near)
        expected["mix"] = (1, features + sum(expected[n][2] for n in ("past", "near") if n in expected), context.hidden)
        layers = {name: getattr(group, name) for name in ("past", "near", "mix", "out")}
        found = {name: (v.side, v.inputs, v.outputs) for name, v in layers.items() if v is not None}
        if found != expected:
            raise ValueError(f"the layers of group {k} of the context model are not those of the architecture")
        if group.mix.bias.any():
            raise ValueError("context model: a bias of mix is not 0")
        check_layer(group.mix, BIAS_MAX)
    if context is not None:
        biases = model.tensors["exact.gains.context"]
        shape = model.levels, len(model.groups), 2 if context.checkerboard else 1, context.hidden
        _check_range("context", biases, shape, -BIAS_MAX, BIAS_MAX)


def _check_gains(model: ModelFile) -> None:
    levels, N, M = model.levels, model.architecture.N, model.architecture.M
    if not 1 <= levels <= LEVELS:
        raise ValueError("the number of levels is out of range")
    bounds = {
        "z_scale": (N, 0, OUTPUT_MAX),
        "z_offset": (N, -(2**52), 2**52),
        "scale": (M, -OUTPUT_MAX, OUTPUT_MAX),
        "mean": (M, 0, OUTPUT_MAX),
    }
    for name, (channels, low, high) in bounds.items():
        _check_range(name, model.tensors[f"exact.gains.{name}"], (levels, channels), low, high)


def _check_range(name: str, value: np.ndarray, shape: tuple[int, ...], low: int, high: int) -> None:
    if value.dtype not in (np.int32, np.int64) or value.shape != shape:
        raise ValueError(f"integer gain {name}: not {shape} int32 or int64 numbers")
    if int(value.min()) < low or int(value.max()) > high:
        raise ValueError(f"integer gain {name}: out of range")


def _tables(tensors: Tensors, prefix: str, first: int, end: int) -> list[Tables]:
    """The tables of rows `first` to `end` − 1, checked."""
    frequencies, lengths, minimum = (tensors[f"{prefix}.{name}"] for name in ("frequencies", "lengths", "minimum"))
    if lengths.dtype != np.int32 or minimum.dtype != np.int32:
        raise ValueError("the sizes of the probability tables are not int32 numbers")
    ends = np.concatenate([[0], np.cumsum(lengths.astype(np.int64).sum(1))])
    if lengths.shape != minimum.shape or lengths.min() < 2 or frequencies.shape != (ends[-1],):
        raise ValueError("the sizes of the probability tables are inconsistent")
    found = []
    for row in range(first, end):
        starts = np.concatenate([[0], np.cumsum(lengths[row].astype(np.int64))])
        tables = Tables(frequencies[ends[row] : ends[row + 1]], starts, minimum[row].astype(np.int64))
        tables.check()
        found.append(tables)
    return found
