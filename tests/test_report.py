"""The report in a browser: Chromium, where it is installed."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_evaluation import FakeCodec, write_image
from PIL import Image, ImageStat, features

from sgacodec.evaluate import coders, pictures, plots, report, summary, sweep
from sgacodec.evaluate.rows import read_rows

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LMBDAS = (2e-5, 5e-5, 2e-4)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'sgacodec[dev]'")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the report of two images, with peers and traces."""
    folder = tmp_path_factory.mktemp("report")
    for i in range(2):
        write_image(folder / "images" / f"{i}<script>&.png", i, 72, 96)
    images = sweep.find_images([folder / "images"])
    grid = coders.settings_grid(LMBDAS, ["none", "ssl"], [50])
    chosen = coders.own_coders(FakeCodec(), grid, trace=10) + coders.peer_coders(["jpeg", "webp"])[0]
    measured = sweep.run(chosen, images, folder)
    result = summary.summarize(measured, [], folder)
    drawn = {
        "Rate and distortion": plots.svg(plots.rate_distortion(result.curves, peers=result.peers)),
        "Time and gain": plots.svg(plots.time_and_gain(result.costs), "time"),
        "Convergence": plots.svg(plots.convergence(result.traces), "convergence"),
    }
    views = pictures.views_of(measured.rows, chosen, images, folder, LMBDAS[0])
    page = report.html_report(result, measured.rows, drawn, "A & B", *views)
    (folder / "report.html").write_text(page, encoding="utf-8")
    return folder


@pytest.fixture
def page(browser: Any, out: Path) -> Iterator[Any]:
    """The report from the file system; no request leaves the page, and nothing is logged."""
    problems: list[str] = []
    opened = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    opened.on("console", lambda message: problems.append(message.text))
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else problems.append(r.url))
    opened.goto((out / "report.html").as_uri())
    yield opened
    opened.close()
    assert problems == []


def cells(page: Any, table: str) -> list[dict[str, str]]:
    """The rows of a table of the page, by heading."""
    return page.evaluate(
        """(id) => { const [head, ...rows] = [...document.querySelectorAll(`#${id} tr`)]
            .map((row) => [...row.children].map((cell) => cell.textContent));
            return rows.map((row) => Object.fromEntries(row.map((text, i) => [head[i], text]))); }""",
        table,
    )


def test_tables_hold_the_numbers_of_the_tsv(page: Any, out: Path) -> None:
    """Guards against a page that shows other numbers than were measured."""
    rows = read_rows(out / "results.tsv")
    shown = cells(page, "rows")
    assert len(shown) == len(rows) == 2 * (6 + 13 * 2 + 12)
    measured = {(r["name"], r["method"], r["options"], r["lambda"], r["quality"]): r for r in rows}
    for row in shown:
        setting = [None if row[c] == "–" else float(row[c]) for c in ("λ", "quality")]
        found = measured.pop((row["image"], row["method"], row["options"], *setting))
        assert row["bytes"] == str(found["bytes"])
        assert (row["bpp"], row["PSNR"]) == (f"{found['bpp']:.4f}", f"{found['psnr']:.2f}")
    for point in cells(page, "means") + cells(page, "peers"):
        setting = [None if point[c] == "–" else float(point[c]) for c in ("λ", "quality")]
        key = (point["method"], point["options"], *setting)
        group = [r for r in rows if (r["method"], r["options"], r["lambda"], r["quality"]) == key]
        assert point["bpp"] == f"{sum(r['bpp'] for r in group) / len(group):.4f}"
    deltas = summary.summarize(sweep.Sweep(rows, {}), [], out).comparisons
    assert [row["BD-rate"] for row in cells(page, "deltas")] == [f"{d.bd_rate:+.2f} %" for d in deltas]


def test_slider_moves_by_keyboard_and_pointer(page: Any) -> None:
    """Guards against a comparison that only works in one of the two ways."""
    clip = "document.querySelectorAll('#pair img')[1].style.clipPath"
    assert page.evaluate(clip) == "inset(0px 50% 0px 0px)"
    page.focus("#position")
    page.keyboard.press("ArrowRight")
    assert page.evaluate(clip) == "inset(0px 49.5% 0px 0px)"
    page.focus("#stage")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(clip) == "inset(0px 51.5% 0px 0px)"
    page.locator("#pair").scroll_into_view_if_needed()
    box = page.locator("#pair").bounding_box()
    page.mouse.click(box["x"] + 0.25 * box["width"], box["y"] + 10)
    assert float(page.input_value("#position")) == pytest.approx(25, abs=0.5)
    assert page.evaluate("rule.style.left") == f"{page.input_value('#position')}%"


def test_every_variant_is_shown_with_its_figures(page: Any, out: Path) -> None:
    """Guards against pictures that do not load, and against captions of others."""
    rows = read_rows(out / "results.tsv")
    name = page.evaluate("views[0].name")
    variants = cells(page, "variants")
    assert [v["variant"] for v in variants][:3] == ["original", "none", "ssl, 50 steps"]
    assert [v["variant"].split(",")[0] for v in variants][3:] == ["jpeg 4:4:4", "jpeg 4:2:0", "webp 4:2:0"]
    for i, variant in enumerate(variants):
        page.select_option("#left", str(i))
        assert page.evaluate("over.decode().then(() => [over.naturalWidth, over.naturalHeight])") == [96, 72]
        caption = page.inner_text("#left-caption")
        assert caption.startswith(variant["variant"])
        assert variant["bpp"] in caption or variant["bpp"] == "–"
    (none,) = [r for r in rows if (r["name"], r["method"], r["lambda"]) == (name, "none", LMBDAS[0])]
    assert (variants[1]["bpp"], variants[1]["PSNR"]) == (f"{none['bpp']:.4f}", f"{none['psnr']:.2f}")


def test_difference_zoom_and_next_image(page: Any) -> None:
    """Difference of equal pictures is black, zoom enlarges, the keys turn the images."""
    page.select_option("#right", "0")
    page.keyboard.press("d")
    assert page.input_value("#mode") == "difference"
    page.evaluate("Promise.all([over.decode(), under.decode()])")
    assert _brightness(page) == 0
    page.select_option("#right", "1")
    page.evaluate("under.decode()")
    assert _brightness(page) > 5
    page.select_option("#zoom", "4")
    assert page.evaluate("pair.clientWidth") == 4 * 96
    first = page.evaluate("image.selectedIndex")
    page.locator("#stage").focus()
    page.keyboard.press("n")
    assert page.evaluate("image.selectedIndex") == first + 1
    page.keyboard.press("n")
    assert page.evaluate("image.selectedIndex") == first


def _brightness(page: Any) -> float:
    """Mean grey level of the picture as it is shown."""
    with Image.open(io.BytesIO(page.locator("#pair").screenshot())) as shot:
        return ImageStat.Stat(shot.convert("L").crop((2, 2, 94, 70))).mean[0]


def test_phone_and_dark(browser: Any, out: Path) -> None:
    """Nothing is wider than a phone; the dark page is dark."""
    opened = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark", has_touch=True)
    opened.goto((out / "report.html").as_uri())
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390
    red, green, blue = opened.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert max(red, green, blue) < 60
    opened.locator("#pair").scroll_into_view_if_needed()
    box = opened.locator("#pair").bounding_box()
    opened.touchscreen.tap(box["x"] + 0.75 * box["width"], box["y"] + 10)
    assert float(opened.input_value("#position")) == pytest.approx(75, abs=0.6)
    fingers = opened.context.new_cdp_session(opened)
    for kind, part in (("touchStart", 0.7), ("touchMove", 0.5), ("touchMove", 0.4)):
        points = [{"x": box["x"] + part * box["width"], "y": box["y"] + 20}]
        fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    fingers.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    assert float(opened.input_value("#position")) == pytest.approx(40, abs=0.6)
    opened.close()


def test_many_pictures_are_lossy_and_missing_files_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against pages too large for a browser, and against a table without its files that gives no report."""
    for i in range(2):
        write_image(tmp_path / "images" / f"{i}.png", i, 72, 96)
    images = sweep.find_images([tmp_path / "images"])
    chosen = coders.own_coders(FakeCodec(), coders.settings_grid(LMBDAS[:2], ["none"]))
    chosen += [c for c in coders.peer_coders(["webp", "jpeg"])[0] if c.setting["quality"] == 50]
    measured = sweep.run(chosen, images, tmp_path)
    (tmp_path / "files").rename(tmp_path / "moved")
    assert pictures.views_of(measured.rows, chosen, images, tmp_path, LMBDAS[1]) == ([], True)
    (tmp_path / "moved").rename(tmp_path / "files")
    monkeypatch.setattr(pictures, "_LOSSLESS", 0)
    views, lossless = pictures.views_of(measured.rows, chosen, images, tmp_path, LMBDAS[1])
    assert not lossless
    assert [v.name for v in views] == ["0.png", "1.png"]
    kinds = [variant.source.partition(";")[0] for variant in views[0].variants]
    shown = "data:image/avif" if features.check("avif") else "data:image/webp"
    assert kinds == [shown, shown, "data:image/webp", "data:image/jpeg", "data:image/jpeg"]
    page = report.html_report(summary.summarize(measured, [], tmp_path), measured.rows, {}, "a", views, lossless)
    assert "AVIF of quality 90" in page
    assert "λ = 5e-05" in page
