"""Figures of the documentation: texts and tables that are computed from the tables in docs/results/.

A curve is named FILE or FILE:CURVE. FILE is a table of `sgacodec eval` in the folder, without suffix, or a published
curve in its folder published/. CURVE is the name of one of its curves, or the method, where only one curve has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from .bd import Curve, bd_psnr, bd_rate
from .curves import load_curves, named_groups
from .rows import Row, common_images, means, read_rows, read_traces, seconds_per_megapixel

PUBLISHED, STUDIES = "published", "studies"
_MINUS = "−"


def figure(folder: Path, function: str, arguments: Sequence[str]) -> str:
    """The text of a marker; a table, of several lines, ends without a line break.

    Raises
    ------
    ValueError
        For an unknown function, wrong arguments, or results that do not give the figure.
    OSError
        If a table cannot be read.
    """
    if function not in FUNCTIONS:
        raise ValueError(f"{function!r} is none of {', '.join(FUNCTIONS)}")
    try:
        return FUNCTIONS[function](folder, *arguments)
    except TypeError as error:
        raise ValueError(f"{function}: {error}") from error


@lru_cache(maxsize=64)
def _groups(path: Path, changed: float) -> list[tuple[Curve, list[Row], list[Row]]]:
    """The curves of a table, each with its means and its rows."""
    rows, incomplete = common_images(read_rows(path))
    if incomplete:
        raise ValueError(f"{path}: unfinished sweep: not every setting has {', '.join(incomplete[:3])}")
    points = means(rows)
    keys = ("lambda", "quality", "method", "classes", "steps", "seed", "crop", "options", "model_id")
    found = []
    for curve, group in named_groups(points):
        settings = {tuple(point[k] for k in keys) for point in group}
        found.append((curve, group, [r for r in rows if tuple(r[k] for k in keys) in settings]))
    return found


def _select(folder: Path, spec: str) -> tuple[Curve, list[Row], list[Row]]:
    file, _, name = spec.partition(":")
    path = folder / f"{file}.tsv"
    groups = _groups(path, path.stat().st_mtime)
    for chosen in (
        [g for g in groups if not name or g[0].name == name],
        [g for g in groups if g[1][0]["method"] == name],
    ):
        if len(chosen) == 1:
            return chosen[0]
    raise ValueError(f"{spec}: the curves are {', '.join(repr(g[0].name) for g in groups)}")


def _means_of(folder: Path, file: str) -> list[Row]:
    """The means of a table, over its images."""
    path = folder / f"{file}.tsv"
    return [point for _, group, _ in _groups(path, path.stat().st_mtime) for point in group]


def curve_of(folder: Path, spec: str) -> Curve:
    """The curve of a name."""
    for suffix in (".json", ".csv"):
        path = folder / PUBLISHED / (spec + suffix)
        if path.exists():
            return load_curves(path)[0]
    return _select(folder, spec)[0]


# ------------------------------------------------------------------------------------------------------ numbers


def _bd_rate(folder: Path, curve: str, anchor: str, digits: str = "1") -> str:
    return f"{signed(bd_rate(curve_of(folder, curve), curve_of(folder, anchor)), int(digits))} %"


def _needs(folder: Path, curve: str, anchor: str) -> str:
    rate = bd_rate(curve_of(folder, curve), curve_of(folder, anchor))
    return f"{abs(rate):.0f} % {'fewer' if rate < 0 else 'more'}"


def _saves(folder: Path, curve: str, anchor: str, digits: str = "0") -> str:
    return f"{-bd_rate(curve_of(folder, curve), curve_of(folder, anchor)):.{digits}f} %"


def _bd_psnr(folder: Path, curve: str, anchor: str) -> str:
    return f"{signed(bd_psnr(curve_of(folder, curve), curve_of(folder, anchor)), 2)} dB"


def _loss(folder: Path, spec: str, what: str = "mean") -> str:
    """By how much refinement lowers the loss: mean, minimum (min) or maximum (max) over images and λ."""
    gains = [100 * (1 - row["rd_loss"] / row["rd_loss_unrefined"]) for row in _select(folder, spec)[2]]
    value = {"mean": sum(gains) / len(gains), "min": min(gains), "max": max(gains)}[what]
    return f"{value:.1f} %"


def _count(folder: Path, spec: str, what: str = "images") -> str:
    rows = _select(folder, spec)[2]
    return str(len(rows) if what == "rows" else len({row["name"] for row in rows}))


def _model(folder: Path, spec: str) -> str:
    rows = _select(folder, spec)[2]
    return ", ".join(dict.fromkeys(f"{row['model']}, id {row['model_id']}" for row in rows))


def _iterations(folder: Path, file: str) -> str:
    """Steps of the refinements of a table."""
    steps = sorted({point["steps"] for point in _means_of(folder, file)})
    return f"{' and '.join(map(str, steps))} iterations"


def _seconds(folder: Path, spec: str, what: str) -> str:
    """Mean seconds to encode or decode an image."""
    points = _select(folder, spec)[1]
    return f"{sum(point[f'seconds_{what}'] for point in points) / len(points):.2g}"


# ------------------------------------------------------------------------------------------------------- tables


def _points(folder: Path, *specs: str) -> str:
    """Rate and quality at each λ; LABEL=CURVE labels the rows of a curve."""
    lines: list[list[str]] = []
    for spec in specs:
        label, curve = _labelled(spec)
        _, points, rows = _select(folder, curve)
        if not lines:
            lines.append(["λ", *(f"{point['lambda']:g}" for point in points)])
        before = f"{label}: " if label else ""
        lines.append([f"{before}bpp", *(f"{point['bpp']:.4f}" for point in points)])
        lines.append(["PSNR, dB", *("∞" if point["psnr"] is None else f"{point['psnr']:.2f}" for point in points)])
        if all(point["ms_ssim"] is not None for point in points):
            lines.append(["MS-SSIM", *(f"{point['ms_ssim']:.4f}" for point in points)])
        if points[0]["method"] != "none":
            ratios = [_ratio(rows, point["lambda"]) for point in points]
            lines.append(["true loss, refined / unrefined, mean of images", *(f"{ratio:.3f}" for ratio in ratios)])
    return markdown(lines)


def _ratio(rows: Sequence[Row], lmbda: float) -> float:
    ratios = [row["rd_loss"] / row["rd_loss_unrefined"] for row in rows if row["lambda"] == lmbda]
    return sum(ratios) / len(ratios)


def _bd_table(folder: Path, *specs: str) -> str:
    """BD-rates of curves (before "--") against anchors (after it); LABEL=CURVE labels both."""
    if "--" not in specs:
        raise ValueError("bd-table CURVE... -- ANCHOR...")
    cut = specs.index("--")
    anchors = [_labelled(spec) for spec in specs[cut + 1 :]]
    lines = [["BD-rate against", *(label or spec for label, spec in anchors)]]
    for label, spec in map(_labelled, specs[:cut]):
        lines.append([label or spec, *(_bd_rate(folder, spec, anchor) for _, anchor in anchors)])
    return markdown(lines)


def _costs(folder: Path, anchor: str, *specs: str) -> str:
    """BD-rate against an anchor and seconds a megapixel of curves; LABEL=CURVE labels a curve."""
    label, base = _labelled(anchor)
    lines = [["", f"BD-rate against {label or base}", "encode, s/MP", "decode, s/MP"]]
    for name, spec in map(_labelled, specs):
        points = _select(folder, spec)[1]
        cells = [f"{seconds_per_megapixel(points, what):.3g}" for what in ("encode", "decode")]
        lines.append([name or spec, _bd_rate(folder, spec, base), *cells])
    return markdown(lines)


def _excess(folder: Path, file: str, down: str, anchor: str) -> str:
    """Mean loss by an option and λ, relative to that of another curve at the same λ."""
    losses = {point["lambda"]: point["rd_loss"] for point in _select(folder, anchor)[1]}
    cells: dict[str, dict[float, str]] = {}
    for point in _means_of(folder, file):
        excess = 100 * (point["rd_loss"] / losses[point["lambda"]] - 1)
        cells.setdefault(_number(_value(point, down)), {})[point["lambda"]] = f"{signed(excess, 1)} %"
    lines = [[name, *(row[lmbda] for lmbda in losses)] for name, row in cells.items()]
    return markdown([[f"{down} \\ λ", *map(str, losses)], *lines])


def _pivot(folder: Path, file: str, down: str, across: str, value: str = "rd_loss") -> str:
    """Means of a column, by two columns or options; the lowest of each column is bold."""
    points = _means_of(folder, file)
    cells = {(_value(p, down), _value(p, across)): f"{p[value]:.4f}" for p in points}
    if len(cells) < len(points):
        raise ValueError(f"{file}: several settings have one {down} and one {across}")
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    for column in columns if len(rows) > 1 else ():
        best = min((row for row in rows if (row, column) in cells), key=lambda row: float(cells[row, column]))
        cells[best, column] = f"**{cells[best, column]}**"
    lines = [[f"{down} \\ {across}", *map(_number, columns)]]
    lines += [[_number(row), *(cells.get((row, column), "–") for column in columns)] for row in rows]
    return markdown(lines)


def _spread(folder: Path, file: str, down: str) -> str:
    """By how much the mean loss varies over a hyperparameter: (highest − lowest) / lowest, for each value of `down`."""
    losses: dict[str, list[float]] = {}
    for point in _means_of(folder, file):
        losses.setdefault(_number(_value(point, down)), []).append(point["rd_loss"])
    spreads = [f"{100 * (max(v) / min(v) - 1):.2f} %" for v in losses.values()]
    return markdown([[down, *losses], ["spread", *spreads]])


def _traced(folder: Path, file: str, *steps: str) -> str:
    """Mean true loss of each method, with its classes, after some steps of its trace."""
    losses: dict[str, dict[int, list[float]]] = {}
    for row in read_traces(folder / f"{file}-traces.tsv"):
        if row["relaxed_loss"] is not None:
            name = f"{row['method']}, {row['classes']} classes"
            losses.setdefault(name, {}).setdefault(row["step"], []).append(row["true_loss"])
    lines = [["true loss after step", *steps]]
    for name, found in losses.items():
        lines.append([name, *(f"{sum(found[int(s)]) / len(found[int(s)]):.4f}" for s in steps)])
    return markdown(lines)


def _value(point: Row, name: str) -> Any:
    if name in point:
        return point[name]
    options = dict(word.split("=", 1) for word in point["options"].split())
    return float(options[name]) if name in options else "default"


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _plot(folder: Path, file: str, text: str) -> str:
    """The SVG of a name below docs/images, as the documents refer to it."""
    path = folder.parent / "images" / f"{file}.svg"
    if not path.exists():
        raise FileNotFoundError(path)
    return f"![{text}](images/{file}.svg)"


def _optional(folder: Path, function: str, *arguments: str) -> str:
    """Another figure, or a note where its tables are not there yet."""
    try:
        return figure(folder, function, arguments)
    except FileNotFoundError:
        return "(not measured yet)"


def _study(folder: Path, name: str) -> str:
    """A table that was measured once and is kept as TSV in studies/; lines that begin with # say how."""
    text = (folder / STUDIES / f"{name}.tsv").read_text(encoding="utf-8")
    return markdown([line.split("\t") for line in text.splitlines() if not line.startswith("#")])


def _labelled(spec: str) -> tuple[str, str]:
    label, found, curve = spec.rpartition("=")
    return (label, curve) if found else ("", spec)


def signed(value: float, digits: int) -> str:
    """With a sign, a true minus."""
    return f"{value:+.{digits}f}".replace("-", _MINUS)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is the header."""
    head, *rest = ("|" + "".join(f" {cell} |" if cell else " |" for cell in cells) for cells in lines)
    return "\n".join([head, "|" + "---|" * len(lines[0]), *rest])


FUNCTIONS: dict[str, Callable[..., str]] = {
    "bd-rate": _bd_rate,
    "bd-psnr": _bd_psnr,
    "needs": _needs,
    "saves": _saves,
    "loss": _loss,
    "count": _count,
    "model": _model,
    "iterations": _iterations,
    "seconds": _seconds,
    "points": _points,
    "bd-table": _bd_table,
    "costs": _costs,
    "excess": _excess,
    "pivot": _pivot,
    "spread": _spread,
    "traced": _traced,
    "plot": _plot,
    "optional": _optional,
    "study": _study,
}
