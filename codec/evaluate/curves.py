"""R-D curves from result files and from sweeps, and their Bjøntegaard deltas."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .bd import Curve, bd_psnr, bd_rate, shared_psnr
from .rows import CURVE, Row, common_images, means, read_rows

SUMMARY = "results.json"


@dataclass(frozen=True)
class Comparison:
    """Bjøntegaard deltas of a curve against an anchor.

    Attributes
    ----------
    curve, anchor : str
        Names of the curves.
    bd_rate, bd_psnr : float, optional
        Percent and dB; None if undefined.
    psnr_range : tuple of float, optional
        PSNR in dB over which the BD-rate is integrated.
    note : str
        Reason why a value is undefined, or empty.
    """

    curve: str
    anchor: str
    bd_rate: float | None
    bd_psnr: float | None
    psnr_range: tuple[float, float] | None
    note: str = ""


def load_curves(path: Path | str) -> list[Curve]:
    """Load the R-D curves of a file.

    Formats: CompressAI's JSON (``{"name": ..., "results": {"bpp": [...], "psnr-rgb": [...]}}``, or "psnr"); CSV with
    the columns bpp, psnr, with or without a header; the results.tsv and results.json of `sgacodec eval`.

    Raises
    ------
    ValueError
        If the file has another format; the message is one line and names the file.
    OSError
        If the file cannot be read.
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


def reference_curves(path: Path) -> list[Curve]:
    """The curves of :func:`load_curves`; those of another sweep as `SWEEP: CURVE`, by its folder or renamed table."""
    curves = load_curves(path)
    if path.suffix.lower() != ".tsv" and path.name != SUMMARY:
        return curves
    sweep = path.resolve().parent.name if path.stem == Path(SUMMARY).stem else path.stem
    return [replace(curve, name=f"{sweep}: {curve.name}") for curve in curves]


def curves_of(summary: Sequence[Row]) -> list[Curve]:
    """Join the points of a sweep, as returned by :func:`.rows.means`, to curves over λ.

    There is one curve per combination of method, classes, steps, seed, crop and options. The model may change along a
    curve (``--model auto``); if one λ was measured with several models, each model has its own curve. Points without
    PSNR (identical images) are omitted.
    """
    return [curve for curve, _ in named_groups(summary)]


def named_groups(summary: Sequence[Row]) -> list[tuple[Curve, list[Row]]]:
    """The curves of :func:`curves_of`, each with its points."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for point in summary:
        groups.setdefault(tuple(point[c] for c in CURVE), []).append(point)
    split: list[list[Row]] = []
    for group in groups.values():
        models = list(dict.fromkeys(p["model_id"] for p in group))
        if len({(p["lambda"], p["quality"]) for p in group}) == len(group):
            split.append(group)
        else:
            split += [[p for p in group if p["model_id"] == model] for model in models]
    named = []
    for name, group in zip(_names([g[0] for g in split]), split, strict=True):
        points = sorted((p["bpp"], p["psnr"]) for p in group if p["psnr"] is not None)
        named.append((Curve(name, tuple(p[0] for p in points), tuple(p[1] for p in points)), group))
    return named


def compare(curves: Iterable[Curve], anchors: Sequence[Curve]) -> list[Comparison]:
    """Compare every curve with every anchor; where a delta is undefined, `Comparison.note` has the reason."""
    comparisons = []
    for curve in curves:
        for anchor in anchors:
            rate = gain = span = None
            note = ""
            try:
                span = shared_psnr(curve, anchor)
                rate = bd_rate(curve, anchor)
                gain = bd_psnr(curve, anchor)
            except ValueError as error:
                note = str(error)
            comparisons.append(Comparison(curve.name, anchor.name, rate, gain, span, note))
    return comparisons


def _names(points: Sequence[Row]) -> list[str]:
    """Names of curves: method and steps, and whatever else distinguishes curves with the same method and steps."""
    names = []
    for point in points:
        words = [point["method"] if point["classes"] in (2, None) else f"{point['method']}-{point['classes']}"]
        if point["steps"]:
            words.append(f"{point['steps']} steps")
        similar = [p for p in points if (p["method"], p["steps"]) == (point["method"], point["steps"])]
        words += _distinctive(point["options"], [p["options"] for p in similar])
        for column, text in (("seed", "seed {}"), ("crop", "crop {}"), ("model", "{}"), ("model_id", "{}")):
            if len({p[column] for p in similar}) > 1:
                words.append(text.format(point[column] or "none"))
        names.append(", ".join(words))
    return names


def _distinctive(options: str, similar: Sequence[str]) -> list[str]:
    """The options, of "name=value name=value", that some of `similar` lack."""
    everywhere = set.intersection(*(set(text.split()) for text in similar))
    return [word.removeprefix("subsampling=").replace("=", " ") for word in options.split() if word not in everywhere]


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
                if number == 1 and not points:  # header
                    continue
                raise ValueError(f"{path}, line {number}: expected two numbers: bpp, psnr") from error
            points.append((rate, quality))
    points.sort()
    return Curve(path.stem, tuple(p[0] for p in points), tuple(p[1] for p in points))
