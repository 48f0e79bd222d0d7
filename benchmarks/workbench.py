"""Shared by the benchmarks: pictures of any size, untrained models, medians of interleaved runs, tables."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sgacodec.hyperprior import GainedHyperprior
from sgacodec.models.export import export
from sgacodec.models.level import Model
from sgacodec.networks.architecture import ARCHITECTURES
from sgacodec.picture import Picture

GAIN = 1.8  # log gain of untrained models, which makes their files as large as those of trained ones
PHOTOGRAPH = Path(__file__).parents[1] / "docs" / "images" / "coffee.png"


def pixels_of(path: Path, width: int, height: int) -> np.ndarray:
    """An image as (height, width, 3) uint8: its middle, or itself and its mirror images where it is too small."""
    with Image.open(path) as im:
        pixels = np.array(im.convert("RGB"))
    missing = max(0, height - pixels.shape[0]), max(0, width - pixels.shape[1])
    pixels = np.pad(pixels, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="symmetric")
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return np.ascontiguousarray(pixels[top : top + height, left : left + width])


def picture_of(path: Path, width: int, height: int) -> Picture:
    """The same as a Picture."""
    return Picture(pixels_of(path, width, height))


def untrained(name: str, seed: int = 0) -> Model:
    """A model with random weights, for timing only."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        gained = GainedHyperprior(ARCHITECTURES[name], (0.0075,))
        gained.log_gain_y += GAIN
        gained.log_gain_d -= GAIN
        y: Tensor = gained.g_a(torch.rand(1, 3, 128, 128))
        return export(gained, f"{name}, untrained", {"licence": "none"}, [gained.h_a(y)], levels=1, y_samples=[y])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Wall time of a call, including the work that it starts on the device."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def interleaved(functions: Sequence[Callable[[], object]], device: torch.device, runs: int) -> list[float]:
    """The median wall time of each function over `runs` rounds of all of them, after one round that does not count."""
    rounds = [[seconds(f, device) for f in functions] for _ in range(runs + 1)][1:]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> None:
    """Print a table; the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left", caption=note or None, caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)


def machine(device: torch.device) -> str:
    """torch's version, and the GPU or the number of threads, for the titles of tables."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"torch {torch.__version__}, {name}"
