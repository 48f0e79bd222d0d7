"""Reports of a sweep: tables in the terminal, and a self-contained HTML page.

Summary ─► print_summary (terminal)
        ─► html_report ─► report.html (plots, tables, pictures and their script; needs no other file)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Table

from .curves import Comparison
from .rows import Row, printable

if TYPE_CHECKING:
    from .pictures import View
    from .summary import Cost, Summary

REPORT = "report.html"

# Heading, column of the row, number format.
_POINT_COLUMNS = (
    ("method", "method", ""),
    ("classes", "classes", ""),
    ("steps", "steps", ""),
    ("λ", "lambda", ".4g"),
    ("quality", "quality", "g"),
    ("options", "options", ""),
    ("model", "model", ""),
    ("id", "model_id", ""),
    ("images", "images", ""),
    ("bpp", "bpp", ".4f"),
    ("PSNR", "psnr", ".2f"),
    ("MS-SSIM", "ms_ssim", ".4f"),
    ("FLIP", "flip", ".4f"),
    ("R-D loss", "rd_loss", ".4f"),
    ("unrefined", "rd_loss_unrefined", ".4f"),
    ("enc s", "seconds_encode", ".3g"),
    ("dec s", "seconds_decode", ".2g"),
)
_IMAGE_COLUMNS = (
    ("image", "name", ""),
    *(column for column in _POINT_COLUMNS if column[0] not in ("images", "classes")),
    ("bytes", "bytes", ""),
)
_TERMINAL_COLUMNS = tuple(  # at most 80 characters wide
    column
    for column in _POINT_COLUMNS
    if column[1] not in ("classes", "quality", "options", "model", "model_id", "images", "flip", "rd_loss_unrefined")
)
_TEXT = ("name", "method", "options", "model", "model_id")  # left-aligned

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


# -------------------------------------------------------------------------------------------------------- HTML


def html_report(
    summary: Summary,
    rows: Sequence[Row],
    plots: dict[str, str],
    title: str,
    views: Sequence[View] = (),
    lossless: bool = True,
) -> str:
    """The report as a self-contained HTML page.

    Parameters
    ----------
    summary : Summary
    rows : sequence of Row
        One per image and setting, for the table at the end.
    plots : dict
        SVG by heading.
    title : str
        Heading of the page.
    views : sequence of View
        For the comparison of pictures; `lossless` says whether the page shows their exact pixels.
    """
    own = [row for row in rows if row["lambda"] is not None]
    models = ", ".join(sorted({f"{row['model']} ({row['model_id']})" for row in own}))
    devices = ", ".join(sorted({row["device"] for row in own}))
    versions = ", ".join(sorted({row["version"] for row in rows}))
    crops = sorted({row["crop"] for row in rows if row["crop"] is not None})
    crop = f" · centre crop {', '.join(map(str, crops))}" if crops else ""
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">{len({row["name"] for row in rows})} images{crop} · model {escape(models)} · '
        f"{escape(devices)} · sgacodec {escape(versions)}</p>",
        "<p>Rates are sizes of files; PSNR and MS-SSIM are of the decoded 8-bit images.</p>",
    ]
    body += [f'<p class="bad">{escape(f"{name}: {why}")}</p>' for name, why in summary.failed.items()]
    if summary.left_out:
        names = escape(", ".join(summary.left_out))
        body.append(f'<p class="bad">Not included in the means, as not measured at every setting: {names}</p>')
    for heading, svg in plots.items():
        body += [f"<h2>{escape(heading)}</h2>", f"<figure>{svg[svg.index('<svg') :]}</figure>"]
    if views:
        body += ["<h2>Pictures</h2>", _comparison(views, lossless)]
    if summary.comparisons:
        body += ["<h2>Bjøntegaard deltas</h2>", _comparison_table(summary.comparisons)]
        body += [f'<p class="quiet">{escape(note)}</p>' for note in _notes(summary.comparisons)]
    if len(summary.costs) > 1:
        body += ["<h2>Time and gain</h2>", _cost_table(summary.costs)]
    columns = [c for c in _POINT_COLUMNS if any(point[c[1]] is not None for point in summary.points)]
    ours = [point for point in summary.points if point["lambda"] is not None]
    peers = [point for point in summary.points if point["lambda"] is None]
    body += ["<h2>Means over the images</h2>", _html_table(columns, ours, "means")]
    if peers:
        body.append(_folded(f"Other encoders ({len(peers)} points)", _html_table(columns, peers, "peers")))
    columns = [c for c in _IMAGE_COLUMNS if c in columns or c[1] in ("name", "bytes")]
    body.append(_folded(f"All images ({len(rows)} rows)", _html_table(columns, rows, "rows")))
    if views:
        body.append(f'<script id="views" type="application/json">{_json(views)}</script>')
        body.append(f"<script>{_asset('report.js')}</script>")
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{_asset('report.css')}</style>\n" + "\n".join(body) + "\n</html>\n"
    )


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _json(views: Sequence[View]) -> str:
    """JSON that can stand in a script element."""
    return json.dumps([asdict(view) for view in views], separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _comparison(views: Sequence[View], lossless: bool) -> str:
    """The elements that report.js fills; the right picture is at first the last of our variants."""
    first = sum(variant.lmbda is not None for variant in views[0].variants)
    lmbda = next(v.lmbda for v in views[0].variants if v.lmbda is not None)
    shown = (
        "Pictures are shown without loss."
        if lossless
        else "Pictures but those of JPEG, WebP and AVIF files are shown as AVIF of quality 90; the figures are of the "
        "exact pixels."
    )
    return f"""<p class="quiet">λ = {lmbda:g}; other encoders at the size nearest to our smallest file. {shown}
Keys: ← → move the slider, n and p change the image, d shows the difference (six times as bright).</p>
<div class="controls">
<label>image <select id="image"></select></label>
<label>left <select id="left"></select></label>
<label>right <select id="right" data-first="{first}"></select></label>
<label>view <select id="mode"><option value="slider">slider</option><option value="difference">difference</option>
</select></label>
<label>zoom <select id="zoom"><option value="0">fit</option><option value="1">1×</option><option value="2">2×</option>
<option value="4">4×</option></select></label>
<button type="button" id="previous">‹ previous</button> <button type="button" id="next">next ›</button>
</div>
<div class="stage" id="stage" tabindex="0"><div class="pair" id="pair"><img alt=""><img alt="">
<div class="rule" id="rule"></div></div></div>
<input type="range" id="position" min="0" max="100" step="0.5" value="50" aria-label="position of the slider">
<div class="captions"><p id="left-caption"></p><p id="right-caption"></p></div>
<div class="scroll"><table id="variants"><thead><tr><th class=t>variant</th><th>bpp</th><th>PSNR</th></tr></thead>
<tbody></tbody></table></div>"""


def _cost_table(costs: Sequence[Cost]) -> str:
    headings = ("curve", f"BD-rate against {costs[0].anchor}", "encode, s/MP", "decode, s/MP")
    head = "".join(_tag("th", heading, i < 1) for i, heading in enumerate(headings))
    lines = []
    for cost in costs:
        rate = "–" if cost.bd_rate is None else f"{cost.bd_rate:+.2f} %"
        cells = (cost.curve, rate, f"{cost.seconds_encode:.3g}", f"{cost.seconds_decode:.3g}")
        lines.append("".join(_tag("td", cell, i < 1) for i, cell in enumerate(cells)))
    return _table(head, lines, "costs")


def _html_table(columns: Sequence[tuple[str, str, str]], rows: Sequence[Row], name: str) -> str:
    head = "".join(_tag("th", heading, column in _TEXT) for heading, column, _ in columns)
    lines = (
        "".join(_tag("td", _show(row[column], form), column in _TEXT) for _, column, form in columns) for row in rows
    )
    return _table(head, lines, name)


def _comparison_table(comparisons: Sequence[Comparison]) -> str:
    headings = ("curve", "against", "BD-rate", "BD-PSNR", "PSNR range")
    head = "".join(_tag("th", heading, i < 2) for i, heading in enumerate(headings))
    lines = []
    for comparison in comparisons:
        rate, gain, span = _deltas(comparison)
        better = ' class="good"' if (comparison.bd_rate or 0) < 0 else ""
        names = _tag("td", comparison.curve, True) + _tag("td", comparison.anchor, True)
        lines.append(f"{names}<td{better}>{rate}</td><td>{gain}</td><td>{span}</td>")
    return _table(head, lines, "deltas")


def _tag(tag: str, text: str, left: bool) -> str:
    return f"<{tag}{' class=t' if left else ''}>{escape(text)}</{tag}>"


def _table(head: str, lines: Iterable[str], name: str) -> str:
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f'<div class="scroll"><table id="{name}"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
