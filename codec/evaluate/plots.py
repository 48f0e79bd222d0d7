"""Plots of a sweep, as matplotlib figures: R-D curves, convergence, and time against gain."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..atomic import write_whole
from .bd import Curve
from .rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .summary import Cost

PLOTS = ("rd.png", "rd.svg")
COLOURS = ("#0b6e99", "#d1495b", "#2e933c", "#8d5a97", "#e08e1b", "#30343f", "#1aa6a6", "#a0522d")
_ANCHORS = ("#8a8f98", "#b39c82", "#7d9d9c", "#a98ba8", "#9aa877", "#c08a8a")
_DASHES = ("--", "-.", ":")


def rate_distortion(curves: Sequence[Curve], anchors: Sequence[Curve] = (), peers: Sequence[Curve] = ()) -> Figure:
    """Draw bpp against PSNR: `curves` with dots, `peers` as thin lines, `anchors` as thin grey lines behind them.

    The limits of the axes follow `curves` only, because anchors often cover a much larger range.
    """
    figure, (axes,) = new_figure(1)
    for i, curve in enumerate(anchors):
        colour, dashes = _ANCHORS[i % len(_ANCHORS)], _DASHES[i % len(_DASHES)]
        points = sorted(zip(curve.bpp, curve.psnr, strict=True))
        axes.plot(
            [rate for rate, _ in points], [quality for _, quality in points], color=colour, linestyle=dashes,
            linewidth=1.2, zorder=2, label=label_of(curve.name),
        )  # fmt: skip
    for i, curve in enumerate(curves):
        axes.plot(
            curve.bpp, curve.psnr, color=COLOURS[i % len(COLOURS)], marker="o", markersize=5, linewidth=2, zorder=3,
            label=label_of(curve.name),
        )  # fmt: skip
    for i, curve in enumerate(peers, start=len(curves)):
        axes.plot(
            curve.bpp, curve.psnr, color=COLOURS[i % len(COLOURS)], linewidth=1.1, zorder=2,
            label=label_of(curve.name),
        )  # fmt: skip
    rates = [rate for curve in curves for rate in curve.bpp]
    qualities = [quality for curve in curves for quality in curve.psnr]
    if rates:
        margin = max(1.0, 0.08 * (max(qualities) - min(qualities)))
        axes.set_xlim(0, 1.12 * max(rates))
        axes.set_ylim(min(qualities) - margin, max(qualities) + margin)
    axes.set_xlabel("bits per pixel")
    axes.set_ylabel("PSNR (dB)")
    if curves or anchors or peers:
        axes.legend(frameon=False, loc="lower right")
    return figure


def time_and_gain(costs: Sequence[Cost]) -> Figure:
    """Draw the seconds that a megapixel takes to encode against the BD-rate, one dot a curve."""
    figure, (axes,) = new_figure(1)
    known = [(cost.curve, cost.seconds_encode, cost.bd_rate) for cost in costs if cost.bd_rate is not None]
    for i, (curve, seconds, rate) in enumerate(known):
        axes.scatter([seconds], [rate], color=COLOURS[i % len(COLOURS)], zorder=3)
        axes.annotate(
            label_of(curve), (seconds, rate), xytext=(6, 4),
            textcoords="offset points", fontsize="small",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.25, y=0.1)
    axes.set_xlabel("seconds to encode a megapixel")
    axes.set_ylabel(f"BD-rate against {label_of(costs[0].anchor)} (%)")
    return figure


def convergence(traces: Mapping[str, Sequence[Row]]) -> Figure:
    """Draw the four panels of Figure 2 of SGA+ over the steps: true loss, relaxed minus true loss, PSNR and bpp.

    Values are means over the images and λ of a trace. The last pass, where there is one, is not drawn.

    Parameters
    ----------
    traces : mapping
        Rows of traces by the name of their curve.
    """
    figure, panels = new_figure(4)
    for i, (name, rows) in enumerate(traces.items()):
        steps, means = mean_trace(rows)
        for axes, values in zip(panels, means, strict=True):
            axes.plot(steps, values, color=COLOURS[i % len(COLOURS)], linewidth=1.5, label=label_of(name))
    for axes, title in zip(panels, ("true R-D loss", "relaxed loss − true loss", "PSNR (dB)", "bpp"), strict=True):
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("step")
    panels[0].legend(frameon=False)
    return figure


def mean_trace(rows: Sequence[Row]) -> tuple[list[int], np.ndarray]:
    """Steps (n,), and their true loss, relaxed minus true loss, PSNR and bpp, (4, n); step 0 has no relaxed loss."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        if row["relaxed_loss"] is not None or row["step"] == 0:
            groups.setdefault(row["step"], []).append(row)
    steps = sorted(groups)
    means = np.full((4, len(steps)), np.nan)
    for i, step in enumerate(steps):
        group = groups[step]
        for k, column in enumerate(("true_loss", "relaxed_loss", "psnr", "bpp")):
            if all(row[column] is not None for row in group):
                means[k, i] = np.mean([row[column] for row in group])
    means[1] -= means[0]
    return steps, means


def new_figure(panels: int) -> tuple[Figure, list[Axes]]:
    """A figure with one panel, or with more in rows of two."""
    from matplotlib.figure import Figure

    columns = min(2, panels)
    lines = -(-panels // columns)
    figure = Figure(figsize=(8, 5.4 if panels == 1 else 3 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    axes = [a for line in grid for a in line]
    for a in axes:
        a.grid(color="#e5e7eb", linewidth=0.8)
        a.set_axisbelow(True)
        a.spines[["top", "right"]].set_visible(False)
    return figure, axes


def label_of(name: str) -> str:
    """A label without matplotlib's markup: $ starts a formula, a leading _ hides the label."""
    return name.replace("$", r"\$").lstrip("_") or "curve"


def save_plots(figure: Figure, out: Path) -> None:
    """Write rd.png and rd.svg."""
    png = io.BytesIO()
    figure.savefig(png, dpi=160)
    write_whole(out / PLOTS[0], png.getvalue())
    write_whole(out / PLOTS[1], svg(figure).encode())


def svg(figure: Figure, name: str = "rd", transparent: bool = False) -> str:
    """The figure as SVG, deterministic; `name` keeps the ids of several figures of one page apart."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": f"sgacodec-{name}", "svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=transparent)
    return "".join(line.rstrip() + "\n" for line in stream.getvalue().splitlines())
