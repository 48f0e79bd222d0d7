"""The .sga container, version 1: header, sections, checksum. docs/format.md is the specification.

    magic "SGA" │ version │ model id │ flags │ width │ height │ len z │ z │ [sections] │ y │ CRC-32
        3       │    1    │    4     │   1   │ varint │ varint │ varint │   │            │   │   4

Standard library only, so that `sgacodec info` needs neither torch nor weights. The reader checks every length against
the number of bytes left before it uses it.
"""

from __future__ import annotations

import io
import os
import stat
import zlib
from dataclasses import dataclass
from typing import BinaryIO

MAGIC = b"SGA"
VERSION = 1
DEFAULT_MAX_PIXELS = 2**28
MAX_LEVEL = 63

_GREY = 0x40
_EXTRA = 0x80
_ANCILLARY = 0x80  # in a tag: a reader that does not know the section may skip it
_SECTIONS = {"alpha": 0x01, "icc": 0x81, "exif": 0x82, "xmp": 0x83}  # in ascending order of tags
_NAMES = {tag: name for name, tag in _SECTIONS.items()}
_FIXED = len(MAGIC) + 1 + 4 + 1  # bytes before the first varint
_MINIMUM = _FIXED + 3 + 4  # the smallest possible file: three one-byte varints, empty payloads
_VARINT_BYTES = 5
HEAD_BYTES = _FIXED + 2 * _VARINT_BYTES  # that hold width and height
_VARINT_END = 2**32
_MOST_BYTES = 2**31  # of any file
_METADATA_BYTES = 2**26  # of the smallest image
_PIXEL_BYTES = 4  # more for each pixel


class FormatError(ValueError):
    """Not a valid .sga file, or a damaged one. The message is one line."""


class UnsupportedVersionError(FormatError):
    """A .sga file of a format version that this release cannot read."""


@dataclass(frozen=True)
class SgaFile:
    """The content of a .sga file, with entropy-coded payloads as bytes.

    Attributes
    ----------
    model_id : bytes
        Four bytes that identify the model.
    level : int
        Rate level of that model, 0 to 63.
    width, height : int
        Size of the image in pixels, each 1 to 2³² - 1.
    z, y : bytes
        Entropy-coded hyper-latents and latents.
    grey : bool
        The image has one colour channel.
    alpha, icc, exif, xmp : bytes, optional
        Sections beside the colour; None where the file has none. A section is never empty.
    """

    model_id: bytes
    level: int
    width: int
    height: int
    z: bytes
    y: bytes
    grey: bool = False
    alpha: bytes | None = None
    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None


def write(file: SgaFile) -> bytes:
    """Return the bytes of a .sga file.

    Raises
    ------
    FormatError
        If a field cannot be represented.
    """
    if len(file.model_id) != 4:
        raise FormatError(f"the model id must have 4 bytes, not {len(file.model_id)}")
    if not 0 <= file.level <= MAX_LEVEL:
        raise FormatError(f"the level must be 0 to {MAX_LEVEL}, not {file.level}")
    if not (1 <= file.width < _VARINT_END and 1 <= file.height < _VARINT_END):
        raise FormatError(f"an image of {file.width} x {file.height} pixels cannot be stored")
    extra = _extra_sections(file)
    flags = file.level | (_GREY if file.grey else 0) | (_EXTRA if extra else 0)
    out = bytearray(MAGIC)
    out.append(VERSION)
    out += file.model_id
    out.append(flags)
    out += _varint(file.width) + _varint(file.height)
    out += _varint(len(file.z)) + file.z
    for name, data in extra.items():
        if not data:
            raise FormatError(f"the {name} section is empty: leave it out")
        out.append(_SECTIONS[name])
        out += _varint(len(data)) + data
    if extra:
        out.append(0)
    out += file.y
    if len(out) + 4 > _longest(file.width, file.height):
        raise FormatError(f"{len(out) + 4} bytes are too many for {file.width} x {file.height} pixels")
    out += zlib.crc32(out).to_bytes(4, "little")
    return bytes(out)


def read(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> SgaFile:
    """Parse a .sga file. Unknown ancillary sections are skipped.

    Parameters
    ----------
    data : bytes
        The whole file, and nothing after it.
    max_pixels : int
        The largest width times height to accept; it bounds the memory that decoding needs.

    Raises
    ------
    UnsupportedVersionError
        If the format version is not 1.
    FormatError
        If the file is anything but a valid, undamaged .sga file.
    """
    _check_intact(data)
    body = memoryview(data)[:-4]
    flags = data[_FIXED - 1]
    width, at = _read_varint(body, _FIXED, "width")
    height, at = _read_varint(body, at, "height")
    _check_pixels(width, height, max_pixels)
    if len(data) > _longest(width, height):
        raise FormatError(f"{len(data)} bytes are too many for {width} x {height} pixels")
    z, at = _read_block(body, at, "z")
    found, at = _read_sections(body, at) if flags & _EXTRA else ({}, at)
    return SgaFile(
        model_id=data[4:8],
        level=flags & MAX_LEVEL,
        width=width,
        height=height,
        z=bytes(z),
        y=bytes(body[at:]),
        grey=bool(flags & _GREY),
        **found,
    )


def read_stream(stream: BinaryIO, max_pixels: int = DEFAULT_MAX_PIXELS) -> bytes:
    """Read a whole file for `read`; of what is not a .sga file of this version, only the first bytes.

    The input need not end: the header tells how long a file can be. Of an image with more than `max_pixels`, no more
    is read than of a small one.

    Raises
    ------
    FormatError
        If there are more bytes than a file of this image can have.
    """
    head = stream.read(HEAD_BYTES)
    if not head.startswith(MAGIC + bytes([VERSION])):
        return head
    width, height = stated_size(head)
    limit = _longest(width, height) if width * height <= max_pixels else _longest(0, 0)
    data = io.BytesIO()
    data.write(head)
    if _bytes_left(stream) <= limit - len(head):
        while data.tell() <= limit and (piece := stream.read(2**20)):
            data.write(piece)
        if data.tell() <= limit:
            return data.getvalue()
    _check_pixels(width, height, max_pixels)
    raise FormatError(f"more than {limit} bytes: no image of {width} x {height} pixels takes as many")


def stated_size(head: bytes) -> tuple[int, int]:
    """Width and height that the first HEAD_BYTES of a file state; zeros where they are not those of a .sga file."""
    try:
        width, at = _read_varint(memoryview(head), _FIXED, "width")
        height, _ = _read_varint(memoryview(head), at, "height")
    except FormatError:
        return 0, 0
    return (width, height) if head.startswith(MAGIC + bytes([VERSION])) else (0, 0)


def _longest(width: int, height: int) -> int:
    """The most bytes that a file may have, as docs/format.md states it."""
    return min(_METADATA_BYTES + _PIXEL_BYTES * (width + 64) * (height + 64), _MOST_BYTES)


def _bytes_left(stream: BinaryIO) -> int:
    """Bytes from the position to the end of a regular file; 0 if it is none."""
    try:
        status = os.fstat(stream.fileno())
        return status.st_size - stream.tell() if stat.S_ISREG(status.st_mode) else 0
    except (OSError, AttributeError):  # a file in memory
        return 0


def sections(file: SgaFile) -> dict[str, int]:
    """Return the length in bytes of each payload in the file, by name, in file order."""
    extra = {name: len(data) for name, data in _extra_sections(file).items()}
    return {"z": len(file.z), **extra, "y": len(file.y)}


def _extra_sections(file: SgaFile) -> dict[str, bytes]:
    """Return the optional sections that are present, in ascending order of their tags."""
    every = {"alpha": file.alpha, "icc": file.icc, "exif": file.exif, "xmp": file.xmp}
    return {name: data for name, data in every.items() if data is not None}


def _check_intact(data: bytes) -> None:
    """Raise FormatError unless magic, version and checksum are right."""
    if not data:
        raise FormatError("the file is empty")
    if not data.startswith(MAGIC):
        raise FormatError("not a .sga file")
    if len(data) > 3 and data[3] != VERSION:
        raise UnsupportedVersionError(
            f"format version {data[3]} is not supported: this release reads version {VERSION}"
        )
    if len(data) < _MINIMUM:
        raise FormatError("the file is truncated")
    if zlib.crc32(memoryview(data)[:-4]) != int.from_bytes(data[-4:], "little"):
        raise FormatError("checksum mismatch: the file is damaged or truncated")


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise FormatError(f"the image has no pixels ({width} x {height})")
    if width * height > max_pixels:
        raise FormatError(f"{width} x {height} pixels are more than the limit of {max_pixels} (--max-pixels raises it)")


def _read_sections(body: memoryview, at: int) -> tuple[dict[str, bytes], int]:
    """Read the section list that starts at `at`; return the known ones by name and the position after it."""
    found: dict[str, bytes] = {}
    previous = 0
    while True:
        if at >= len(body):
            raise FormatError("the section list has no end")
        tag, at = body[at], at + 1
        if tag == 0:
            break
        if tag <= previous:
            raise FormatError(f"section {tag:#04x} is repeated or out of order")
        previous = tag
        name = _NAMES.get(tag)
        if name is None and not tag & _ANCILLARY:
            raise FormatError(f"unknown critical section {tag:#04x}: a newer sgacodec may read this file")
        content, at = _read_block(body, at, name or f"{tag:#04x}")
        if not content:
            raise FormatError(f"section {tag:#04x} is empty")
        if name is not None:
            found[name] = bytes(content)
    if previous == 0:
        raise FormatError("the section list is empty")
    return found, at


def _read_block(body: memoryview, at: int, name: str) -> tuple[memoryview, int]:
    """Read a length and that many bytes (not copied); return them and the position after them."""
    length, at = _read_varint(body, at, f"length of {name}")
    if length > len(body) - at:
        raise FormatError(f"{name} claims {length} bytes, but only {len(body) - at} are left")
    return body[at : at + length], at + length


def _varint(value: int) -> bytes:
    """Encode an unsigned integer below 2³² as minimal LEB128: seven bits a byte, the lowest first."""
    if not 0 <= value < _VARINT_END:
        raise FormatError(f"{value} does not fit the format's 32-bit integers")
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(body: memoryview, at: int, name: str) -> tuple[int, int]:
    """Decode the integer at `at`; return it and the position after it."""
    value = 0
    for i, byte in enumerate(body[at : at + _VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            if byte == 0 and i > 0:
                raise FormatError(f"{name} is not in its shortest form")
            if value >= _VARINT_END:
                break
            return value, at + i + 1
    if len(body) - at < _VARINT_BYTES:
        raise FormatError(f"the file ends inside {name}")
    raise FormatError(f"{name} is larger than 32 bits")
