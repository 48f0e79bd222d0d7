"""The whole codec on real models: reports are true of files and decoded pictures; damaged files are refused."""

from __future__ import annotations

import dataclasses
import io
import itertools
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sgacodec
from sgacodec import api, bitstream, encoding, latents
from sgacodec.api import Codec, Settings
from sgacodec.image import read_image
from sgacodec.image_writer import write_image
from sgacodec.metrics import psnr
from sgacodec.models import recent
from sgacodec.models.catalogue import find_model
from sgacodec.models.file import read_model
from sgacodec.models.level import LevelModel, Model
from sgacodec.picture import ImageError, Picture
from sgacodec.refine.problem import Problem
from sgacodec.targets import CLOSE_PSNR

PLAIN = Settings(method="none")
KODAK = sorted((Path(__file__).parents[2] / "shared" / "data" / "kodak").glob("*.png"))
kodak = pytest.mark.skipif(not KODAK, reason="needs the 24 Kodak images, which are not distributed")


def encode(codec: Codec, picture: Picture, settings: Settings = PLAIN) -> api.Encoded:
    return codec.encode([picture], settings)[0]


def as_png(picture: Picture) -> Picture:
    """What is left of a picture after it has been written as PNG and read again."""
    stream = io.BytesIO()
    write_image(picture, stream)
    return read_image(io.BytesIO(stream.getvalue()))


def code_bits(codec: Codec, data: bytes) -> tuple[float, int]:
    """The model's estimate for the integers in a file, and the payload's bits."""
    file = bitstream.read(data)
    level = codec.levels.for_decoding(file)
    found = latents.unpack(level, file.z, file.y, file.height, file.width)
    return latents.code_length(level, found), 8 * (len(file.z) + len(file.y))


# ------------------------------------------------------------------------------------------------------ end to end


def assert_report_is_true(codec: Codec, picture: Picture, settings: Settings) -> api.Encoded:
    """The report of an encoding is true of its file and of the PNG that it decodes to."""
    encoded = encode(codec, picture, settings)
    decoded = codec.decode(encoded.data)
    shown = as_png(decoded.picture)
    height, width = picture.pixels.shape[:2]
    assert shown.pixels.shape == picture.pixels.shape
    assert encoded.report["bytes"] == len(encoded.data)
    assert encoded.report["bpp"] == pytest.approx(8 * len(encoded.data) / (height * width))
    assert (encoded.report["width"], encoded.report["height"]) == (width, height)
    if picture.alpha is None and not np.array_equal(shown.pixels, picture.pixels):
        assert psnr(shown.pixels, picture.pixels) == pytest.approx(encoded.report["psnr"], abs=0.001)
    assert decoded.report["level"] == encoded.report["level"]
    assert decoded.report["model_id"] == encoded.report["model_id"]
    return encoded


@pytest.mark.parametrize("lmbda", [0.0016, 0.0075, 0.045])
def test_photograph(codec: Codec, photograph: np.ndarray, lmbda: float) -> None:
    """Reported rates and PSNR are those of the file and of the decoded picture."""
    encoded = assert_report_is_true(codec, Picture(photograph), Settings(lmbda=lmbda, method="none"))
    estimate, bits = code_bits(codec, encoded.data)
    assert bits == pytest.approx(estimate, rel=0.005)
    assert encoded.report["psnr"] > 27


def test_more_lambda_is_more_quality(codec: Codec, photograph: np.ndarray) -> None:
    """A larger `--lambda` gives a larger file and a higher PSNR."""
    settings = [Settings(lmbda=v, method="none") for v in (0.002, 0.01, 0.04)]
    reports = [encode(codec, Picture(photograph[:256, :256]), s).report for s in settings]
    assert sorted(r["psnr"] for r in reports) == [r["psnr"] for r in reports]
    assert sorted(r["bytes"] for r in reports) == [r["bytes"] for r in reports]


@kodak
@pytest.mark.parametrize("path", KODAK[3:24:10], ids=lambda p: p.stem)
def test_kodak(codec: Codec, path: Path) -> None:
    """The published curves are those of real files."""
    encoded = assert_report_is_true(codec, read_image(path), PLAIN)
    estimate, bits = code_bits(codec, encoded.data)
    assert bits == pytest.approx(estimate, rel=0.005)


@pytest.mark.slow  # 24 photographs at three rates
@kodak
@pytest.mark.parametrize("path", KODAK, ids=lambda p: p.stem)
def test_all_of_kodak(codec: Codec, path: Path) -> None:
    """Reports are true for all of Kodak at low, medium and high rate."""
    for lmbda in (0.0016, 0.0075, 0.045):
        encoded = assert_report_is_true(codec, read_image(path), Settings(lmbda=lmbda, method="none"))
        estimate, bits = code_bits(codec, encoded.data)
        assert bits == pytest.approx(estimate, rel=0.005)


@pytest.mark.slow  # all 64 levels
@pytest.mark.parametrize(("name", "dead_zone"), [("lite", True), ("lite-refined", False)])
def test_more_lambda_is_more_bits_and_more_quality(photograph: np.ndarray, name: str, dead_zone: bool) -> None:
    """Bits and PSNR rise over all 64 levels, which the search for a target relies on."""
    model = read_model(find_model(name))
    picture = Picture(photograph[:384, :576])
    levels = [model.at(level) for level in range(len(model.gains))]
    problems = [Problem.of(level, picture, None, level.lmbda, "mse") for level in levels]
    starts = [dataclasses.replace(problem, dead_zone=dead_zone).start() for problem in problems]
    assert all(a.bits < b.bits for a, b in itertools.pairwise(starts))
    assert all(a.mse > b.mse for a, b in itertools.pairwise(starts))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 70), (129, 1), (17, 33), (64, 64), (65, 63)])
def test_any_size(codec: Codec, small: Codec, photograph: np.ndarray, height: int, width: int) -> None:
    """Guards against failures on icons, lines and sizes that are not multiples of 64."""
    for each in (codec, small):
        assert_report_is_true(each, Picture(photograph[100 : 100 + height, 100 : 100 + width]), PLAIN)


def test_flat_and_wild_pictures(codec: Codec) -> None:
    """Guards against failures where all symbols are zero, or most of them are escaped."""
    noise = np.random.default_rng(0).integers(0, 2, (64, 96, 3), dtype=np.uint8) * 255
    for pixels in (np.zeros((70, 70, 3), np.uint8), np.full((70, 70, 3), 255, np.uint8), noise):
        assert_report_is_true(codec, Picture(pixels), Settings(lmbda=0.045, method="none"))


def test_grey_alpha_and_metadata(codec: Codec, photograph: np.ndarray) -> None:
    """Grey stays grey; alpha, colour profile, EXIF and XMP survive."""
    crop = photograph[:90, :110]
    grey = np.repeat(crop[..., 1:2], 3, axis=2)
    encoded = assert_report_is_true(codec, Picture(grey, grey=True), PLAIN)
    shown = codec.decode(encoded.data).picture
    assert shown.grey
    assert (shown.pixels == shown.pixels[..., :1]).all()

    alpha = np.zeros(crop.shape[:2], np.uint8)
    alpha[20:60, 30:90] = 255
    alpha[60:70] = 99
    icc = Image.open(Path(__file__).parents[1] / "docs" / "images" / "coffee.png").info.get("icc_profile") or b"icc"
    full = Picture(crop, alpha=alpha, icc=icc, exif=b"II*\0\x08\0\0\0\0\0", xmp=b"<x:xmpmeta/>")
    encoded = encode(codec, full)
    shown = codec.decode(encoded.data).picture
    assert shown.alpha is not None
    assert np.array_equal(shown.alpha, alpha)
    assert (shown.icc, shown.exif, shown.xmp) == (full.icc, full.exif, full.xmp)
    visible = alpha > 0
    error = (shown.pixels.astype(float) - crop)[visible]
    assert -10 * np.log10(np.mean(error**2) / 255**2) == pytest.approx(encoded.report["psnr"], abs=0.001)


def test_invisible_picture(codec: Codec, photograph: np.ndarray) -> None:
    """Guards against a division by zero where no pixel is visible."""
    encoded = encode(codec, Picture(photograph[:40, :50], alpha=np.zeros((40, 50), np.uint8)))
    assert encoded.report["psnr"] is None
    alpha = codec.decode(encoded.data).picture.alpha
    assert alpha is not None
    assert not alpha.any()


def test_batch_is_the_single_images(small: Codec, photograph: np.ndarray) -> None:
    """A batch gives the files of single encodings, in the order of the pictures."""
    parts = [photograph[i : i + h, i : i + w] for i, h, w in ((0, 60, 70), (9, 64, 128), (30, 50, 90), (60, 200, 30))]
    pictures = [Picture(part) for part in parts]
    together = small.encode(pictures, PLAIN)
    for picture, encoded in zip(pictures, together, strict=True):
        assert encoded.data == encode(small, picture).data
        assert encoded.report["width"] == picture.pixels.shape[1]


def test_refined_and_unrefined_files_are_of_different_models(
    photograph: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a report of a model that was not used, and a refined file that is worse than an unrefined one."""
    automatic, picture = Codec(device="cpu"), Picture(photograph[:128, :128])
    refined = Settings(steps=30)
    models = {s.method: assert_report_is_true(automatic, picture, s).report["model"] for s in (PLAIN, refined)}
    assert models == {"none": "lite", "ssl": "lite-refined"}
    for model in ("lite", "lite-refined"):
        assert encode(Codec(model, device="cpu"), picture, refined).report["model"] == model

    monkeypatch.setattr(encoding, "refine", lambda level, problems, start, *_: (start, 0))
    unchanged = assert_report_is_true(automatic, picture, refined)
    assert unchanged.report["model"] == "lite"
    assert unchanged.data == encode(automatic, picture, PLAIN).data
    assert unchanged.report["rd_loss"] == unchanged.report["rd_loss_unrefined"]


@pytest.mark.parametrize("target", [{"target_bpp": 0.6}, {"target_psnr": 33.0}])
def test_a_target_is_met_with_two_models(photograph: np.ndarray, target: dict[str, float]) -> None:
    """Guards against a search that loses its way: unrefined encodings with one model, refined ones with another."""
    settings = Settings(steps=30, **target)  # type: ignore[arg-type]
    encoded = assert_report_is_true(Codec(device="cpu"), Picture(photograph[:192, :256]), settings)
    assert encoded.report["model"] == "lite-refined"
    if settings.target_bpp:
        assert 0.99 * settings.target_bpp <= encoded.report["bpp"] <= settings.target_bpp
    else:
        assert 0 <= encoded.report["psnr"] - 33.0 <= CLOSE_PSNR


def test_library_functions(photograph: np.ndarray, tmp_path: Path, tiny_path: Path) -> None:
    """The functions `encode` and `decode` take and give what the README says."""
    data = sgacodec.encode(Picture(photograph[:30, :40]), PLAIN, model=str(tiny_path))
    (tmp_path / "x.sga").write_bytes(data)
    assert np.array_equal(
        sgacodec.decode(data, model=str(tiny_path)).pixels,
        sgacodec.decode(tmp_path / "x.sga", model=str(tiny_path)).pixels,
    )


def test_what_the_library_functions_take(photograph: np.ndarray, tmp_path: Path, tiny_path: Path) -> None:
    """Paths, file objects and bytes; a TypeError names the others."""
    Image.fromarray(photograph[:30, :40]).save(tmp_path / "x.png")
    data = sgacodec.encode(tmp_path / "x.png", PLAIN, model=str(tiny_path))
    with open(tmp_path / "x.png", "rb") as file:
        assert sgacodec.encode(file, PLAIN, model=str(tiny_path)) == data
    plain = types.SimpleNamespace(read=io.BytesIO(data).read)  # as little as Pillow asks for, without `fileno`
    for source in (io.BytesIO(data), plain, bytearray(data), memoryview(data)):
        assert sgacodec.decode(source, model=str(tiny_path)).pixels.shape == (30, 40, 3)
    with pytest.raises(TypeError, match="not bytes"):
        sgacodec.encode(data)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not ndarray"):
        sgacodec.encode(photograph)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not int"):
        sgacodec.decode(7)  # type: ignore[arg-type]
    assert "encode" in dir(sgacodec)


def test_many_levels_stay_small(photograph: np.ndarray) -> None:
    """Guards against a sweep over λ that keeps gigabytes of folded levels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recent, "LEVELS_HELD", 2)
        fresh = Codec("lite", device="cpu")
        files = [
            encode(fresh, Picture(photograph[:64, :64]), Settings(lmbda=v, method="none")) for v in (0.002, 0.01, 0.04)
        ]
        assert len(fresh.levels._levels._values) == 2
        assert [fresh.decode(f.data).report["level"] for f in files] == [f.report["level"] for f in files]


def test_encoder_checks_its_own_bytes(small: Codec, photograph: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a faulty coder: a file that does not decode to the encoder's integers is never written."""
    pack = latents.pack

    def careless(level: LevelModel, y: torch.Tensor, z: torch.Tensor, _: object) -> latents.Payload:
        changed = y.clone()
        changed[0, 0, 0, 0] += 1
        return dataclasses.replace(pack(level, changed, z), digest=pack(level, y, z).digest)

    monkeypatch.setattr(latents, "pack", careless)
    with pytest.raises(RuntimeError, match="do not decode to the same integers"):
        encode(small, Picture(photograph[:64, :64]))


# ----------------------------------------------------------------------------------------------------------- tiles


def test_tiles_are_invisible(lite_level: LevelModel, tiny: Model, photograph: np.ndarray) -> None:
    """Guards against seams in large images, and decoded pixels other than those that were measured."""
    for level in (lite_level, tiny.at(1)):
        picture = photograph[:330, :460]
        y, z = latents.analyse(level, picture)
        found = latents.quantize(level, y, z)
        whole = latents.render(level, found, 330, 460)
        for tile in (64, 128, 192):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(latents, "_TILE", tile)
                patch.setattr(latents, "_SYNTHESIS_TILE", 64)
                y_tiled, z_tiled = latents.analyse(level, picture)
                tiled = latents.render(level, found, 330, 460)
                pieces = list(latents.preview(level, found))
            assert float((y - y_tiled).abs().max()) < 1e-3
            assert float((z - z_tiled).abs().max()) < 1e-3
            assert np.abs(whole.astype(int) - tiled).max() <= 1
            for (top, left, bottom, right), shown, _ in pieces:
                assert np.array_equal(shown[: 330 - top, : 460 - left], tiled[top:bottom, left:right])
            assert sum(bits for _, _, bits in pieces) == pytest.approx(latents.code_length(level, found), rel=1e-9)


@pytest.mark.parametrize(
    "fields",
    [
        {"pixels": np.zeros((0, 0, 3), np.uint8)},
        {"pixels": np.zeros((5, 0, 3), np.uint8)},
        {"pixels": np.zeros((5, 5), np.uint8)},
        {"pixels": np.zeros((5, 5, 4), np.uint8)},
        {"pixels": np.zeros((5, 5, 3))},
        {"alpha": np.zeros((4, 5), np.uint8)},
        {"alpha": np.zeros((5, 5))},
        {"exif": b""},
        {"icc": "text"},
    ],
)
def test_records_that_are_no_pictures(small: Codec, fields: dict[str, Any]) -> None:
    """Guards against errors from the depths of torch for arrays of a wrong type or shape."""
    picture = Picture(**{"pixels": np.zeros((5, 5, 3), np.uint8), **fields})
    with pytest.raises(ImageError, match="must be"):
        small.encode([picture], Settings(method="none"))
    assert small.encode([], Settings(method="none")) == []
