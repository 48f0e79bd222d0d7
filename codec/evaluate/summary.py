"""A sweep in numbers that fit on a page: means, curves and Bjøntegaard deltas; results.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from ..metrics import Curve
from .curves import Comparison, compare, curves_of
from .rows import Row, common_images, means
from .sweep import Sweep

SUMMARY = "results.json"


@dataclass(frozen=True)
class Summary:
    """A sweep in numbers that fit on a page.

    Attributes
    ----------
    points : list of Row
        Means per setting over the images that every setting has.
    curves : list of Curve
        The points, joined over λ.
    comparisons : list of Comparison
        Each curve against each anchor.
    left_out : list of str
        Images that some setting lacks.
    failed : dict
        What went wrong, by image name.
    """

    points: list[Row]
    curves: list[Curve]
    comparisons: list[Comparison]
    left_out: list[str]
    failed: dict[str, str]


def summarise(sweep: Sweep, anchors: Sequence[Curve], out: Path) -> Summary:
    """Average a sweep, compare its curves with `anchors`, and write ``out/results.json``.

    Where there are several curves, they are also compared with the first (method none, if it is there).
    """
    rows, left_out = common_images(sweep.rows)
    points = means(rows)
    curves = curves_of(points)
    own = curves[:1] if len(curves) > 1 else []
    comparisons = [c for c in compare(curves, [*own, *anchors]) if c.curve != c.anchor]
    summary = Summary(points, curves, comparisons, left_out, sweep.failed)
    content = {
        "version": version("sgacodec"),
        "images": len({row["name"] for row in rows}),
        "left_out": left_out,
        "failed": sweep.failed,
        "means": points,
        "curves": [{"name": c.name, "results": {"bpp": c.bpp, "psnr-rgb": c.psnr}} for c in curves],
        "comparisons": [asdict(c) for c in comparisons],
    }
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    (out / SUMMARY).write_text(text, encoding="utf-8")
    return summary
