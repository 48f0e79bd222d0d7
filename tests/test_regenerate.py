"""Figures of the documents are those of docs/results/; studies and figures."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from fake_evaluation import FakeCodec, write_image

from sgacodec.evaluate import curves, figures, paper, paper_plots, regenerate, rows, studies, sweep
from sgacodec.evaluate.bd import bd_rate
from sgacodec.evaluate.coders import settings_grid
from sgacodec.evaluate.studies import Study
from sgacodec.models.catalogue import ModelNotFoundError

ROOT = Path(__file__).parents[1]
PAGES = [page.relative_to(ROOT).as_posix() for page in regenerate.pages(ROOT)]
LMBDAS = (2e-5, 5e-5, 2e-4)
GRID = settings_grid(LMBDAS, ["none", "ssl"], [50])


@pytest.mark.parametrize("page", PAGES)
def test_figures_of_the_documents_are_those_of_the_results(page: str) -> None:
    """Guards against figures that were true of other weights: `python -m sgacodec.evaluate.regenerate`."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert regenerate.regenerated(text, ROOT / regenerate.RESULTS) == text


@pytest.mark.parametrize("page", PAGES)
def test_markers_that_begin_a_line_are_blocks(page: str) -> None:
    """In a paragraph Markdown would end the paragraph there, and show the rest of the line as HTML."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for match in re.finditer(r"^<!-- measured: [^\n]+? -->.*?<!-- end -->", text, flags=re.DOTALL | re.MULTILINE):
        assert text[: match.start()].endswith("\n\n"), match[0]
        assert f"{text}\n"[match.end() :].startswith("\n\n"), match[0]


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{name}.md" for name in ("decoding", "experiments", "models", "paper", "refinement"))]
)
def test_tables_of_measurements_are_made_from_results(page: str) -> None:
    """Guards against figures in a document that no table of docs/results/ has.

    A table of another kind is put into docs/results/studies/NAME.tsv, and "<!-- measured: study NAME -->" shows it.
    """
    text = re.sub(r"<!-- measured: .+?<!-- end -->", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        head, *rows = table.splitlines()
        others = (
            "| name | networks |",
            "| network | layers |",
            "| | `lite` | `mshyper` |",
            "| `--method` |",
            "| | `codec/decoder/` | `Codec.decode` |",
            "| collection |",
        )
        if head.startswith(others):
            continue
        assert not any(re.search(r"\d[.,]\d| %", row) for row in rows), head


@pytest.fixture
def images(tmp_path: Path) -> dict[str, Path]:
    for i in range(3):
        write_image(tmp_path / "images" / f"kodim{3 * i + 1:02}.png", i)
    return sweep.find_images([tmp_path / "images"])


@pytest.fixture
def results(tmp_path: Path, images: dict[str, Path]) -> Path:
    """A folder with a study of methods none and ssl, and peers."""
    folder = tmp_path / "results"
    for study in (Study(name="ours", images="kodak", grid=GRID), Study(name="peers", images="kodak", peers=("jpeg",))):
        assert studies.run_study(study, images, FakeCodec(), tmp_path / "work", folder, lambda _: None) == []
    return folder


def test_figures_are_computed_from_the_tables(results: Path) -> None:
    """Guards against figures that are not those of the rows."""
    none, ssl = curves.load_curves(results / "ours.tsv")
    jpeg = curves.load_curves(results / "peers.tsv")[0]
    table = rows.read_rows(results / "ours.tsv")

    def shown(function: str, *arguments: str) -> str:
        return figures.figure(results, function, arguments)

    rate = bd_rate(ssl, none)
    assert rate < 0
    assert shown("bd-rate", "ours:ssl", "ours:none") == f"−{-rate:.1f} %"
    assert shown("bd-rate", "ours:ssl, 50 steps", "ours:none", "3") == f"−{-rate:.3f} %"
    assert shown("saves", "ours:ssl", "ours:none", "1") == f"{-rate:.1f} %"
    assert shown("needs", "ours:ssl", "ours:none") == f"{-rate:.0f} % fewer"
    assert shown("needs", "ours:none", "ours:ssl").endswith(" % more")
    assert shown("bd-rate", "ours:none", "peers:jpeg, 4:2:0") == f"{bd_rate(none, jpeg):+.1f} %".replace("-", "−")
    gains = [100 * (1 - r["rd_loss"] / r["rd_loss_unrefined"]) for r in table if r["method"] == "ssl"]
    assert shown("loss", "ours:ssl") == f"{np.mean(gains):.1f} %"
    assert shown("loss", "ours:ssl", "min") == f"{min(gains):.1f} %"
    assert (shown("count", "ours:ssl"), shown("count", "ours:ssl", "rows")) == ("3", "9")
    assert shown("model", "ours:none") == "fake, id 01020304"
    lines = shown("points", "unrefined=ours:none", "refined=ours:ssl").splitlines()
    assert lines[0] == "| λ | 2e-05 | 5e-05 | 0.0002 |"
    assert lines[2] == f"| unrefined: bpp | {' | '.join(f'{v:.4f}' for v in none.bpp)} |"
    assert lines[5] == f"| PSNR, dB | {' | '.join(f'{v:.2f}' for v in ssl.psnr)} |"
    assert lines[6].startswith("| true loss, refined / unrefined, mean of images | 0.")
    deltas = shown("bd-table", "none=ours:none", "ssl=ours:ssl", "--", "JPEG=peers:jpeg, 4:2:0", "ours:none")
    assert deltas.splitlines()[0] == "| BD-rate against | JPEG | ours:none |"
    assert deltas.splitlines()[3] == f"| ssl | {bd_rate(ssl, jpeg):+.1f} % | {rate:+.1f} % |".replace("-", "−")
    assert shown("optional", "points", "paper/missing") == "(not measured yet)"
    pivot = shown("pivot", "ours", "method", "lambda").splitlines()
    means = [np.mean([r["rd_loss"] for r in table if (r["method"], r["lambda"]) == ("ssl", v)]) for v in (2e-5, 5e-5)]
    assert pivot[3].startswith(f"| ssl | **{means[0]:.4f}** | **{means[1]:.4f}** |")
    spread = shown("spread", "ours", "method").splitlines()
    losses = [np.mean([r["rd_loss"] for r in table if (r["method"], r["lambda"]) == ("none", v)]) for v in LMBDAS]
    assert spread[0] == "| method | none | ssl |"
    assert spread[2].startswith(f"| spread | {100 * (max(losses) / min(losses) - 1):.2f} % |")
    excess = shown("excess", "ours", "method", "ours:none").splitlines()
    assert excess[0] == "| method \\ λ | 2e-05 | 5e-05 | 0.0002 |"
    assert excess[2] == "| none | +0.0 % | +0.0 % | +0.0 % |"
    assert excess[3].startswith(f"| ssl | {100 * (means[0] / losses[0] - 1):+.1f} % |".replace("-", "−"))
    costs = shown("costs", "JPEG=peers:jpeg, 4:2:0", "ssl=ours:ssl").splitlines()[2].split(" | ")
    assert costs[1] == f"{bd_rate(ssl, jpeg):+.1f} %".replace("-", "−")


def test_text_between_markers_is_replaced_and_nothing_else(results: Path, tmp_path: Path) -> None:
    """Guards against documents that are damaged, and against an outdated one that passes the check."""
    marker = "<!-- measured: count ours:ssl rows -->"
    page = tmp_path / "README.md"
    page.write_text(
        f"a {marker}7<!-- end -->, b\n\n<!-- measured: points ours:none --><!-- end -->\n", encoding="utf-8"
    )
    (tmp_path / "docs").mkdir()
    results.rename(tmp_path / "docs" / "results")

    def run(*arguments: str) -> int:
        return CliRunner().invoke(regenerate.main, ["--root", str(tmp_path), *arguments]).exit_code

    assert run("--check") == 1
    assert run() == 0
    assert run("--check") == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"a {marker}9<!-- end -->, b\n\n<!-- measured: points ours:none -->\n\n| λ | 2e-05")
    assert text.endswith("|\n\n<!-- end -->\n")


@pytest.mark.parametrize(
    ("marker", "why"),
    [
        ("magic ours", "none of bd-rate"),
        ("bd-rate ours:ssl", "anchor"),
        ("bd-rate ours:ssl missing", "missing.tsv"),
        ("bd-rate ours:atanh ours:none", "the curves are 'none', 'ssl, 50 steps'"),
        ("bd-rate ours ours:none", "the curves are"),
        ("points ours:none", "must begin a line"),
        ("plot paper/missing text", "missing.svg"),
        ("optional bd-rate ours:atanh ours:none", "the curves are"),
    ],
)
def test_a_marker_that_gives_no_figure_is_an_error_that_names_it(results: Path, marker: str, why: str) -> None:
    """Guards against a figure that silently stays as it was."""
    with pytest.raises(ValueError, match=re.escape(marker)) as error:
        regenerate.regenerated(f"a <!-- measured: {marker} -->1<!-- end -->", results)
    assert why in str(error.value)
    with pytest.raises(ValueError, match="without <!-- end -->"):
        regenerate.regenerated("<!-- measured: count ours:ssl -->1", results)


# ------------------------------------------------------------------------------------------------------ studies


def test_a_table_is_replaced_only_when_its_study_is_complete(tmp_path: Path, images: dict[str, Path]) -> None:
    """Guards against documents over a part of the images, and against losing what was measured before."""
    study = Study(name="ours", images="kodak", grid=GRID[3:4], trace=10)
    broken = write_image(tmp_path / "images" / "kodim10.png", 5)
    whole = broken.read_bytes()
    broken.write_bytes(whole[:60])
    log: list[str] = []
    work, folder = tmp_path / "work", tmp_path / "results"
    problems = studies.run_study(study, images | {"kodim10.png": broken}, FakeCodec(), work, folder, log.append)
    assert [p.split(":")[:2] for p in problems] == [["ours", " kodim10.png"]]
    assert not folder.exists()
    assert [line.split()[1] for line in log] == ["1/4", "2/4", "3/4", "4/4"]
    broken.write_bytes(whole)
    codec = FakeCodec()
    assert studies.run_study(study, images | {"kodim10.png": broken}, codec, work, folder, log.append) == []
    assert len(codec.encoded) == 1  # the others are not measured again
    assert len(rows.read_rows(folder / "ours.tsv")) == 4
    assert len(rows.read_traces(folder / "ours-traces.tsv")) == 8
    traced = figures.figure(folder, "traced", ["ours", "10"])
    assert traced.splitlines()[2] == "| ssl, 2 classes | 1.0000 |"


def test_studies_need_their_images(tmp_path: Path, images: dict[str, Path]) -> None:
    """A folder that is not given or incomplete is one line, before anything is measured."""
    for arguments, why in (
        (["kodak-lite-none"], "needs --kodak"),
        (["held-out-peers", "--kodak", tmp_path / "images"], "needs --held-out"),
        (["kodak-crops-lite-ssl", "--kodak", tmp_path / "images"], "lacks kodim10.png, kodim13.png"),
        (["magic"], "none of kodak-lite-none"),
    ):
        result = CliRunner().invoke(studies.main, [*map(str, arguments), "--work", str(tmp_path / "work")])
        assert result.exit_code in (1, 2)
        assert why in result.stderr
        assert not (tmp_path / "work").exists()


# -------------------------------------------------------------------------------------------------------- paper


def test_figure_3a_shows_the_baselines_of_any_number_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against baselines of 500 steps that are left out with the curves of 500 steps of Table 1."""
    names = {"unrefined": ["none"], "figure-3a-baselines": ["ste, 500 steps", "noise, 500 steps"]}
    monkeypatch.setattr(paper_plots, "load_curves", lambda path: [SimpleNamespace(name=n) for n in names[path.stem]])
    monkeypatch.setattr(paper_plots, "curve_of", lambda _, spec: SimpleNamespace(name=spec.partition(":")[2]))
    monkeypatch.setattr(paper_plots.plots, "rate_distortion", lambda curves: [curve.name for curve in curves])
    monkeypatch.setattr(paper_plots.plots, "svg", lambda shown, name: shown)
    assert paper_plots.FIGURES["figure-3a"](Path("results")) == [
        "none", "ste, 500 steps", "noise, 500 steps", "atanh, 2000 steps", "ssl, 2000 steps",
    ]  # fmt: skip


def test_the_paper_is_measured_drawn_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a run of hours that ends in an error: all studies, with an encoder that takes no time.

    The page shows every table and plot that is measured; an interrupted run continues.
    """
    monkeypatch.setattr(studies, "EIGHT", ("kodim01.png", "kodim19.png"))
    for name in studies.EIGHT:
        write_image(tmp_path / "kodak" / name, len(name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sgacodec.api.Codec", FakeCodec)
    pixels = SimpleNamespace(pixels=np.zeros((8, 8, 3), np.uint8))
    monkeypatch.setattr(paper_plots, "decode", lambda file: pixels)
    run = CliRunner().invoke(paper.main, ["--kodak", "kodak"])
    assert run.exit_code == 0, run.output
    drawn = {path.stem for path in Path("docs/images/paper").glob("*.svg")}
    assert drawn == {*paper_plots.FIGURES, "figure-4"}
    before = {path: path.read_bytes() for path in Path("docs/results/paper").glob("*.tsv")}
    assert len(before) == len(paper.STUDIES) + 5 + 1  # traces, figure 1
    shutil.copytree(ROOT / "docs" / "results" / "published", "docs/results/published")
    page = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8").replace("25 50 100 200 500", "10")
    text = regenerate.regenerated(page, Path("docs/results"))  # the trace of the fake has step 10 only
    assert "not measured yet" not in text
    assert CliRunner().invoke(paper.main, ["table-2", "--kodak", "kodak"]).exit_code == 0
    assert {path: path.read_bytes() for path in before} == before

    def missing(file: Path) -> None:
        raise ModelNotFoundError("no model with this id")

    monkeypatch.setattr(paper_plots, "decode", missing)  # as when the weights have changed since
    Path("docs/images/paper/table-2.svg").unlink()
    run = CliRunner().invoke(paper.main, ["--plots", "--kodak", "kodak"])
    assert (run.exit_code, run.stderr) == (1, "figure-4: no model with this id\n")
    assert Path("docs/images/paper/table-2.svg").exists()
