"""Summary of a sweep: means, curves and Bjøntegaard deltas; results.json."""

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
    """Summary of a sweep.

    Attributes
    ----------
    points : list of Row
        Means of each setting over the images that were measured at every setting.
    curves : list of Curve
        The points, joined over λ.
    comparisons : list of Comparison
        Each curve against each anchor.
    left_out : list of str
        Images that were not measured at every setting.
    failed : dict
        Error messages by image name.
    """

    points: list[Row]
    curves: list[Curve]
    comparisons: list[Comparison]
    left_out: list[str]
    failed: dict[str, str]


def summarise(sweep: Sweep, anchors: Sequence[Curve], out: Path) -> Summary:
    """Average a sweep, compare its curves with `anchors`, and write ``out/results.json``.

    Several curves are also compared with the first of them, which is of method "none" if that was measured.
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
