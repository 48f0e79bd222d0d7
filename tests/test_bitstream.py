"""The .sga container: what is written is read, and whatever is not valid is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgacodec import bitstream
from sgacodec.bitstream import FormatError, SgaFile, UnsupportedVersionError, read, read_stream, write

FORMAT_MD = Path(__file__).parents[1] / "docs" / "format.md"

PLAIN = SgaFile(b"\x1b\xad\xb0\x02", 20, 768, 512, z=bytes(range(40)), y=bytes(range(200)))
FULL = dataclasses.replace(PLAIN, grey=True, alpha=b"alpha", icc=b"icc", exif=b"II*\0", xmp=b"<x/>")

FILES = st.builds(
    SgaFile,
    model_id=st.binary(min_size=4, max_size=4),
    level=st.integers(0, 63),
    width=st.integers(1, 2**32 - 1),
    height=st.integers(1, 2**32 - 1),
    z=st.binary(max_size=300),
    y=st.binary(max_size=300),
    grey=st.booleans(),
    alpha=st.none() | st.binary(min_size=1, max_size=300),
    icc=st.none() | st.binary(min_size=1, max_size=300),
    exif=st.none() | st.binary(min_size=1),
    xmp=st.none() | st.binary(min_size=1),
)


def sealed(body: bytes) -> bytes:
    """Append the right checksum, so that the parser and not the checksum is tested."""
    return body + zlib.crc32(body).to_bytes(4, "little")


def parse(data: bytes) -> SgaFile | None:
    """Read a file, or return None when it is refused in the proper way: any other exception passes."""
    try:
        return read(data)
    except FormatError:
        return None


def with_sections(listing: bytes) -> bytes:
    """A valid 1 x 1 file around a hand-made section list."""
    return sealed(b"SGA\x01MODL\x80\x01\x01\x00" + listing)


def examples() -> list[tuple[bytes, SgaFile]]:
    """The worked examples of docs/format.md: bytes, and the fields that they mean."""
    pairs = re.findall(r"```hex\n(.*?)```\s+```json\n(.*?)```", FORMAT_MD.read_text("utf-8"), re.S)
    found = []
    for listing, fields in pairs:
        data = bytes.fromhex(re.sub(r"#.*", "", listing))
        values = json.loads(fields)
        for key in values.keys() - {"level", "width", "height", "grey"}:
            values[key] = bytes.fromhex(values[key])
        found.append((data, SgaFile(**values)))
    return found


def test_worked_examples_of_the_specification() -> None:
    """The worked examples of docs/format.md are what the code reads and writes."""
    assert len(examples()) == 2
    for data, file in examples():
        assert write(file) == data
        assert read(data) == file


@given(FILES)
def test_round_trip(file: SgaFile) -> None:
    """Every field is read as it was written."""
    assert read(write(file), max_pixels=2**64) == file


@given(st.binary(max_size=120))
def test_arbitrary_bytes(data: bytes) -> None:
    """Any bytes are parsed or refused as FormatError, and what is parsed is written as the same bytes."""
    for attempt in (data, sealed(b"SGA\x01" + data)):
        file = parse(attempt)
        if file is not None:
            assert read(write(file)) == file
            assert write(file) == attempt or attempt[8] & 0x80  # unknown ancillary sections are dropped


@given(FILES, st.data())
def test_damage_behind_a_right_checksum(file: SgaFile, draw: st.DataObject) -> None:
    """Guards against crashes by crafted files, whose checksum is right."""
    body = bytearray(write(file)[:-4])
    body[draw.draw(st.integers(0, len(body) - 1))] = draw.draw(st.integers(0, 255))
    damaged = parse(sealed(bytes(body)))
    assert damaged is None or parse(write(damaged)) == damaged


@pytest.mark.parametrize("file", [PLAIN, FULL], ids=["plain", "full"])
def test_every_changed_byte_and_every_truncation(file: SgaFile) -> None:
    """Guards against damage that is not noticed."""
    data = write(file)
    for i in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            with pytest.raises(FormatError):
                read(data[:i] + bytes([data[i] ^ flip]) + data[i + 1 :])
        with pytest.raises(FormatError):
            read(data[:i])
    with pytest.raises(FormatError):
        read(data + b"\0")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a .sga file"),
        (b"SG", "not a .sga file"),
        (b"SGA", "truncated"),
        (b"SGA\x01MODL", "truncated"),
        (write(PLAIN)[:100], "damaged or truncated"),
    ],
)
def test_the_message_names_the_trouble(data: bytes, message: str) -> None:
    """The message tells a foreign file from a truncated one."""
    with pytest.raises(FormatError, match=message):
        read(data)


def test_newer_version() -> None:
    """Guards against reading a newer version as a damaged file, or as version 1."""
    for data in (sealed(b"SGA\x02" + bytes(40)), b"SGA\x02"):
        with pytest.raises(UnsupportedVersionError, match="version 2"):
            read(data)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (b"\x80\x80\x80\x80\x80\x80\x80\x80\x10\x01\x00", "width is larger than 32 bits"),  # 2**60
        (b"\x80\x80\x80\x80\x10\x01\x00", "width is larger than 32 bits"),  # 2**32
        (b"\x01\xff\xff\xff\xff\x7f\x00", "height is larger than 32 bits"),
        (b"\x80\x94\xeb\xdc\x03" * 2 + b"\x00", "1000000000 x 1000000000 pixels.*--max-pixels"),
        (b"\x01\x01\xff\xff\xff\xff\x0f", "z claims 4294967295 bytes, but only 0 are left"),
        (b"\x01\x01\x80\x80\x80\x80\x80\x80\x80\x80\x10", "length of z is larger than 32 bits"),
        (b"\x01\x81\x00\x00", "height is not in its shortest form"),
        (b"\x01\x80\x80\x00\x00", "height is not in its shortest form"),
        (b"\x00\x01\x00", "no pixels"),
        (b"\x01\x00\x00", "no pixels"),
        (b"\x01\x01\x80", "ends inside length of z"),
    ],
)
def test_absurd_numbers(fields: bytes, message: str) -> None:
    """Guards against memory that is allocated for lengths which the file only claims."""
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=message):
            read(sealed(b"SGA\x01MODL\x00" + fields))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_pixel_limit_can_be_raised_and_lowered() -> None:
    """The limit holds exactly, and can be changed."""
    large = dataclasses.replace(PLAIN, width=2**14, height=2**14 + 1)
    with pytest.raises(FormatError, match="--max-pixels"):
        read(write(large))
    assert read(write(large), max_pixels=2**29) == large
    assert read(write(PLAIN), max_pixels=768 * 512) == PLAIN
    with pytest.raises(FormatError, match="--max-pixels"):
        read(write(PLAIN), max_pixels=768 * 512 - 1)


def test_unknown_ancillary_section_is_skipped() -> None:
    """Guards against refusing files of later releases for an ancillary section."""
    file = read(with_sections(b"\x82\x02II\x90\x03new\xff\x01!\x00rest"))
    assert (file.exif, file.y) == (b"II", b"rest")


@pytest.mark.parametrize(
    ("listing", "message"),
    [
        (b"\x02\x03new\x00", "unknown critical section 0x02"),
        (b"\x00", "list is empty"),
        (b"", "has no end"),
        (b"\x82\x02II", "has no end"),
        (b"\x82\x00\x00", "section 0x82 is empty"),
        (b"\x82\x02II\x82\x02MM\x00", "repeated or out of order"),
        (b"\x82\x02II\x81\x02MM\x00", "repeated or out of order"),
        (b"\x82\x70II\x00", "exif claims 112 bytes, but only 3 are left"),
        (b"\x82", "ends inside length of exif"),
    ],
)
def test_malformed_sections(listing: bytes, message: str) -> None:
    """Guards against section lists that two readers would understand differently."""
    with pytest.raises(FormatError, match=message):
        read(with_sections(listing))


@pytest.mark.parametrize(
    "change",
    [
        {"model_id": b"abc"},
        {"level": 64},
        {"level": -1},
        {"width": 0},
        {"height": 2**32},
        {"exif": b""},
    ],
)
def test_write_refuses_what_read_would_refuse(change: dict) -> None:
    """Guards against writing files that cannot be read."""
    with pytest.raises(FormatError):
        write(dataclasses.replace(PLAIN, **change))


def test_the_limit_of_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against bytes that are read, where a file with the same bytes is refused."""
    file = SgaFile(b"1234", 0, 1, 1, b"", b"x" * (4 * 65**2 - 16))
    longer = sealed(write(file)[:-4] + b"x")
    assert read(longer).y == file.y + b"x"
    monkeypatch.setattr(bitstream, "_METADATA_BYTES", 0)
    assert len(write(file)) == 4 * 65**2
    assert read(read_stream(io.BytesIO(write(file)))) == file
    for refuse in (read, lambda data: read_stream(io.BytesIO(data))):
        with pytest.raises(FormatError, match="bytes"):
            refuse(longer)


def test_overhead() -> None:
    """The container takes at most 20 bytes, as the README promises."""
    file = dataclasses.replace(PLAIN, width=16383, height=16383, z=bytes(20_000), grey=True)
    assert len(write(file)) - len(file.z) - len(file.y) <= 20
    assert len(write(PLAIN)) - len(PLAIN.z) - len(PLAIN.y) == 18


def test_sections_account_for_the_whole_file() -> None:
    """The lengths that `info` shows add up to the file."""
    assert bitstream.sections(PLAIN) == {"z": 40, "y": 200}
    assert list(bitstream.sections(FULL)) == ["z", "alpha", "icc", "exif", "xmp", "y"]
    assert sum(bitstream.sections(FULL).values()) == len(write(FULL)) - 18 - 4 * 2 - 1


def test_import_needs_neither_torch_nor_numpy() -> None:
    """`sgacodec info` starts at once, and works without torch."""
    code = "import sys, sgacodec.bitstream; print({'torch', 'numpy'} & sys.modules.keys() or 'none')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "none"
