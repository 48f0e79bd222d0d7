"""Accuracy and cost of targets: each compared with a plain encoding of the same picture, in the same run.

    python benchmarks/targets.py kodak/*.png                 # 256² centre crops, three targets each
    python benchmarks/targets.py photo.png --steps 500 --size 512

The three targets are bits a pixel, bytes and PSNR, each of a plain encoding at another λ. A ratio of the size from 0.99
to 1, or 0 to 0.05 dB above the PSNR, is a hit. Cost is processor time over the median of the plain encodings of the
picture, of which there are two for each target. The loss is that of the target's encoding at its own λ over that of a
plain one at this λ.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from workbench import machine, picture_of, show

from sgacodec.api import Codec, Picture, Settings

LAMBDAS = (0.0032, 0.0075, 0.02)  # of the plain encodings that the targets are taken from


def encoded(codec: Codec, picture: Picture, settings: Settings) -> tuple[dict[str, Any], float]:
    """The report, and processor seconds."""
    start = time.process_time()
    (result,) = codec.encode([picture], settings)
    return result.report, time.process_time() - start


def loss_of(report: dict[str, Any], lmbda: float) -> float:
    return float(report["bpp"] + lmbda * 255**2 * 10 ** (-report["psnr"] / 10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--size", type=int, default=256, help="pixels a side")
    parser.add_argument("--model", default="lite")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    codec = Codec(options.model, options.device)
    codec.encode([picture_of(options.images[0], 64, 64)], Settings(steps=5))  # not timed
    rows, hits, costs, losses = [], [], [], []
    for image in options.images:
        picture = picture_of(image, options.size, options.size)
        plain = [encoded(codec, picture, Settings(lmbda=lmbda, steps=options.steps)) for lmbda in LAMBDAS]
        targets = (
            {"target_bpp": 1.05 * plain[0][0]["bpp"]},
            {"target_size": round(0.95 * plain[1][0]["bytes"])},
            {"target_psnr": plain[2][0]["psnr"] - 0.2},
        )
        plain_seconds = [seconds for _, seconds in plain]
        spent_seconds = []
        for target in targets:
            report, spent = encoded(codec, picture, Settings(steps=options.steps, **target))  # type: ignore[arg-type]
            spent_seconds.append(spent)
            again, seconds = encoded(codec, picture, Settings(lmbda=report["lambda"], steps=options.steps))
            plain_seconds.append(seconds)
            ((name, wanted),) = target.items()
            if name == "target_psnr":
                off = report["psnr"] - wanted
                hits.append(0 <= off <= 0.05)
                shown = f"{off:+.3f} dB"
            else:
                pixels = options.size**2
                off = report["bytes"] / (wanted if name == "target_size" else wanted * pixels / 8)
                hits.append(0.99 <= off <= 1)
                shown = f"{off:.4f}"
            losses.append(loss_of(report, report["lambda"]) / loss_of(again, report["lambda"]))
            hit = "yes" if hits[-1] else "no"
            rows.append([image.name, f"{name[7:]} {wanted:.4g}", shown, hit, f"{losses[-1]:.4f}"])
        usual = statistics.median(plain_seconds)
        for row, spent in zip(rows[-len(targets) :], spent_seconds, strict=True):
            costs.append(spent / usual)
            row.append(f"{costs[-1]:.2f}")
            print(*row, file=sys.stderr, flush=True)
    show(
        f"Targets, {options.steps} steps, {options.size}x{options.size} ({machine(torch.device(options.device))})",
        ("picture", "target", "result", "hit", "loss", "cost"),
        rows,
        f"{sum(hits)} of {len(hits)} hit; cost: median {statistics.median(costs):.2f}, at most {max(costs):.2f}; "
        f"loss: median {statistics.median(losses):.4f}, at most {max(losses):.4f}.",
    )


if __name__ == "__main__":
    main()
