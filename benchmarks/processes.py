"""Whole processes, from the start to the written file: wall time, CPU time and peak memory, beside other codecs.

    python benchmarks/processes.py
    python benchmarks/processes.py --megapixels 0.25,1 --encode 0,1,2,3 --runs 1
    python benchmarks/processes.py --megapixels 12 --encode 0,1 --runs 1

Decoding with torch is what `Codec.decode` does in a process of its own. Decoders write PNG. avifdec, djxl, avifenc and
cjxl are measured where they are installed, at their default speeds. Wall time depends on what else runs on the machine,
CPU time (user and system) much less. The batch is decoded in this process, after everything is loaded.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from workbench import PHOTOGRAPH, interleaved, machine, picture_of, show

from sgacodec.api import Codec, Settings
from sgacodec.decoder.decode import PictureDecoder

SGACODEC = (sys.executable, "-m", "sgacodec")
WITH_TORCH = """
import sys
from sgacodec.api import Codec
from sgacodec.image_writer import write_image
with open(sys.argv[1], "rb") as file:
    write_image(Codec(device="cpu").decode(file.read()).picture, sys.argv[2])
"""


RUN = """
import json, os, sys, time
null = os.open(os.devnull, os.O_RDWR)
start = time.perf_counter()
process = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, null, 1)])
_, status, usage = os.wait4(process, 0)
wall = time.perf_counter() - start
print(json.dumps([status, wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000]))
"""


def measured(command: Sequence[str]) -> tuple[float, float, float]:
    """Wall time and CPU time in seconds, and peak memory in MB, of a process.

    A small process starts it: the peak of a process begins with the memory of the one that it was forked from.
    """
    done = subprocess.run([sys.executable, "-c", RUN, *command], check=True, capture_output=True, text=True)
    status, wall, cpu, peak = json.loads(done.stdout)
    if status:
        raise RuntimeError(f"{command[0]} failed: {done.stderr}")
    return wall, cpu, peak


def commands_of(folder: Path, photograph: Path, width: int, height: int, efforts: str | None) -> dict[str, list[str]]:
    """The commands to measure, by name; makes the files that they read."""
    png, sga, out = (str(folder / name) for name in ("in.png", "in.sga", "out.png"))
    picture = picture_of(photograph, width, height)
    Image.fromarray(picture.pixels).save(png)
    data = Codec("lite", "cpu").encode([picture], Settings(method="none"))[0].data
    Path(sga).write_bytes(data)
    commands = {
        "sgacodec info": [*SGACODEC, "info", sga],
        "sgacodec decode": [*SGACODEC, "decode", sga, out, "-q"],
        "the same with torch": [sys.executable, "-c", WITH_TORCH, sga, out],
    }
    if shutil.which("avifenc") and shutil.which("avifdec"):
        avif = str(folder / "in.avif")
        make = ["avifenc", "--min", "30", "--max", "30", png, avif]
        subprocess.run(make, check=True, capture_output=True)
        commands["avifdec"] = ["avifdec", avif, out]
        commands |= {"avifenc": make} if efforts is not None else {}
    if shutil.which("cjxl") and shutil.which("djxl"):
        jxl = str(folder / "in.jxl")
        make = ["cjxl", "-d", "3", png, jxl]
        subprocess.run(make, check=True, capture_output=True)
        commands["djxl"] = ["djxl", jxl, out]
        commands |= {"cjxl": make} if efforts is not None else {}
    if efforts is not None:
        line = [*SGACODEC, "encode", png, str(folder / "out.sga"), "-q"]
        commands["sgacodec encode"] = line
        for effort in filter(None, efforts.split(",")):
            commands[f"sgacodec encode --effort {effort}"] = [*line, "--effort", effort]
    return commands


def processes(options: argparse.Namespace, megapixels: float) -> None:
    width = 32 * round((1e6 * megapixels * 1.5) ** 0.5 / 32)
    height = 32 * round(1e6 * megapixels / width / 32)
    with tempfile.TemporaryDirectory() as name:
        commands = commands_of(Path(name), options.image, width, height, options.encode)
        runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
        for _ in range(options.runs):
            for name, command in commands.items():
                runs[name].append(measured(command))
    rows = []
    for name, found in runs.items():
        wall, cpu, memory = (statistics.median(values) for values in zip(*found, strict=True))
        rows.append([name, f"{wall:.2f}", f"{cpu:.2f}", f"{memory:.0f}"])
    note = f"{machine(torch.device('cpu'))}; medians of {options.runs} interleaved runs"
    show(f"Processes, {width}x{height}", ("command", "wall, s", "CPU, s", "peak, MB"), rows, note)


def batch(options: argparse.Namespace) -> None:
    """One file after another in one process."""
    data = Codec("lite", "cpu").encode([picture_of(options.image, 768, 512)], Settings(method="none"))[0].data
    decoders = PictureDecoder(), Codec(device="cpu")
    calls = [functools.partial(decoder.decode, data) for decoder in decoders]
    times = interleaved(calls, torch.device("cpu"), options.runs)
    rows = [[name, f"{1000 * t:.0f}"] for name, t in zip(("numpy", "torch"), times, strict=True)]
    show("Each further file of 768x512", ("decoder", "ms"), rows, machine(torch.device("cpu")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, default=PHOTOGRAPH)
    parser.add_argument("--megapixels", default="0.4,1,12")
    parser.add_argument("--encode", metavar="EFFORTS", help="measure encoders, too; ours with these efforts")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    for megapixels in options.megapixels.split(","):
        processes(options, float(megapixels))
    batch(options)


if __name__ == "__main__":
    main()
