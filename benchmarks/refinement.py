"""Speed of refinement compared with an eager loop of the published method, in one run on one machine.

    python benchmarks/refinement.py                      # all parts
    python benchmarks/refinement.py --parts rate,loss    # some of them
    python benchmarks/refinement.py --device cuda --image photo.png

rate     steps per second of both
context  time of a step with the context model, and of one with the same weights but without it
loss     time until the true loss of the published settings after 500 steps is reached; the eager loop gives the time
memory   time of a step and peak memory over the number of pixels, each size in a process of its own
efforts  processor time and loss of --effort 1 to 3 over pictures and λ; --images names the pictures, --steps the steps

The eager loop is SGA+ as published: two classes, ssl with a = 2.3, Adam at 0.005, τ = min(1, e^(−0.001·t)),
float32, NCHW, autograd through the Gumbel-softmax of torch.distributions and through CompressAI's likelihoods, weights
frozen.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import RelaxedOneHotCategorical
from workbench import PHOTOGRAPH, interleaved, machine, picture_of, seconds, show, untrained

from sgacodec.api import Codec, Progress, Settings
from sgacodec.memory import keep_freed_memory
from sgacodec.models import catalogue as models
from sgacodec.models.file import read_model
from sgacodec.models.level import LevelModel
from sgacodec.networks.build import build
from sgacodec.networks.lite import LiteSynthesis
from sgacodec.networks.transforms import Networks
from sgacodec.refine.loop import refine
from sgacodec.refine.objective import Batch
from sgacodec.refine.problem import Candidate, Problem
from sgacodec.refine.steps import prepare, stepper

PARTS = ("rate", "context", "loss", "memory", "efforts")
EFFORT_LAMBDAS = (0.0016, 0.0075, 0.03)
PUBLISHED_STEPS = 500
LADDER = (25, 50, 75, 100, 125, 150, 200, 250, 300, 400, 500)
SIZES = {0.25: (512, 512), 1.0: (1024, 1024), 4.0: (2048, 2048), 16.0: (4096, 4096)}  # megapixels: width, height
MEMORY_STEPS = 5  # the true loss is looked at from step 3 on, so the second step is a step alone


# -------------------------------------------------------------------------------------------- the published loop


class PublishedLoop:
    """SGA+ with autograd and torch's own layers, as published."""

    def __init__(self, level: LevelModel, networks: Networks, problem: Problem) -> None:
        self.level, self.networks, self.lmbda = level, networks, problem.lmbda
        self.x, self.weight = problem.x.to(level.device), problem.weight.to(level.device)
        self.pixels = problem.pixels
        start = problem.start()
        self.y = start.y.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        self.z = start.z.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        self.optimizer = torch.optim.Adam([self.y, self.z], lr=0.005)
        self.count = 0

    def step(self) -> None:
        tau = min(1.0, math.exp(-0.001 * self.count))
        median = self.level.folded.density.median[None, :, None, None]
        z_hat = relaxed(self.z - median, tau) + median
        z_bits = -torch.log2(self.level.folded.density.likelihood(z_hat).clamp(min=1e-9)).sum()
        scale, mu = self.networks.h_s(z_hat).chunk(2, 1)
        sigma = (torch.exp(scale) if self.level.folded.architecture.scale == "exp" else scale).clamp(min=0.11)
        v_hat = relaxed(self.y - mu, tau)
        y_bits = -torch.log2(gaussian_likelihood(v_hat, sigma).clamp(min=1e-9)).sum()
        x_hat = self.networks.g_s(v_hat + mu)
        mse = ((x_hat - self.x).square() * self.weight).sum() / (3 * self.pixels)
        loss = self.lmbda * 255**2 * mse + (y_bits + z_bits) / self.pixels
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.count += 1


def relaxed(v: Tensor, tau: float, a: float = 2.3) -> Tensor:
    """Two-class rounding with the sigmoid scaled logit."""
    low, high = torch.floor(v), torch.ceil(v)
    u = (v - low).clamp(1e-6, 1 - 1e-6)
    logits = torch.stack((torch.logit(u), torch.logit(1 - u)), dim=-1).mul(-a).sigmoid().log() / tau
    sample = RelaxedOneHotCategorical(torch.tensor(tau, device=v.device), logits=logits, validate_args=False).rsample()
    return (sample * torch.stack((low, high), dim=-1)).sum(dim=-1)


def gaussian_likelihood(v: Tensor, sigma: Tensor) -> Tensor:
    """As CompressAI's GaussianConditional."""
    values = v.abs()
    upper = 0.5 * torch.erfc(-(2**-0.5) * ((0.5 - values) / sigma))
    lower = 0.5 * torch.erfc(-(2**-0.5) * ((-0.5 - values) / sigma))
    return upper - lower


def eager_networks(level: LevelModel) -> Networks:
    """The networks in NCHW, torch's layers (`lite`) or CompressAI's with random weights, to measure their speed."""
    networks = copy.deepcopy(level.folded.networks)
    if isinstance(networks.g_s, LiteSynthesis):
        networks.g_s.blocks = transposed(networks.g_s.blocks)
    else:
        networks = build(level.folded.architecture)
    for _, network in networks.items():
        network.requires_grad_(False).to(level.device).to(memory_format=torch.contiguous_format)
    return networks


def transposed(blocks: Any) -> nn.ConvTranspose2d:
    """The block synthesis of `lite` as a transposed convolution."""
    M, size, _, width = blocks.weight.shape
    layer = nn.ConvTranspose2d(M, width, size, stride=8, padding=2)
    layer.weight.data = blocks.weight.data.permute(0, 3, 1, 2).contiguous()
    layer.bias = blocks.bias
    return layer


# ------------------------------------------------------------------------------------------------------ the parts


def repeat(step: Callable[[], None], count: int) -> None:
    for _ in range(count):
        step()


def annealings(level: LevelModel, problem: Problem, steps: int, count: int) -> list[Callable[[], None]]:
    """Functions that do a step, each of an annealing of `steps` steps of the unrefined latents of a problem."""
    start, prepared = problem.start(), prepare(level)
    y, z = (v.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format) for v in (start.y, start.z))
    return [stepper(prepared, Batch.of(prepared, [problem]), y, z, Settings(), steps) for _ in range(count)]


def step_rates(image: Path, device: torch.device, runs: int) -> None:
    rows = []
    lite = level_of("lite", device)
    wide = untrained("mshyper-128")
    mshyper = wide.at(0, device)
    for name, level in (("lite", lite), ("mshyper-128, untrained", mshyper)):
        eager = eager_networks(level)
        for width, height in ((256, 256), (768, 512)):
            picture = picture_of(image, width, height)
            problem = Problem.of(level, picture, None, 0.0075, "mse")
            published = PublishedLoop(level, eager, problem)
            burst = 50 if device.type == "cuda" else 5  # a whole annealing of ours, as z is fixed in its last part
            ours = functools.partial(run_next, annealings(level, problem, burst, runs + 1), burst)
            theirs, own = interleaved([functools.partial(repeat, published.step, burst), ours], device, runs)
            times = [f"{1000 * t / burst:.1f}" for t in (theirs, own)]
            rates = [f"{burst / t:.2f}" for t in (theirs, own)]
            rows.append([name, f"{width}x{height}", times[0], rates[0], times[1], rates[1], f"{theirs / own:.2f}"])
    show(
        f"One step ({machine(device)}; medians of {runs} interleaved runs)",
        ("model", "picture", "eager, ms", "eager, 1/s", "ours, ms", "ours, 1/s", "ours is faster by"),
        rows,
        "mshyper-128 has random weights here: only its speed is meaningful.",
    )


def run_next(waiting: list[Callable[[], None]], steps: int) -> None:
    with keep_freed_memory():
        repeat(waiting.pop(), steps)


def cost_of_context(image: Path, device: torch.device, runs: int, model: str) -> None:
    level = level_of(model, device)
    without = replace(level, folded=replace(level.folded, context=None))
    rows, burst = [], 50 if device.type == "cuda" else 10
    for width, height in ((256, 256), (512, 512), (768, 512)):
        problem = Problem.of(level, picture_of(image, width, height), None, 0.0075, "mse")
        ours = [
            functools.partial(run_next, annealings(one, problem, burst, runs + 1), burst) for one in (without, level)
        ]
        plain, own = (1000 * t / burst for t in interleaved(ours, device, runs))
        rows.append([f"{width}x{height}", f"{plain:.1f}", f"{own:.1f}", f"{own / plain:.2f}"])
    show(
        f"A step with the context model, {model} ({machine(device)}; medians of {runs} interleaved runs)",
        ("picture", "without, ms", "with, ms", "ratio"),
        rows,
    )


def time_to_loss(image: Path, device: torch.device, model: str, size: int) -> None:
    level = level_of(model, device)
    problem = Problem.of(level, picture_of(image, size, size), None, 0.0075, "mse")
    published = PublishedLoop(level, eager_networks(level), problem)
    repeat(published.step, 3)  # not timed: what is allocated and chosen once
    published = PublishedLoop(level, published.networks, problem)
    unrefined = problem.start()

    theirs = seconds(functools.partial(repeat, published.step, PUBLISHED_STEPS), device)
    as_published = Settings(schedule="exp", steps=PUBLISHED_STEPS)
    goal = refine(level, [problem], [unrefined], as_published)[0][0].loss
    rows = [
        ["unrefined", "0", "", f"{unrefined.loss:.4f}", ""],
        ["eager loop, published settings", str(PUBLISHED_STEPS), f"{theirs:.2f}", f"{goal:.4f}", "1"],
    ]
    refine(level, [problem], [unrefined], Settings(steps=2))  # not timed, again
    for steps in LADDER:
        found: list[Candidate] = []

        def run(steps: int = steps, found: list[Candidate] = found) -> None:
            found.extend(refine(level, [problem], [unrefined], Settings(steps=steps))[0])

        ours, loss = seconds(run, device), found[0].loss
        rows.append([f"ours, {Settings().method}", str(steps), f"{ours:.2f}", f"{loss:.4f}", f"{theirs / ours:.1f}"])
        if loss <= goal:
            break
    show(
        f"Time to the true loss of the published settings, {model}, {size}x{size} ({machine(device)})",
        ("", "steps", "seconds", "true loss", "faster by"),
        rows,
        "The loss of the published settings is that of --schedule exp, with a context model if there is one; the eager "
        "loop, whose time it is, has none. Our times include the evaluations of the true loss. The last line has the "
        "fewest steps that reach it.",
    )


def efforts(images: list[Path], device: torch.device, model: str, size: int, counts: list[int]) -> None:
    """Encode with each number of steps, in turn; the gain is the mean part by which the true loss is lower."""
    codec = Codec(model, str(device))
    picture = picture_of(images[0], size, size)
    codec.encode([picture], Settings(steps=2))  # not timed: what is allocated and chosen once
    times: dict[int, list[float]] = {count: [] for count in counts}
    gains: dict[tuple[int, float], list[float]] = {(n, lmbda): [] for n in counts for lmbda in EFFORT_LAMBDAS}
    for image, lmbda, count in itertools.product(images, EFFORT_LAMBDAS, counts):
        start = time.process_time()
        (encoded,) = codec.encode([picture_of(image, size, size)], Settings(lmbda=lmbda, steps=count))
        times[count].append(time.process_time() - start)
        gains[count, lmbda].append(1 - encoded.report["rd_loss"] / encoded.report["rd_loss_unrefined"])
        print(image.name, lmbda, count, f"{gains[count, lmbda][-1]:.4f} {times[count][-1]:.2f}", file=sys.stderr)
    rows = []
    means = {n: statistics.mean(statistics.mean(gains[n, lmbda]) for lmbda in EFFORT_LAMBDAS) for n in counts}
    for n in counts:
        spent = statistics.mean(times[n])
        rows.append(
            [
                str(n),
                f"{spent:.2f}",
                f"{spent / (size * size / 2**20):.0f}",
                f"{spent / statistics.mean(times[counts[-1]]):.3f}",
                *(f"{100 * statistics.mean(gains[n, lmbda]):.2f} %" for lmbda in EFFORT_LAMBDAS),
                f"{100 * means[n]:.2f} %",
                f"{means[n] / means[counts[-1]]:.2f}",
            ]
        )
    show(
        f"Steps, time and gain, {model}, {size}x{size}, {len(images)} pictures ({machine(device)})",
        (
            "steps",
            "CPU s",
            "s per Mi pixel",
            "of the last",
            *(f"λ = {lmbda}" for lmbda in EFFORT_LAMBDAS),
            "mean",
            "of it",
        ),
        rows,
        "The gain is the part by which the true loss is below that of method none.",
    )


def memory_over_size(image: Path, device: torch.device, megapixels: list[float], model: str) -> None:
    rows = []
    for size in megapixels:
        command = [sys.executable, __file__, "--one-size", str(size), "--device", str(device), "--model", model]
        run = subprocess.run([*command, "--image", str(image)], check=True, capture_output=True, env=os.environ)
        found = json.loads(run.stdout)
        width, height = SIZES[size]
        rows.append(
            [
                f"{width}x{height}",
                f"{width * height / 2**20:.2f}",
                f"{1000 * found['step']:.0f}",
                f"{1000 * found['step'] / (width * height / 2**20):.0f}",
                f"{found['before']:.0f}",
                f"{found['peak']:.0f}",
            ]
        )
    where = "of the device" if device.type == "cuda" else "of the process"
    show(
        f"Step and memory over size, {model} ({machine(device)})",
        ("picture", "Mi pixels", "a step, ms", "ms a Mi pixel", "MiB before", "MiB at most"),
        rows,
        f"Memory {where}: with the picture and the model loaded, and the peak of an encoding without the last pass,"
        " which takes about as much.",
    )


def one_size(image: Path, device: torch.device, megapixels: float, model: str) -> None:
    """Encode one picture with few steps and print time and memory as JSON."""
    import resource

    def peak() -> float:
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device) / 2**20
        status = Path("/proc/self/status")
        if status.exists():  # Linux hands ru_maxrss down from the process that started this one
            return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

    codec = Codec(model, str(device))
    codec.encode([picture_of(image, 64, 64)], Settings(steps=1))
    picture = picture_of(image, *SIZES[megapixels])
    before = peak()
    stamps: list[tuple[int, float]] = []

    def stamp(progress: Progress) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        stamps.append((progress.step, time.perf_counter()))

    codec.encode([picture], Settings(steps=MEMORY_STEPS, rounds=0), progress=stamp)
    pairs = [(a, b) for a, b in itertools.pairwise(stamps) if b[0] == a[0] + 1]  # rounds are told of by the tile
    second = [b[1] - a[1] for a, b in pairs if b[0] % MEMORY_STEPS == 2]  # one for each tile
    print(json.dumps({"step": sum(second), "before": before, "peak": peak()}))


def level_of(model: str, device: torch.device) -> LevelModel:
    loaded = read_model(models.find_model(model))
    return loaded.at(loaded.level_for(0.0075), device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="which parts, separated by commas")
    parser.add_argument("--image", type=Path, default=PHOTOGRAPH)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="lite", help="for the parts context, loss and memory")
    parser.add_argument("--runs", type=int, default=3, help="rounds of the parts rate and context")
    parser.add_argument("--size", type=int, default=256, help="pixels a side in parts loss and efforts")
    parser.add_argument("--megapixels", default="0.25,1,4,16", help="sizes of part memory")
    parser.add_argument("--images", type=Path, nargs="+", help="pictures of part efforts; default: --image")
    parser.add_argument("--steps", default="50,100,500", help="of part efforts")
    parser.add_argument("--one-size", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.one_size:
        one_size(options.image, device, options.one_size, options.model)
        return
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown part {unknown.pop()!r}; there are {', '.join(PARTS)}")
    if "rate" in parts:
        step_rates(options.image, device, options.runs)
    if "context" in parts:
        cost_of_context(options.image, device, options.runs, options.model)
    if "loss" in parts:
        time_to_loss(options.image, device, options.model, options.size)
    if "memory" in parts:
        memory_over_size(options.image, device, [float(m) for m in options.megapixels.split(",")], options.model)
    if "efforts" in parts:
        steps = [int(n) for n in options.steps.split(",")]
        efforts(options.images or [options.image], device, options.model, options.size, steps)


if __name__ == "__main__":
    main()
