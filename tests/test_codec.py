"""The whole codec on real models: reports are true of files and decoded pictures; damaged files are refused."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import random
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from PIL import Image

from sgacodec import api, bitstream, latents
from sgacodec.api import Codec, Settings
from sgacodec.bitstream import FormatError
from sgacodec.image import read_image, write_image
from sgacodec.metrics import psnr
from sgacodec.models import cache
from sgacodec.models.catalogue import ModelNotFoundError, find_model
from sgacodec.models.file import read_model
from sgacodec.models.level import LevelModel, Model
from sgacodec.picture import Picture
from sgacodec.refine.problem import Problem

PLAIN = Settings(method="none")
KODAK = sorted((Path(__file__).parents[2] / "shared" / "data" / "kodak").glob("*.png"))
kodak = pytest.mark.skipif(not KODAK, reason="needs the Kodak photographs in ../shared/data/kodak")


@pytest.fixture(scope="module")
def codec() -> Codec:
    """The built-in model, as a user gets it."""
    return Codec("lite", device="cpu")


@pytest.fixture(scope="module")
def small(tiny_path: Path) -> Codec:
    """The small model of the golden files."""
    return Codec(str(tiny_path), device="cpu")


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
def test_more_lambda_is_more_bits_and_more_quality(photograph: np.ndarray) -> None:
    """Bits and PSNR rise over all 64 levels, which the search for a target relies on."""
    model = read_model(find_model("lite"))
    picture = Picture(photograph[:384, :576])
    levels = [model.at(level) for level in range(len(model.gains))]
    starts = [Problem.of(level, picture, None, level.lmbda, "mse").start() for level in levels]
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


def test_library_functions(photograph: np.ndarray, tmp_path: Path, tiny_path: Path) -> None:
    """The functions `encode` and `decode` take and give what the README says."""
    data = api.encode(Picture(photograph[:30, :40]), PLAIN, model=str(tiny_path))
    (tmp_path / "x.sga").write_bytes(data)
    assert np.array_equal(
        api.decode(data, model=str(tiny_path)).pixels, api.decode(tmp_path / "x.sga", model=str(tiny_path)).pixels
    )


def test_many_levels_stay_small(photograph: np.ndarray) -> None:
    """Guards against a sweep over λ that keeps gigabytes of folded levels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "_LEVELS_HELD", 2)
        fresh = Codec("lite", device="cpu")
        files = [
            encode(fresh, Picture(photograph[:64, :64]), Settings(lmbda=v, method="none")) for v in (0.002, 0.01, 0.04)
        ]
        assert len(fresh.levels._levels) == 2
        assert [fresh.decode(f.data).report["level"] for f in files] == [f.report["level"] for f in files]


def test_encoder_checks_its_own_bytes(small: Codec, photograph: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a faulty coder: a file that does not decode to the encoder's integers is never written."""
    pack = latents.pack

    def careless(level: LevelModel, y: torch.Tensor, z: torch.Tensor) -> latents.Payload:
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
                pieces = list(latents.preview(level, y, z))
            assert float((y - y_tiled).abs().max()) < 1e-3
            assert float((z - z_tiled).abs().max()) < 1e-3
            assert np.abs(whole.astype(int) - tiled).max() <= 1
            for (top, left, bottom, right), shown, _ in pieces:
                assert np.array_equal(shown[: 330 - top, : 460 - left], tiled[top:bottom, left:right])
            assert sum(bits for _, _, bits in pieces) == pytest.approx(latents.code_length(level, found), rel=1e-9)


# ------------------------------------------------------------------------------------------------------- bad files


def sealed(data: bytes) -> bytes:
    """The file with a right checksum, as somebody would craft it."""
    return data[:-4] + zlib.crc32(data[:-4]).to_bytes(4, "little")


def test_every_changed_byte_and_every_truncation(small: Codec, photograph: np.ndarray) -> None:
    """Guards against damaged files that decode to a wrong picture without an error."""
    data = encode(small, Picture(photograph[:40, :50])).data
    assert len(data) < 2000
    for i in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            with pytest.raises(FormatError):
                small.decode(data[:i] + bytes([data[i] ^ flip]) + data[i + 1 :])
        with pytest.raises(FormatError):
            small.decode(data[:i])


def misbehaves(codec: Codec, data: bytes) -> bool:
    """Whether a file is refused in more than one line; any exception but the documented ones passes through."""
    try:
        codec.decode(data, max_pixels=2**18)
    except (FormatError, ModelNotFoundError) as error:
        return "\n" in str(error)
    return False


def test_damage_behind_a_right_checksum(small: Codec, photograph: np.ndarray) -> None:
    """Guards against crafted files that crash a service: anybody can compute the checksum."""
    alpha = np.zeros((40, 50), np.uint8)
    alpha[10:] = 255
    data = encode(small, Picture(photograph[:40, :50], alpha=alpha)).data
    chance = random.Random(4)
    for _ in range(150):
        changed = bytearray(data)
        for _ in range(chance.choice((1, 1, 2, 6))):
            changed[chance.randrange(4, len(changed) - 4)] = chance.randrange(256)
        end = chance.randrange(12, len(changed)) if chance.random() < 0.3 else len(changed)
        assert not misbehaves(small, sealed(bytes(changed[:end])))


@pytest.mark.slow  # 2,000 decodings of a photograph
def test_two_thousand_mutated_files(codec: Codec, photograph: np.ndarray) -> None:
    """Guards against rare damage of a real file that gives a traceback, hangs or takes all memory."""
    data = encode(codec, Picture(photograph[:256, :256])).data
    chance = random.Random(5)
    for i in range(2000):
        changed = bytearray(data)
        for _ in range(chance.choice((1, 1, 2, 6, 40))):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        part = bytes(changed[: chance.randrange(len(changed))]) if chance.random() < 0.3 else bytes(changed)
        assert not misbehaves(codec, sealed(part) if i % 2 and len(part) > 4 else part)


def test_unknown_model(codec: Codec, small: Codec, photograph: np.ndarray, tmp_path: Path, tiny_path: Path,
                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """The error for a model that is not installed names its id; files are never decoded with another model."""
    monkeypatch.setenv("SGACODEC_MODELS", str(tmp_path))
    data = encode(small, Picture(photograph[:30, :30])).data
    with pytest.raises(ModelNotFoundError, match=data[4:8].hex()):
        Codec(device="cpu").decode(data)
    with pytest.raises(ModelNotFoundError, match=data[4:8].hex()):
        codec.decode(data)
    shutil.copy(tiny_path, tmp_path)
    assert Codec(device="cpu").decode(data).picture.pixels.shape == (30, 30, 3)


def test_built_in_model_wins_over_a_user_model_of_its_name(tiny_path: Path, tmp_path: Path, tiny: Model,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Guards against a name that means one model with --model and another without."""
    from sgacodec.models.file import write_model

    write_model(dataclasses.replace(tiny, metadata={**tiny.metadata, "name": "lite"}), tmp_path / "lite.safetensors")
    monkeypatch.setenv("SGACODEC_MODELS", str(tmp_path))
    ids = {Codec(model, device="cpu").levels.for_encoding(PLAIN.lmbda).model_id for model in (None, "lite")}
    assert len(ids) == 1
    assert tiny.id not in ids


def test_level_that_the_model_does_not_have(small: Codec, photograph: np.ndarray) -> None:
    """Guards against tracebacks from a damaged level byte."""
    file = bitstream.read(encode(small, Picture(photograph[:30, :30])).data)
    for level in (3, 63):
        with pytest.raises(FormatError, match=f"level {level}"):
            small.decode(bitstream.write(dataclasses.replace(file, level=level)))


@pytest.mark.parametrize(("width", "height"), [(2**28, 1), (1, 2**28), (2**24, 16)])
def test_slivers(small: Codec, photograph: np.ndarray, width: int, height: int) -> None:
    """Guards against twenty bytes that take 64 times the memory that the pixel limit allows."""
    file = bitstream.read(encode(small, Picture(photograph[:30, :30])).data)
    with pytest.raises(FormatError, match="--max-pixels"):
        small.decode(bitstream.write(dataclasses.replace(file, width=width, height=height)))


def test_pixel_limit(small: Codec, photograph: np.ndarray) -> None:
    """The limit counts the pixels of the image, not those of its padding."""
    data = encode(small, Picture(photograph[:30, :40])).data
    assert small.decode(data, max_pixels=1200).picture.pixels.shape == (30, 40, 3)
    with pytest.raises(FormatError, match="--max-pixels"):
        small.decode(data, max_pixels=1199)


def test_wrong_size_for_the_payload(small: Codec, photograph: np.ndarray) -> None:
    """Guards against a wrong picture where the size in the header is not that of the payload."""
    file = bitstream.read(encode(small, Picture(photograph[:256, :256])).data)
    with pytest.raises(FormatError, match="damaged"):
        small.decode(bitstream.write(dataclasses.replace(file, width=64, height=64)))


# --------------------------------------------------------------------------------------------- stability of the format


CASES = ("colour", "grey-alpha")


def golden_picture(case: str, photograph: np.ndarray) -> tuple[Picture, Settings]:
    crop = photograph[130:200, 230:350]
    if case == "colour":
        return Picture(crop, exif=b"II*\0\x08\0\0\0\0\0"), Settings(lmbda=0.045, method="none")
    alpha = np.tile(np.arange(90, dtype=np.uint8), (33, 1))
    return Picture(np.repeat(crop[:33, :90, :1], 3, axis=2), grey=True, alpha=alpha), Settings(
        lmbda=0.0016, method="none"
    )


@pytest.mark.parametrize("case", CASES)
def test_golden_files(case: str, small: Codec, photograph: np.ndarray, regenerate: bool) -> None:
    """Files of format version 1 decode to the same integers in every later version."""
    path, record = GOLDEN / f"{case}.sga", GOLDEN / f"{case}.json"
    if regenerate:
        path.write_bytes(encode(small, *golden_picture(case, photograph)).data)
    decoded = small.decode(path.read_bytes())
    picture = decoded.picture
    exact = {
        "integers": decoded.report["integers"],
        "alpha": None if picture.alpha is None else hashlib.sha256(picture.alpha.tobytes()).hexdigest(),
        "exif": None if picture.exif is None else picture.exif.hex(),
        "grey": picture.grey,
    }
    if regenerate:
        record.write_text(json.dumps(exact, indent=1) + "\n", encoding="utf-8")
        Image.fromarray(picture.pixels).save(GOLDEN / f"{case}.png", optimize=True)
    assert exact == json.loads(record.read_text("utf-8"))
    with Image.open(GOLDEN / f"{case}.png") as shown:  # the pixels may differ by 1 between machines
        assert np.abs(np.array(shown).astype(int) - picture.pixels).max() <= 1


def test_golden_file_with_four_threads(small: Codec) -> None:
    """Guards against integers that depend on the number of threads."""
    data = (GOLDEN / "colour.sga").read_bytes()
    expected = json.loads((GOLDEN / "colour.json").read_text("utf-8"))["integers"]
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert small.decode(data).report["integers"] == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.cuda
def test_files_travel_between_devices(photograph: np.ndarray, tiny_path: Path) -> None:
    """Files encoded on CUDA decode on a CPU to the same integers, and the other way round."""
    on_cpu, on_cuda = Codec("lite", device="cpu"), Codec("lite", device="cuda")
    assert on_cuda.levels.for_encoding(0.0075).exact.device.type == "cuda"
    for lmbda in (0.0016, 0.0075, 0.045):
        for one, other in ((on_cpu, on_cuda), (on_cuda, on_cpu)):
            data = encode(one, Picture(photograph), Settings(lmbda=lmbda, method="none")).data
            a, b = one.decode(data), other.decode(data)
            assert a.report["integers"] == b.report["integers"]
            assert np.abs(a.picture.pixels.astype(int) - b.picture.pixels).max() <= 1
    golden = Codec(str(tiny_path), device="cuda").decode((GOLDEN / "colour.sga").read_bytes())
    assert golden.report["integers"] == json.loads((GOLDEN / "colour.json").read_text("utf-8"))["integers"]
