"""Pillow opens and saves .sga files once the plugin is imported."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN
from PIL import Image, ImageCms
from test_light import light

import sgacodec
from sgacodec import pillow_plugin
from sgacodec.image import read_image
from sgacodec.image_writer import write_image
from sgacodec.picture import ImageError

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
FAST = {"method": "none", "model": "lite", "device": "cpu"}


@pytest.fixture(scope="module")
def image(photograph: np.ndarray) -> Image.Image:
    return Image.fromarray(photograph[:50, :70])


def saved(im: Image.Image, **options: object) -> bytes:
    stream = io.BytesIO()
    im.save(stream, format="SGA", **(FAST | options))
    return stream.getvalue()


def test_save_and_open(image: Image.Image, tmp_path: Path) -> None:
    """Guards against pixels that differ from those of `sgacodec.decode`, and files that stay open after loading."""
    path = tmp_path / "x.sga"
    image.save(path, lmbda=0.03, method="ssl", steps=30, model="lite-refined", device="cpu")
    with Image.open(path) as im:
        assert (im.format, im.size, im.mode) == ("SGA", (70, 50), "RGB")
        assert im.get_format_mimetype() == "image/x-sga"
        pixels = np.array(im)
    assert np.array_equal(pixels, sgacodec.decode(path).pixels)
    assert np.abs(pixels.astype(int) - np.array(image)).mean() < 8
    assert path.read_bytes() != saved(image, lmbda=0.03)  # steps count


def test_opening_decodes_no_pixels(image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a listing of a folder that decodes every picture in it."""
    data = saved(image)

    def fail(*args: object) -> None:
        raise AssertionError("decoded")

    with monkeypatch.context() as patch:
        patch.setattr("sgacodec.decoding.shared_decoder", fail)
        im = Image.open(io.BytesIO(data))
        assert im.size == (70, 50)
        with pytest.raises(AssertionError, match="decoded"):
            im.load()
    assert im.resize((7, 5)).size == (7, 5)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1", "CMYK", "I;16"])
def test_modes(mode: str, image: Image.Image) -> None:
    """Grey stays grey, alpha is lossless, other modes are converted; what is lost is a warning."""
    if mode == "I;16":
        source = Image.fromarray(np.array(image.convert("L")).astype(np.uint16) * 257)
    else:
        source = image.convert(mode)
    if mode in ("LA", "RGBA"):
        source.putalpha(Image.linear_gradient("L").resize(image.size))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = saved(source)
    assert bool(caught) == (mode in ("CMYK", "I;16"))
    im = Image.open(io.BytesIO(data))
    expected = {"L": "L", "LA": "LA", "RGBA": "RGBA", "1": "L", "I;16": "L"}.get(mode, "RGB")
    assert im.mode == expected
    im.load()
    assert im.mode == expected
    if mode in ("LA", "RGBA"):
        assert im.getchannel("A").tobytes() == source.getchannel("A").tobytes()


def test_metadata(image: Image.Image) -> None:
    """ICC, EXIF, XMP and resolution travel through `info`; options replace or remove them."""
    exif = Image.Exif()
    exif[274], exif[270] = 6, "a cup"
    jpeg = io.BytesIO()
    image.save(jpeg, format="JPEG", exif=exif, icc_profile=ICC, xmp=b"<x/>", dpi=(300, 300))
    im = Image.open(io.BytesIO(saved(Image.open(jpeg))))
    assert (im.info["icc_profile"], im.info["xmp"]) == (ICC, b"<x/>")
    assert im.info["dpi"] == (300, 300)
    assert (im.getexif()[274], im.getexif()[270]) == (6, "a cup")
    other = Image.Exif()
    other[270] = "another"
    again = Image.open(io.BytesIO(saved(im, exif=other, xmp=None, icc_profile=None)))
    assert again.getexif()[270] == "another"
    assert not {"xmp", "icc_profile"} & set(again.info)
    im.load()
    assert im.info["icc_profile"] == ICC


def test_a_file_saved_onto_itself(image: Image.Image, tmp_path: Path) -> None:
    """Pillow empties the file before it calls the plugin: its content must have been read."""
    path = tmp_path / "x.sga"
    image.save(path, **FAST)
    im = Image.open(path)
    im.save(path, **FAST)
    assert Image.open(path).convert("L").size == image.size


def test_damage_is_an_os_error(image: Image.Image) -> None:
    """Programs that open any image catch OSError."""
    data = saved(image)
    for damaged in (data[:30], data[:-1] + b"\0", b"SGA\x02" + data[4:]):
        with pytest.raises(OSError, match=r"truncated|damaged|not supported"):
            Image.open(io.BytesIO(damaged))
    unknown = Image.open(GOLDEN / "colour.sga")
    with pytest.raises(OSError, match="which is not installed"):
        unknown.load()
    with pytest.raises(OSError, match="which is not installed"):
        unknown.load()


@pytest.mark.parametrize("wrong", [{"steps": -1}, {"method": "best"}, {"lmbda": 0}, {"method": "ssl", "classes": 4}])
def test_wrong_options(wrong: dict[str, object], image: Image.Image) -> None:
    with pytest.raises(ValueError, match=r"must|allowed"):
        saved(image, **({"method": "ssl"} | wrong))


def test_our_own_encoder_refuses_sga_files(image: Image.Image, tmp_path: Path) -> None:
    """Guards against coding a coded picture again, in a process that has imported the plugin."""
    path = tmp_path / "x.sga"
    image.save(path, **FAST)
    with pytest.raises(ImageError, match=r"a \.sga file"):
        read_image(path)
    with pytest.raises(ImageError, match=r"cannot write images of type \.sga"):
        write_image(sgacodec.decode(path), tmp_path / "y.sga")


def test_without_torch(image: Image.Image, tmp_path: Path) -> None:
    """A receiver opens files; saving says what is missing."""
    path = tmp_path / "x.sga"
    image.save(path, **FAST)
    code = f"""
from PIL import Image
import sgacodec.pillow_plugin
im = Image.open({str(path)!r})
print(im.convert("L").size)
try:
    im.save({str(tmp_path / "y.sga")!r})
except ImportError as error:
    print(error)
"""
    said = "(70, 50)\nsgacodec.Codec needs torch, which is not installed: pip install sgacodec\n"
    assert light("-c", code).stdout == said
    assert not (tmp_path / "y.sga").exists()


def test_nothing_is_registered_without_the_import() -> None:
    """Guards against a side effect of `import sgacodec` on Pillow."""
    program = "import sgacodec.decoding, sgacodec.image; from PIL import Image; Image.init(); print(*Image.OPEN)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert "PNG" in done.stdout.split()
    assert pillow_plugin.FORMAT not in done.stdout.split()
