"""Progress of a training run: a bar with the last figures on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from . import output
from .output import Output
from .streams import is_terminal


@dataclass
class View:
    """Display of a training run.

    Attributes
    ----------
    console : Output
    figures : str
        Throughput and losses of the last log record.
    """

    console: Output
    figures: str = ""


@contextlib.contextmanager
def shown(console: Output) -> Iterator[View]:
    """A view that has a progress bar while the block runs, if standard error is a terminal."""
    view = View(console)
    if console.quiet or not is_terminal(sys.stderr):
        yield view
        return
    from rich.progress import TaskProgressColumn

    bar = output.new_bar(TaskProgressColumn())
    with bar:
        bar.add_task("train", total=1.0, state="")
        console.bar = bar
        try:
            yield view
        finally:
            console.bar = None


def tick(view: View, progress: float, step: int) -> None:
    """Update the bar; `progress` is in 0..1."""
    if view.console.bar is not None:
        text = f"step {step}  {view.figures}"
        view.console.bar.update(view.console.bar.task_ids[0], completed=progress, state=text)


def report(view: View, line: dict[str, Any]) -> None:
    """Show a log record: figures of the last training steps, or a validation curve."""
    if "validation" in line:
        curve = "  ".join(f"{bpp:.3f} bpp {psnr:.2f} dB" for bpp, psnr in line["validation"])
        output.note(view.console, f"step {line['step']}: validation  {curve}")
        return
    losses = " ".join("-" if loss is None else f"{loss:.2f}" for loss in line["loss"])
    view.figures = f"{line['crops_per_second']:.1f} crops/s  loss {losses}"
    if view.console.bar is None:
        output.note(view.console, f"step {line['step']}: {100 * line['progress']:.1f} %  {view.figures}")
