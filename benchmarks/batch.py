"""Small pictures: one batch against one process each, and refinement as one batch against one by one.

    python benchmarks/batch.py [--count 100] [--side 96] [--repeat 1]

Times of the first table are wall times of whole commands with --method none; those of the second are processor times of
one thread, for each picture.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

PHOTOGRAPH = Path(__file__).parents[1] / "docs" / "images" / "coffee.png"
STEPS = 20


def crops(side: int, count: int) -> list[np.ndarray]:
    """Crops of the photograph, (side, side, 3) uint8."""
    with Image.open(PHOTOGRAPH) as im:
        pixels = np.array(im.convert("RGB"))
    rng = np.random.default_rng(0)
    tops = rng.integers(0, pixels.shape[0] - side, count)
    lefts = rng.integers(0, pixels.shape[1] - side, count)
    return [np.ascontiguousarray(pixels[t : t + side, x : x + side]) for t, x in zip(tops, lefts, strict=True)]


def commands(count: int, side: int, repeat: int) -> None:
    """Print the wall times of one batch and of a process for each picture."""
    encode = [sys.executable, "-m", "sgacodec", "encode", "-q", "--method", "none", "--device", "cpu"]
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder, "photos")
        photos.mkdir()
        for i, pixels in enumerate(crops(side, count)):
            Image.fromarray(pixels).save(photos / f"{i:03}.png")
        out = str(Path(folder, "out"))

        def batch() -> None:
            subprocess.run([*encode, str(photos), "--out-dir", out], check=True)

        def each() -> None:
            for path in sorted(photos.iterdir()):
                subprocess.run([*encode, str(path), f"{out}/{path.stem}.sga"], check=True)

        one, many = wall(batch, repeat), wall(each, repeat)
    times = f"one batch {one:.2f} s, {count} processes {many:.2f} s, ratio {many / one:.1f}"
    print(f"{count} pictures of {side}×{side}: {times}")


def refinement() -> None:
    """Print processor times of a refinement of eight pictures, one by one and as the batch that the command makes."""
    import torch

    from sgacodec.api import Codec
    from sgacodec.batching import batch_size
    from sgacodec.picture import Picture
    from sgacodec.settings import Settings

    torch.set_num_threads(1)
    codec = Codec("lite", "cpu")
    settings = Settings(steps=STEPS)
    for side in (64, 128, 192, 256):
        size = batch_size(side, side, False, settings)
        pictures = [Picture(pixels) for pixels in crops(side, size)]
        codec.encode(pictures[:1], settings)
        single = processor(lambda pictures=pictures: [codec.encode([one], settings) for one in pictures]) / size
        together = processor(lambda pictures=pictures: codec.encode(pictures, settings)) / size
        times = f"one by one {1e3 * single:.0f} ms, batches of {size} {1e3 * together:.0f} ms"
        print(f"{side}×{side}, {STEPS} steps: {times}, ratio {single / together:.2f}")


def wall(work: Callable[[], object], repeat: int) -> float:
    """Median wall time in seconds."""
    return statistics.median(_timed(work, time.perf_counter) for _ in range(repeat))


def processor(work: Callable[[], object]) -> float:
    """Median processor time of three runs in seconds."""
    return statistics.median(_timed(work, time.process_time) for _ in range(3))


def _timed(work: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    work()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--repeat", type=int, default=1)
    chosen = parser.parse_args()
    commands(chosen.count, chosen.side, chosen.repeat)
    refinement()


if __name__ == "__main__":
    main()
