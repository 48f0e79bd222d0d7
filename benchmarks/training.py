"""CPU time, or time on a GPU, of training steps in each stage, with both optimizers, and of the parts of a joint step.

On CPUs also that of joint steps with and without freed memory kept.

    python benchmarks/training.py
    python benchmarks/training.py --no-bf16 --stages joint,prior
    python benchmarks/training.py --device cuda --batch 32

All rows come from one run with interleaved measurements, so that their ratios mean something on a busy machine. CPU
time is that of all threads: with one thread (OMP_NUM_THREADS=1), crops per second are those of an idle core.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from workbench import PHOTOGRAPH, machine, pixels_of, show, synchronize

from sgacodec.device import reduced_precision
from sgacodec.memory import keep_freed_memory
from sgacodec.training.checkpoint import State, start
from sgacodec.training.crops import Crops
from sgacodec.training.loop import step
from sgacodec.training.objective import forward
from sgacodec.training.optimizer import update
from sgacodec.training.recipe import OPTIMIZERS, STAGES, standard_recipe
from sgacodec.training.stages import source_of

PERIOD = 10  # steps between updates of SOAP's preconditioners


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """CPU time of a call, or wall time including the work that it starts on a GPU."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    synchronize(device)
    started = clock()
    function()
    synchronize(device)
    return clock() - started


def runs_of(options: argparse.Namespace, device: torch.device) -> dict[tuple[str, str], Callable[[], object]]:
    """A function that does one step, for each stage and optimizer."""
    images = [torch.from_numpy(pixels_of(PHOTOGRAPH, 512, 512)).permute(2, 0, 1)]
    functions: dict[tuple[str, str], Callable[[], object]] = {}
    for stage in options.stages.split(","):
        for optimizer in OPTIMIZERS:
            settings = {"stage": stage, "optimizer": optimizer, "batch": options.batch, "bf16": options.bf16}
            recipe = standard_recipe(options.architecture, steps=10**6, **settings)
            state = start(recipe, Crops(images), device)
            source = source_of(state, images, device)
            functions[stage, optimizer] = lambda state=state, source=source: step(state, source, device)
    return functions


def stages(options: argparse.Namespace, device: torch.device) -> None:
    functions = runs_of(options, device)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in functions}
    for round_number in range(options.runs + 1):
        for key, function in functions.items():
            spent = [seconds(function, device) for _ in range(1 if key[0] == "decoder" else PERIOD)]
            if round_number:
                times[key].append(statistics.mean(spent))
    medians = {key: statistics.median(values) for key, values in times.items()}
    slowest = next(iter(medians.values()))
    rows = [[*key, f"{1000 * t:.0f}", f"{options.batch / t:.1f}", f"{slowest / t:.2f}"] for key, t in medians.items()]
    columns = ("stage", "optimizer", "ms a step", "crops/s", "crops/s, relative")
    show(f"Training, {options.batch} crops of 256x256 ({machine(device)})", columns, rows)


def parts(options: argparse.Namespace, device: torch.device) -> None:
    """The parts of a joint step with SOAP."""
    images = [torch.from_numpy(pixels_of(PHOTOGRAPH, 512, 512)).permute(2, 0, 1)]
    recipe = standard_recipe(options.architecture, steps=10**6, batch=options.batch, bf16=options.bf16)
    state: State = start(recipe, Crops(images), device)
    crops, anchor = Crops(images, device), torch.arange(options.batch, device=device) % 6
    x = loss = torch.empty(0)

    def sample() -> None:
        nonlocal x
        x = crops.sample(options.batch, 256, state.data)

    def losses() -> None:
        nonlocal loss
        state.model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.bf16):
            loss = forward(state.model, x, anchor, state.noise).loss

    def backward() -> Tensor | None:
        return loss.backward()

    functions = {
        "crops": sample,
        "losses": losses,
        "gradients": backward,
        "optimizers": lambda: update(state.optimizers, recipe.bf16),
    }
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(PERIOD * (1 + options.runs)):
        for name, function in functions.items():
            spent = seconds(function, device)
            if number >= PERIOD:
                times[name].append(spent)
    means = {name: statistics.mean(values) for name, values in times.items()}
    total = sum(means.values())
    rows = [[name, f"{1000 * t:.0f}", f"{t / total:.0%}"] for name, t in means.items()]
    show(f"A joint step with SOAP, {options.batch} crops of 256x256", ("part", "ms", "share"), rows)


def memory(options: argparse.Namespace, device: torch.device) -> None:
    """A joint step with freed memory returned to the system, and with it kept, as `train` does."""
    images = [torch.from_numpy(pixels_of(PHOTOGRAPH, 512, 512)).permute(2, 0, 1)]
    recipe = standard_recipe(options.architecture, steps=10**6, batch=options.batch, bf16=options.bf16)
    state, source = start(recipe, Crops(images), device), Crops(images, device)
    contexts = {"returned": contextlib.nullcontext, "kept": keep_freed_memory}
    times: dict[str, list[float]] = {name: [] for name in contexts}
    for round_number in range(options.runs + 1):
        for name, context in contexts.items():
            with context():
                step(state, source, device)  # takes the memory that the others keep
                spent = [seconds(lambda: step(state, source, device), device) for _ in range(PERIOD)]
            if round_number:
                times[name].append(statistics.mean(spent))
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = [[name, f"{1000 * t:.0f}", f"{t / medians['returned']:.2f}"] for name, t in medians.items()]
    show(f"Freed memory, joint steps of {options.batch} crops", ("freed memory", "ms a step", "relative"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="lite")
    parser.add_argument("--stages", default=",".join(STAGES), help="which stages, separated by commas")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="[default: where it is faster]")
    parser.add_argument("--runs", type=int, default=3, help=f"measurements of {PERIOD} steps each")
    options = parser.parse_args()
    if unknown := set(options.stages.split(",")) - set(STAGES):
        parser.error(f"unknown stage {unknown.pop()!r}; there are {', '.join(STAGES)}")
    device = torch.device(options.device)
    if options.bf16 is None:
        options.bf16 = reduced_precision(device)
    stages(options, device)
    parts(options, device)
    if device.type == "cpu":
        memory(options, device)


if __name__ == "__main__":
    main()
