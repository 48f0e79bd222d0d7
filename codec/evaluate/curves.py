"""R-D curves: from published files and from our own sweeps; how far one lies from another."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import metrics
from ..metrics import Curve
from .rows import Row, common_images, means, read_rows


@dataclass(frozen=True)
class Comparison:
    """A curve against an anchor.

    Attributes
    ----------
    curve, anchor : str
        Their names.
    bd_rate : float, optional
        Percent; None where it is not defined.
    bd_psnr : float, optional
        dB; None where it is not defined.
    psnr_range : tuple of float, optional
        What PSNR, in dB, the BD-rate is taken over.
    note : str
        Why a number is missing, or empty.
    """

    curve: str
    anchor: str
    bd_rate: float | None
    bd_psnr: float | None
    psnr_range: tuple[float, float] | None
    note: str = ""


def load_curves(path: Path | str) -> list[Curve]:
    """Load the R-D curves of a file.

    CompressAI's JSON (``{"name": ..., "results": {"bpp": [...], "psnr-rgb": [...]}}``, or "psnr"), CSV of two
    columns bpp, psnr (with or without a header), or what `sgacodec eval` writes: results.tsv (means over the
    images) and results.json.

    Raises
    ------
    ValueError
        If the file is of another kind; the message is one line and names it.
    OSError
        If it cannot be read.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".tsv":
        rows, incomplete = common_images(read_rows(path))
        if incomplete:
            raise ValueError(f"{path}: unfinished sweep: not every setting has {', '.join(incomplete[:3])}")
        curves = curves_of(means(rows))
    elif suffix == ".json":
        curves = _from_json(path)
    elif suffix == ".csv":
        curves = [_from_csv(path)]
    else:
        raise ValueError(f"{path}: a curve is a .json, .csv or .tsv file")
    if not curves or not all(curve.bpp for curve in curves):
        raise ValueError(f"{path}: no points")
    return curves


def curves_of(summary: Sequence[Row]) -> list[Curve]:
    """Join the points of a sweep, as :func:`.rows.means` gives them, to curves over λ.

    One curve a method, classes, steps, seed and crop. The model may change along a curve (``--model auto``),
    but if one λ was measured with several models, each has its curve. A point without PSNR (identical images)
    is left out.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for point in summary:
        part = tuple(point[c] for c in ("method", "classes", "steps", "seed", "crop"))
        groups.setdefault(part, []).append(point)
    split: list[list[Row]] = []
    for group in groups.values():
        models = list(dict.fromkeys(p["model_id"] for p in group))
        if len({p["lambda"] for p in group}) == len(group):
            split.append(group)
        else:
            split += [[p for p in group if p["model_id"] == model] for model in models]
    curves = []
    for name, group in zip(_names([g[0] for g in split]), split, strict=True):
        points = sorted((p["bpp"], p["psnr"]) for p in group if p["psnr"] is not None)
        curves.append(Curve(name, tuple(p[0] for p in points), tuple(p[1] for p in points)))
    return curves


def compare(curves: Iterable[Curve], anchors: Sequence[Curve]) -> list[Comparison]:
    """Compare every curve with every anchor; a pair without overlap gives a note, not an error."""
    comparisons = []
    for curve in curves:
        for anchor in anchors:
            rate = gain = span = None
            note = ""
            try:
                span = metrics.shared_psnr(curve, anchor)
                rate = metrics.bd_rate(curve, anchor)
                gain = metrics.bd_psnr(curve, anchor)
            except ValueError as error:
                note = str(error)
            comparisons.append(Comparison(curve.name, anchor.name, rate, gain, span, note))
    return comparisons


def _names(points: Sequence[Row]) -> list[str]:
    """Name curves by what they are, saying only what tells them apart beyond method and steps."""
    names = []
    for point in points:
        words = [point["method"] if point["classes"] == 2 else f"{point['method']}-{point['classes']}"]
        if point["method"] != "none":
            words.append(f"{point['steps']} steps")
        for column, text in (("seed", "seed {}"), ("crop", "crop {}"), ("model", "{}"), ("model_id", "{}")):
            alike = [p for p in points if (p["method"], p["steps"]) == (point["method"], point["steps"])]
            if len({p[column] for p in alike}) > 1:
                words.append(text.format(point[column] or "none"))
        names.append(", ".join(words))
    return names


def _from_json(path: Path) -> list[Curve]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if "curves" in data:
            return [_published(item, path.stem) for item in data["curves"]]
        return [_published(data, path.stem)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path}: not a curve: {{"results": {{"bpp": [...], "psnr-rgb": [...]}}}}') from error


def _published(data: dict[str, Any], name: str) -> Curve:
    results = data["results"]
    psnr = results["psnr-rgb"] if "psnr-rgb" in results else results["psnr"]
    points = sorted((float(r), float(q)) for r, q in zip(results["bpp"], psnr, strict=True))
    return Curve(str(data.get("name") or name), tuple(p[0] for p in points), tuple(p[1] for p in points))


def _from_csv(path: Path) -> Curve:
    points: list[tuple[float, float]] = []
    with open(path, encoding="utf-8-sig", newline="") as file:
        for number, cells in enumerate(csv.reader(file), start=1):
            if not any(cell.strip() for cell in cells) or cells[0].lstrip().startswith("#"):
                continue
            try:
                rate, quality = (float(cell) for cell in cells)
            except ValueError as error:
                if number == 1 and not points:  # a header
                    continue
                raise ValueError(f"{path}, line {number}: not two numbers: bpp, psnr") from error
            points.append((rate, quality))
    points.sort()
    return Curve(path.stem, tuple(p[0] for p in points), tuple(p[1] for p in points))
