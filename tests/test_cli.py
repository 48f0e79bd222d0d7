"""The command line, one file at a time: flags, streams, exit codes, JSON. The codec is that of fake_codec."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import fake_codec
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image, ImageOps

from sgacodec import bitstream
from sgacodec.bitstream import SgaFile
from sgacodec.cli import main
from sgacodec.cli.manual import manual

ROOT = Path(__file__).parent.parent
ENCODE_KEYS = [
    "input",
    "output",
    "width",
    "height",
    "bytes",
    "bpp",
    "psnr",
    "lambda",
    "level",
    "model",
    "method",
]
ENCODE_KEYS += ["classes", "steps", "seconds", "device", "rd_loss", "rd_loss_unrefined"]
INFO_KEYS = ["format_version", "model", "model_id", "level", "lambda", "width", "height", "bytes", "sections"]

Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Run]:
    """Run the command line in an empty folder, with the fake codec and no installed models."""
    from sgacodec.cli import batch

    monkeypatch.setitem(sys.modules, "sgacodec.api", fake_codec.install())
    monkeypatch.setitem(sys.modules, "sgacodec.decoding", fake_codec.decoding())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SGACODEC_MODELS", str(tmp_path / "models"))
    fake_codec.CALLS.clear()
    fake_codec.OPENED.clear()
    batch.open_codec.cache_clear()
    batch.open_decoder.cache_clear()

    def invoke(*args: str, data: bytes | None = None) -> Result:
        result = CliRunner().invoke(main, list(args), input=data)
        assert "Traceback" not in result.output
        return result

    yield invoke
    batch.open_codec.cache_clear()  # of fake codecs
    batch.open_decoder.cache_clear()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return picture(tmp_path / "photo.png")


def picture(path: Path, first: int = 100, size: tuple[int, int] = (20, 12)) -> Path:
    pixels = np.full((size[1], size[0], 3), first, np.uint8)
    pixels[1:, 1:] = np.random.default_rng(0).integers(0, 255, (size[1] - 1, size[0] - 1, 3))
    Image.fromarray(pixels).save(path)
    return path


def settings_of(run: Run, *flags: str) -> Any:
    result = run("encode", "photo.png", "out.sga", "--device", "cpu", *flags)
    assert result.exit_code == 0, result.output
    return fake_codec.CALLS[-1][0]


# --------------------------------------------------------------------------------------------- the main job


def test_a_photograph_there_and_back(run: Run, photo: Path) -> None:
    """Encode and decode with paths give the pixels back."""
    assert run("encode", "photo.png", "out.sga").exit_code == 0
    assert run("decode", "out.sga", "out.png").exit_code == 0
    assert np.array_equal(np.asarray(Image.open("out.png")), np.asarray(Image.open(photo)))


def test_bare_encode_uses_the_documented_defaults(run: Run, photo: Path) -> None:
    """The defaults of the command line are those in the README and docs/cli.md."""
    settings = settings_of(run)
    assert settings == fake_codec.Settings()
    assert (settings.lmbda, settings.method, settings.rounding_classes) == (0.0075, "ssl", 2)
    shown = " ".join(run("encode", "--help").stdout.split())
    assert f"{settings.on_device('cuda').annealing_steps} on a GPU" in shown
    assert f"{settings.on_device('cpu').annealing_steps} on a CPU" in shown
    assert fake_codec.OPENED == [(None, "cpu")]


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        ("--lambda 0.01", "lmbda", 0.01),
        ("--level-lambda 0.02", "level_lambda", 0.02),
        ("--target-bpp 0.5", "target_bpp", 0.5),
        ("--target-size 40000", "target_size", 40000),
        ("--target-psnr 33.5", "target_psnr", 33.5),
        ("--method cosine", "method", "cosine"),
        ("--classes 3", "classes", 3),
        ("--steps 7", "steps", 7),
        ("--effort 0", "steps", 0),
        ("--effort 1", "steps", 50),
        ("--effort 2", "steps", 150),
        ("--effort 3", "steps", 500),
        ("--effort 4", "steps", 2000),
        ("--time-limit 2.5", "time_limit", 2.5),
        ("--seed 3", "seed", 3),
        ("--tau-max 0.5", "tau_max", 0.5),
        ("--schedule exp --rate 0.002", "rate", 0.002),
        ("--lr 0.01", "lr", 0.01),
        ("--schedule sga", "schedule", "sga"),
        ("--rounds 0", "rounds", 0),
        ("--ssl-a 1.4", "ssl_a", 1.4),
        ("--classes 3 --r 0.9", "r", 0.9),
        ("--classes 3 --n 2", "n", 2.0),
        ("--metric ms-ssim", "metric", "ms-ssim"),
    ],
)
def test_a_flag_reaches_the_encoder(run: Run, photo: Path, flags: str, field: str, value: object) -> None:
    """Every option of the encoder arrives in its settings."""
    assert getattr(settings_of(run, *flags.split(" ")), field) == value


def test_model_and_device_reach_the_codec(run: Run, photo: Path) -> None:
    """Guards against coding with another model or device than the one named."""
    run("encode", "photo.png", "out.sga", "--model", "other", "--device", "cuda:1")
    run("decode", "out.sga", "out.png", "--model", "third", "--device", "cpu")
    assert fake_codec.OPENED == [("other", "cuda:1"), ("third", "cpu")]


def test_strip_drops_metadata_before_encoding(run: Run, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against publishing metadata that --strip should drop."""
    with_orientation(photo, 6)
    settings_of(run)
    settings_of(run, "--strip")
    kept, stripped = (call[3][0] for call in fake_codec.CALLS)
    assert kept.exif is not None
    assert (stripped.icc, stripped.exif, stripped.xmp) == (None, None, None)
    assert stripped.pixels.shape == (20, 12, 3)


def with_orientation(path: Path, orientation: int) -> None:
    """Write the orientation into an image file, and leave its pixels."""
    tags = Image.Exif()
    tags[274] = orientation
    with Image.open(path) as im:
        im.load()
    im.save(path, exif=tags)


@pytest.mark.parametrize("size", [(20, 12), (16, 16)])
@pytest.mark.parametrize("own", [None, 1, 3, 6])
@pytest.mark.parametrize("turn", [None, 6, 8])
@pytest.mark.parametrize("strip", [False, True])
def test_the_mask_is_turned_with_the_picture(
    run: Run, photo: Path, size: tuple[int, int], own: int | None, turn: int | None, strip: bool
) -> None:
    """Guards against weights at the wrong place: in the picture as it is shown, mask and pixels lie on each other."""
    picture(photo, size=size)
    pixels = np.asarray(Image.open(photo))
    if turn:
        with_orientation(photo, turn)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(photo)))
    mask = Image.fromarray(shown if own else pixels)  # with an orientation of its own, it is one of the shown picture
    if own == 6:
        mask = mask.transpose(Image.Transpose.ROTATE_90)
    elif own == 3:
        mask = mask.transpose(Image.Transpose.ROTATE_180)
    mask.save("mask.png")
    if own:
        with_orientation(Path("mask.png"), own)
    settings_of(run, "--roi", "mask.png", *(["--strip"] if strip else []))
    _, _, (weights,), (coded,) = fake_codec.CALLS[-1]
    assert np.array_equal(coded.pixels, shown if strip else pixels)
    assert np.allclose(weights, coded.pixels.mean(axis=2) / 255)


def test_a_mask_of_the_shown_picture_fits(run: Run, photo: Path) -> None:
    """Guards against "the mask has 12×20 pixels" for a mask that an editor made of the upright picture."""
    with_orientation(photo, 6)
    shown = ImageOps.exif_transpose(Image.open(photo))
    shown.save("mask.png", exif=b"")
    settings_of(run, "--roi", "mask.png")
    _, _, (weights,), (coded,) = fake_codec.CALLS[-1]
    assert np.allclose(weights, coded.pixels.mean(axis=2) / 255)


def test_roi_gives_the_weights_of_the_pixels(run: Run, photo: Path) -> None:
    """Grey levels of the mask become weights of the pixels; a mask of another size is an error."""
    mask = np.zeros((12, 20), np.uint8)
    mask[:6] = 255
    Image.fromarray(mask).save("mask.png")
    settings_of(run, "--roi", "mask.png")
    weights = fake_codec.CALLS[-1][2][0]
    assert weights.shape == (12, 20)
    assert weights[0, 0] == 1
    assert weights[11, 0] == 0
    Image.fromarray(mask[:5]).save("small.png")
    result = run("encode", "photo.png", "out.sga", "--device", "cpu", "--roi", "small.png")
    assert result.exit_code == 1
    assert "20×5" in result.stderr


def test_format_chooses_the_type_of_the_image(run: Run, photo: Path) -> None:
    """--format and the suffix of OUT choose the image format."""
    run("encode", "photo.png", "a.sga")
    assert run("decode", "a.sga", "a.ppm").exit_code == 0
    assert run("decode", "a.sga", "b.bin", "--format", "ppm").exit_code == 0
    assert run("decode", "a.sga", "-", "--format", "ppm").stdout_bytes.startswith(b"P6")
    assert Path("a.ppm").read_bytes() == Path("b.bin").read_bytes()
    assert run("decode", "a.sga", "--out-dir", "d", "--format", "ppm").exit_code == 0
    assert Path("d/a.ppm").exists()


@pytest.mark.parametrize("flags", [[], ["--strip"]])
@pytest.mark.parametrize("suffix", ["png", "ppm"])
def test_decode_reports_the_written_file(
    run: Run, photo: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, flags: list[str]
) -> None:
    """Guards against sizes of before the orientation was applied; --strip of decode does what that of encode does."""
    tags = Image.Exif()
    tags[271], tags[274] = "Maker", 6
    real = fake_codec.Codec.decode

    def decode(self: fake_codec.Codec, data: bytes, *, max_pixels: int) -> fake_codec.Decoded:
        decoded = real(self, data, max_pixels=max_pixels)
        return dataclasses.replace(decoded, picture=dataclasses.replace(decoded.picture, exif=tags.tobytes()[6:]))

    monkeypatch.setattr(fake_codec.Codec, "decode", decode)
    run("encode", "photo.png", "out.sga", "--device", "cpu")
    result = run("decode", "out.sga", f"out.{suffix}", "--json", *flags)
    report = json.loads(result.stdout)
    with Image.open(f"out.{suffix}") as im:
        assert (report["width"], report["height"]) == im.size
        assert report["format"] == im.format
        assert dict(im.getexif()) == ({271: "Maker", 274: 6} if suffix == "png" and not flags else {})
        upright = ImageOps.exif_transpose(im)
    assert report["bytes"] == Path(f"out.{suffix}").stat().st_size
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(Image.open(photo)), -1))
    assert ("PPM holds no EXIF" in result.stderr) == (suffix == "ppm" and not flags)


def test_the_real_codec_from_pixels_to_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a command line that is tested only with the fake codec."""
    monkeypatch.chdir(tmp_path)
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8))
    smooth.resize((90, 60), Image.Resampling.BICUBIC).save("photo.png")
    flags = ["--device", "cpu", "--json"]
    reports = []
    for more in (["--method", "none"], ["--steps", "4"], ["--effort", "0"]):
        result = CliRunner().invoke(main, ["encode", "photo.png", "out.sga", *flags, *more])
        assert result.exit_code == 0, result.output
        reports.append(json.loads(result.stdout))
        assert [key for key in ENCODE_KEYS if key not in reports[-1]] == []
    assert reports[1]["rd_loss"] <= reports[1]["rd_loss_unrefined"]
    assert reports[2]["rd_loss"] == reports[2]["rd_loss_unrefined"] == reports[0]["rd_loss"]
    info = json.loads(CliRunner().invoke(main, ["info", "--json", "out.sga"]).stdout)
    assert (info["model"], info["level"]) == (reports[2]["model"], reports[2]["level"])
    assert CliRunner().invoke(main, ["decode", "out.sga", "out.png", *flags]).exit_code == 0
    pixels = [np.asarray(Image.open(name), dtype=float) for name in ("photo.png", "out.png")]
    psnr = 10 * np.log10(255**2 / np.mean((pixels[0] - pixels[1]) ** 2))
    assert psnr == pytest.approx(reports[2]["psnr"], abs=1e-3)
    for line in (
        "--classes 3 --method atanh",
        "--method none --ssl-a 2",
        "--method none --rounds 2",
        "--metric ms-ssim --rounds 2",
        "--rate 0.1 --schedule cold",
    ):
        assert CliRunner().invoke(main, ["encode", "photo.png", "out.sga", *line.split(" ")]).exit_code == 2


# ----------------------------------------------------------------------------------------------------- usage


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("encode", "missing input"),
        ("encode photo.png", "where should"),
        ("encode a.png b.png c.png", "--out-dir"),
        ("encode photo.png b.png", "--out-dir"),
        ("decode a.sga b.sga", "--out-dir"),
        ("encode . out.sga", "folder"),
        ("encode photo.png .", "--out-dir"),
        ("encode - --out-dir d", "standard input"),
        ("encode photo.png out.sga --steps 5 --effort 1", "exclude"),
        ("encode photo.png out.sga --lambda 0.01 --target-bpp 1", "exclude"),
        ("encode photo.png out.sga --target-psnr 30 --target-size 100", "exclude"),
        ("encode photo.png out.sga --lambda 2", "lambda"),
        ("encode photo.png out.sga --lambda nan", "finite"),
        ("encode photo.png out.sga --target-bpp inf", "finite"),
        ("encode photo.png out.sga --lr -1", "lr"),
        ("encode photo.png out.sga --classes 4", "classes"),
        ("encode photo.png out.sga --classes 3 --method atanh", "atanh"),
        ("encode photo.png out.sga --method best", "ssl"),
        ("encode photo.png out.sga --method none --classes 2", "Error: --classes has no meaning with method none\n"),
        ("encode photo.png out.sga --method none --steps 5", "Error: --steps has no meaning with method none\n"),
        ("encode photo.png out.sga --method none --effort 2", "Error: --effort has no meaning with --method none\n"),
        (
            "encode photo.png out.sga --method none --time-limit 5",
            "Error: --time-limit has no meaning",
        ),
        ("encode photo.png out.sga --method none --tau-max 1", "Error: --tau-max has no meaning with method none\n"),
        ("encode photo.png out.sga --metric ms-ssim --rounds 1", "Error: --rounds has no meaning with metric ms-ssim"),
        ("eval photo.png --out d --method none --steps 5", "--steps has no meaning with --method none"),
        ("eval photo.png --out d --method none --classes 3", "--classes has no meaning with --method none"),
        ("encode photo.png out.sga --device gpu", "cuda"),
        ("encode photo.png out.sga --jobs 0", "jobs"),
        ("encode photo.png out.sga --max-pixels 0", "max-pixels"),
        ("encode photo.png --files-from nix --out-dir d", "nix"),
        ("encode photo.png photo.png --out-dir d", "photo"),
        ("encode photo.png --out-dir photo.png", "not a folder"),
        ("encode photo.png out.sga --roi absent.png", "absent.png"),
        ("encode photo.png out.sga --effort 0 --roi photo.png", "--roi has no meaning without refinement"),
        ("encode photo.png ", "a name is empty"),
        ("encode photo.png --out-dir ", "a name is empty"),
        ("encode photo.png out.sga --wrong", "--wrong"),
        ("decode photo.png out.txt", "txt"),
        ("decode photo.png out.png --format docx", "docx"),
        ("info", "FILE"),
        ("wrong", "wrong"),
    ],
)
def test_wrong_usage_is_told_before_any_work(run: Run, photo: Path, line: str, said: str) -> None:
    """Guards against an hour of refinement, or an overwritten file, after a typing error."""
    before = photo.read_bytes()
    result = run(*line.split(" "))
    assert result.exit_code == 2
    assert said in result.stderr
    assert not fake_codec.CALLS
    assert photo.read_bytes() == before
    assert not Path("out.sga").exists()


def test_the_input_is_never_the_output(run: Run, photo: Path) -> None:
    """Guards against overwriting the original through a link."""
    Path("link").symlink_to(photo)
    result = run("encode", "photo.png", "link")
    assert result.exit_code == 2
    assert "input itself" in result.stderr
    before = photo.read_bytes()
    assert "'photo.png' is the input itself: give the output another name" in run("encode", *["photo.png"] * 2).stderr
    assert "'photo.png' is given twice" in run("encode", *["photo.png"] * 2, "--out-dir", "d").stderr
    assert photo.read_bytes() == before


def test_binary_is_not_sent_to_a_terminal(run: Run, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against binary data on a terminal."""
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True, raising=False)
    result = run("encode", "photo.png", "-")
    assert result.exit_code == 2
    assert "terminal" in result.stderr


def test_an_output_larger_than_the_input_is_a_warning(run: Run, photo: Path) -> None:
    """Guards against users who enlarge what other formats code better, without a word."""
    bits = np.random.default_rng(0).integers(0, 2, (64, 64), dtype=np.uint8)
    Image.fromarray(bits * 255).convert("1").save("bits.png")
    result = run("encode", "bits.png", "bits.sga")
    assert result.exit_code == 0
    sizes = Path("bits.sga").stat().st_size, Path("bits.png").stat().st_size
    line = "sgacodec: bits.png: the output is larger than the input: {} bytes, not {}"
    assert line.format(*sizes) in result.stderr
    assert "larger" not in run("encode", "bits.png", "bits.sga", "-q").stderr
    assert "larger" not in run("encode", "photo.png", "photo.sga").stderr
    assert run("encode", "-", "bits.sga", data=Path("bits.png").read_bytes()).stderr == ""


def test_lambda_outside_the_ladder_works_with_a_warning(run: Run, photo: Path) -> None:
    """A lambda outside the ladder is accepted, with a warning about the level."""
    result = run("encode", "photo.png", "out.sga", "--lambda", "0.1")
    assert result.exit_code == 0
    assert "nearest level" in result.stderr
    assert fake_codec.CALLS[-1][0].lmbda == 0.1
    assert not run("encode", "photo.png", "out.sga", "--lambda", "0.045").stderr


# ------------------------------------------------------------------------------------------------ exit codes


def test_unreadable_images_exit_1(run: Run) -> None:
    """Guards against a script that takes a failure for success."""
    Path("text.png").write_text("no image")
    for name in ("text.png", "absent.png"):
        result = run("encode", name, "out.sga")
        assert result.exit_code == 1
        assert result.stderr.startswith(f"sgacodec: {name}: ")
        assert result.stderr.count("\n") == 1
    assert not Path("out.sga").exists()


@pytest.mark.parametrize("name", ["not", "a  b.png", "ü.png"])
def test_a_message_names_its_file_once(run: Run, name: str) -> None:
    """Guards against names that are printed twice, or not at all."""
    Path(name).write_text("no image")
    for line in (["encode", name, "out.sga"], ["decode", name, "out.png"], ["info", name]):
        message = run(*line).stderr.removeprefix(f"sgacodec: {name}: ")
        assert message in ("not an image of a known format\n", "not a .sga file\n")


def test_a_link_to_itself_is_named_once(run: Run, photo: Path) -> None:
    """Guards against a second, absolute name in the message."""
    Path("loop.sga").symlink_to("loop.sga")
    message = run("encode", "photo.png", "loop.sga").stderr
    assert message.startswith("sgacodec: loop.sga: ")
    assert message.count("loop.sga") == 1


def test_streams_are_named_in_plain_words(run: Run, photo: Path) -> None:
    """Guards against <stdin>, output and - as names in messages."""
    for line in (["encode", "-", "out.sga"], ["decode", "-", "out.png"], ["info", "-"]):
        message = run(*line, data=b"no image").stderr.removeprefix("sgacodec: standard input: ")
        assert message in ("not an image of a known format\n", "not a .sga file\n")
    result = run("encode", "-", "-", data=photo.read_bytes())
    assert result.stderr.startswith("standard input → standard output  20×12")
    assert run("info", "-", data=result.stdout_bytes).stdout.startswith("standard input\n")
    run("encode", "photo.png", "out.sga", "--device", "cpu")
    result = run("decode", "out.sga", "out.xbm")
    assert result.stderr.startswith("sgacodec: out.sga: cannot be written as XBM")


CONTROL = "\x1b[31m\x07\x9b\u202e"


@pytest.mark.skipif(os.name != "posix", reason="needs a file system that allows control characters in names")
def test_control_characters_do_not_reach_the_terminal(run: Run, tmp_path: Path, photo: Path) -> None:
    """Guards against names of files, and metadata of models, that a terminal obeys."""
    name = f"a{CONTROL}.png"
    photo.rename(name)
    model_file(tmp_path / "models" / "tiny.safetensors", name=f"tiny{CONTROL}")
    model_file(tmp_path / "models" / "damaged.safetensors", architecture={"family": CONTROL})
    Path("bad.sga").write_bytes(b"")
    Path(f"{CONTROL}.csv").write_text("1,30")
    header = bitstream.write(SgaFile(b"1234", 0, 1, 1, b"", b""))
    Path(f"{CONTROL}.sga").write_bytes(header)
    lines = [
        ["encode", name, "out.sga", "--device", "cpu", "-v"],
        ["encode", name, f"{CONTROL}/out.sga", "--device", "cpu"],
        ["encode", "bad.sga", f"{CONTROL}/out.sga", "--device", "cpu"],
        ["encode", name, name],
        ["encode", name, "--out-dir", name],
        ["encode", name],
        ["decode", name, "out.png"],
        ["decode", "bad.sga", name, "--no-overwrite"],
        ["decode", "bad.sga", f"x.{CONTROL}"],
        ["decode", "bad.sga", "x.png", "--format", CONTROL],
        ["info", f"{CONTROL}.sga", name],
        ["models", "list"],
        ["models", "show", CONTROL],
        ["models", "show", f"tiny{CONTROL}"],
        ["models", "verify", f"{CONTROL}.safetensors"],
        ["models", "import", name, "--name", CONTROL],
        ["eval", name, "--out", "d", "--against", f"{CONTROL}.csv"],
        [CONTROL],
        [f"--{CONTROL}"],
    ]
    for line in lines:
        result = run(*line)
        assert not isinstance(result.exception, AssertionError)
        assert not set(CONTROL) & set(result.output) - set("[31m"), line
        assert result.output, line


def test_bad_files_exit_3(run: Run, photo: Path) -> None:
    """A script can tell damaged files (3) from other failures (1)."""
    run("encode", "photo.png", "good.sga")
    good = Path("good.sga").read_bytes()
    flipped = bytes([*good[:20], good[20] ^ 1, *good[21:]])
    newer = good[:3] + b"\x09" + good[4:]
    for content in (b"", b"SG", b"GIF89a", good[:-1], good + b"x", flipped, newer, b"SGA\x01" + b"\xff" * 40):
        Path("bad.sga").write_bytes(content)
        for line in (["decode", "bad.sga", "out.png"], ["info", "bad.sga"]):
            result = run(*line)
            assert result.exit_code == 3
            assert result.stderr.startswith("sgacodec: bad.sga: ")
            assert result.stderr.count("\n") == 1
    assert not Path("out.png").exists()


@pytest.mark.parametrize("size", [(1, 1), (2**14, 2**14), (2**31, 2**31)])
def test_a_file_of_40_gigabytes_is_refused_at_once(run: Run, size: tuple[int, int]) -> None:
    """Guards against reading a sparse file until the memory is full."""
    Path("a.sga").write_bytes(bitstream.write(SgaFile(b"1234", 0, *size, b"z", b"y")))
    os.truncate("a.sga", 40 * 10**9)
    for line in (["decode", "a.sga", "out.png"], ["info", "a.sga"]):
        result = run(*line)
        assert result.exit_code == 3
        assert f"{size[0]} x {size[1]}" in result.stderr


def test_an_endless_list_of_names_is_refused(run: Run) -> None:
    """Guards against reading a sparse file until the memory is full."""
    Path("list").write_bytes(b"")
    os.truncate("list", 40 * 10**9)
    assert run("encode", "--files-from", "list", "--out-dir", "out").exit_code == 2


def test_a_missing_model_exits_4_and_says_where_it_looked(run: Run, photo: Path) -> None:
    """The message names the folders that were searched, and the id that the file needs."""
    result = run("encode", "photo.png", "out.sga", "--model", "missing")
    assert result.exit_code == 4
    assert "/nowhere" in result.stderr
    Path("foreign.sga").write_bytes(bitstream.write(SgaFile(b"none", 0, 4, 4, b"z", b"y")))
    result = run("decode", "foreign.sga", "out.png")
    assert result.exit_code == 4
    assert "6e6f6e65" in result.stderr
    assert run("models", "show", "missing").exit_code == 4
    assert run("info", "foreign.sga").exit_code == 0


def test_too_many_pixels_are_refused(run: Run, photo: Path) -> None:
    """Guards against small files that decode to more pixels than the memory holds."""
    assert run("encode", "photo.png", "out.sga", "--max-pixels", "239").exit_code == 1
    assert run("encode", "photo.png", "out.sga", "--max-pixels", "240").exit_code == 0
    assert run("decode", "out.sga", "out.png", "--max-pixels", "239").exit_code == 3
    assert run("decode", "out.sga", "out.png", "--max-pixels", "240").exit_code == 0


def test_a_defect_is_one_line_and_a_traceback_on_demand(run: Run, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against tracebacks for users, and against defects that cannot be traced."""

    def broken(self: object, *args: object, **kwargs: object) -> None:
        raise RuntimeError("one\ntwo")

    monkeypatch.setattr(fake_codec.Codec, "encode", broken)
    result = run("encode", "photo.png", "out.sga", "--device", "cpu")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "RuntimeError: one two" in result.stderr
    monkeypatch.setenv("SGACODEC_DEBUG", "1")
    result = run("encode", "photo.png", "out.sga", "--device", "cpu")
    assert isinstance(result.exception, RuntimeError)


# ---------------------------------------------------------------------------------------------------- output


def test_json_of_encode_and_decode(run: Run, photo: Path) -> None:
    """The keys and values that scripts read."""
    result = run("encode", "photo.png", "out.sga", "--json")
    report = json.loads(result.stdout)
    assert [key for key in ENCODE_KEYS if key not in report] == []
    assert (report["input"], report["output"]) == ("photo.png", "out.sga")
    assert report["bytes"] == Path("out.sga").stat().st_size
    assert report["psnr"] is None  # infinite, which JSON cannot say
    report = json.loads(run("decode", "out.sga", "out.png", "--json").stdout)
    assert (report["input"], report["output"], report["width"]) == ("out.sga", "out.png", 20)
    report = json.loads(run("encode", "absent.png", "out.sga", "--json").stdout)
    assert report["output"] is None
    assert "absent.png" in report["error"]


def test_data_on_standard_output_is_alone_there(run: Run, photo: Path) -> None:
    """Guards against messages in the stream of a file."""
    result = run("encode", "-", "-", "--json", data=photo.read_bytes())
    assert bitstream.read(result.stdout_bytes).width == 20
    assert json.loads(result.stderr)["output"] == "-"
    result = run("decode", "-", data=result.stdout_bytes)
    assert result.stdout_bytes.startswith(b"\x89PNG")
    assert "20×12" in result.stderr


def test_quiet_and_verbose(run: Run, photo: Path) -> None:
    """--quiet prints nothing on success; --verbose prints the figures."""
    assert run("encode", "photo.png", "out.sga", "-q").output == ""
    assert "photo.png → out.sga" in run("encode", "photo.png", "out.sga").stdout
    assert "rd_loss 1.5" in run("encode", "photo.png", "out.sga", "-v").stderr
    assert run("encode", "absent.png", "out.sga", "-q").stderr != ""


def test_what_pillow_logs_is_not_shown(run: Run, photo: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against lines of other libraries, which --quiet does not stop."""
    Image.open(photo).save("bad.tif")
    data = bytearray(Path("bad.tif").read_bytes())
    at = data.index(b"\x15\x01\x03\0\1\0\0\0")  # 277: samples per pixel
    data[at + 8 : at + 10] = b"\0\1"
    Path("bad.tif").write_bytes(data)
    done = run("encode", "bad.tif", "out.sga", "-q")
    assert done.exit_code == 1
    assert done.stderr.count("\n") == 1
    assert [entry.name for entry in caplog.records if entry.name.startswith("PIL")] == []


@pytest.mark.parametrize("traced", [["-vv"], []])
def test_trace_by_flag_and_by_variable(
    run: Run, photo: Path, monkeypatch: pytest.MonkeyPatch, traced: list[str]
) -> None:
    """Guards against traces that cannot be compared between machines."""
    import logging

    if not traced:
        monkeypatch.setenv("SGACODEC_TRACE", "1")
    real = fake_codec.Codec.decode

    def decode(self: fake_codec.Codec, data: bytes, *, max_pixels: int) -> fake_codec.Decoded:
        logging.getLogger("sgacodec.api").debug("pixels 0123abcd")
        return real(self, data, max_pixels=max_pixels)

    monkeypatch.setattr(fake_codec.Codec, "decode", decode)
    run("encode", "photo.png", "out.sga", "--device", "cpu")
    assert "pixels 0123abcd" in run("decode", "out.sga", "out.png", *traced).stderr


# ---------------------------------------------------------------------------------------------- info, models


def test_info_says_what_the_header_says(run: Run, photo: Path) -> None:
    """Every header field is shown, in JSON and as text."""
    data = bitstream.write(SgaFile(b"\xab\xcd\xef\x01", 63, 300, 200, b"zz", b"yyy", grey=True, xmp=b"<x/>"))
    Path("a.sga").write_bytes(data)
    report = json.loads(run("info", "--json", "a.sga").stdout)
    assert [key for key in INFO_KEYS if key not in report] == []
    assert (report["model"], report["model_id"], report["level"]) == (None, "abcdef01", 63)
    assert report["lambda"] == pytest.approx(0.045)
    assert (report["format_version"], report["width"], report["height"]) == (1, 300, 200)
    assert (report["bytes"], report["sections"]) == (len(data), {"z": 2, "xmp": 4, "y": 3})
    text = run("info", "-", data=data).stdout
    assert "300×200, grey" in text
    assert "not installed (id abcdef01)" in text


def test_info_of_several_files_goes_on_after_a_bad_one(run: Run) -> None:
    """A bad file is reported and the others are shown."""
    Path("a.sga").write_bytes(bitstream.write(SgaFile(b"1234", 0, 1, 1, b"", b"")))
    Path("b.sga").write_bytes(b"foreign")
    result = run("info", "--json", "b.sga", "a.sga")
    assert result.exit_code == 3
    assert [json.loads(line)["input"] for line in result.stdout.splitlines()] == ["b.sga", "a.sga"]
    assert run("info", "b.sga", "a.sga", "absent.sga").exit_code == 1


def model_file(path: Path, **changes: object) -> None:
    """A model file that has a header only."""
    record = {
        "format": "sgacodec-model-1",
        "name": "tiny",
        "id": "31323334",
        "architecture": {"family": "mshyper", "N": 4, "M": 6, "scale": "linear"},
    }
    record |= {"anchors": [0.01, 0.02], "levels": 2, "licence": "MIT", **changes}
    header = json.dumps({"__metadata__": {"sgacodec": json.dumps(record)}}).encode()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def test_info_names_an_installed_model_and_uses_its_ladder(run: Run, tmp_path: Path) -> None:
    """Guards against the lambda of the wrong ladder for an imported model's files."""
    model_file(tmp_path / "models" / "tiny.safetensors")
    Path("a.sga").write_bytes(bitstream.write(SgaFile(b"1234", 1, 1, 1, b"", b"")))
    report = json.loads(run("info", "--json", "a.sga").stdout)
    assert report["model"] == "tiny"
    assert report["lambda"] == pytest.approx(0.02)


@pytest.mark.parametrize("anchors", [[0.01, 10**400], [2e-9, 1.7e308], [1e-7, 0.01], [0.01, 1e7]])
def test_a_model_with_absurd_anchors(run: Run, tmp_path: Path, anchors: list[float]) -> None:
    """Guards against a model whose λ are not finite, and its file that ends the listing of all others."""
    path = tmp_path / "models" / "evil.safetensors"
    model_file(path, id=b"evil".hex(), anchors=anchors)
    for name, model_id in (("a.sga", b"1234"), ("evil.sga", b"evil"), ("b.sga", b"1234")):
        Path(name).write_bytes(bitstream.write(SgaFile(model_id, 0, 1, 1, b"", b"")))
    result = run("info", "--json", "a.sga", "evil.sga", "b.sga")
    assert result.exit_code == 0
    assert [json.loads(line)["model"] for line in result.stdout.splitlines()] == [None] * 3
    assert "anchors: not ascending numbers" in run("models", "list").stderr


def test_models_list_and_show(run: Run, tmp_path: Path) -> None:
    """The installed models are listed; `show` prints the licence."""
    model_file(tmp_path / "models" / "tiny.safetensors")
    assert "tiny" in run("models", "list").stdout
    assert "tiny" in [entry["name"] for entry in json.loads(run("models", "list", "--json").stdout)]
    assert json.loads(run("models", "show", "tiny").stdout)["licence"] == "MIT"


WRONG: dict[str, object] = {
    "architecture": ["lite"],
    "anchors": 0.01,
    "levels": "many",
    "bits": {},
    "id": 7,
    "name": None,
}


@pytest.mark.parametrize("key", WRONG)
def test_one_damaged_model_does_not_hide_the_others(run: Run, tmp_path: Path, key: str) -> None:
    """Guards against commands that one file in the user's folder breaks for all models."""
    model_file(tmp_path / "models" / "tiny.safetensors")
    bad = tmp_path / "models" / "bad.safetensors"
    model_file(bad, **{key: WRONG[key]})
    Path("a.sga").write_bytes(bitstream.write(SgaFile(b"1234", 1, 1, 1, b"", b"")))
    assert json.loads(run("info", "--json", "a.sga").stdout)["model"] == "tiny"
    result = run("models", "list")
    assert result.exit_code == 0
    assert "damaged" in next(line for line in result.stdout.splitlines() if str(bad) in line)
    assert str(bad) in result.stderr
    rows = {row["name"]: row for row in json.loads(run("models", "list", "--json").stdout)}
    assert (rows["tiny"]["error"], rows["bad"]["architecture"]) == (None, "damaged")
    assert key in rows["bad"]["error"]
    assert run("models", "show", str(bad)).exit_code == 4
    assert str(bad) in run("models", "verify").stderr


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_among_the_models(run: Run, tmp_path: Path) -> None:
    """Guards against a command that waits for ever for what no one writes."""
    model_file(tmp_path / "models" / "tiny.safetensors")
    os.mkfifo(tmp_path / "models" / "pipe.safetensors")
    (tmp_path / "models" / "folder.safetensors").mkdir()
    (tmp_path / "models" / "nowhere.safetensors").symlink_to(tmp_path / "absent")
    result = run("models", "list")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in ("tiny", "pipe", "folder", "nowhere"))
    assert "not a regular file" in result.stderr
    assert run("models", "show", str(tmp_path / "models" / "pipe.safetensors")).exit_code == 4


def test_models_verify_and_import(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`verify` exits 4 for a damaged model; `import` refuses names with folders."""
    from sgacodec.models import compressai_import, verify

    model_file(tmp_path / "models" / "tiny.safetensors")
    problems = ["the id is not that of the tensors"]
    monkeypatch.setattr(verify, "verify", lambda path: problems)
    imported = Path("mine.safetensors")
    monkeypatch.setattr(compressai_import, "import_compressai", lambda path, name, lmbda: imported)
    result = run("models", "verify", "tiny")
    assert result.exit_code == 4
    assert problems[0] in result.stderr
    problems.clear()
    assert run("models", "verify", "tiny").exit_code == 0
    assert "ok, but it has no digest" in run("models", "verify", "tiny").stdout
    model_file(tmp_path / "models" / "tiny.safetensors", encoder="0" * 64)
    assert run("models", "verify", "tiny").stdout.endswith(": ok\n")
    Path("c.pth.tar").write_bytes(b"")
    assert "mine.safetensors" in run("models", "import", "c.pth.tar", "--name", "mine").stdout
    assert run("models", "import", "c.pth.tar", "--name", "../mine").exit_code == 2
    assert run("models", "import", "absent", "--name", "mine").exit_code == 2
    for name in ("lite", "mshyper-128", "mshyper-192"):
        result = run("models", "import", "c.pth.tar", "--name", name)
        assert result.exit_code == 2
        assert f"--name '{name}': a name of built-in models" in result.stderr
    assert run("models", "import", "c.pth.tar", "--name", "mine", "--lambda", "1e-7").exit_code == 2
    assert run("models", "verify", "other").exit_code == 4


# ---------------------------------------------------------------------------------------------------- manual


def test_help_lists_every_command(run: Run) -> None:
    """The help of every command can be printed."""
    text = run("--help").stdout
    assert all(name in text for name in ("encode", "decode", "info", "models", "Exit codes"))
    assert run("-h").exit_code == 0
    assert run("--version").stdout.startswith("sgacodec ")
    context = click.Context(main)
    for name in main.list_commands(context):
        assert run(name, "--help").exit_code == 0


def test_the_manual_is_current() -> None:
    """Guards against an outdated docs/cli.md. To update it: python -m sgacodec.cli.manual > docs/cli.md"""
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == manual()


@pytest.mark.parametrize(
    ("environment", "spins"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_waiting_threads_release_their_core(tmp_path: Path, environment: dict[str, str], spins: str) -> None:
    """Guards against threads of torch that spin for seconds beside other programs; the user's settings stay."""
    code = (
        "import os, sys; from sgacodec.cli import main; main(['models', 'list'], standalone_mode=False); "
        "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules, file=sys.stderr)"
    )
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=clean | environment, check=True)
    assert done.stderr.split()[-2:] == [spins, "False"]


@pytest.mark.parametrize("line", [["--help"], ["--version"], ["encode", "--help"], ["info", "a.sga"]])
def test_light_commands_import_nothing_heavy(tmp_path: Path, line: list[str]) -> None:
    """Guards against imports that take seconds for commands that need none of them."""
    (tmp_path / "a.sga").write_bytes(bitstream.write(SgaFile(b"1234", 0, 1, 1, b"", b"")))
    code = (
        "import sys; from sgacodec.cli import main; main(sys.argv[1:], standalone_mode=False); "
        "print(*{'torch', 'numpy', 'PIL', 'rich'} & set(sys.modules), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, *line]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout
    assert done.stderr.strip() == ""
