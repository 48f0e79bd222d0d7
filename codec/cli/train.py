"""`sgacodec train`: train a model on photographs; writes the model, a checkpoint and a log."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from ..training.recipe import OPTIMIZERS, STAGES
from . import options, output, training_start, training_view
from .exits import INTERRUPTED
from .output import Output

if TYPE_CHECKING:
    import torch

    from ..training.checkpoint import State
    from ..training.data import Photograph
    from ..training.stages import Source

_VALIDATION = 24  # photographs in a validation, at most
_MIN_SIDE = 64  # pixels; smaller photographs are skipped

_PATH = click.Path(path_type=Path)


@click.command(short_help="Train a model.")
@click.argument("sources", nargs=-1, required=True, type=_PATH, metavar="DATA...")
@click.option("--out", required=True, type=_PATH, metavar="FILE", help="Model file to write (.safetensors).")
@click.option("--name", help="Name of the model.  [default: FILE without folder and suffix]")
@click.option("--licence", help="Licence of the weights, stored in the model.  [default: not stated]")
@click.option("--architecture", metavar="lite|mshyper-128|mshyper-192", help="[default: lite]")
@click.option(
    "--stage",
    type=click.Choice(STAGES),
    help="Train everything (joint), the prior on latents that are computed once, or the decoder on refined latents.  "
    "[default: joint]",
)
@click.option(
    "--refine-steps",
    metavar="N",
    type=click.IntRange(min=1),
    help="Steps of the refinement of a crop with --stage decoder.  [default: 20]",
)
@click.option(
    "--unrefined",
    metavar="W",
    type=click.FloatRange(min=0),
    callback=options.finite,
    help="Weight of the loss of unrefined crops with --stage decoder; 0 leaves the encoder as it is.  [default: 0.5]",
)
@click.option(
    "--dead-zone",
    is_flag=True,
    default=None,
    help="Round the latents of unrefined crops as `encode --method none` does. This suits a model for unrefined files.",
)
@click.option("--steps", metavar="N", type=click.IntRange(min=0), help="Train N steps in total.")
@click.option(
    "--minutes",
    metavar="M",
    type=click.FloatRange(min=0),
    callback=options.finite,
    help="Train M minutes in total, including resumed runs.",
)
@click.option("--resume", type=_PATH, metavar="CHECKPOINT", help="Continue the run of a checkpoint.")
@click.option("--init", metavar="NAME|FILE", help="Start from the weights of this model or checkpoint.")
@click.option("--export-only", type=_PATH, metavar="CHECKPOINT", help="Only export the model of a checkpoint.")
@click.option("--batch", metavar="N", type=click.IntRange(1, 4096), help="Crops per step.")
@click.option("--crop", metavar="PIXELS", type=click.IntRange(64, 2048), help="Side of the crops, a multiple of 64.")
@click.option(
    "--final-crop",
    metavar="PIXELS",
    type=click.IntRange(0, 2048),
    help="Side of the crops in the last part of the run (0: unchanged).",
)
@click.option(
    "--lr", metavar="LR", type=click.FloatRange(min=0, min_open=True), callback=options.finite, help="Learning rate."
)
@click.option(
    "--lr-end",
    metavar="LR",
    type=click.FloatRange(min=0),
    callback=options.finite,
    help="Learning rate at the end of the decay; that of --lr keeps it constant.",
)
@click.option(
    "--ema",
    metavar="DECAY",
    type=click.FloatRange(0, 1, max_open=True),
    callback=options.finite,
    help="Decay of the averages of the weights, which are exported.",
)
@click.option(
    "--optimizer",
    type=click.Choice(OPTIMIZERS),
    help="Optimizer of all but the large layers of the transforms, which Adam trains.  [default: soap for lite, adam "
    "in stage decoder]",
)
@click.option("--seed", metavar="N", type=click.IntRange(min=0), help="[default: 0]")
@click.option("--device", metavar="auto|cpu|cuda[:N]", default="auto", show_default=True, help="Where to compute.")
@click.option("--bf16/--no-bf16", default=None, help="Run convolutions in bfloat16.  [default: where it is faster]")
@click.option("--compile/--no-compile", default=None, help="Use torch.compile.  [default: on CUDA with Triton]")
@click.option(
    "--validation",
    type=_PATH,
    metavar="DIR|TAR",
    help="Photographs for validation.  [default: about one in 40 of DATA, held out]",
)
@click.option(
    "--save-every",
    metavar="S",
    type=click.FloatRange(min=0),
    callback=options.finite,
    default=300.0,
    show_default=True,
    help="Seconds between checkpoints; a validation follows each.",
)
@click.option("--threads", metavar="N", type=click.IntRange(1, 1024), help="Number of CPU threads.")
@click.option("--log", "log_file", type=_PATH, metavar="FILE", help="Log file (JSON lines).  [default: beside --out]")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.pass_context
def command(
    ctx: click.Context,
    sources: tuple[Path, ...],
    out: Path,
    name: str | None,
    licence: str | None,
    resume: Path | None,
    init: str | None,
    export_only: Path | None,
    device: str,
    validation: Path | None,
    save_every: float,
    threads: int | None,
    log_file: Path | None,
    quiet: bool,
    **wanted: Any,
) -> None:
    """Train a model on photographs and write it to FILE.

    DATA are folders, tars or image files. One model covers all rates. A checkpoint is written beside FILE (.ckpt)
    every few minutes, at the end, and when the run is interrupted with Ctrl-C. --resume continues from it, exactly but
    in stage decoder, also with more --steps or --minutes. --init starts a new run from the weights of a model or
    checkpoint.

    Stage joint trains everything. Stage prior trains the hyperprior and the context model on latents of all
    photographs, which are computed once: several times as many crops per second, but the transforms stay as they are.
    Use it first when --init gives a model without context. Stage decoder comes last: the decoder is fitted to refined
    latents, as the encoder sends them, and the encoder to this decoder. Files with refinement become smaller, those
    without it larger.

    \b
    sgacodec train photos/ --out mine.safetensors --minutes 120
    sgacodec train photos/ --out mine.safetensors --resume mine.ckpt --minutes 240
    sgacodec encode photo.png photo.sga --model mine.safetensors
    \b
    sgacodec train photos/ --out joint.safetensors --init lite --minutes 600
    sgacodec train photos/ --out final.safetensors --init joint.ckpt --stage decoder --minutes 120
    """
    console = Output(quiet=quiet)
    checkpoint = out.with_suffix(".ckpt")
    training_start.check_options(out, checkpoint, resume, init, export_only, wanted)
    initial_file = training_start.initial_file(init)
    training_start.check_files(sources, out, checkpoint, (initial_file, resume, export_only, validation), log_file)
    import torch

    from ..models.file import write_model
    from ..training.checkpoint import load_checkpoint, start
    from ..training.crops import Crops
    from ..training.data import digest, read_photographs, split
    from ..training.export import export_checkpoint
    from ..training.stages import source_of

    if threads is not None:
        torch.set_num_threads(threads)
    chosen = training_start.device(device)
    with output.logged(console):
        # Checkpoint and model are read first, so that errors are reported before the photographs are decoded.
        state = load_checkpoint(export_only, chosen) if export_only else training_start.resumed(resume, chosen, wanted)
        initial = None if initial_file is None else training_start.initial_weights(initial_file, wanted, console)
        recipe = training_start.recipe_of(chosen, wanted) if state is None else state.recipe
        photographs = read_photographs(list(sources), _MIN_SIDE)
        held_out: list[Photograph] = []
        if validation is None:
            photographs, held_out = split(photographs)
        validated = held_out if validation is None else read_photographs([validation], _MIN_SIDE)
        output.note(console, f"{len(photographs)} photographs for training, {len(validated)} for validation")
        interrupted = 0
        images = [p.pixels for p in photographs]
        state = state or start(recipe, Crops(images), chosen, initial)
        state.name, state.licence = name or state.name, licence or state.licence
        if not export_only:
            log_file = log_file or out.with_suffix(".jsonl")
            if resume is not None and state.photographs not in ("", digest(photographs)):
                output.problem(console, f"{resume} is of a run with other photographs: it is not continued exactly")
            elif resume is not None and recipe.stage == "decoder":
                output.note(console, "refined crops are not in a checkpoint: the run is not continued exactly")
            state.photographs = digest(photographs)
            source = source_of(state, images, chosen)
            state, interrupted = _train(state, source, validated, chosen, checkpoint, log_file, save_every, console)
        if interrupted:
            output.problem(console, f"interrupted after {state.step} steps; continue with --resume {checkpoint}")
            ctx.exit(interrupted)
        record = _record(state, photographs, held_out, chosen, sources)
        model = export_checkpoint(state, state.name or out.stem, images, record)
        write_model(model, out)
        output.result(console, f"{out}: model {model.name}, id {model.id}, after {state.step} steps")


def _train(
    state: State,
    source: Source,
    validation: list[Photograph],
    device: torch.device,
    checkpoint: Path,
    log_file: Path,
    save_every: float,
    console: Output,
) -> tuple[State, int]:
    """Train until the end or an interruption; returns the state and the exit code of an interruption, else 0."""
    from ..training.data import evenly_spaced
    from ..training.loop import progress, train

    images = [p.pixels for p in evenly_spaced(validation, _VALIDATION)]
    with training_view.shown(console) as view, _interruptible() as caught:

        def tick(state: State) -> bool:
            training_view.tick(view, progress(state), state.step)
            return not caught

        def report(line: dict[str, Any]) -> None:
            training_view.report(view, line)

        state = train(state, source, device, checkpoint, images, log_file, save_every, report, tick)
        return state, caught[0] if caught and progress(state) < 1.0 else 0


@contextlib.contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Collect the exit code of a first Ctrl-C or SIGTERM instead of stopping; a second one raises KeyboardInterrupt."""
    caught: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(INTERRUPTED if number == signal.SIGINT else 128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _record(
    state: State,
    photographs: list[Photograph],
    held_out: list[Photograph],
    device: torch.device,
    sources: tuple[Path, ...],
) -> dict[str, Any]:
    """Metadata of the model; absolute paths of the sources are not stored."""
    from ..training.export import training_record

    names = [os.path.basename(os.path.abspath(source)) for source in sources]
    return training_record(state, device, names, len(photographs), [p.name for p in held_out])
