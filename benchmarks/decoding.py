"""Time of decoding compared with g_s alone, of entropy coding, and of commands that do not load torch.

    python benchmarks/decoding.py
    python benchmarks/decoding.py --device cuda --parts decode,entropy

decode    g_s alone, and everything from bytes to pixels, in one run; without imports and loading of the model
entropy   coding and decoding of the integers, and the integer networks alone
commands  wall time of `sgacodec --help` and `sgacodec info` in processes of their own
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from workbench import PHOTOGRAPH, interleaved, machine, picture_of, show, untrained

from sgacodec import bitstream, latents
from sgacodec.api import Codec, Settings
from sgacodec.coding.passes import Pass, run_passes
from sgacodec.models import catalogue as models
from sgacodec.models.file import write_model

PARTS = ("decode", "entropy", "commands")


def codecs(folder: Path, device: torch.device, lmbda: float) -> list[tuple[str, Codec, Settings]]:
    """Each model with its name and the settings to encode with."""
    path = folder / "mshyper-128.safetensors"
    write_model(untrained("mshyper-128"), path)
    settings = Settings(lmbda=lmbda, method="none")
    return [
        ("lite", Codec(str(models.find_model("lite")), str(device)), settings),
        ("mshyper-128, untrained", Codec(str(path), str(device)), settings),
    ]


def symbols_of(found: latents.Latents, one: Pass) -> torch.Tensor:
    return one.of(found.y)


@torch.no_grad()
def decode_and_entropy(options: argparse.Namespace, device: torch.device, parts: list[str]) -> None:
    width, height = options.width, options.height
    picture = picture_of(options.image, width, height)
    decoding, coding = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, codec, settings in codecs(Path(folder), device, options.lmbda):
            data = codec.encode([picture], settings)[0].data
            file = bitstream.read(data)
            level = codec.levels.for_decoding(file)
            found = latents.unpack(level, file.z, file.y, height, width)
            y_hat = found.y_hat()

            synthesis, whole, pack, unpack, exact = interleaved(
                [
                    functools.partial(level.folded.networks.g_s, y_hat),
                    functools.partial(codec.decode, data),
                    functools.partial(latents.pack, level, y_hat, found.z, found),
                    functools.partial(latents.unpack, level, file.z, file.y, height, width),
                    functools.partial(run_passes, level.exact, found.z, functools.partial(symbols_of, found)),
                ],
                device,
                options.runs,
            )
            size = f"{len(data)}"
            times = (f"{1000 * t:.0f}" for t in (synthesis, whole))
            decoding.append([name, size, *times, f"{whole / synthesis:.2f}"])
            coding.append([name, size, *(f"{1000 * t:.0f}" for t in (pack, unpack, exact))])
    note = "mshyper-128 has random weights here: only its speed is meaningful."
    what = f"{width}x{height} ({machine(device)}; medians of {options.runs} interleaved runs)"
    if "decode" in parts:
        show(f"Decoding {what}", ("model", "bytes", "g_s, ms", "decode, ms", "ratio"), decoding, note)
    if "entropy" in parts:
        columns = ("model", "bytes", "coding, ms", "decoding, ms", "of which integer networks, ms")
        show(f"Entropy coding {what}", columns, coding, note)


def commands(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photograph.sga"
        path.write_bytes(Codec("lite", "cpu").encode([picture_of(options.image, 256, 256)], Settings(steps=0))[0].data)
        lines = (["--help"], ["encode", "--help"], ["info", str(path)], ["info", "--json", str(path)])

        def run(line: list[str]) -> None:
            subprocess.run([sys.executable, "-m", "sgacodec", *line], check=True, capture_output=True)

        times = interleaved([functools.partial(run, line) for line in lines], torch.device("cpu"), options.runs)
    rows = [
        ["sgacodec " + " ".join("FILE" if part == str(path) else part for part in line), f"{1000 * t:.0f}"]
        for line, t in zip(lines, times, strict=True)
    ]
    show(f"Commands (medians of {options.runs} interleaved runs)", ("command", "ms"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="which parts, separated by commas")
    parser.add_argument("--image", type=Path, default=PHOTOGRAPH)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--lambda", dest="lmbda", type=float, default=0.0075)
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown part {unknown.pop()!r}; there are {', '.join(PARTS)}")
    if {"decode", "entropy"} & set(parts):
        decode_and_entropy(options, torch.device(options.device), parts)
    if "commands" in parts:
        commands(options)


if __name__ == "__main__":
    main()
