"""Reports of a sweep: tables in the terminal, the R-D plot, and a self-contained HTML page.

Summary ─► print_summary (terminal)
        ─► plot ─► rd.png, rd.svg
        ─► html_report ─► report.html (includes the plot and all rows; no scripts, no other files)
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Table

from ..metrics import Curve
from .curves import Comparison
from .rows import Row, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .summary import Summary

REPORT, PLOTS = "report.html", ("rd.png", "rd.svg")

# Heading, column of the row, number format.
_POINT_COLUMNS = (
    ("method", "method", ""),
    ("classes", "classes", ""),
    ("steps", "steps", ""),
    ("λ", "lambda", ".4g"),
    ("model", "model", ""),
    ("images", "images", ""),
    ("bpp", "bpp", ".4f"),
    ("PSNR", "psnr", ".2f"),
    ("MS-SSIM", "ms_ssim", ".4f"),
    ("R-D loss", "rd_loss", ".4f"),
    ("unrefined", "rd_loss_unrefined", ".4f"),
    ("enc s", "seconds_encode", ".2f"),
    ("dec s", "seconds_decode", ".2f"),
)
_IMAGE_COLUMNS = (
    ("image", "name", ""),
    *(column for column in _POINT_COLUMNS if column[0] not in ("images", "classes")),
    ("bytes", "bytes", ""),
)
_TERMINAL_COLUMNS = tuple(  # at most 80 characters wide
    column for column in _POINT_COLUMNS if column[1] not in ("classes", "model", "images", "rd_loss_unrefined")
)
_TEXT = ("name", "method", "model")  # left-aligned

_OURS = ("#0b6e99", "#d1495b", "#2e933c", "#8d5a97", "#e08e1b", "#30343f")
_ANCHORS = ("#8a8f98", "#b39c82", "#7d9d9c", "#a98ba8", "#9aa877", "#c08a8a")
_DASHES = ("--", "-.", ":")

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #22262e; background: #fff;
       max-width: 64rem; margin: 3rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .6rem; }
p { margin: .4rem 0; } .quiet { color: #6b7280; } .bad { color: #a3222f; }
figure { margin: 1.5rem 0; } figure svg { width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem; width: 100%; }
th { font-weight: 600; color: #6b7280; border-bottom: 1px solid #c9ced6; white-space: nowrap; }
th, td { padding: .28rem .6rem; text-align: right; }
.t { text-align: left; } tbody tr:nth-child(even) { background: #f6f7f9; }
.good { color: #1d7a33; } summary { cursor: pointer; margin: 2rem 0 .6rem; font-weight: 600; }
"""


# ---------------------------------------------------------------------------------------------------- terminal


def print_summary(summary: Summary, console: Console) -> None:
    """Print our means, the Bjøntegaard deltas and the images that are not included."""
    console.print(_rich_table(_TERMINAL_COLUMNS, [p for p in summary.points if p["lambda"] is not None]))
    if summary.comparisons:
        table = Table("curve", "against", box=None, header_style="bold")
        for heading in ("BD-rate", "BD-PSNR", "PSNR range"):
            table.add_column(heading, justify="right", no_wrap=True)
        for comparison in summary.comparisons:
            names = (printable(comparison.curve), printable(comparison.anchor))
            table.add_row(*map(escape_markup, names), *_deltas(comparison))
        console.print(table)
    for note in _notes(summary.comparisons):
        console.print(printable(note), style="dim", markup=False, highlight=False)
    if summary.left_out:
        left_out = printable(", ".join(summary.left_out))
        console.print(f"not included in the means, as not measured at every setting: {left_out}", markup=False)


def _rich_table(columns: Sequence[tuple[str, str, str]], rows: Sequence[Row]) -> Table:
    table = Table(box=None, header_style="bold")
    for heading, column, _ in columns:
        table.add_column(heading, justify="left" if column in _TEXT else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(escape_markup(printable(_show(row[column], form))) for _, column, form in columns))
    return table


def _show(value: Any, form: str) -> str:
    return "–" if value is None else format(value, form)


def _deltas(comparison: Comparison) -> tuple[str, str, str]:
    """BD-rate, BD-PSNR and the PSNR range as text."""
    rate = "–" if comparison.bd_rate is None else f"{comparison.bd_rate:+.2f} %"
    gain = "–" if comparison.bd_psnr is None else f"{comparison.bd_psnr:+.3f} dB"
    span = comparison.psnr_range
    return rate, gain, "–" if span is None else f"{span[0]:.2f}–{span[1]:.2f} dB"


def _notes(comparisons: Sequence[Comparison]) -> list[str]:
    return list(dict.fromkeys(c.note for c in comparisons if c.note))


# -------------------------------------------------------------------------------------------------------- plot


def plot(curves: Sequence[Curve], anchors: Sequence[Curve] = ()) -> Figure:
    """Draw bpp against PSNR: `curves` in colour, `anchors` as thin lines behind them.

    The limits of the axes follow `curves` only, because anchors often cover a much larger range.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.4), layout="constrained")
    axes = figure.add_subplot()
    for i, curve in enumerate(anchors):
        colour, dashes = _ANCHORS[i % len(_ANCHORS)], _DASHES[i % len(_DASHES)]
        points = sorted(zip(curve.bpp, curve.psnr, strict=True))
        axes.plot(
            [rate for rate, _ in points], [quality for _, quality in points], color=colour, linestyle=dashes,
            linewidth=1.2, zorder=2, label=_escape_label(curve.name),
        )  # fmt: skip
    for i, curve in enumerate(curves):
        colour = _OURS[i % len(_OURS)]
        axes.plot(
            curve.bpp, curve.psnr, color=colour, marker="o", markersize=5, linewidth=2, zorder=3,
            label=_escape_label(curve.name),
        )  # fmt: skip
    rates = [rate for curve in curves for rate in curve.bpp]
    qualities = [quality for curve in curves for quality in curve.psnr]
    if rates:
        margin = max(1.0, 0.08 * (max(qualities) - min(qualities)))
        axes.set_xlim(0, 1.12 * max(rates))
        axes.set_ylim(min(qualities) - margin, max(qualities) + margin)
    axes.set_xlabel("bits per pixel")
    axes.set_ylabel("PSNR (dB)")
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if curves or anchors:
        axes.legend(frameon=False, loc="lower right")
    return figure


def _escape_label(name: str) -> str:
    """A legend label without matplotlib's markup: $ starts a formula, a leading _ hides the label."""
    return name.replace("$", r"\$").lstrip("_") or "curve"


def save_plots(figure: Figure, out: Path) -> None:
    """Write rd.png and rd.svg."""
    figure.savefig(out / PLOTS[0], dpi=160)
    (out / PLOTS[1]).write_text(_svg(figure), encoding="utf-8")


def _svg(figure: Figure) -> str:
    """The figure as SVG; deterministic."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "sgacodec"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


# -------------------------------------------------------------------------------------------------------- HTML


def html_report(summary: Summary, rows: Sequence[Row], figure: Figure | None, title: str) -> str:
    """The report as a self-contained HTML page.

    Parameters
    ----------
    summary : Summary
    rows : sequence of Row
        One per image and setting, for the table at the end.
    figure : Figure, optional
        The R-D plot, included as inline SVG.
    title : str
        Heading of the page.
    """
    images = len({row["name"] for row in rows})
    models = ", ".join(sorted({f"{row['model']} ({row['model_id']})" for row in rows}))
    devices = ", ".join(sorted({row["device"] for row in rows}))
    versions = ", ".join(sorted({row["version"] for row in rows}))
    crops = sorted({row["crop"] for row in rows if row["crop"] is not None})
    crop = f" · centre crop {', '.join(map(str, crops))}" if crops else ""
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">{images} images{crop} · model {escape(models)} · {escape(devices)} · '
        f"sgacodec {escape(versions)}</p>",
        "<p>Rates are sizes of files; PSNR and MS-SSIM are of the decoded 8-bit images.</p>",
    ]
    body += [f'<p class="bad">{escape(f"{name}: {why}")}</p>' for name, why in summary.failed.items()]
    if summary.left_out:
        names = escape(", ".join(summary.left_out))
        body.append(f'<p class="bad">Not included in the means, as not measured at every setting: {names}</p>')
    if figure is not None:
        svg = _svg(figure)
        body.append(f"<figure>{svg[svg.index('<svg') :]}</figure>")
    if summary.comparisons:
        body += ["<h2>Bjøntegaard deltas</h2>", _comparison_table(summary.comparisons)]
        body += [f'<p class="quiet">{escape(note)}</p>' for note in _notes(summary.comparisons)]
    body += ["<h2>Means over the images</h2>", _html_table(_POINT_COLUMNS, summary.points)]
    table = _html_table(_IMAGE_COLUMNS, rows)
    body.append(f"<details><summary>All images ({len(rows)} rows)</summary>{table}</details>")
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n" + "\n".join(body) + "\n</html>\n"
    )


def _html_table(columns: Sequence[tuple[str, str, str]], rows: Sequence[Row]) -> str:
    head = "".join(_tag("th", heading, column in _TEXT) for heading, column, _ in columns)
    lines = (
        "".join(_tag("td", _show(row[column], form), column in _TEXT) for _, column, form in columns) for row in rows
    )
    return _table(head, lines)


def _comparison_table(comparisons: Sequence[Comparison]) -> str:
    headings = ("curve", "against", "BD-rate", "BD-PSNR", "PSNR range")
    head = "".join(_tag("th", heading, i < 2) for i, heading in enumerate(headings))
    lines = []
    for comparison in comparisons:
        rate, gain, span = _deltas(comparison)
        better = ' class="good"' if (comparison.bd_rate or 0) < 0 else ""
        names = _tag("td", comparison.curve, True) + _tag("td", comparison.anchor, True)
        lines.append(f"{names}<td{better}>{rate}</td><td>{gain}</td><td>{span}</td>")
    return _table(head, lines)


def _tag(tag: str, text: str, left: bool) -> str:
    return f"<{tag}{' class=t' if left else ''}>{escape(text)}</{tag}>"


def _table(head: str, lines: Any) -> str:
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
