"""Image files, pixels and tensors: what a user puts in must come out, or be told otherwise."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import struct
import subprocess
import sys
import tracemalloc
import types
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from sgacodec import bounded
from sgacodec.alpha import decode_alpha, encode_alpha, fill_transparent
from sgacodec.bitstream import FormatError
from sgacodec.image import read_image
from sgacodec.image_writer import write_image
from sgacodec.metadata import orientation, resolution
from sgacodec.picture import ImageError, Picture, to_grey
from sgacodec.pixels import pad, to_pixels, to_tensor

RNG = np.random.default_rng(7)
H, W = 23, 37
RGB = RNG.integers(0, 256, (H, W, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (H, W), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (H, W), dtype=np.uint8)
GREY_RGB = np.repeat(GREY[..., None], 3, axis=2)

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/">ü</x:xmpmeta>'.encode()


def exif(orientation: int | None = None) -> bytes:
    tags = Image.Exif()
    tags[271] = "Maker"
    tags.get_ifd(34665)[33434] = 0.25  # exposure time
    if orientation:
        tags[274] = orientation
    return tags.tobytes()


def stored(im: Image.Image, format: str = "PNG", **options: object) -> io.BytesIO:
    """The image as a file in memory."""
    stream = io.BytesIO()
    im.save(stream, format=format, **options)
    stream.seek(0)
    return stream


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: tuple[bytes, bytes]) -> io.BytesIO:
    """A PNG file of kinds that Pillow does not write; `rows` are the samples without filter bytes."""
    row = max(1, len(rows) // height)
    filtered = b"".join(b"\0" + rows[i : i + row] for i in range(0, len(rows), row))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(filtered)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in chunks:
        data += struct.pack(">I", len(content)) + kind + content
        data += struct.pack(">I", zlib.crc32(kind + content))
    return io.BytesIO(data)


def tiff(tags: dict[int, list[int]], *planes: bytes, order: str = "<", packed: bool = False) -> io.BytesIO:
    """A TIFF file of kinds that Pillow does not write; `tags` are those that do not follow from `planes`."""
    strips = [zlib.compress(plane) if packed else plane for plane in planes]
    offsets = [8 + sum(len(strip) for strip in strips[:i]) for i in range(len(strips))]
    tags = {256: [W], 257: [H], 259: [8 if packed else 1], 273: offsets, 278: [H], **tags}
    tags[279] = [len(strip) for strip in strips]
    data = b"".join(strips)
    out = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(data)) + data
    directory, values = struct.pack(order + "H", len(tags)), b""
    for tag, numbers in sorted(tags.items()):
        directory += struct.pack(order + "HHI", tag, 4, len(numbers))
        stored_at = len(out) + 2 + 12 * len(tags) + 4 + len(values)
        directory += struct.pack(order + "I", numbers[0] if len(numbers) == 1 else stored_at)
        values += struct.pack(f"{order}{len(numbers)}I", *numbers) if len(numbers) > 1 else b""
    return io.BytesIO(out + directory + bytes(4) + values)


def again(picture: Picture, format: str = "png") -> Picture:
    """Write and read back."""
    stream = io.BytesIO()
    write_image(picture, stream, format)
    stream.seek(0)
    return read_image(stream)


def same(a: Picture, b: Picture) -> bool:
    alphas = (a.alpha is None and b.alpha is None) or np.array_equal(a.alpha, b.alpha)  # type: ignore[arg-type]
    rest = (a.grey, a.icc, a.exif, a.xmp) == (b.grey, b.icc, b.exif, b.xmp)
    return np.array_equal(a.pixels, b.pixels) and alphas and rest


def three(plane: np.ndarray) -> np.ndarray:
    return np.repeat(plane[..., None], 3, axis=2)


# ------------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize("size", [(H, W), (1, 1), (1, 9), (9, 1)])
@pytest.mark.parametrize("format", ["png", "tiff", "webp"])
def test_rgb_and_alpha(size: tuple[int, int], format: str) -> None:
    """RGB and RGBA pixels are read and written without any change."""
    h, w = size
    plain = read_image(stored(Image.fromarray(RGB[:h, :w])))
    assert np.array_equal(plain.pixels, RGB[:h, :w])
    assert (plain.grey, plain.alpha, plain.warnings) == (False, None, ())
    assert same(again(plain, format), plain)
    alpha = np.minimum(ALPHA[:h, :w], 254) | 1  # WebP may clear colours under alpha 0
    clear = read_image(stored(Image.fromarray(np.dstack([RGB[:h, :w], alpha]))))
    assert np.array_equal(clear.alpha, alpha)  # type: ignore[arg-type]
    assert same(again(clear, format), clear)


@pytest.mark.parametrize("format", ["png", "tiff"])
def test_grey_stays_grey(format: str) -> None:
    """Guards against grey pictures that become colour ones."""
    for size in [(H, W), (1, 1), (1, 9)]:
        h, w = size
        plain = read_image(stored(Image.fromarray(GREY[:h, :w])))
        assert plain.grey
        assert np.array_equal(plain.pixels, three(GREY[:h, :w]))
        assert same(again(plain, format), plain)
    clear = read_image(stored(Image.fromarray(np.dstack([GREY, ALPHA]))))
    assert clear.grey
    assert np.array_equal(clear.alpha, ALPHA)  # type: ignore[arg-type]
    assert same(again(clear, format), clear)
    assert Image.open(stored_picture(clear, format)).mode == "LA"


def stored_picture(picture: Picture, format: str) -> io.BytesIO:
    stream = io.BytesIO()
    write_image(picture, stream, format)
    return stream


def test_one_bit() -> None:
    """Guards against inverted or unreadable bilevel images."""
    bits = Image.fromarray(GREY).convert("1")
    for format in ("PNG", "TIFF", "PPM"):
        picture = read_image(stored(bits, format))
        assert picture.grey
        assert np.array_equal(picture.pixels, three(np.array(bits.convert("L"))))


@pytest.mark.parametrize("kind", range(1, 7))
def test_every_kind_of_netpbm(kind: int, tmp_path: Path) -> None:
    """Plain and raw PBM, PGM and PPM give the same pixels, from a file and from a pipe."""
    plane = np.array([[0, 255, 0], [255, 255, 0]], np.uint8)
    samples = plane if kind in (1, 2, 4, 5) else RGB[:2, :3]
    bits = 1 - samples // 255  # 1 is black
    plain = bits if kind == 1 else samples
    rows = np.packbits(bits, axis=1) if kind == 4 else samples
    text = " ".join(map(str, plain.ravel())).encode() + b"\n"
    header = b"P%d\n# comment\n3 2\n" % kind + (b"" if kind in (1, 4) else b"255\n")
    data = header + (text if kind < 4 else rows.tobytes())
    (tmp_path / "a.pnm").write_bytes(data)
    expected = samples if samples.ndim == 3 else three(samples)
    for source in (tmp_path / "a.pnm", io.BytesIO(data)):
        picture = read_image(source)
        assert np.array_equal(picture.pixels, expected)
        assert picture.grey == (samples.ndim == 2)
        assert picture.warnings == ()


@pytest.mark.parametrize("name", ["a.pbm", "a.pfm"])
def test_netpbm_formats_that_are_not_written(name: str, tmp_path: Path) -> None:
    """Guards against a PPM file under a name that says otherwise."""
    with pytest.raises(ImageError, match="cannot write images of type"):
        write_image(Picture(three(GREY)), tmp_path / name)
    assert not (tmp_path / name).exists()


def test_palette_with_and_without_transparency() -> None:
    """Palette colours and their transparency are kept."""
    palette = Image.fromarray(RGB).quantize(16)
    expected = np.array(palette.convert("RGB"))
    for format in ("PNG", "GIF", "BMP"):
        plain = read_image(stored(palette, format))
        assert np.array_equal(plain.pixels, expected)
        assert (plain.grey, plain.alpha) == (False, None)
    indexes = np.array(palette)
    clear = read_image(stored(palette, "GIF", transparency=3))
    assert np.array_equal(clear.alpha, np.where(indexes == 3, 0, 255))  # type: ignore[arg-type]
    levels = bytes(range(0, 160, 10))
    graded = read_image(stored(palette, "PNG", transparency=levels))
    assert np.array_equal(graded.alpha, np.frombuffer(levels, np.uint8)[indexes])  # type: ignore[arg-type]
    assert np.array_equal(graded.pixels, expected)
    assert same(again(graded), graded)


def test_colour_key_transparency() -> None:
    """A transparent colour (tRNS) of a PNG becomes alpha."""
    key = tuple(int(v) for v in RGB[2, 3])
    colour = read_image(stored(Image.fromarray(RGB), transparency=key))
    assert np.array_equal(colour.alpha == 0, (key == RGB).all(axis=2))
    grey = read_image(stored(Image.fromarray(GREY), transparency=int(GREY[2, 3])))
    assert grey.grey
    assert np.array_equal(grey.alpha == 0, GREY[2, 3] == GREY)
    nibbles = png(4, 1, 4, 0, b"\x0f\x3a", (b"tRNS", b"\0\x03"))
    picture = read_image(nibbles)
    assert picture.pixels[0, :, 0].tolist() == [0, 255, 51, 170]
    assert picture.alpha is not None
    assert picture.alpha[0].tolist() == [255, 255, 0, 255]
    wide = read_image(png(2, 1, 16, 2, bytes(6) + b"\1\2\3\4\5\6", (b"tRNS", b"\1\2\3\4\5\6")))
    assert wide.alpha is not None
    assert wide.alpha[0].tolist() == [255, 0]


@pytest.mark.parametrize(("mode", "kind"), [("LAB", "TIFF"), ("YCbCr", "TIFF"), ("YCbCr", "JPEG")])
def test_pillow_only_modes(mode: str, kind: str) -> None:
    """Files in Lab and YCbCr can be read."""
    if (mode, kind) == ("YCbCr", "TIFF") and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("Pillow before 13 opens such a file as one of RGB")
    flat = Image.new("RGB", (8, 8), (200, 100, 50))
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        im = ImageCms.applyTransform(flat, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    else:
        im = flat.convert(mode)
    assert im is not None
    picture = read_image(stored(im, kind))
    assert np.abs(picture.pixels.astype(int) - (200, 100, 50)).max() <= 3


def test_opaque_alpha_is_dropped() -> None:
    """Guards against an alpha section for opaque pictures."""
    assert read_image(stored(Image.fromarray(RGB).convert("RGBA"))).alpha is None


SIXTEEN = RNG.integers(0, 2**16, (H, W, 4), dtype=np.uint16)


@pytest.mark.parametrize(("channels", "colour"), [(1, 0), (2, 4), (3, 2), (4, 6)])
def test_sixteen_bit_png(channels: int, colour: int) -> None:
    """16-bit samples are rounded to v / 257, with a warning."""
    samples = SIXTEEN[..., :channels]
    picture = read_image(png(W, H, 16, colour, samples.astype(">u2").tobytes()))
    expected = np.rint(samples / 257).astype(np.uint8)
    assert picture.grey == (channels < 3)
    assert np.array_equal(picture.pixels, three(expected[..., 0]) if picture.grey else expected[..., :3])
    if channels in (2, 4):
        assert np.array_equal(picture.alpha, expected[..., -1])  # type: ignore[arg-type]
    assert "more than 8 bits" in picture.warnings[0]


def test_sixteen_bit_of_other_kinds() -> None:
    """16-bit TIFF, PGM and PPM are read, with a warning."""
    samples = SIXTEEN[..., 0]
    expected = three(np.rint(samples / 257).astype(np.uint8))
    pgm = io.BytesIO(b"P5 %d %d 65535\n" % (W, H) + samples.astype(">u2").tobytes())
    big = Image.frombytes("I;16B", (W, H), samples.astype(">u2").tobytes())
    for stream in (stored(Image.fromarray(samples), "TIFF"), stored(big, "TIFF"), pgm):
        picture = read_image(stream)
        assert picture.grey
        assert np.array_equal(picture.pixels, expected)
        assert "more than 8 bits" in picture.warnings[0]
    ppm = io.BytesIO(b"P6 %d %d 65535\n" % (W, H) + SIXTEEN[..., :3].astype(">u2").tobytes())
    assert "more than 8 bits" in read_image(ppm).warnings[0]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [1, 8])
def test_sixteen_bit_colour_tiff(order: str, compression: int) -> None:
    """Guards against the 8-bit truncation that Pillow applies to 16-bit colour."""
    data = SIXTEEN[..., :3].astype(order + "u2").tobytes()
    tags = {258: [16] * 3, 262: [2], 277: [3]}
    picture = read_image(tiff(tags, data, order=order, packed=compression == 8))
    assert np.array_equal(picture.pixels, np.rint(SIXTEEN[..., :3] / 257).astype(np.uint8))
    assert "more than 8 bits" in picture.warnings[0]


@pytest.mark.parametrize("packed", [False, True])
def test_twelve_bit_tiff(packed: bool) -> None:
    """Guards against white that becomes nearly black, as if 12 bits were 16."""
    samples = np.resize(np.arange(4096), H * (W + 1)).reshape(H, W + 1)  # rows of whole bytes
    a, b = samples[:, 0::2], samples[:, 1::2]
    data = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], axis=-1).astype(np.uint8).tobytes()
    picture = read_image(tiff({256: [W + 1], 258: [12], 262: [1], 277: [1]}, data, packed=packed))
    assert np.array_equal(picture.pixels, three(np.rint(samples * 255 / 4095).astype(np.uint8)))
    assert "more than 8 bits" in picture.warnings[0]


@pytest.mark.parametrize("packed", [False, True])
def test_tiff_in_which_zero_is_white(packed: bool) -> None:
    """Guards against negatives, and against an inversion of what Pillow has inverted."""
    wide, tags = SIXTEEN[..., 0], {262: [0], 277: [1]}
    expected = 255 - np.rint(wide / 257).astype(np.uint8)
    little = tiff({**tags, 258: [16]}, wide.astype("<u2").tobytes(), packed=packed)
    assert np.array_equal(read_image(little).pixels, three(expected))
    big = tiff({**tags, 258: [16]}, wide.astype(">u2").tobytes(), order=">", packed=packed)
    with contextlib.suppress(ImageError):  # Pillow does not know it
        assert np.array_equal(read_image(big).pixels, three(expected))
    narrow = tiff({**tags, 258: [8]}, GREY.tobytes(), packed=packed)
    assert np.array_equal(read_image(narrow).pixels, three(255 - GREY))


PLANES = [SIXTEEN[..., i].astype("<u2").tobytes() for i in range(4)]


@pytest.mark.parametrize(
    ("tags", "planes", "packed"),
    [
        ({258: [16] * 3, 262: [2], 277: [3]}, PLANES[:3], False),
        ({258: [16] * 4, 262: [2], 277: [4], 338: [2]}, PLANES, False),
        ({258: [16] * 4, 262: [5], 277: [4]}, PLANES, False),
        ({258: [8, 8], 262: [1], 277: [2], 338: [2]}, [GREY.tobytes(), ALPHA.tobytes()], True),
        ({258: [8] * 3, 262: [8], 277: [3]}, [GREY.tobytes()] * 3, True),
        ({258: [8], 262: [0], 277: [1]}, [GREY.tobytes()], False),
    ],
)
def test_planes_that_pillow_mixes_up(tags: dict[int, list[int]], planes: list[bytes], packed: bool) -> None:
    """Guards against garbage and lost transparency in TIFF files with separate planes."""
    with pytest.raises(ImageError, match="TIFF with separate planes"):
        read_image(tiff({**tags, 284: [2]}, *planes, packed=packed))


@pytest.mark.parametrize("packed", [False, True])
def test_planes_of_eight_bits(packed: bool) -> None:
    """TIFF files with separate planes are read where Pillow can."""
    planes = [np.ascontiguousarray(plane).tobytes() for plane in np.moveaxis(RGB, 2, 0)]
    tags = {258: [8] * 3, 262: [2], 277: [3], 284: [2]}
    assert np.array_equal(read_image(tiff(tags, *planes, packed=packed)).pixels, RGB)
    tags = {258: [8] * 4, 262: [2], 277: [4], 284: [2], 338: [2]}
    assert np.array_equal(read_image(tiff(tags, *planes, ALPHA.tobytes(), packed=packed)).alpha, ALPHA)  # type: ignore[arg-type]
    tags = {258: [8], 262: [1], 277: [1], 284: [2]}
    assert np.array_equal(read_image(tiff(tags, GREY.tobytes(), packed=packed)).pixels, three(GREY))
    tags = {258: [1], 262: [1], 277: [1], 284: [2]}
    bits = read_image(tiff(tags, np.packbits(GREY >> 7, axis=1).tobytes(), packed=packed))
    assert np.array_equal(bits.pixels, three((GREY >> 7) * np.uint8(255)))


@pytest.mark.parametrize("samples", [GREY.astype(np.float32), GREY.astype(np.int32) * 70_000])
def test_samples_without_a_range(samples: np.ndarray) -> None:
    """Floating-point and 32-bit samples are refused."""
    with pytest.raises(ImageError, match="not supported"):
        read_image(stored(Image.fromarray(samples), "TIFF"))


def test_cmyk() -> None:
    """Guards against inverted CMYK, and a CMYK profile with RGB pixels."""
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    for format, options in (("JPEG", {"quality": 95}), ("TIFF", {})):
        picture = read_image(stored(cmyk, format, icc_profile=SRGB, **options))
        assert np.abs(picture.pixels.astype(int) - (255, 0, 0)).max() <= 4
        assert picture.icc is None
        assert picture.warnings == ("CMYK is converted to RGB",)


def cmyk_profile() -> bytes:
    """A printer with green paper, Lab (50, -64, 64), and one ink that shows, black."""
    ramp = bytes(range(256))
    matrix = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table = (
        b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + 4 * ramp + 8 * bytes([128, 64, 192, 0, 128, 128]) + 3 * ramp
    )
    text = b"desc" + bytes(4) + struct.pack(">I", 5) + b"inks\0" + bytes(78)
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    body, entries = b"", b""
    for tag, content in ((b"desc", text), (b"wtpt", white), (b"A2B0", table)):
        content += bytes(-len(content) % 4)
        entries += tag + struct.pack(">II", 128 + 4 + 36 + len(body), len(content))
        body += content
    size = 128 + 4 + len(entries) + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02400000, b"prtr", b"CMYK", b"Lab ") + bytes(12) + b"acsp"
    header += bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I", 3) + entries + body


def test_cmyk_is_converted_with_its_own_profile() -> None:
    """Guards against a conversion that ignores the profile."""
    source = stored(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF", icc_profile=cmyk_profile())
    red, green, blue = read_image(source).pixels[0, 0]
    assert green > 100 > red
    assert green > 100 > blue


def test_first_frame_of_an_animation() -> None:
    """The first frame is read, with a warning about the others."""
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    for format, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        stream = stored(first, format, save_all=True, append_images=[second], **options)
        picture = read_image(stream)
        assert np.array_equal(picture.pixels, np.array(first)), format
        assert "first of 2" in picture.warnings[0]


@pytest.mark.parametrize("size", [(8, 8), (24, 20)])
def test_a_damaged_later_page(size: tuple[int, int]) -> None:
    """Guards against the second page of a TIFF in place of the first where the directory of a third is missing."""
    pages = [Image.new("RGB", size, "lime"), Image.new("RGB", (8, 8), "blue")]
    data = bytearray(stored(Image.new("RGB", (8, 8), "red"), "TIFF", save_all=True, append_images=pages).getvalue())
    at = 4
    for _ in range(2):  # to the place where the second directory points to the third
        (start,) = struct.unpack_from("<I", data, at)
        at = start + 2 + 12 * struct.unpack_from("<H", data, start)[0]
    struct.pack_into("<I", data, at, len(data) + 1000)
    assert (read_image(io.BytesIO(data)).pixels == (255, 0, 0)).all()


@pytest.mark.parametrize("pages", [1, 2])
@pytest.mark.parametrize("samples", [RGB, GREY.astype(np.uint16) * 257])
def test_pages_are_not_turned_twice(pages: int, samples: np.ndarray) -> None:
    """Guards against an orientation beside pixels that were turned on loading, when the pages are counted."""
    im = Image.fromarray(samples)
    tags = Image.Exif()
    tags[274] = 6
    found = read_image(stored(im, "TIFF", exif=tags, save_all=True, append_images=[im] * (pages - 1)))
    assert found.pixels.shape[:2] == (W, H)
    assert orientation(found.exif, found.xmp) in (None, 1)


# ---------------------------------------------------------------------------------------- metadata


@pytest.mark.parametrize("format", ["png", "jpg", "webp", "tiff", "avif"])
def test_metadata_survives(format: str) -> None:
    """ICC, EXIF and XMP are written and read by every format that has them."""
    picture = Picture(RGB, icc=SRGB, exif=exif(1)[6:], xmp=XMP)
    back = again(picture, format)
    assert back.icc == SRGB
    assert back.xmp == XMP
    assert back.exif is not None
    tags = Image.Exif()
    tags.load(back.exif)
    assert tags[271] == "Maker"
    assert tags.get_ifd(34665)[33434] == 0.25
    if format not in ("tiff", "avif"):
        assert back.exif == picture.exif
    stripped = read_image(stored_as_new(picture, format), strip=True)
    assert (stripped.icc, stripped.exif, stripped.xmp) == (None, None, None)


def stored_as_new(picture: Picture, format: str) -> io.BytesIO:
    stream = stored_picture(picture, format)
    stream.seek(0)
    return stream


@pytest.mark.parametrize("dpi", [(300, 300), (72, 72), (2835 * 0.0254, 2835 * 0.0254), (600, 300)])
@pytest.mark.parametrize("format", ["png", "jpg", "tiff", "bmp"])
def test_resolution_survives(format: str, dpi: tuple[float, float]) -> None:
    """Guards against scans that lose their size in print."""
    source = stored(Image.fromarray(RGB), {"jpg": "JPEG"}.get(format, format), dpi=dpi)
    expected = Image.open(source).info["dpi"]
    source.seek(0)
    picture = read_image(source)
    assert picture.exif is not None
    assert len(picture.exif) < 60 or format == "tiff"
    for written in ("png", "jpg", "tiff", "bmp"):
        im = Image.open(stored_picture(picture, written))
        assert im.info["dpi"] == pytest.approx(expected, rel=0.01)
        if written != "bmp":
            assert im.getexif()[282] == pytest.approx(expected[0], rel=1e-4)
    assert read_image(stored_as_new(picture, "png")).exif == picture.exif


@pytest.mark.parametrize("order", ["<", ">"])
def test_resolution_does_not_move_what_is_in_exif(order: str) -> None:
    """Guards against data of cameras that can no longer be found, as only they know its offset."""
    tags = Image.Exif()
    tags.endian = order
    tags[271], tags[274], tags[296] = "Maker", 6, 3
    tags.get_ifd(34665)[37500] = b"note at a fixed place"
    data = tags.tobytes()
    picture = read_image(stored(Image.fromarray(RGB), exif=data, dpi=(300, 300)))
    assert picture.exif is not None
    kept = Image.Exif()
    kept.load(picture.exif)
    assert (kept[271], kept[274], kept[282], kept[283]) == ("Maker", 6, 300, 300)
    assert kept.get_ifd(34665)[37500] == b"note at a fixed place"
    assert picture.exif.index(b"note") == data[6:].index(b"note")
    same_again = read_image(stored(Image.fromarray(RGB), exif=picture.exif, dpi=(72, 72)))
    assert same_again.exif == picture.exif  # EXIF has the word


@pytest.mark.parametrize("order", ["<", ">"])
def test_an_invalid_resolution_is_replaced(order: str) -> None:
    """Guards against two entries of one tag, where EXIF states no resolution that can be one."""
    tags = Image.Exif()
    tags.endian = order
    tags[271], tags[282], tags[283], tags[296] = "Maker", 0.0, 0.0, 3
    picture = read_image(stored(Image.fromarray(RGB), "JPEG", exif=tags.tobytes(), dpi=(300, 300)))
    assert picture.exif is not None
    (start,) = struct.unpack_from(order + "I", picture.exif, 4)
    (count,) = struct.unpack_from(order + "H", picture.exif, start)
    entries = [struct.unpack_from(order + "HHII", picture.exif, start + 2 + 12 * i) for i in range(count)]
    assert [entry[0] for entry in entries] == [271, 282, 283]
    assert resolution(picture.exif) == (300, 300)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation: int) -> None:
    """--strip turns the pixels, and nothing turns them twice."""
    from PIL import ImageOps

    source = stored(Image.fromarray(RGB), exif=exif(orientation))
    upright = np.array(ImageOps.exif_transpose(Image.open(source)))
    source.seek(0)
    kept = read_image(source)
    assert np.array_equal(kept.pixels, RGB)
    assert kept.exif == exif(orientation)[6:]
    source.seek(0)
    assert np.array_equal(read_image(source, strip=True).pixels, upright)
    for format in ("ppm", "bmp", "tiff"):  # they have no EXIF, or their readers apply it
        assert np.array_equal(again(kept, format).pixels, upright)


def linear_grey_profile() -> bytes:
    """A profile of grey levels that are proportional to the light."""
    tags = {
        b"wtpt": b"XYZ " + struct.pack(">I3i", 0, 63190, 65536, 54061),
        b"kTRC": b"curv" + struct.pack(">II", 0, 0),
        b"desc": b"desc" + struct.pack(">II", 0, 2) + b"g\0" + bytes(78),
        b"cprt": b"text" + bytes(4) + b"CC0\0",
    }
    start, body, entries = 132 + 12 * len(tags), b"", struct.pack(">I", len(tags))
    for name, content in tags.items():
        entries += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    header = struct.pack(
        ">I4x4s4s4s4s12x4s28x3i",
        start + len(body),
        b"\2\x10\0\0",
        b"mntr",
        b"GRAY",
        b"XYZ ",
        b"acsp",
        63190,
        65536,
        54061,
    )
    return header.ljust(128, b"\0") + entries + body


def swapped_profile() -> bytes:
    """sRGB with red and green exchanged, and still called sRGB: a wide-gamut profile would be a binary file."""
    profile = bytearray(SRGB)
    table = {
        bytes(profile[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i
        for i in range(int.from_bytes(profile[128:132], "big"))
    }
    red, green = table[b"rXYZ"], table[b"gXYZ"]
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile)


def test_strip_keeps_the_colours() -> None:
    """--strip converts wide-gamut colours to sRGB."""
    source = stored(Image.new("RGB", (4, 4), (200, 20, 30)), icc_profile=swapped_profile())
    kept = read_image(source)
    assert kept.icc == swapped_profile()
    source.seek(0)
    stripped = read_image(source, strip=True)
    assert (stripped.icc, stripped.warnings) == (None, ())
    assert np.abs(stripped.pixels.astype(int) - (20, 200, 30)).max() <= 3
    source = stored(Image.fromarray(RGB), icc_profile=SRGB)
    assert np.array_equal(read_image(source, strip=True).pixels, RGB)
    source = stored(Image.fromarray(RGB), icc_profile=SRGB[:200])
    assert "cannot be used" in read_image(source, strip=True).warnings[0]


# --------------------------------------------------------------------- colours without an ICC profile

SRGB_CHRM = struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
P3_CHRM = struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
P3_TO_SRGB = np.array([[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]])


def srgb_light(samples: np.ndarray) -> np.ndarray:
    """Linear light of sRGB samples in 0..1."""
    return np.where(samples <= 0.04045, samples / 12.92, ((samples + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("gamma", [1.0, 1 / 1.8])
@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize(("channels", "colour"), [(1, 0), (2, 4), (3, 2), (4, 6)])
def test_gamma_is_converted(gamma: float, depth: int, channels: int, colour: int) -> None:
    """Guards against linear pictures that come out dark; transparency has no gamma."""
    samples = SIXTEEN[..., :channels] >> (16 - depth)
    rows = samples.astype(">u2" if depth == 16 else "u1").tobytes()
    picture = read_image(png(W, H, depth, colour, rows, (b"gAMA", struct.pack(">I", round(100000 * gamma)))))
    light = (samples[..., : 1 if channels < 3 else 3] / (2**depth - 1)) ** (1 / gamma)
    assert np.abs(srgb_light(picture.pixels / 255) - light).max() < 0.005
    assert "gamma" in picture.warnings[-1]
    if channels in (2, 4):
        assert np.array_equal(picture.alpha, np.rint(samples[..., -1] * (255 / (2**depth - 1))))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "chunks",
    [
        [(b"gAMA", struct.pack(">I", 45455)), (b"cHRM", SRGB_CHRM)],
        [(b"sRGB", b"\0"), (b"gAMA", struct.pack(">I", 100000)), (b"cHRM", P3_CHRM)],
        [(b"cICP", bytes([1, 13, 0, 1])), (b"gAMA", struct.pack(">I", 100000))],
        [(b"gAMA", bytes(4)), (b"cHRM", bytes(32))],
        [(b"tEXt", b"gamma\x001.0"), (b"tEXt", b"chromaticity\0a"), (b"tEXt", b"dpi\0300"), (b"cICP", b"\x0c")],
    ],
)
def test_colours_of_srgb_need_no_conversion(chunks: list[tuple[bytes, bytes]]) -> None:
    """Guards against pixels that change, and profiles that take bytes, where a file states sRGB or nonsense."""
    picture = read_image(png(W, H, 8, 2, RGB.tobytes(), *chunks))
    assert np.array_equal(picture.pixels, RGB)
    assert (picture.icc, picture.exif, picture.warnings) == (None, None, ())


@pytest.mark.parametrize("chunk", [(b"cICP", bytes([12, 13, 0, 1])), (b"cHRM", P3_CHRM)])
def test_primaries_become_a_profile(chunk: tuple[bytes, bytes]) -> None:
    """Guards against pale colours of Display P3."""
    picture = read_image(png(W, H, 8, 2, RGB.tobytes(), chunk))
    assert np.array_equal(picture.pixels, RGB)
    assert picture.icc is not None
    assert len(picture.icc) < 500
    assert again(picture).icc == picture.icc
    light = srgb_light(RGB / 255) @ P3_TO_SRGB.T
    inside = ((light >= 0) & (light <= 1)).all(axis=2)
    stripped = read_image(png(W, H, 8, 2, RGB.tobytes(), chunk), strip=True)
    assert np.abs(srgb_light(stripped.pixels / 255) - light)[inside].max() < 0.01
    grey = read_image(png(W, H, 8, 0, GREY.tobytes(), chunk))
    assert (grey.icc, grey.warnings) == (None, ())


@given(st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 100_000), min_size=8, max_size=8))
def test_impossible_primaries(values: list[int]) -> None:
    """Guards against pictures that cannot be read for what they say of their colours."""
    chunk = (b"cHRM", struct.pack(">8I", *values))
    for strip in (False, True):
        picture = read_image(png(3, 3, 8, 2, RGB[:3, :3].tobytes(), chunk), strip=strip)
        assert picture.pixels.shape == (3, 3, 3)


def test_high_dynamic_range_is_told() -> None:
    """Guards against a curve that vanishes without a word."""
    picture = read_image(png(W, H, 8, 2, RGB.tobytes(), (b"cICP", bytes([9, 16, 0, 1]))))
    assert "PQ" in picture.warnings[0]


def test_colours_of_avif() -> None:
    """AVIF states primaries as PNG does."""
    data = stored(Image.fromarray(RGB), "AVIF").getvalue()
    at = data.index(b"colrnclx") + 8
    assert read_image(io.BytesIO(data)).icc is None
    picture = read_image(io.BytesIO(data[:at] + b"\0\x0c" + data[at + 2 :]))
    assert picture.icc == read_image(png(W, H, 8, 2, RGB.tobytes(), (b"cICP", bytes([12, 13, 0, 1])))).icc


# --------------------------------------------------------------------- what formats hold, docs/cli.md

LOSSLESS = ["png", "tiff", "webp", "jp2", "tga", "qoi", "sgi", "dds", "ico", "bmp", "ppm", "pcx", "im", "apng"]
WITH_METADATA = ["png", "tiff", "webp", "jpg", "avif", "mpo"]


@pytest.mark.parametrize("format", LOSSLESS)
def test_lossless_formats(format: str) -> None:
    """Pixels, greyness and alpha are written exactly, or alpha is refused."""
    pictures = [Picture(RGB), Picture(three(GREY), grey=True)]
    if format not in ("bmp", "ppm", "pcx", "im"):
        pictures += [Picture(RGB, alpha=ALPHA | 1), Picture(three(GREY), grey=True, alpha=ALPHA | 1)]
    for picture in pictures:
        stream = io.BytesIO()
        written = write_image(picture, stream, format)
        assert (written.width, written.height, written.bytes) == (W, H, len(stream.getvalue()))
        assert written.warnings == ()
        back = read_image(io.BytesIO(stream.getvalue()))
        assert np.array_equal(back.pixels, picture.pixels)
        assert (back.alpha is None) == (picture.alpha is None)
        assert picture.alpha is None or np.array_equal(back.alpha, picture.alpha)  # type: ignore[arg-type]


def test_avif_is_as_good_as_it_can_be() -> None:
    """Guards against Pillow's default, quality 75 with a quarter of the colours."""
    back = again(Picture(RGB, alpha=ALPHA), "avif")
    assert np.array_equal(back.alpha, ALPHA)  # type: ignore[arg-type]
    assert np.abs(back.pixels.astype(int) - RGB)[ALPHA > 0].max() <= 3
    assert np.abs(again(Picture(RGB), "avif").pixels.astype(int) - RGB).max() <= 3
    assert np.array_equal(again(Picture(three(GREY), grey=True), "avif").pixels, three(GREY))


@pytest.mark.parametrize(
    ("format", "size"),
    [("ico", (257, 9)), ("icns", (20, 20)), ("jpg", (1, 65501)), ("webp", (16384, 1)), ("gif", (65536, 1))],
)
def test_sizes_that_a_format_cannot_hold(format: str, size: tuple[int, int], capfd: pytest.CaptureFixture[str]) -> None:
    """Guards against formats of icons, which Pillow scales without a word, and against libjpeg's own messages."""
    picture = Picture(np.zeros((size[1], size[0], 3), np.uint8))
    with pytest.raises(ImageError, match=f"cannot hold an image of {size[0]} x {size[1]} pixels"):
        write_image(picture, io.BytesIO(), format)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("format", ["bmp", "ppm", "jp2", "tga", "qoi", "gif", "ico", "sgi", "dds", "pcx"])
def test_formats_without_a_profile_get_srgb(format: str) -> None:
    """Guards against wrong colours where a format has no ICC profile."""
    pixels = np.full((8, 8, 3), (200, 20, 30), np.uint8)
    stream = io.BytesIO()
    written = write_image(Picture(pixels, icc=swapped_profile()), stream, format)
    back = np.asarray(Image.open(stream).convert("RGB"), int)
    assert np.abs(back - (20, 200, 30)).max() <= 3
    assert "no ICC profile: the colours are converted to sRGB" in written.warnings[0]
    assert write_image(Picture(RGB, icc=SRGB), io.BytesIO(), format).warnings == ()
    written = write_image(Picture(pixels, icc=SRGB[:200]), io.BytesIO(), format)
    assert written.warnings == ("an ICC profile that cannot be used is dropped",)


@pytest.mark.parametrize("format", WITH_METADATA)
@pytest.mark.parametrize(
    "kind", ["large EXIF", "large XMP", "broken EXIF", "no EXIF", "broken ICC", "large ICC", "all"]
)
def test_metadata_that_a_format_cannot_hold(format: str, kind: str) -> None:
    """The picture is written upright, and what is lost is told."""
    long = Image.Exif()
    long[274], long[306] = 6, "x" * 70_000
    given: dict[str, bytes] = {
        "large EXIF": {"exif": long.tobytes()[6:]},
        "large XMP": {"xmp": b'<x tiff:Orientation="6"/>'.ljust(70_000)},
        "broken EXIF": {"exif": b"II*\0\xff\xff\xff\x7f"},
        "no EXIF": {"exif": b"garbage"},
        "broken ICC": {"icc": SRGB[:200]},
        "large ICC": {"icc": SRGB.ljust(2**21, b"x")},
        "all": {"exif": long.tobytes()[6:], "xmp": b"x" * 70_000, "icc": SRGB.ljust(2**21, b"x")},
    }[kind]
    stream = io.BytesIO()
    written = write_image(Picture(RGB, **given), stream, format)  # type: ignore[arg-type]
    stream.seek(0)
    upright = np.rot90(RGB, -1) if kind in ("large EXIF", "large XMP", "all") else RGB
    back = read_image(stream, strip=True).pixels
    assert back.shape == upright.shape
    assert np.abs(back.astype(int) - upright).mean() < 8
    stream.seek(0)
    back_metadata = read_image(stream)
    for name, data in given.items():
        word = {"icc": "ICC profile", "exif": "EXIF", "xmp": "XMP"}[name]
        lost = len(getattr(back_metadata, name) or b"") < len(data) / 2  # some write EXIF anew, without the orientation
        told = (*written.warnings, *back_metadata.warnings)
        assert lost == any(word in text for text in told), told


def test_what_is_dropped_is_told() -> None:
    """Guards against metadata that vanish without a word; orientation and resolution need none, being applied."""
    full = Picture(RGB, exif=exif(6)[6:], xmp=XMP)
    written = write_image(full, io.BytesIO(), "ppm")
    assert written.warnings == ("PPM holds no EXIF and no XMP: dropped",)
    assert (written.width, written.height) == (H, W)
    turned = Image.Exif()
    turned[274] = 6
    assert write_image(Picture(RGB, exif=turned.tobytes()[6:]), io.BytesIO(), "ppm").warnings == ()


@pytest.mark.parametrize("format", ["webp", "avif"])
def test_a_grey_profile_where_none_fits_is_told(format: str) -> None:
    """Guards against grey levels that are converted to sRGB, or a profile that is dropped, without a word."""
    linear = linear_grey_profile()
    stream = io.BytesIO()
    said = write_image(Picture(GREY_RGB, grey=True, icc=linear), stream, format).warnings
    assert said == (f"{format.upper()} holds no ICC profile of grey: the grey levels are converted to sRGB",)
    stream.seek(0)
    assert read_image(stream).icc is None
    unusable = Picture(GREY_RGB, grey=True, icc=linear[:140])
    assert write_image(unusable, io.BytesIO(), format).warnings == ("an ICC profile that cannot be used is dropped",)


@pytest.mark.parametrize("stated", [b'="6"', b">8</tiff:Orientation>"])
def test_exif_outweighs_xmp_in_every_format(stated: bytes) -> None:
    """Guards against pictures that AVIF turns: of an orientation 1 in EXIF nothing is left there."""
    upright = Picture(RGB, exif=exif(1)[6:], xmp=b"<x tiff:Orientation" + stated)
    for format in ("png", "jpg", "webp", "avif"):
        assert orientation(again(upright, format).exif, again(upright, format).xmp) in (None, 1), format


@pytest.mark.parametrize(("extension", "start"), [("j2k", b"\xff\x4f\xff\x51"), ("jp2", b"\0\0\0\x0cjP  ")])
def test_jpeg_2000_with_and_without_container(extension: str, start: bytes) -> None:
    """Guards against a container in a file that is named as a codestream."""
    stream = io.BytesIO()
    write_image(Picture(RGB), stream, extension)
    assert stream.getvalue().startswith(start)


def test_profile_of_another_colour_space() -> None:
    """Guards against an RGB profile in a grey picture, which strict readers refuse."""
    picture = read_image(stored(Image.fromarray(GREY), "JPEG", icc_profile=SRGB))
    assert picture.icc is None
    assert "ICC" in picture.warnings[0]
    grey = SRGB[:16] + b"GRAY" + SRGB[20:]
    assert read_image(stored(Image.fromarray(GREY), "JPEG", icc_profile=grey)).icc == grey


def test_broken_exif_is_no_obstacle() -> None:
    """Damaged EXIF does not keep a picture from being read or written."""
    for strip in (False, True):
        source = stored(Image.fromarray(RGB), exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
        picture = read_image(source, strip=strip)
        assert np.array_equal(picture.pixels, RGB)
        for format in ("png", "tiff", "ppm"):
            assert np.array_equal(again(picture, format).pixels, RGB)


def test_exif_and_xmp_that_a_file_may_not_hold() -> None:
    """Guards against .sga files with EXIF without a byte order, or XMP that is not UTF-8."""
    picture = read_image(stored(Image.fromarray(RGB), "WEBP", exif=b"hello", xmp=b"<x>\xff\xfe</x>", lossless=True))
    assert (picture.exif, picture.xmp) == (None, None)
    assert picture.warnings == ("EXIF that cannot be read is dropped", "XMP that is not UTF-8 is dropped")
    twice = read_image(stored(Image.fromarray(RGB), "JPEG", exif=b"Exif\0\0" + exif(6)))  # as some files have it
    assert (twice.exif, twice.warnings) == (exif(6)[6:], ())


def test_values_that_overlap_are_not_multiplied() -> None:
    """Guards against EXIF of which old versions of Pillow copy the same megabyte for each tag."""
    size, count = 2**20, 60
    entry = [struct.pack("<HHII", 40_000 + i, 7, size, 8) for i in range(count)]
    pointer = [struct.pack("<HHII", 34665, 4, 1, 8)]  # the Exif directory: the same one
    data = b"II*\0\x08\0\0\0" + struct.pack("<H", count + 2) + struct.pack("<HHII", 274, 3, 1, 6)
    data += b"".join(pointer + entry) + bytes(4)
    picture = Picture(RGB, exif=data.ljust(size + 8, b"\0"))
    tracemalloc.start()
    try:
        assert resolution(picture.exif) is None
        assert orientation(picture.exif, None) == 6
        write_image(picture, io.BytesIO(), "tiff")
        assert tracemalloc.get_traced_memory()[1] < 16 * size
    finally:
        tracemalloc.stop()


# ------------------------------------------------------------------------------------ files, limits


def test_paths_extensions_and_streams(tmp_path: Path) -> None:
    """The extension decides the format; paths, files and streams can be read."""
    picture = Picture(RGB)
    for name, kind in {"a.png": "PNG", "a.JPG": "JPEG", "a.tif": "TIFF", "a.ppm": "PPM", "a": "PNG"}.items():
        write_image(picture, tmp_path / name)
        assert Image.open(tmp_path / name).format == kind
    write_image(picture, tmp_path / "b.png", "webp")
    assert Image.open(tmp_path / "b.png").format == "WEBP"
    assert np.array_equal(read_image(tmp_path / "a.png").pixels, RGB)
    with (tmp_path / "a.png").open("rb") as file:
        assert np.array_equal(read_image(file).pixels, RGB)


@pytest.mark.parametrize("name", ["a.unknown", "missing/a.png", "a.jpg", "a.ppm", "a.bmp"])
def test_write_errors(tmp_path: Path, name: str) -> None:
    """Guards against dropped transparency, and tracebacks for wrong names."""
    with pytest.raises(ImageError) as caught:
        write_image(Picture(RGB, alpha=ALPHA), tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("head", "package", "module"),
    [
        (b"\0\0\0\x1cftypheic", "pillow-heif", "pillow_heif"),
        (b"\0\0\0\x1cftypmif1", "pillow-heif", "pillow_heif"),
        (b"\xff\x0a", "pillow-jxl-plugin", "pillow_jxl"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "pillow-jxl-plugin", "pillow_jxl"),
    ],
)
def test_formats_of_other_packages(head: bytes, package: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """HEIC and JPEG XL are read if their package is installed; else the message names it."""
    data = head.ljust(20, b"\0") + stored(Image.fromarray(RGB)).getvalue()
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(Image.OPEN, "JXL", raising=False)  # of the package, where another test has imported it
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "JXL"])
    with pytest.raises(ImageError, match=f"pip install {package}"):
        read_image(io.BytesIO(data))

    def register() -> None:
        def opened(fp: Any, filename: object) -> Image.Image:
            fp.seek(20)
            return Image.open(io.BytesIO(fp.read()))

        monkeypatch.setitem(Image.OPEN, "TEST", (opened, lambda prefix: prefix.startswith(head)))
        monkeypatch.setattr(Image, "ID", [*Image.ID, "TEST"])

    plugin = types.ModuleType(module)
    plugin.register_heif_opener = register  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module, plugin)
    assert np.array_equal(read_image(io.BytesIO(data)).pixels, RGB)


def test_read_errors(tmp_path: Path) -> None:
    """Every message is one line that names the file."""
    good = stored(Image.fromarray(RGB)).getvalue()
    bad = {
        "empty.png": b"",
        "text.png": b"hello",
        "short.png": good[: len(good) // 2],
        "header.png": good[:30],
        "damaged.png": good[:100] + bytes(50) + good[150:],
        "short.jpg": stored(Image.fromarray(RGB), "JPEG").getvalue()[:700],
        "zero.pgm": b"P5 0 0 255\n",
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder.png").mkdir()
    for name in [*bad, "folder.png", "missing.png"]:
        with pytest.raises(ImageError) as caught:
            read_image(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_messages_about_streams_have_no_invented_name() -> None:
    """Guards against "<stdin>" and "output" in messages that already name the file."""
    stream = io.BytesIO(b"no image")
    stream.name = "<stdin>"
    with pytest.raises(ImageError, match=r"^not an image of a known format$"):
        read_image(stream)
    with pytest.raises(ImageError, match=r"^JPEG cannot hold"):
        write_image(Picture(RGB, alpha=ALPHA), io.BytesIO(), "jpg")


def test_a_pgm_file_is_grey() -> None:
    """Guards against a file of colours with the name of a grey one."""
    with pytest.raises(ImageError, match=r"^PGM cannot hold colours: write PPM$"):
        write_image(Picture(RGB), io.BytesIO(), "PGM")
    stream = io.BytesIO()
    write_image(Picture(np.repeat(RGB[..., :1], 3, axis=2), grey=True), stream, "pgm")
    assert stream.getvalue().startswith(b"P5")


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "jpeg"])
def test_libtiff_prints_nothing(compression: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Guards against libtiff's own messages on standard error, which --quiet does not stop."""
    data = bytearray(stored(Image.fromarray(RGB), "TIFF", compression=compression).getvalue())
    for at in range(100, 200):
        data[at] ^= 0x5A
    with contextlib.suppress(ImageError):
        read_image(io.BytesIO(data))
    os.write(2, b"heard\n")
    assert capfd.readouterr().err == "heard\n"


class Endless:
    """A pipe that delivers a beginning and then zeros, for ever."""

    def __init__(self, beginning: bytes) -> None:
        self.beginning = io.BytesIO(beginning)
        self.delivered = 0

    def read(self, size: int = -1) -> bytes:
        assert size >= 0, "this read does not end"
        data = self.beginning.read(size).ljust(size, b"\0")
        self.delivered += size
        return data


BEGINNINGS = {
    "nothing": b"",
    "JPEG with a header": stored(Image.fromarray(RGB), "JPEG").getvalue()[:300],
    "PNG with a text": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(17) + b"\x7f\xff\xff\xffzTXt",
    "GIF": stored(Image.fromarray(RGB), "GIF").getvalue()[:-1],
    "WebP": b"RIFF\xff\xff\xff\xffWEBPVP8 ",
    "AVIF": b"\0\0\0\x1cftypavif",
    "TIFF": b"II*\0\x08\0\0\0\xff\xff",
    "comment": b"P6 #",
    "XPM": b"/* XPM */",
}


@pytest.mark.parametrize("kind", BEGINNINGS)
def test_input_that_never_ends(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against reading /dev/zero, an endless pipe or a sparse file until the memory is full."""
    monkeypatch.setattr(bounded, "_CALLS", 2**14)  # of 2**22, which take seconds
    pipe = Endless(BEGINNINGS[kind])
    sparse = tmp_path / "sparse"
    sparse.write_bytes(BEGINNINGS[kind])
    os.truncate(sparse, 40 * 10**9)
    for source in (pipe, sparse):
        with contextlib.nullcontext() if kind == "GIF" else pytest.raises(ImageError):  # its first frame is there
            read_image(source, max_pixels=2**20)  # type: ignore[arg-type]
    assert pipe.delivered < 2**27


def test_a_pipe_is_read_to_its_end() -> None:
    """Guards against a broken pipe of the program that writes an image with something after it."""
    data = stored(Image.fromarray(RGB)).getvalue()
    pipe = io.BytesIO(b"before" + data + bytes(2**21))
    pipe.read(6)
    assert np.array_equal(read_image(pipe).pixels, RGB)
    assert pipe.read() == b""


def test_a_long_animation_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first frame is read and the loss of the others is told, also where counting them takes too long."""
    monkeypatch.setattr(bounded, "_CALLS", 2**10)
    first = stored(Image.fromarray(GREY[:2, :2]), "GIF").getvalue()[:-1]
    frame = first[first.index(b"\x2c") :]
    picture = read_image(io.BytesIO(first + 500 * frame + b";"))
    assert picture.pixels.shape == (2, 2, 3)
    assert picture.warnings == ("only the first frame or page is kept",)


def test_metadata_without_measure_is_dropped(tmp_path: Path) -> None:
    """Guards against files that are refused on reading for their length."""
    stream = stored(Image.fromarray(RGB), "TIFF", tiffinfo={700: b"x" * (2**24 + 1)})
    picture = read_image(stream)
    assert picture.xmp is None
    assert picture.warnings == (f"XMP of {2**24 + 1} bytes is dropped",)


def test_large_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pixel limit is ours, not Pillow's, and holds before pixels are decoded."""
    panorama = png(20_000, 10_000, 1, 0, b"\0" * 10_000)
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ImageError, match="--max-pixels"):
        read_image(panorama, max_pixels=20_000 * 10_000 - 1)
    assert limit == Image.MAX_IMAGE_PIXELS
    bomb = png(60_000, 60_000, 8, 2, b"\0" * 60_000)
    with pytest.raises(ImageError, match="--max-pixels"):
        read_image(bomb)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    small = stored(Image.fromarray(RGB))
    assert read_image(small, max_pixels=H * W).pixels.shape == (H, W, 3)


@pytest.mark.slow  # decodes 200 megapixels
def test_panorama_is_accepted() -> None:
    """Guards against Pillow's own limit, which large scans exceed."""
    assert read_image(stored(Image.new("1", (20_000, 10_000)))).pixels.shape == (10_000, 20_000, 3)


@given(st.data())
def test_damaged_files(draw: st.DataObject) -> None:
    """Guards against exceptions and warnings of Pillow for damaged files."""
    kind = draw.draw(st.sampled_from(["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "PPM"]))
    data = bytearray(stored(Image.fromarray(RGB[:9, :9]), kind).getvalue())
    for _ in range(draw.draw(st.integers(1, 4))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            read_image(io.BytesIO(data), max_pixels=2**20)
        except ImageError as error:
            message = str(error)
        else:
            message = ""
    assert "\n" not in message


# -------------------------------------------------------------------------------------------- alpha


@pytest.mark.parametrize("size", [(H, W), (1, 1), (1, 9), (9, 1)])
def test_alpha_is_lossless(size: tuple[int, int]) -> None:
    """Alpha is coded without loss."""
    alpha = ALPHA[: size[0], : size[1]]
    for plane in (
        alpha,
        np.where(alpha > 99, 255, 0).astype(np.uint8),
        np.zeros_like(alpha),
        alpha.T.copy().T,
    ):
        data = encode_alpha(plane)
        assert np.array_equal(decode_alpha(data, size[1], size[0]), plane)


def test_hard_edged_alpha_is_small() -> None:
    """Guards against a mask that takes more bytes than the colours."""
    mask = np.zeros((512, 512), np.uint8)
    mask[100:300, 50:400] = 255
    assert len(encode_alpha(mask)) < 300


def test_bad_alpha_sections() -> None:
    """Every malformed alpha section is a FormatError, before its pixels are allocated."""
    good = encode_alpha(ALPHA)
    bad = [
        b"",
        b"x" * 100,
        good[:40],
        good[: len(good) // 2],
        good[:60] + b"\xff" + good[61:],
        encode_alpha(ALPHA[:, 1:]),
        stored(Image.fromarray(RGB)).getvalue(),
        stored(Image.fromarray(ALPHA), "TIFF").getvalue(),
        stored(Image.fromarray(SIXTEEN[..., 0])).getvalue(),
        stored(Image.fromarray(ALPHA), transparency=3).getvalue(),
        png(60_000, 60_000, 8, 0, b"\0").getvalue(),
    ]
    for data in bad:
        with pytest.raises(FormatError) as caught:
            decode_alpha(data, W, H)
        assert "\n" not in str(caught.value)


def test_alpha_is_one_complete_stream() -> None:
    """Guards against pictures whose alpha other readers would refuse, and against hidden bytes."""
    good = encode_alpha(ALPHA)
    end = good[-12:]
    assert end[4:8] == b"IEND"
    animated = io.BytesIO()
    plane = Image.fromarray(ALPHA)
    plane.save(animated, "PNG", save_all=True, append_images=[Image.fromarray(ALPHA ^ 255)])
    assert b"acTL" in animated.getvalue()
    bad = [
        good[:-12],
        good[:-4],
        good[:-1],
        good + b"x",
        good + end,
        good[:-12] + b"\0\0\0\x01IENDx" + zlib.crc32(b"IENDx").to_bytes(4, "big"),
        good[:-4] + bytes(4),
        good[:-12] + b"\xff\0\0\0teXt" + end,
        animated.getvalue(),
    ]
    for data in bad:
        with pytest.raises(FormatError, match="the alpha section is damaged"):
            decode_alpha(data, W, H)
    text = b"tEXtkey\0value"
    chunk = struct.pack(">I", len(text) - 4) + text + zlib.crc32(text).to_bytes(4, "big")
    assert np.array_equal(decode_alpha(good[:-12] + chunk + end, W, H), ALPHA)


def test_fill_transparent() -> None:
    """Invisible pixels become smooth, and visible ones do not change."""
    alpha = np.zeros((H, W), np.uint8)
    alpha[4:9, 5:30] = 1
    alpha[15:, 3:8] = 255
    before = RGB.copy()
    filled = fill_transparent(RGB, alpha)
    assert np.array_equal(RGB, before)
    assert np.array_equal(filled[alpha > 0], RGB[alpha > 0])
    rough = np.abs(np.diff(RGB.astype(int), axis=1))[(alpha[:, 1:] | alpha[:, :-1]) == 0].mean()
    smooth = np.abs(np.diff(filled.astype(int), axis=1))[(alpha[:, 1:] | alpha[:, :-1]) == 0].mean()
    assert smooth < rough / 8
    assert filled[alpha == 0].var() < RGB[alpha == 0].var() / 4
    assert filled.max() <= RGB[alpha > 0].max()


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (3, 1), (1, 17), (5, 7)])
def test_fill_transparent_at_small_sizes(size: tuple[int, int]) -> None:
    """Guards against failures at sizes of a few pixels."""
    pixels = np.full((*size, 3), 77, np.uint8)
    alpha = np.zeros(size, np.uint8)
    assert fill_transparent(pixels, alpha).var() == 0
    alpha[-1, -1] = 9
    assert np.array_equal(fill_transparent(pixels, alpha), pixels)
    assert np.array_equal(fill_transparent(pixels, alpha + 1), pixels)


# ------------------------------------------------------------------------------------------ tensors


def test_tensors_round_trip() -> None:
    """Pixels → tensor → pixels is the identity; values outside 0 to 1 are clamped."""
    x = to_tensor(RGB)
    assert x.shape == (1, 3, H, W)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    assert 0 <= x.min() <= x.max() <= 1
    assert np.array_equal(to_pixels(x), RGB)
    wild = torch.tensor([-1.0, 2.0, 0.5 / 255]).reshape(1, 3, 1, 1)
    assert to_pixels(wild).tolist() == [[[0, 255, 0]]]


@pytest.mark.parametrize("size", [(1, 1), (1, 65), (64, 64), (63, 130)])
def test_pad_and_crop(size: tuple[int, int]) -> None:
    """Padding repeats the last pixels, and adds as few as possible."""
    x = torch.rand(1, 3, *size)
    padded = pad(x, 64)
    assert padded.shape[2] % 64 == padded.shape[3] % 64 == 0
    assert padded.shape[2] - size[0] < 64
    assert torch.equal(padded[..., : size[0], : size[1]], x)
    assert torch.equal(padded[..., -1, -1], x[..., -1, -1])
    if size == (64, 64):
        assert padded.shape == x.shape


def test_to_grey_is_the_rounded_mean() -> None:
    """Guards against a tint of grey pictures; docs/format.md specifies the rounding."""
    grey = to_grey(RGB)
    assert np.array_equal(grey, three(np.rint(RGB.mean(axis=2)).astype(np.uint8)))
    assert np.array_equal(to_grey(three(GREY)), three(GREY))


@pytest.mark.parametrize(("module", "absent"), [("image", {"torch"}), ("picture", {"torch", "numpy", "PIL"})])
def test_import_does_not_need_torch(module: str, absent: set[str]) -> None:
    """Guards against a `sgacodec --help` that takes seconds."""
    code = f"import sys, sgacodec.{module}; print({absent!r} & sys.modules.keys() or 'none')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "none"


def test_pictures_are_records() -> None:
    """Guards against pictures that are changed while they are shared."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Picture(RGB).grey = True  # type: ignore[misc]


def test_postscript_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a program, which is what PostScript is, that a picture brings and Pillow has Ghostscript run."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given, **options: pytest.fail("Ghostscript was run"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(ImageError, match="PostScript"):
        read_image(io.BytesIO(eps))
