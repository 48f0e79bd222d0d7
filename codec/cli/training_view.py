"""What a training run shows: a bar with the last figures on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from . import output
from .output import Output


@dataclass
class View:
    """Where the progress of a run goes; `shown` makes one."""

    speech: Output
    state: str = ""


@contextlib.contextmanager
def shown(speech: Output) -> Iterator[View]:
    """A view, with a bar on a terminal's standard error while the block runs."""
    view = View(speech)
    if speech.quiet or not sys.stderr.isatty():
        yield view
        return
    from rich.progress import TaskProgressColumn

    bar = output.new_bar(TaskProgressColumn())
    with bar:
        bar.add_task("train", total=1.0, state="")
        speech.bar = bar
        try:
            yield view
        finally:
            speech.bar = None


def tick(view: View, progress: float, step: int) -> None:
    """Move the bar."""
    if view.speech.bar is not None:
        text = f"step {step}  {view.state}"
        view.speech.bar.update(view.speech.bar.task_ids[0], completed=progress, state=text)


def report(view: View, line: dict[str, Any]) -> None:
    """Show a line of the log: figures of a stretch of training, or a validation curve."""
    if "validation" in line:
        curve = "  ".join(f"{bpp:.3f} bpp {psnr:.2f} dB" for bpp, psnr in line["validation"])
        output.note(view.speech, f"step {line['step']}: validation  {curve}")
        return
    losses = " ".join("-" if loss is None else f"{loss:.2f}" for loss in line["loss"])
    view.state = f"{line['crops_per_second']:.1f} crops/s  loss {losses}"
    if view.speech.bar is None:
        output.note(view.speech, f"step {line['step']}: {100 * line['progress']:.1f} %  {view.state}")
