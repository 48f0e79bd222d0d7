"""Colours that PNG and AVIF files state without an ICC profile: gamma, primaries, the code points of ITU-T H.273.

A gamma is converted to the transfer curve of sRGB when the samples are read; primaries become an ICC profile.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from .bounded import BoundedFile

Primaries = tuple[float, ...]  # x and y of white, red, green and blue

_D65 = (0.3127, 0.3290)
_SRGB: Primaries = (*_D65, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
_PRIMARIES: dict[int, Primaries] = {
    4: (0.310, 0.316, 0.67, 0.33, 0.21, 0.71, 0.14, 0.08),  # BT.470 M
    5: (*_D65, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),  # BT.601, 625 lines
    6: (*_D65, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07),  # BT.601, 525 lines
    7: (*_D65, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07),  # SMPTE 240M
    9: (*_D65, 0.708, 0.292, 0.17, 0.797, 0.131, 0.046),  # BT.2020
    11: (0.314, 0.351, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),  # DCI-P3
    12: (*_D65, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),  # Display P3
}
_GAMMAS = {4: 1 / 2.2, 5: 1 / 2.8, 8: 1.0}
_HDR = {16: "PQ", 18: "HLG"}
_SAME_GAMMA = 0.05  # as a part of it; the threshold of libpng
_SAME_CHROMATICITY = 0.003
_HEAD = 2**16  # bytes in which AVIF states its colours

_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_D50 = np.array([0.9642, 1.0, 0.8249])


@dataclass(frozen=True)
class Colours:
    """What a file states about its colours, as far as it differs from sRGB.

    Attributes
    ----------
    gamma : float, optional
        Samples are light to this power.
    primaries : tuple of float, optional
    hdr : str
        Name of a transfer curve that cannot be converted; empty where there is none.
    """

    gamma: float | None = None
    primaries: Primaries | None = None
    hdr: str = ""


def stated_colours(im: Image.Image, stream: BoundedFile) -> Colours:
    """The colours of an opened image that has no ICC profile; those of sRGB for other formats than PNG and AVIF."""
    if im.info.get("icc_profile"):
        return Colours()
    points = _code_points(im.format, stream)
    if points is not None:
        primaries, transfer = points
        if transfer in _HDR:
            return Colours(hdr=_HDR[transfer])
        return Colours(_GAMMAS.get(transfer), _PRIMARIES.get(primaries))
    if im.format != "PNG" or isinstance(im.info.get("srgb"), int):
        return Colours()
    return Colours(_gamma(im.info.get("gamma")), _chromaticity(im.info.get("chromaticity")))


def _gamma(value: Any) -> float | None:
    """The gamma of a gAMA chunk, unless it is about that of sRGB."""
    if not isinstance(value, float) or not 0.01 < value < 100:
        return None
    return None if abs(value * 2.2 - 1) <= _SAME_GAMMA else value


def _chromaticity(value: Any) -> Primaries | None:
    """The primaries of a cHRM chunk, unless they are those of sRGB or enclose no colours."""
    if not isinstance(value, tuple) or len(value) != 8 or max(value) > 1 or min(value[1::2]) == 0:
        return None
    if np.abs(np.subtract(value, _SRGB)).max() <= _SAME_CHROMATICITY:
        return None
    red, green, blue = (np.array(value[at : at + 2]) for at in (2, 4, 6))
    area = np.linalg.det(np.stack([green - red, blue - red]))
    return value if abs(area) > 0.01 else None


def _code_points(format: str | None, stream: BoundedFile) -> tuple[int, int] | None:
    """Primaries and transfer as H.273 numbers them: of cICP in PNG, of the box colr in AVIF."""
    at = stream.tell()
    try:
        if format == "PNG":
            chunk = _png_chunk(stream, b"cICP")
            return (chunk[0], chunk[1]) if len(chunk) == 4 else None
        if format == "AVIF":
            stream.seek(0)
            _, box, points = stream.read(_HEAD).partition(b"colrnclx")
            return struct.unpack_from(">HH", points) if box and len(points) >= 4 else None
        return None
    finally:
        stream.seek(at)


def _png_chunk(stream: BoundedFile, wanted: bytes) -> bytes:
    """The content of a chunk before the pixels; empty if there is none."""
    stream.seek(8)
    while len(head := stream.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        if name == wanted and length < 2**10:
            return stream.read(length)
        if name == b"IDAT":
            break
        stream.seek(stream.tell() + length + 4)
    return b""


def srgb_table(gamma: float) -> np.ndarray:
    """The 8-bit samples of sRGB for all 16-bit samples that are light to the power `gamma`: (65536,) uint8."""
    light = np.linspace(0, 1, 2**16) ** (1 / gamma)
    curve = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.rint(255 * curve).astype(np.uint8)


def matrix_profile(primaries: Primaries) -> bytes:
    """An ICC profile (version 4) of RGB with these primaries and the transfer curve of sRGB."""
    white, *colours = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in zip(*[iter(primaries)] * 2, strict=True))
    matrix = np.stack(colours, axis=1)
    matrix = matrix * np.linalg.solve(matrix, white)  # the primaries sum to white
    adapt = np.linalg.solve(_BRADFORD, np.diag(_BRADFORD @ _D50 / (_BRADFORD @ white)) @ _BRADFORD)
    columns = (adapt @ matrix).T
    curve = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    tags = {
        b"desc": b"mluc" + struct.pack(">IIIHHII", 0, 1, 12, 0x656E, 0x5553, 6, 28) + "RGB".encode("utf-16-be"),
        b"cprt": b"mluc" + struct.pack(">IIIHHII", 0, 1, 12, 0x656E, 0x5553, 6, 28) + "CC0".encode("utf-16-be"),
        b"wtpt": _numbers(b"XYZ ", _D50),
        b"chad": _numbers(b"sf32", adapt.ravel()),
        b"rXYZ": _numbers(b"XYZ ", columns[0]),
        b"gXYZ": _numbers(b"XYZ ", columns[1]),
        b"bXYZ": _numbers(b"XYZ ", columns[2]),
        b"rTRC": b"para" + bytes(4) + struct.pack(">HH", 3, 0) + _numbers(b"", curve)[4:],
    }
    start = 128 + 4 + 12 * (len(tags) + 2)
    body, entries = b"", b""
    for name, content in tags.items():
        entry = struct.pack(">II", start + len(body), len(content))
        entries += name + entry
        body += content.ljust(-(-len(content) // 4) * 4, b"\0")
    entries += b"gTRC" + entry + b"bTRC" + entry  # the same curve
    header = struct.pack(">II4s4s4s4s", start + len(body), 0, b"\4\x30\0\0", b"mntr", b"RGB ", b"XYZ ")
    header += struct.pack(">6H", 2000, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + _numbers(b"", _D50)[4:]
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags) + 2) + entries + body


def _numbers(kind: bytes, values: Any) -> bytes:
    """An ICC element of fixed-point numbers; those of impossible colours are clamped."""
    fixed = np.rint(np.clip(np.multiply(values, 65536), -(2**31), 2**31 - 1)).astype(">i4")
    return kind + bytes(4) + fixed.tobytes()
