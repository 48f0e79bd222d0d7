"""Time of a round of the last pass beside that of a step of the annealing, as differences of whole encodings.

    python benchmarks/rounds.py
    python benchmarks/rounds.py --image photo.png --size 512 --runs 5

What every encoding does once cancels out.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import torch
from workbench import PHOTOGRAPH, interleaved, machine, picture_of, show

from sgacodec.api import Codec, Settings

FEW, STEPS, ROUNDS = 5, 50, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, default=PHOTOGRAPH)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="lite")
    parser.add_argument("--size", type=int, default=256, help="pixels a side")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    device, codec = torch.device(options.device), Codec(options.model, options.device)
    picture = picture_of(options.image, options.size, options.size)
    settings = [Settings(steps=steps, rounds=rounds) for steps, rounds in ((FEW, 0), (FEW + STEPS, 0), (FEW, ROUNDS))]
    few, steps, rounds = interleaved(
        [functools.partial(codec.encode, [picture], s) for s in settings], device, options.runs
    )
    step, one = 1000 * (steps - few) / STEPS, 1000 * (rounds - few) / ROUNDS
    show(
        f"A round and a step, {options.size}x{options.size}, {options.model} ({machine(device)})",
        ("", "ms"),
        [["step", f"{step:.1f}"], ["round", f"{one:.1f}"], ["round / step", f"{one / step:.2f}"]],
        f"Medians of {options.runs} interleaved runs.",
    )


if __name__ == "__main__":
    main()
