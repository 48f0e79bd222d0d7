"""Summary of a sweep: means, curves and Bjøntegaard deltas; results.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from ..atomic import write_whole
from .bd import Curve
from .curves import SUMMARY, Comparison, compare, named_groups
from .rows import SETTING, Row, common_images, means, seconds_per_megapixel
from .sweep import Sweep


@dataclass(frozen=True)
class Cost:
    """Mean time of a curve's files, and what it gains.

    Attributes
    ----------
    curve, anchor : str
        The BD-rate is of `curve` against `anchor`.
    bd_rate : float, optional
        Percent; None if undefined.
    seconds_encode, seconds_decode : float
        Of a megapixel, means over all points of the curve.
    """

    curve: str
    anchor: str
    bd_rate: float | None
    seconds_encode: float
    seconds_decode: float


@dataclass(frozen=True)
class Summary:
    """Summary of a sweep.

    Attributes
    ----------
    points : list of Row
        Means of each setting over the images that were measured at every setting.
    curves, peers : list of Curve
        The points, joined over λ; those of peers, joined over the quality.
    comparisons : list of Comparison
        Each curve against the first of them, each peer and each anchor.
    costs : list of Cost
        Seconds and BD-rate of each curve and peer.
    traces : dict
        Steps of traced refinements by the name of their curve.
    left_out : list of str
        Images that were not measured at every setting.
    failed : dict
        Error messages by image name.
    """

    points: list[Row]
    curves: list[Curve]
    peers: list[Curve]
    comparisons: list[Comparison]
    costs: list[Cost]
    traces: dict[str, list[Row]]
    left_out: list[str]
    failed: dict[str, str]


def summarize(sweep: Sweep, anchors: Sequence[Curve], out: Path) -> Summary:
    """Average a sweep, compare its curves with `anchors`, and write ``out/results.json``.

    Several curves are also compared with the first of them, which is of method "none" if that was measured, and with
    the peers.
    """
    rows, left_out = common_images(sweep.rows)
    points = means(rows)
    named = named_groups(points)
    curves = [curve for curve, group in named if group[0]["lambda"] is not None]
    peers = [curve for curve, group in named if group[0]["lambda"] is None]
    own = curves[:1] if len(curves) > 1 else []
    references = [*own, *peers, *anchors]
    comparisons = [c for curve in curves for c in compare([curve], [r for r in references if r is not curve])]
    summary = Summary(
        points=points,
        curves=curves,
        peers=peers,
        comparisons=comparisons,
        costs=_costs(named, [*sorted(peers, key=_is_not_jpeg), *anchors, *curves]),
        traces=_traces(named, sweep.traces, {row["name"] for row in rows}),
        left_out=left_out,
        failed=sweep.failed,
    )
    content = {
        "version": version("sgacodec"),
        "images": len({row["name"] for row in rows}),
        "left_out": left_out,
        "failed": sweep.failed,
        "means": points,
        "curves": [{"name": c.name, "results": {"bpp": c.bpp, "psnr-rgb": c.psnr}} for c in [*curves, *peers]],
        "comparisons": [asdict(c) for c in comparisons],
        "costs": [asdict(c) for c in summary.costs],
    }
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_whole(out / SUMMARY, text.encode())
    return summary


def _is_not_jpeg(curve: Curve) -> bool:
    return not curve.name.startswith("jpeg")


def _costs(named: Sequence[tuple[Curve, list[Row]]], anchors: Sequence[Curve]) -> list[Cost]:
    """The cost of each curve; BD-rates are against the first anchor: a peer where there is one."""
    costs = []
    for curve, group in named:
        comparison = compare([curve], anchors[:1])[0]
        costs.append(
            Cost(
                curve=curve.name,
                anchor=comparison.anchor,
                bd_rate=comparison.bd_rate,
                seconds_encode=seconds_per_megapixel(group, "encode"),
                seconds_decode=seconds_per_megapixel(group, "decode"),
            )
        )
    return costs


def _traces(named: Sequence[tuple[Curve, list[Row]]], rows: Sequence[Row], names: set[str]) -> dict[str, list[Row]]:
    """The traces of each curve that has some, of the images `names`."""
    found = {}
    for curve, group in named:
        settings = {tuple(point[column] for column in SETTING) for point in group}
        traces = [r for r in rows if r["name"] in names and tuple(r[column] for column in SETTING) in settings]
        if traces:
            found[curve.name] = traces
    return found
