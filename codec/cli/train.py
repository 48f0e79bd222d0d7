"""`sgacodec train`: from photographs to a model file, with a checkpoint and a log beside it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from . import options, output, training_view
from .exits import INTERRUPTED
from .output import Output

if TYPE_CHECKING:
    import torch

    from ..hyperprior import GainedHyperprior
    from ..training.checkpoint import State
    from ..training.crops import Crops
    from ..training.data import Photograph

_JUDGES = 24  # photographs of the validation line, at most
_SMALLEST = 64  # pixels a side of a photograph that is learnt from

_PATH = click.Path(path_type=Path)


@click.command(short_help="Train a model.")
@click.argument("sources", nargs=-1, required=True, type=_PATH, metavar="DATA...")
@click.option("--out", required=True, type=_PATH, metavar="FILE", help="Where the model goes (.safetensors).")
@click.option("--name", help="What the model is called.  [default: FILE without folder and suffix]")
@click.option("--licence", default="not stated", help="Licence of the weights, for the model's record.")
@click.option("--architecture", metavar="lite|mshyper-128|mshyper-192", help="[default: lite]")
@click.option("--steps", metavar="N", type=click.IntRange(min=0), help="Train N steps in all.")
@click.option(
    "--minutes",
    metavar="M",
    type=click.FloatRange(min=0),
    callback=options.finite,
    help="Train M minutes in all, earlier runs included.",
)
@click.option("--resume", type=_PATH, metavar="CHECKPOINT", help="Go on from here, exactly.")
@click.option("--init", metavar="NAME|PATH", help="Start with the weights of this model, of the same architecture.")
@click.option("--export-only", type=_PATH, metavar="CHECKPOINT", help="Only make the model of a checkpoint.")
@click.option("--batch", metavar="N", type=click.IntRange(1, 4096), help="Crops a step.")
@click.option("--crop", metavar="PIXELS", type=click.IntRange(64, 2048), help="Side of the crops, a multiple of 64.")
@click.option(
    "--final-crop",
    metavar="PIXELS",
    type=click.IntRange(0, 2048),
    help="Side of the crops near the end (0: as before).",
)
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), callback=options.finite, help="Learning rate.")
@click.option("--seed", metavar="N", type=click.IntRange(min=0), help="[default: 0]")
@click.option("--device", metavar="auto|cpu|cuda[:N]", default="auto", show_default=True, help="Where to compute.")
@click.option("--bf16/--no-bf16", default=None, help="Convolutions in bfloat16.  [default: where fast]")
@click.option("--compile/--no-compile", default=None, help="Use torch.compile.  [default: on CUDA with Triton]")
@click.option(
    "--validation",
    type=_PATH,
    metavar="DIR|TAR",
    help="Judge by these photographs.  [default: by one in about 40 of DATA]",
)
@click.option(
    "--save-every",
    metavar="S",
    type=click.FloatRange(min=0),
    callback=options.finite,
    default=300.0,
    show_default=True,
    help="Seconds between checkpoints; each is followed by a validation.",
)
@click.option("--threads", metavar="N", type=click.IntRange(1, 1024), help="Threads on a CPU.")
@click.option("--log", "log_file", type=_PATH, metavar="FILE", help="JSON lines go there.  [default: beside --out]")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors.")
@click.pass_context
def command(
    ctx: click.Context,
    sources: tuple[Path, ...],
    out: Path,
    name: str | None,
    licence: str,
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

    DATA are folders, tars or single pictures. One model serves all rates. A checkpoint goes to FILE.ckpt every
    few minutes, at the end, and when the run is interrupted with Ctrl-C; --resume goes on from it as if nothing
    had happened, also with more --steps or --minutes. --init begins a new run with the weights of a model.

    \b
    sgacodec train photos/ --out mine.safetensors --minutes 120
    sgacodec train photos/ --out mine.safetensors --resume mine.ckpt --minutes 240
    sgacodec encode photo.png photo.sga --model mine.safetensors
    """
    speech = Output(quiet=quiet)
    checkpoint = out.with_suffix(".ckpt")
    _check_options(out, checkpoint, resume, init, export_only, wanted)
    import torch

    from ..training.checkpoint import load_checkpoint
    from ..training.crops import Crops
    from ..training.data import read_photographs, split

    if threads is not None:
        torch.set_num_threads(threads)
    chosen = _device(device)
    with output.logged(speech):
        # what can be wrong is found before the photographs are read
        state = load_checkpoint(export_only, chosen) if export_only else _resumed(resume, chosen, wanted)
        earlier = None if init is None else _earlier(init, wanted)
        photographs, judges = read_photographs(list(sources), _SMALLEST), []
        if validation is not None:
            judges = read_photographs([validation], _SMALLEST)
        else:
            photographs, judges = split(photographs)
        held_out = [] if validation is not None else judges
        output.note(speech, f"{len(photographs)} photographs to learn from, {len(judges)} to judge by")
        interrupted = 0
        if not export_only:
            log_file = log_file or out.with_suffix(".jsonl")
            crops = Crops([p.pixels for p in photographs], chosen)
            state = state or _begun(earlier, crops, chosen, wanted)
            state, interrupted = _train(state, crops, judges, chosen, checkpoint, log_file, save_every, speech)
        assert state is not None
        if interrupted:
            output.problem(speech, f"interrupted after {state.step} steps; go on with --resume {checkpoint}")
            ctx.exit(interrupted)
        _export(state, photographs, held_out, chosen, out, name or out.stem, licence, sources, speech)


def _check_options(
    out: Path,
    checkpoint: Path,
    resume: Path | None,
    init: str | None,
    export_only: Path | None,
    wanted: dict[str, Any],
) -> None:
    """Refuse what contradicts itself, or would overwrite an earlier run."""
    if out.suffix != ".safetensors":
        raise click.UsageError(f"--out '{out}': the name of a model ends in .safetensors")
    if not out.parent.is_dir():
        raise click.UsageError(f"--out '{out}': no such folder")
    if export_only:
        given = [key for key, value in wanted.items() if value is not None]
        if resume or init or given:
            raise click.UsageError("--export-only trains nothing: it takes no --resume, --init or training options")
        return
    if wanted["steps"] is not None and wanted["minutes"] is not None:
        raise click.UsageError("either --steps or --minutes")
    for key in ("crop", "final_crop"):
        if wanted[key] is not None and wanted[key] % 64:
            raise click.UsageError(f"--{key.replace('_', '-')} {wanted[key]}: a multiple of 64 is wanted")
    if resume is not None:
        if wanted["seed"] is not None:
            raise click.UsageError("--seed: a resumed run keeps its own")
        if init is not None:
            raise click.UsageError("either --resume, which goes on with a run, or --init, which begins one")
    elif wanted["steps"] is None and wanted["minutes"] is None:
        raise click.UsageError("say how long: --steps or --minutes")
    elif checkpoint.exists():
        raise click.UsageError(f"{checkpoint} exists: go on with --resume {checkpoint}, or remove it")


def _device(name: str) -> torch.device:
    from ..device import device_of

    try:
        return device_of(name)
    except ValueError:
        raise click.UsageError(f"--device '{name}': there is no such device") from None


def _resumed(resume: Path | None, device: torch.device, wanted: dict[str, Any]) -> State | None:
    """The state to go on from, with what the user wants changed."""
    if resume is None:
        return None
    from ..training.checkpoint import load_checkpoint

    changed = {key: value for key, value in wanted.items() if value is not None}
    if "steps" in changed or "minutes" in changed:
        changed = {"steps": None, "minutes": None, **changed}
    if device.type == "cpu":
        changed.setdefault("compile", False)
    return load_checkpoint(resume, device, **changed)


def _earlier(init: str, wanted: dict[str, Any]) -> GainedHyperprior:
    """The weights to start with; the architecture that is wanted becomes theirs."""
    from ..models.catalogue import find_model
    from ..training.checkpoint import trainable

    architecture, model_id, gained = trainable(find_model(init))
    if wanted["architecture"] not in (None, architecture):
        raise click.UsageError(f"--architecture {wanted['architecture']}: {init} is of {architecture}")
    wanted.update(architecture=architecture, init=model_id)
    return gained


def _begun(earlier: GainedHyperprior | None, crops: Crops, device: torch.device, wanted: dict[str, Any]) -> State:
    """A new run. Weights that have been learnt are changed with a lower learning rate than new ones."""
    from importlib.util import find_spec

    from ..device import reduced_precision
    from ..training.checkpoint import standard_recipe, start

    changed = {key: value for key, value in wanted.items() if value is not None}
    changed.setdefault("compile", device.type == "cuda" and find_spec("triton") is not None)
    changed.setdefault("bf16", reduced_precision(device))
    recipe = standard_recipe(changed.pop("architecture", "lite"), **changed)
    if earlier is not None and "lr" not in changed:
        recipe = replace(recipe, lr=0.3 * recipe.lr)
    return start(recipe, crops, device, earlier)


def _train(
    state: State,
    crops: Crops,
    judges: list[Photograph],
    device: torch.device,
    checkpoint: Path,
    log_file: Path,
    save_every: float,
    speech: Output,
) -> tuple[State, int]:
    """Train until the end or an interruption; the state, and the exit code of the interruption."""
    from ..training.loop import progress, train

    images = [p.pixels for p in judges[:: max(1, len(judges) // _JUDGES)][:_JUDGES]]
    with training_view.shown(speech) as view, _interruptible() as caught:

        def tick(state: State) -> bool:
            training_view.tick(view, progress(state), state.step)
            return not caught

        def report(line: dict[str, Any]) -> None:
            training_view.report(view, line)

        state = train(state, crops, device, checkpoint, images, log_file, save_every, report, tick)
        return state, caught[0] if caught and progress(state) < 1.0 else 0


@contextlib.contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Collect the exit code of Ctrl-C or SIGTERM in place of stopping at once; a second one stops at once."""
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


def _export(
    state: State,
    photographs: list[Photograph],
    held_out: list[Photograph],
    device: torch.device,
    out: Path,
    name: str,
    licence: str,
    sources: tuple[Path, ...],
    speech: Output,
) -> None:
    """Write the model of a state."""
    from ..models.file import write_model
    from ..training.export import export_checkpoint, training_record

    record = training_record(
        state,
        device,
        licence,
        [os.path.basename(os.path.abspath(source)) for source in sources],
        len(photographs),
        [p.name for p in held_out],
    )
    model = export_checkpoint(state, name, [p.pixels for p in photographs], record)
    write_model(model, out)
    output.result(speech, f"{out}: model {name}, id {model.id}, after {state.step} steps")
