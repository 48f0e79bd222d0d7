"""Seeded structured mutations of containers and model files, with right checksums and ids as in crafted ones."""

from __future__ import annotations

import contextlib
import io
import json
import random
import struct
import zlib
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save

from sgacodec.models.file import encoder_digest, model_id

# -------------------------------------------------------------------------------------------------------- containers

NUMBERS = (0, 1, 2, 63, 64, 65, 127, 128, 255, 256, 2**14, 2**16, 2**28, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**35 - 1)
TAGS = (0x01, 0x02, 0x7F, 0x80, 0x81, 0x82, 0x83, 0x84, 0xFF)


def varint(value: int, extra: int = 0) -> bytes:
    """LEB128 of any length; `extra` bytes more than needed."""
    out = []
    while value > 0x7F or extra > 0:
        extra -= value <= 0x7F
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def split(data: bytes) -> dict[str, Any]:
    """The fields of a valid file."""
    at = 9

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = data[at], at + 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    fields: dict[str, Any] = {"head": data[:4], "id": data[4:8], "flags": data[8], "width": number()}
    fields |= {"height": number(), "z_length": number(), "padding": 0}
    fields["z"], at = data[at : at + fields["z_length"]], at + fields["z_length"]
    fields["sections"] = []
    while fields["flags"] & 0x80:
        tag, at = data[at], at + 1
        if tag == 0:
            break
        length = number()
        fields["sections"].append((tag, length, data[at : at + length]))
        at += length
    fields["y"] = data[at:-4]
    return fields


def joined(fields: dict[str, Any]) -> bytes:
    """The file of fields, which need not be consistent; the checksum is right."""
    out = fields["head"] + fields["id"] + bytes([fields["flags"]])
    for name in ("width", "height", "z_length"):
        out += varint(fields[name], fields["padding"] if name == "height" else 0)
    out += fields["z"]
    if fields["flags"] & 0x80:
        out += b"".join(bytes([tag]) + varint(length) + content for tag, length, content in fields["sections"]) + b"\0"
    return sealed(out + fields["y"])


def sealed(body: bytes) -> bytes:
    return body + zlib.crc32(body).to_bytes(4, "little")


def mutated_bytes(chance: random.Random, data: bytes) -> bytes:
    """Bytes changed, removed, repeated, put in, or cut off."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 6, 40))):
        at, size = chance.randrange(len(changed) + 1), chance.choice((1, 1, 2, 4, 30))
        kind = chance.randrange(6)
        if kind <= 1 and at < len(changed):
            changed[at] = chance.choice((0, 0xFF, changed[at] ^ 1 << chance.randrange(8), chance.randrange(256)))
        elif kind == 2:
            del changed[at : at + size]
        elif kind == 3:
            changed[at:at] = chance.randbytes(size)
        elif kind == 4:
            changed[at:at] = changed[at : at + size]
        elif kind == 5 and chance.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def png(chance: random.Random, width: int, height: int) -> bytes:
    """An alpha section of a mode, size and length that may be wrong."""
    width, height = min(max(1, width), 300), min(max(1, height), 300)
    size = chance.choice(((width, height), (width, height), (height, width), (1, 1), (width + 1, height), (3000, 3000)))
    stream = io.BytesIO()
    mode = chance.choice(("1", "L", "L", "LA", "RGB", "P", "I;16"))
    options = {"transparency": 0} if mode in ("L", "P") and chance.random() < 0.3 else {}
    Image.new(mode, size).save(stream, "PNG", **options)
    data = stream.getvalue()
    return mutated_bytes(chance, data) if chance.random() < 0.5 else data


def mutated_file(chance: random.Random, data: bytes) -> bytes:
    """A valid file with one to three fields changed, or some of its bytes; most have a right checksum."""
    if chance.random() < 0.2:
        changed = mutated_bytes(chance, data)
        return changed if chance.random() < 0.3 else sealed(changed[:-4])
    fields = split(data)
    for _ in range(chance.choice((1, 1, 2, 3))):
        name = chance.choice(("flags", "width", "height", "z_length", "padding", "z", "y", "y", "sections", "sections"))
        if name == "flags":
            fields["flags"] = chance.choice((fields["flags"] ^ 1 << chance.randrange(8), chance.randrange(256)))
        elif name in ("width", "height", "z_length"):
            near = max(0, fields[name] + chance.choice((-64, -1, -1, -1, 1, 1, 1, 63, 64)))
            fields[name] = chance.choice((chance.choice(NUMBERS), near))
        elif name == "padding":
            fields[name] = chance.choice((1, 2, 4, 9))
        elif name in ("z", "y"):
            other = fields["y" if name == "z" else "z"]
            zeros = bytes(chance.choice((1, 4, 8, 1000)))
            changed = mutated_bytes(chance, fields[name])
            fields[name] = chance.choice((b"", zeros, fields[name] + zeros, fields[name][:-1], other, changed, changed))
            if name == "z" and chance.random() < 0.9:
                fields["z_length"] = len(fields["z"])
        else:
            fields["flags"] |= 0x80
            content = chance.choice(
                (b"", b"<x/>", chance.randbytes(20), png(chance, fields["width"], fields["height"]))
            )
            length = chance.choice((len(content), len(content), len(content), chance.choice(NUMBERS)))
            fields["sections"].append((chance.choice(TAGS), length, content))
            if chance.random() < 0.9:
                fields["sections"].sort(key=lambda section: section[0])
            if chance.random() < 0.2:
                fields["sections"] *= 2
            if chance.random() < 0.2:
                fields["sections"] = fields["sections"][:-1]
    return joined(fields)


# ------------------------------------------------------------------------------------------------------------ models

VALUES = (None, True, "", "lite", "mshyper", "exp", "linear", -1, 0, 1, 2, 3, 16, 64, 65, 1024, 1025, 2**31, 2**63, 0.5)
VALUES += (
    1e-300,
    1e300,
    float("nan"),
    float("inf"),
    [],
    {},
    [0],
    [1e-3, 1e-2],
    [[]],
    {"groups": [1]},
    "\x1b[31m",
    "x" * 999,
)
DTYPES = (torch.float16, torch.float32, torch.float64, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool)


def mutated_tensor(chance: random.Random, value: torch.Tensor) -> torch.Tensor:
    """Values, type or shape changed."""
    value = value.clone()
    kind = chance.randrange(10)
    if kind == 0:
        return value.to(chance.choice(DTYPES))
    if kind == 1 and value.dim():
        return value.narrow(chance.randrange(value.dim()), 0, 1)
    if kind == 2 and value.dim():
        axis = chance.randrange(value.dim())
        return torch.cat([value, value.narrow(axis, 0, 1)], axis)
    if kind == 3:
        return chance.choice((value[None], value.flatten(), value.mT if value.dim() > 1 else value, value[:0]))
    if kind == 4:
        return torch.zeros_like(value)
    if value.is_floating_point():
        top = torch.finfo(value.dtype).max
        new = chance.choice((float("nan"), float("inf"), -float("inf"), top, -top, 0.0, 1.0, 1e-30, 50.0))
    elif value.dtype == torch.bool:
        new = True
    else:
        info = torch.iinfo(value.dtype)
        new = chance.choice((info.min, info.max, 0, 1, 2, info.max // 2, info.max // 255))
    flat = value.view(-1)
    if kind == 5:
        return value.fill_(new)
    for _ in range(chance.choice((1, 2, 9)) if len(flat) else 0):
        flat[chance.randrange(len(flat))] = new
    return value


def mutated_json(chance: random.Random, value: Any) -> Any:
    """One leaf or part of a JSON value replaced, removed or repeated."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(sorted(value))
        if chance.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: mutated_json(chance, value[key])}
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        changed = mutated_json(chance, value[at])
        return chance.choice((value[:at], value * 2, [*value[:at], changed, *value[at + 1 :]]))
    if isinstance(value, (int, float)) and chance.random() < 0.5:
        return value + chance.choice((-1, 1, 2))
    return chance.choice(VALUES)


def mutated_model(chance: random.Random, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> bytes:
    """A model file with tensors, metadata or bytes changed; most have the right id and digest."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        key, kind = chance.choice(sorted(tensors)), chance.random()
        if kind < 0.45:
            tensors[key] = mutated_tensor(chance, tensors[key])
        elif kind < 0.5:
            del tensors[key]
        elif kind < 0.55:
            tensors[chance.choice(sorted(tensors)) + chance.choice(("", "x"))] = tensors[key]
        else:
            metadata = mutated_json(chance, metadata)
    if chance.random() < 0.9:
        with contextlib.suppress(Exception):  # no id can be computed of this metadata
            metadata |= {"id": model_id(tensors, metadata), "encoder": encoder_digest(tensors, metadata)}
    text = json.dumps(metadata)
    data = save({k: v.contiguous().clone() for k, v in sorted(tensors.items())}, metadata={"sgacodec": text})
    if chance.random() < 0.15:
        (size,) = struct.unpack("<Q", data[:8])
        header = mutated_bytes(chance, data[8 : 8 + size])
        data = struct.pack("<Q", chance.choice((size, len(header), len(header)))) + header + data[8 + size :]
    return mutated_bytes(chance, data) if chance.random() < 0.05 else data
