"""The figures of docs/paper.md, drawn from the tables in docs/results/paper/ as SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from ..decoding import decode
from ..refine.probabilities import probabilities
from ..rounding import rounding
from . import plots
from .bd import bd_rate
from .curves import load_curves, named_groups
from .figures import curve_of
from .plots import COLOURS, convergence, label_of, new_figure
from .rows import Row, means, read_rows, read_traces
from .sweep import FILES, picture_of, row_file

PICTURE = "kodim19.png"  # of Figure 4


def figure_1(results: Path) -> str:
    """Probabilities over v, two and three classes; writes their table, figure-1.tsv."""
    chosen = {
        2: [rounding("atanh"), rounding("linear"), rounding("cosine"), rounding("ssl")],
        3: [rounding(method, 3) for method in ("linear", "cosine", "ssl")],
    }
    v = np.linspace(-0.5, 0.5, 201) * (1 - 1e-6)
    lines = ["v\tmethod\tclasses\tclass\tprobability"]
    figure, panels = new_figure(2)
    for axes, (classes, methods) in zip(panels, chosen.items(), strict=True):
        x = v + 0.5 if classes == 2 else v
        for i, how in enumerate(methods):
            _, found = probabilities(torch.from_numpy(x), how)
            for k, p in enumerate(found.numpy()):
                axes.plot(x, p, color=COLOURS[i], linewidth=1.4, label=None if k else how.method)
                name = k if classes == 2 else k - 1
                lines += [f"{a:.3f}\t{how.method}\t{classes}\t{name}\t{b:.6f}" for a, b in zip(x, p, strict=True)]
        axes.set_title(f"{classes} classes", fontsize="medium")
        axes.set_xlabel("v")
    panels[0].set_ylabel("probability")
    panels[0].legend(frameon=False)
    panels[1].legend(frameon=False)
    results.mkdir(parents=True, exist_ok=True)
    (results / "figure-1.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return plots.svg(figure, "figure-1")


def _traces(*names: str) -> Callable[[Path], str]:
    """A plot of the convergence of every curve of these studies."""

    def draw(results: Path) -> str:
        drawn: dict[str, Sequence[Row]] = {}
        for name in names:
            traces = read_traces(results / f"{name}-traces.tsv")
            for curve, group in named_groups(means(read_rows(results / f"{name}.tsv"))):
                settings = {(p["method"], p["classes"], p["steps"], p["options"]) for p in group}
                drawn[curve.name] = [
                    t for t in traces if (t["method"], t["classes"], t["steps"], t["options"]) in settings
                ]
        return plots.svg(convergence(drawn), names[0])

    return draw


def _rate_distortion(*sources: str) -> Callable[[Path], str]:
    """A plot of all curves of studies NAME, and of the curves NAME:CURVE."""

    def draw(results: Path) -> str:
        shown = []
        for source in sources:
            one = ":" in source
            shown += [curve_of(results, source)] if one else load_curves(results / f"{source}.tsv")
        return plots.svg(plots.rate_distortion(shown), sources[-1])

    return draw


def _against(option: str, name: str) -> Callable[[Path], str]:
    """A plot of the mean true loss over a hyperparameter, one line a method."""

    def draw(results: Path) -> str:
        lines: dict[str, list[tuple[float, float]]] = {}
        for point in means(read_rows(results / f"{name}.tsv")):
            options = dict(word.split("=") for word in point["options"].split())
            lines.setdefault(point["method"], []).append((float(options[option]), point["rd_loss"]))
        figure, (axes,) = new_figure(1)
        for i, (method, pairs) in enumerate(lines.items()):
            x, y = zip(*sorted(pairs), strict=True)
            axes.plot(x, y, marker="o", markersize=4, color=COLOURS[i], label=label_of(method))
        axes.set_xlabel(option)
        axes.set_ylabel("true R-D loss")
        axes.legend(frameon=False)
        return plots.svg(figure, name)

    return draw


def _gains(kind: str) -> Callable[[Path], str]:
    """BD-rates of atanh and ssl against the unrefined files, over the iterations."""

    def draw(results: Path) -> str:
        (anchor,) = load_curves(results / "unrefined.tsv")
        figure, (axes,) = new_figure(1)
        found = load_curves(results / f"table-1-{kind}.tsv")
        axes.bar([c.name for c in found], [bd_rate(c, anchor) for c in found], color=COLOURS[0])
        axes.set_ylabel("BD-rate against unrefined (%)")
        return plots.svg(figure, f"table-1-{kind}")

    return draw


def figure_4(results: Path, work: Path, original: Path) -> str:
    """One image at λ = 0.0016: original, unrefined, atanh and ssl after 2000 iterations, with bpp and PSNR."""
    panels = [("original", picture_of(original, None).pixels)]
    for study, method in (("unrefined", "none"), ("table-1-published", "atanh"), ("table-1-published", "ssl")):
        rows = [r for r in read_rows(results / f"{study}.tsv") if r["name"] == original.name and r["method"] == method]
        row = max((r for r in rows if r["lambda"] == 0.0016), key=lambda r: r["steps"])
        panels[0] = ("original", picture_of(original, row["crop"]).pixels)
        file = row_file(work / study / FILES, row, ".sga")
        if not file.exists():
            raise FileNotFoundError(file)
        name = "unrefined" if method == "none" else method
        panels.append((f"{name}: {row['bpp']:.4f} bpp, {row['psnr']:.2f} dB", decode(file).pixels))
    figure, axes = new_figure(len(panels))
    for panel, (title, pixels) in zip(axes, panels, strict=True):
        panel.imshow(pixels)
        panel.set_axis_off()
        panel.set_title(title, fontsize="medium")
    return plots.svg(figure, "figure-4")


FIGURES: dict[str, Callable[[Path], str]] = {
    "figure-1": figure_1,
    "figure-2-published": _traces("figure-2-published"),
    "figure-2-ours": _traces("figure-2-ours"),
    "figure-3a": _rate_distortion(
        "unrefined",
        "figure-3a-baselines",
        "table-1-published:atanh, 2000 steps",
        "table-1-published:ssl, 2000 steps",
    ),
    "figure-3c-published": _rate_distortion("unrefined", "figure-3c-published"),
    "figure-3c-ours": _rate_distortion("unrefined", "figure-3c-ours"),
    "table-1-published": _gains("published"),
    "table-1-ours": _gains("ours"),
    "table-2": _against("tau_max", "table-2"),
    "table-4-published": _against("ssl_a", "table-4-published"),
    "table-4-ours": _against("ssl_a", "table-4-ours"),
    "figure-c6": _traces("table-c3"),
    "figure-b5-published": _traces("table-c5-published"),
    "figure-b5-ours": _traces("table-c5-ours"),
}
