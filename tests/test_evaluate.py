"""Sweeps, curves, reports and `sgacodec eval`."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from fake_evaluation import UNREADABLE_RED, FakeCodec, write_image
from PIL import Image

from sgacodec import metrics
from sgacodec.api import Codec, Settings
from sgacodec.cli import batch, main
from sgacodec.evaluate import coders, curves, peers, pictures, plots, report, rows, summary, sweep
from sgacodec.evaluate.bd import Curve, bd_rate

LAMBDAS = (0.0016, 0.0075, 0.03)
ALL = coders.settings_grid(LAMBDAS, ["none", "ssl"], [50])


@pytest.fixture
def images(tmp_path: Path) -> dict[str, Path]:
    for i in range(3):
        write_image(tmp_path / "images" / f"photo{i}.png", i)
    return sweep.find_images([tmp_path / "images"])


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "out" / "results.tsv"


def sweep_of(
    codec: FakeCodec,
    images: dict[str, Path],
    grid: list[Settings],
    out: Path,
    *,
    crop: int | None = None,
    **options: Any,
) -> sweep.Sweep:
    return sweep.run(coders.own_coders(codec, grid, crop), images, out, **options)


def lines(table: Path) -> list[str]:
    return table.read_text(encoding="utf-8").splitlines()


# ------------------------------------------------------------------------------------------------------- sweep


def test_rows_are_of_the_real_files(images: dict[str, Path], tmp_path: Path) -> None:
    """Guards against rates and PSNR that are not those of the files."""
    codec = FakeCodec()
    measured = sweep_of(codec, images, ALL, tmp_path / "out")
    files = {file: file.stat().st_size for file in (tmp_path / "out" / "files").rglob("*.sga")}
    assert len(measured.rows) == len(files) == 3 * len(ALL)
    for row in measured.rows:
        (folder,) = {
            file.parent
            for file in files
            if f"lambda{row['lambda']:g}-{row['method']}" in file.parent.name and file.stem == row["name"]
        }
        file = folder / f"{row['name']}.sga"
        original = np.array(Image.open(images[row["name"]]))
        decoded = codec.decode(file.read_bytes(), max_pixels=10**6).picture.pixels
        assert row["bytes"] == files[file]
        assert row["pixels"] == 48 * 40
        assert row["bpp"] == pytest.approx(8 * files[file] / (48 * 40))
        assert row["psnr"] == pytest.approx(metrics.psnr(original, decoded))
        assert row["ms_ssim"] is None  # too small
        loss = row["lambda"] * 255**2 * metrics.mse(original, decoded) + row["bpp"]
        assert row["rd_loss"] == pytest.approx(loss)
        gained = 0 if row["method"] == "none" else 8 / (48 * 40)
        assert row["rd_loss_unrefined"] - row["rd_loss"] == pytest.approx(gained, abs=1e-6)


@pytest.mark.parametrize("keep", [0, 5, 200, 700, -1])
def test_killed_sweep_continues_where_it_stopped(images: dict[str, Path], table: Path, keep: int) -> None:
    """Guards against measuring everything again, and against incomplete rows."""
    whole = sweep_of(FakeCodec(), images, ALL, table.parent)
    content = table.read_bytes()
    table.write_bytes(content[:keep])
    complete = max(0, content[:keep].count(b"\n") - 1)

    codec = FakeCodec()
    again = sweep_of(codec, images, ALL, table.parent)
    assert len(codec.encoded) == 3 * len(ALL) - complete
    assert len(lines(table)) == 1 + 3 * len(ALL)
    timeless = [{k: v for k, v in row.items() if "seconds" not in k} for row in again.rows]
    assert timeless == [{k: v for k, v in row.items() if "seconds" not in k} for row in whole.rows]


def test_interrupted_sweep_has_written_every_row_that_it_measured(images: dict[str, Path], table: Path) -> None:
    """Guards against losing measurements on Ctrl-C."""
    codec = FakeCodec()
    codec.stop_after = 4
    with pytest.raises(KeyboardInterrupt):
        sweep_of(codec, images, ALL, table.parent)
    assert len(lines(table)) == 1 + 4
    codec = FakeCodec()
    sweep_of(codec, images, ALL, table.parent)
    assert len(codec.encoded) == 3 * len(ALL) - 4


def test_finished_sweep_measures_nothing_again(images: dict[str, Path], table: Path) -> None:
    """Guards against measuring existing rows again."""
    sweep_of(FakeCodec(), images, ALL, table.parent)
    codec = FakeCodec()
    sweep_of(codec, images, [*ALL, replace(ALL[-1], steps=51)], table.parent)
    assert {settings.steps for _, settings in codec.encoded} == {51}
    assert len(codec.encoded) == 3


def test_another_model_crop_or_image_is_measured_again(images: dict[str, Path], table: Path) -> None:
    """Guards against reporting old rows for a new model, crop or image."""
    sweep_of(FakeCodec(), images, ALL[:1], table.parent)
    codec = FakeCodec(model_id="0a0b0c0d")
    measured = sweep_of(codec, images, ALL[:1], table.parent)
    assert len(codec.encoded) == 3
    assert {row["model_id"] for row in measured.rows} == {"0a0b0c0d"}

    codec = FakeCodec()
    measured = sweep_of(codec, images, ALL[:1], table.parent, crop=20)
    assert len(codec.encoded) == 3
    assert {(row["crop"], row["pixels"]) for row in measured.rows} == {(20, 400)}

    codec = FakeCodec()
    write_image(images["photo1.png"], 77)
    measured = sweep_of(codec, images, ALL[:1], table.parent)
    assert len(codec.encoded) == 1
    assert sum(row in measured.rows for row in rows.read_rows(table)) == 3


def test_one_bad_image_does_not_stop_the_rest(tmp_path: Path, images: dict[str, Path]) -> None:
    """Guards against sweeps that end at the first error."""
    broken = tmp_path / "images" / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    greedy = tmp_path / "images" / "greedy.png"
    Image.new("RGB", (30, 30), (UNREADABLE_RED, 0, 0)).save(greedy)
    calls: list[str] = []
    measured = sweep_of(
        FakeCodec(),
        images | {"broken.png": broken, "greedy.png": greedy},
        ALL,
        tmp_path / "out",
        progress=lambda name, error: calls.append(f"{name} {error}"),
    )
    assert len(measured.rows) == 3 * len(ALL)
    assert set(measured.failed) == {"broken.png", "greedy.png"}
    assert measured.failed["greedy.png"] == "not enough memory"  # one line
    assert len(calls) == 5 * len(ALL)


def test_full_disk_ends_the_sweep(images: dict[str, Path], table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against encoding on when results cannot be written."""

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sweep, "write_whole", full)
    codec = FakeCodec()
    with pytest.raises(OSError, match=r"No space.*photo0\.png\.sga"):
        sweep_of(codec, images, ALL, table.parent)
    assert len(codec.encoded) == 1


def test_metadata_and_transparency_cost_no_rate(tmp_path: Path) -> None:
    """Published curves do not include metadata in the rate."""
    pixels = np.full((20, 20, 4), 200, np.uint8)
    pixels[:5, :, 3] = 0
    for name, extra in (("bare", {}), ("rich", {"icc_profile": bytes(900)})):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png", **extra)
    found = sweep.find_images([tmp_path])
    measured = sweep_of(FakeCodec(), found, ALL[:1], tmp_path / "out")
    assert len({row["bytes"] for row in measured.rows}) == 1


def test_names_tell_images_apart(tmp_path: Path) -> None:
    """Guards against two files with the same name sharing a row."""
    for folder in ("a/x", "a/y", "b"):
        write_image(tmp_path / folder / "1.png", 1)
    (tmp_path / "b" / "notes.txt").write_text("not an image")
    write_image(tmp_path / "b" / "2.JPG", 1, format="JPEG")
    found = sweep.find_images([tmp_path / "a", tmp_path / "b", tmp_path / "b" / "2.JPG"])
    assert sorted(found) == ["2.JPG", "b/1.png", "x/1.png", "y/1.png"]
    (tmp_path / "empty").mkdir()
    for path, why in ((tmp_path / "empty", "no images"), (tmp_path / "gone.png", "no such")):
        with pytest.raises(ValueError, match=why):
            sweep.find_images([path])


def test_names_that_would_print_alike_are_refused(tmp_path: Path) -> None:
    """Guards against an image that is dropped because its name differs in unprintable characters only."""
    for name in (b"a\xe8.png", b"a\xe9.png"):
        write_image(tmp_path / "x.png", 1).rename(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    with pytest.raises(ValueError, match=r"several images would be called .*a_\.png"):
        sweep.find_images([tmp_path])


def test_a_name_that_is_too_long_fails_alone(tmp_path: Path) -> None:
    """Guards against a sweep that ends because of one file's name."""
    write_image(tmp_path / "images" / "a.png", 1)
    write_image(tmp_path / "images" / f"{'n' * 250}.png", 1)
    measured = sweep_of(FakeCodec(), sweep.find_images([tmp_path / "images"]), ALL[:1], tmp_path / "out")
    assert [row["name"] for row in measured.rows] == ["a.png"]
    assert list(measured.failed) == [f"{'n' * 250}.png"]


def test_crop_is_from_the_centre() -> None:
    """The crop is centred, and shorter axes stay whole."""
    pixels = np.arange(7 * 9 * 3, dtype=np.uint8).reshape(7, 9, 3)
    assert np.array_equal(sweep.centre(pixels, 3), pixels[2:5, 3:6])
    assert np.array_equal(sweep.centre(pixels, 8), pixels[:, :8])


def test_grid_measures_no_setting_twice() -> None:
    """Method "none" does not depend on the steps; invalid combinations are an error."""
    grid = coders.settings_grid([0.01, 0.01], ["none", "ssl", "ssl"], [10, 20], classes=3, seed=5)
    assert [(s.method, s.steps, s.classes, s.seed) for s in grid[1:]] == [("ssl", 10, 3, 5), ("ssl", 20, 3, 5)]
    assert grid[0].method == "none"
    with pytest.raises(ValueError, match="two classes"):
        coders.settings_grid([0.01], ["atanh"], [10], classes=3)


@pytest.mark.parametrize("damage", ["other\tcolumns\n", "row"])
def test_foreign_table_is_an_error_not_overwritten(table: Path, images: dict[str, Path], damage: str) -> None:
    """Guards against overwriting other files, and against ignoring damaged rows."""
    if damage == "row":
        sweep_of(FakeCodec(), images, ALL[:1], table.parent)
        damage = table.read_text().replace("photo1.png\t", "photo1.png\tx", 1)
    else:
        table.parent.mkdir()
    table.write_text(damage)
    with pytest.raises(ValueError, match=r"other columns|line 3: damaged"):
        sweep_of(FakeCodec(), images, ALL, table.parent)
    assert table.read_text() == damage


def test_flip_is_measured_where_it_is_asked_for(images: dict[str, Path], table: Path) -> None:
    """A later run with --flip measures the rows again that lack it."""
    pytest.importorskip("flip_evaluator", reason="needs flip-evaluator: pip install 'sgacodec[peers]'")
    sweep_of(FakeCodec(), images, ALL[:1], table.parent)
    measured = sweep_of(FakeCodec(), images, ALL[:1], table.parent, flip=True)
    assert all(0 < row["flip"] < 1 for row in measured.rows)
    codec = FakeCodec()
    assert sweep_of(codec, images, ALL[:1], table.parent, flip=True).rows == measured.rows
    assert not codec.encoded


def test_trace_is_a_table_of_its_own(images: dict[str, Path], table: Path) -> None:
    """Guards against traces of a part of the steps, and against taking the seconds of a traced run for others."""
    refined = ALL[3:4]
    measured = sweep.run(coders.own_coders(FakeCodec(), refined, trace=10), images, table.parent)
    traces = rows.read_traces(table.parent / "traces.tsv")
    assert {(t["name"], t["step"]) for t in traces} == {(name, step) for name in images for step in (0, 10)}
    assert {r["options"] for r in [*traces, *measured.rows]} == {"trace=10"}
    assert [t["relaxed_loss"] for t in traces] == [None, 2.5] * 3
    with (table.parent / "traces.tsv").open("a") as file:
        file.write(lines(table.parent / "traces.tsv")[1][:30])  # an interrupted run
    sweep.run(coders.own_coders(FakeCodec(), refined, trace=10), images, table.parent)
    assert rows.read_traces(table.parent / "traces.tsv") == traces


def test_tables_of_older_versions_are_read_but_not_continued(images: dict[str, Path], table: Path) -> None:
    """Guards against losing old results, and against rows of two layouts in one table."""
    measured = sweep_of(FakeCodec(), images, ALL[:1], table.parent)
    dropped = [rows.COLUMNS.index(column) for column in ("flip", "options", "quality")]
    old = [[c for i, c in enumerate(line.split("\t")) if i not in dropped] for line in lines(table)]
    table.write_text("".join("\t".join(cells) + "\n" for cells in old))
    assert rows.read_rows(table) == measured.rows
    with pytest.raises(ValueError, match="other columns"):
        sweep_of(FakeCodec(), images, ALL[:1], table.parent)


# --------------------------------------------------------------------------------------------------------- peers


@pytest.mark.parametrize("name", ["jpeg", "webp", "avif", "jxl"])
def test_rows_of_a_peer_are_those_of_its_files(tmp_path: Path, name: str) -> None:
    """Guards against peers whose rate or PSNR is not that of real files."""
    images = sweep.find_images([write_image(tmp_path / "a.png", 1)])
    chosen, missing = coders.peer_coders([name])
    if missing:
        pytest.skip(missing[0])
    chosen = [c for c in chosen if 30 <= c.setting["quality"] <= 60]
    measured = sweep.run(chosen, images, tmp_path / "out")
    assert not measured.failed
    original = np.array(Image.open(tmp_path / "a.png"))
    for row, coder in zip(measured.rows, chosen, strict=True):
        (file,) = [
            f
            for f in (tmp_path / "out" / "files").glob(f"*quality{row['quality']:g}-*/*")
            if row["options"].split()[0].replace(":", "") in f.parent.name
        ]
        with Image.open(file) as image:
            assert image.format.lower() == name
            shown = np.array(image.convert("RGB"))
        assert row["bytes"] == file.stat().st_size
        assert row["psnr"] == pytest.approx(metrics.psnr(original, shown), rel=1e-6)
        assert (row["lambda"], row["rd_loss"], row["method"]) == (None, None, name)
        assert row["model_id"] == coder.setting["model_id"] != ""
    (chroma,) = {len({r["options"] for r in measured.rows})}
    assert chroma == (2 if name in ("jpeg", "avif") else 1)
    again = sweep.run(chosen, images, tmp_path / "out")
    assert again.rows == measured.rows  # with their seconds: nothing was measured again


def test_chroma_formats_are_what_they_say() -> None:
    """Guards against 4:2:0 files that are counted as 4:4:4."""
    pixels = np.array(Image.open(Path(__file__).parents[1] / "docs" / "images" / "coffee.png").convert("RGB"))[:64, :64]
    for chroma, sampling in (("4:4:4", [1, 1]), ("4:2:0", [2, 2])):
        with Image.open(io.BytesIO(peers.encode(peers.PEERS["jpeg"], chroma, 50, pixels))) as image:
            assert list(image.layer[0][1:3]) == sampling


def test_matching_quality_is_the_nearest_of_all() -> None:
    """Guards against comparisons at sizes that differ more than they must."""
    pixels = np.array(Image.open(Path(__file__).parents[1] / "docs" / "images" / "coffee.png").convert("RGB"))[:96, :96]
    jpeg = peers.PEERS["jpeg"]
    sizes = [len(peers.encode(jpeg, "4:2:0", q, pixels)) for q in range(101)]
    for wanted in (0, 1500, 10**6):
        quality, data = peers.matching(jpeg, "4:2:0", pixels, wanted)
        assert len(data) == sizes[quality]
        assert abs(len(data) - wanted) == min(abs(size - wanted) for size in sizes)


@pytest.mark.parametrize("name", ["jpeg", "avif"])  # WebP has no grey
def test_a_grey_image_is_grey_for_a_peer(name: str) -> None:
    """Guards against peers that spend bits on the colours of grey images, which ours does not have."""
    peer, _ = peers.available(name)
    grey = np.repeat(np.random.default_rng(0).integers(0, 256, (32, 48, 1), dtype=np.uint8), 3, axis=2)
    data = peers.encode(peer, peer.subsamplings[0], 60, grey)
    decoded = peers.decode(data)
    assert (decoded == decoded[..., :1]).all()
    with Image.open(io.BytesIO(data)) as image:
        assert name != "jpeg" or image.mode == "L"


def test_peer_that_is_not_installed_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a sweep that ends, or is silently incomplete, without an optional package."""
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    chosen, missing = coders.peer_coders(["jxl", "webp"])
    assert missing == ["peer jxl is not available (pip install 'sgacodec[peers]')"]
    assert {c.setting["method"] for c in chosen} == {"webp"}


def test_curves_are_compared_with_peers(images: dict[str, Path], tmp_path: Path) -> None:
    """BD-rates of our curves against each peer, and the cost of every curve."""
    coarse = coders.settings_grid((2e-5, 5e-5, 1e-4, 2e-4), ["none", "ssl"], [50])
    chosen = coders.own_coders(FakeCodec(), coarse) + coders.peer_coders(["jpeg"])[0]
    result = summary.summarize(sweep.run(chosen, images, tmp_path / "out"), [], tmp_path / "out")
    assert [c.name for c in result.curves] == ["none", "ssl, 50 steps"]
    assert [c.name for c in result.peers] == ["jpeg, 4:2:0", "jpeg, 4:4:4"]
    deltas = {(c.curve, c.anchor): c.bd_rate for c in result.comparisons}
    assert set(deltas) == {
        (c, a) for c in ("none", "ssl, 50 steps") for a in ("none", "jpeg, 4:2:0", "jpeg, 4:4:4")
    } - {("none", "none")}
    expected = bd_rate(result.curves[1], result.peers[0])
    assert deltas["ssl, 50 steps", "jpeg, 4:2:0"] == expected
    costs = {c.curve: c for c in result.costs}
    assert costs["ssl, 50 steps"].bd_rate == expected
    assert costs["jpeg, 4:2:0"].bd_rate == 0
    points = [p for p in result.points if p["method"] == "none"]
    seconds = np.mean([p["seconds_encode"] for p in points]) / (48 * 40 / 1e6)
    assert costs["none"].seconds_encode == pytest.approx(seconds)


# ---------------------------------------------------------------------------------------------- means and curves


def test_summary_is_the_mean_of_the_rows(images: dict[str, Path], tmp_path: Path) -> None:
    """Guards against means that do not follow from the table."""
    measured = sweep_of(FakeCodec(), images, ALL, tmp_path / "out")
    result = summary.summarize(measured, [], tmp_path / "out")
    assert len(result.points) == len(ALL)
    for point in result.points:
        same = [r for r in measured.rows if (r["method"], r["lambda"]) == (point["method"], point["lambda"])]
        assert point["images"] == len(same) == 3
        assert point["bytes"] == sum(r["bytes"] for r in same)
        for column in ("bpp", "psnr", "rd_loss", "rd_loss_unrefined", "seconds_encode"):
            assert point[column] == pytest.approx(np.mean([r[column] for r in same]))
        assert point["ms_ssim"] is None
    assert [c.name for c in result.curves] == ["none", "ssl, 50 steps"]
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["means"] == result.points
    assert written["images"] == 3
    assert curves.load_curves(tmp_path / "out" / "results.tsv") == result.curves
    assert curves.load_curves(tmp_path / "out" / "results.json") == result.curves


def test_image_that_failed_at_one_setting_counts_at_none(images: dict[str, Path], tmp_path: Path) -> None:
    """Guards against curves whose points are means over different images."""
    measured = sweep_of(FakeCodec(), images, ALL, tmp_path / "out")
    measured.rows.remove(next(r for r in measured.rows if r["name"] == "photo2.png"))
    result = summary.summarize(measured, [], tmp_path / "out")
    assert result.left_out == ["photo2.png"]
    assert {point["images"] for point in result.points} == {2}


def test_unfinished_table_is_no_curve(images: dict[str, Path], table: Path) -> None:
    """Guards against anchors over a part of the images."""
    sweep_of(FakeCodec(), images, ALL, table.parent)
    table.write_text("\n".join(lines(table)[:-1]) + "\n")
    with pytest.raises(ValueError, match=r"unfinished sweep.*photo2\.png"):
        curves.load_curves(table)


def test_lossless_image_has_no_psnr_in_files(tmp_path: Path) -> None:
    """ "Infinity" is not valid JSON, and would make the mean infinite."""
    path = tmp_path / "flat.png"
    Image.new("RGB", (30, 30), (6, 6, 6)).save(path)  # the middle of a quantization cell
    other = write_image(tmp_path / "other.png", 3)
    grid = coders.settings_grid([0.0006], ["none"])  # step 12
    measured = sweep_of(FakeCodec(), {"flat": path, "other": other}, grid, tmp_path / "out")
    assert [row["psnr"] is None for row in measured.rows] == [True, False]
    result = summary.summarize(measured, [], tmp_path / "out")
    assert result.points[0]["psnr"] is None
    assert result.curves[0].bpp == ()
    assert "Infinity" not in (tmp_path / "out" / "results.json").read_text()


def test_lossless_peer_has_no_psnr_in_the_report() -> None:
    """JSON.parse would stop at "Infinity", and no picture be shown."""
    variant = pictures._peer("jpeg", "4:4:4", np.full((16, 16, 3), 255, np.uint8), 100, lossless=True)
    assert variant.psnr is None
    view = pictures.View("white", 16, 16, [variant])
    assert "Infinity" not in report._json([view])


def test_narrow_images_are_decoded(tmp_path: Path) -> None:
    """Guards against the limit of padded pixels, which is for files of strangers."""
    Image.new("RGB", (4, 20000), (6, 6, 6)).save(tmp_path / "strip.png")
    codec = Codec("lite", "cpu")
    measured = sweep.run(
        coders.own_coders(codec, coders.settings_grid([0.0075], ["none"])), {"s": tmp_path / "strip.png"}, tmp_path
    )
    assert not measured.failed
    assert measured.rows[0]["pixels"] == 80000


def test_an_interruption_leaves_whole_files(
    images: dict[str, Path], table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against half a file beside a row of the whole one."""
    sweep_of(FakeCodec(), images, ALL[:1], table.parent)
    files = {path: path.read_bytes() for path in (table.parent / "files").rglob("*.sga")}

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            sweep_of(FakeCodec(), images, ALL[:1], table.parent, flip=True)
    assert files == {path: path.read_bytes() for path in (table.parent / "files").rglob("*.sga")}


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs /dev/zero, which has no end")
def test_a_device_is_no_image() -> None:
    """Guards against reading for ever."""
    assert sweep._image_id(Path("/dev/zero")) == ""


def test_curves_of_two_models_are_kept_apart(images: dict[str, Path], table: Path) -> None:
    """Guards against one curve through the points of two models."""
    for model_id in ("01020304", "0a0b0c0d"):
        sweep_of(FakeCodec(model_id=model_id), images, ALL[:3], table.parent)
    loaded = curves.load_curves(table)
    assert [len(curve.bpp) for curve in loaded] == [3, 3]
    assert {curve.name for curve in loaded} == {"none, 01020304", "none, 0a0b0c0d"}


@pytest.mark.parametrize("key", ["psnr", "psnr-rgb"])
def test_curve_from_json(tmp_path: Path, key: str) -> None:
    """Published files use either key."""
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"name": "X", "results": {"bpp": [2, 1], key: [35, 30], "ms-ssim-rgb": [1, 1]}}))
    assert curves.load_curves(path) == [Curve("X", (1.0, 2.0), (30.0, 35.0))]


@pytest.mark.parametrize("text", ["0.2, 30\n0.1, 27\n", "bpp,psnr\n0.1,27\n0.2,30", "# bpp psnr\n0.1,27\n\n0.2,30\n"])
def test_curve_from_csv(tmp_path: Path, text: str) -> None:
    """Headers, comments, empty lines and unsorted points are accepted."""
    path = tmp_path / "x.csv"
    path.write_text(text)
    assert curves.load_curves(path) == [Curve("x", (0.1, 0.2), (27.0, 30.0))]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", "{"),
        ("b.json", "[1]"),
        ("c.json", '{"results": {"bpp": [1]}}'),
        ("d.json", '{"results": {"bpp": [1, 2], "psnr": [30]}}'),
        ("e.csv", "0.1,27\n0.2,30,7\n"),
        ("f.csv", ""),
        ("g.tsv", "bpp\tpsnr\n"),
        ("h.txt", "0.1,27\n"),
    ],
)
def test_file_that_holds_no_curve_is_an_error_that_names_it(tmp_path: Path, name: str, text: str) -> None:
    """Guards against tracebacks and against partial curves."""
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(name)) as error:
        curves.load_curves(tmp_path / name)
    assert "\n" not in str(error.value)


def test_comparison_without_overlap_is_a_note() -> None:
    """Guards against one anchor without overlap ending the evaluation."""
    low, high = Curve("low", (0.1, 0.2), (25.0, 28.0)), Curve("high", (0.15, 0.9), (35.0, 40.0))
    (found,) = curves.compare([low], [high])
    assert found.bd_rate is None
    assert "share no PSNR" in found.note


# ------------------------------------------------------------------------------------------------------- report


def test_report_holds_the_numbers_and_needs_no_other_file(images: dict[str, Path], tmp_path: Path) -> None:
    """The report is self-contained and has the numbers of the table."""
    out = tmp_path / "out"
    measured = sweep_of(FakeCodec(), images, ALL, out)
    anchor = Curve("<b>JPEG</b>", (0.5, 20.0), (10.0, 60.0))
    result = summary.summarize(measured, [anchor], out)
    figure = plots.rate_distortion(result.curves, [anchor])
    plots.save_plots(figure, out)
    page = report.html_report(result, measured.rows, {"Rate": plots.svg(figure)}, "A & B")
    for point in result.points:
        assert f"<td>{point['bpp']:.4f}</td><td>{point['psnr']:.2f}</td>" in page
    for row in measured.rows:
        assert f">{row['name']}</td>" in page
        assert f"<td>{row['bytes']}</td>" in page
    deltas = {(c.curve, c.anchor): c for c in result.comparisons}
    assert set(deltas) == {
        ("ssl, 50 steps", "none"),
        ("none", anchor.name),
        ("ssl, 50 steps", anchor.name),
    }
    for comparison in result.comparisons:
        assert f"{comparison.bd_rate:+.2f} %" in page
    assert deltas["ssl, 50 steps", "none"].bd_rate < 0
    assert "&lt;b&gt;JPEG" in page
    assert "A &amp; B" in page
    assert "<svg" in page
    assert not re.search(r"(src|href)=\"(?!#)(?!data:)", page)
    assert Image.open(out / "rd.png").size[0] > 600
    assert (out / "rd.svg").read_text() == (plots.save_plots(figure, out), (out / "rd.svg").read_text())[1]


# --------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("sgacodec.api.Codec", FakeCodec)
    yield
    batch.open_codec.cache_clear()  # later tests need the real codec


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["eval", *map(str, arguments)])


@pytest.mark.usefixtures("fake", "images")
def test_command_writes_everything_and_prints_the_deltas(tmp_path: Path) -> None:
    """All files are written, and the terminal shows the same numbers."""
    out = tmp_path / "out"
    (tmp_path / "anchor.csv").write_text("0.5,10\n20,60\n")
    arguments = (tmp_path / "images", "--lambda", "0.0016,0.0075", "--lambda", 0.03, "--method", "none")
    arguments += ("--method", "ssl", "--steps", "50", "--out", out, "--against", tmp_path / "anchor.csv")
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    wanted = {"results.tsv", "results.json", "rd.png", "rd.svg", "report.html", "files"}
    assert {path.name for path in out.iterdir()} == wanted
    written = json.loads((out / "results.json").read_text())
    assert len(written["means"]) == 6
    for comparison in written["comparisons"]:
        assert f"{comparison['bd_rate']:+.2f} %" in result.output
    for point in written["means"]:
        assert f"{point['bpp']:.4f}" in result.output
    again = run(*arguments, "-q")
    assert (again.exit_code, again.output) == (0, "")
    assert len(lines(out / "results.tsv")) == 1 + 18
    assert "same crops" in run(*arguments, "--crop", 20).stderr  # than those of the anchor


@pytest.mark.usefixtures("fake", "images")
def test_command_measures_what_it_can_without_a_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line for the peer that is not installed, rows for the others, and exit code 1."""
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    arguments = (tmp_path / "images", "--lambda", "0.003,0.01", "--method", "none", "--peers", "jxl,webp", "--no-plot")
    result = run(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "peer jxl is not available (pip install" in result.stderr
    found = rows.read_rows(tmp_path / "out" / "results.tsv")
    assert {r["method"] for r in found} == {"none", "webp"}
    assert "webp" in result.output


@pytest.mark.usefixtures("fake", "images")
def test_command_writes_its_report_without_a_damaged_file(tmp_path: Path) -> None:
    """Guards against a sweep of hours that ends without a report, as one of its old files is damaged."""
    arguments = (tmp_path / "images", "--lambda", "0.003,0.01", "--method", "none", "--out", tmp_path / "out")
    assert run(*arguments).exit_code == 0
    assert 'id="views"' in (tmp_path / "out" / "report.html").read_text()
    next((tmp_path / "out" / "files").glob("lambda0.003*/photo1*")).write_bytes(b"SGA")
    result = run(*arguments)
    assert result.exit_code == 0
    assert "no pictures in the report: " in result.stderr
    assert "<table" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.usefixtures("fake", "images")
def test_command_passes_the_settings_of_the_refinement(tmp_path: Path) -> None:
    """Guards against rows whose settings are not those that were asked for."""
    arguments = (tmp_path / "images", "--lambda", "0.01", "--method", "none,ssl", "--steps", 50, "--no-plot")
    arguments += ("--schedule", "exp", "--rounds", 0, "--lr", 0.02, "--level-lambda", 0.0075, "--ssl-a", 1.4)
    assert run(*arguments, "--out", tmp_path / "out").exit_code == 0
    found = rows.read_rows(tmp_path / "out" / "results.tsv")
    options = {r["method"]: r["options"] for r in found}
    assert options["none"] == "level_lambda=0.0075"
    assert options["ssl"] == "level_lambda=0.0075 schedule=exp lr=0.02 rounds=0 ssl_a=1.4"


@pytest.mark.usefixtures("fake", "images")
def test_command_has_the_default_steps_of_encode(tmp_path: Path) -> None:
    """Guards against figures of files that `sgacodec encode` does not make without options."""
    arguments = (tmp_path / "images", "--lambda", "0.01", "--no-plot", "--out", tmp_path / "out")
    assert run(*arguments).exit_code == 0
    found = rows.read_rows(tmp_path / "out" / "results.tsv")
    assert {r["steps"] for r in found if r["method"] == "ssl"} == {Settings().on_device("cpu").steps} == {75}


@pytest.mark.usefixtures("fake", "images")
def test_command_compares_with_another_sweep(tmp_path: Path) -> None:
    """Guards against comparing nothing where the curves of two sweeps have the same name."""
    common = (tmp_path / "images", "--lambda", "0.0016,0.0075,0.03", "--method", "none", "--no-plot")
    assert run(*common, "--out", tmp_path / "first").exit_code == 0
    for table in ("results.tsv", "results.json"):
        result = run(*common, "--out", tmp_path / "second", "--against", tmp_path / "first" / table)
        assert result.exit_code == 0, result.output
        (found,) = json.loads((tmp_path / "second" / "results.json").read_text())["comparisons"]
        assert (found["curve"], found["anchor"], found["bd_rate"]) == ("none", "first: none", 0.0)


@pytest.mark.usefixtures("fake", "images")
def test_command_reports_a_failed_image(tmp_path: Path) -> None:
    """Guards against exit code 0 for incomplete results."""
    (tmp_path / "images" / "broken.png").write_bytes(b"nonsense")
    result = run(tmp_path / "images", "--lambda", 0.01, "--method", "none", "--no-plot", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.count("broken.png") == 1
    assert not (tmp_path / "out" / "rd.png").exists()
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.usefixtures("fake", "images")
def test_command_with_nothing_that_can_be_read(tmp_path: Path) -> None:
    """Guards against a traceback when no image is readable."""
    (tmp_path / "broken.png").write_bytes(b"nonsense")
    result = run(tmp_path / "broken.png", "--lambda", 0.01, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "not an image" in result.stderr


@pytest.mark.usefixtures("fake", "images")
@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--lambda", "0.01,x"], "not a list of numbers"),
        (["--lambda", "nan"], "not in the range"),
        (["--method", "magic"], "none of none, ste"),
        (["--steps", "ten"], "not a list of whole numbers"),
        (["--steps", "-1"], "negative"),
        (["--peers", "jpeg,heic"], "none of jpeg, webp, avif, jxl"),
        (["--lambda", "0.01", "--view", "0.02"], "--view 0.02 is none of --lambda"),
        (["--method", "none", "--trace", "5"], "--trace has no meaning"),
        (["--method", "none", "--tau-max", "1"], "--tau-max has no meaning"),
        (["--schedule", "cold", "--rate", "1"], "belongs to the schedules"),
        (["--method", "atanh", "--classes", "3"], "two classes"),
        (["--against", "photo.txt"], "does not exist"),
        (["--lambda", ","], "list is empty"),
    ],
)
def test_wrong_usage_is_found_before_anything_is_measured(tmp_path: Path, arguments: list[str], why: str) -> None:
    """Guards against usage errors that are found after the measurement."""
    result = run(tmp_path / "images", "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert why in result.stderr
    assert not (tmp_path / "out").exists()
