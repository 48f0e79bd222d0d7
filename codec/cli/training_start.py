"""The start of a training run: options checked, and the state of a new or a resumed run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..device import reduced_precision
from ..folders import IMAGE_SUFFIXES, suffix
from . import output
from .output import Output

if TYPE_CHECKING:
    import torch

    from ..training.checkpoint import State
    from ..training.initial_weights import InitialWeights
    from ..training.recipe import Recipe


def check_options(
    out: Path,
    checkpoint: Path,
    resume: Path | None,
    init: str | None,
    export_only: Path | None,
    wanted: dict[str, Any],
) -> None:
    """Refuse contradictory options, and a new run that would overwrite an existing checkpoint."""
    if out.suffix != ".safetensors":
        raise click.UsageError(f"--out '{out}': the file name of a model ends in .safetensors")
    if not out.parent.is_dir():
        raise click.UsageError(f"--out '{out}': no such folder")
    if export_only:
        given = [key for key, value in wanted.items() if value is not None]
        if resume or init or given:
            raise click.UsageError("--export-only does not train; it takes no --resume, --init or training options")
        return
    if wanted["steps"] is not None and wanted["minutes"] is not None:
        raise click.UsageError("give either --steps or --minutes")
    for key in ("crop", "final_crop"):
        if wanted[key] is not None and wanted[key] % 64:
            raise click.UsageError(f"--{key.replace('_', '-')} {wanted[key]}: not a multiple of 64")
    if resume is not None:
        for key in ("seed", "optimizer", "stage", "refine_steps", "unrefined", "dead_zone"):
            if wanted[key] is not None:
                key = key.replace("_", "-")
                raise click.UsageError(f"--{key}: a resumed run keeps its {key}")
        if init is not None:
            raise click.UsageError("give either --resume, which continues a run, or --init, which starts one")
        if checkpoint.exists() and resume.exists() and not checkpoint.samefile(resume):
            raise click.UsageError(f"{checkpoint} is the checkpoint of another run than {resume}: give another --out")
        return
    if init is None and wanted["stage"] in ("prior", "decoder"):
        raise click.UsageError(f"--stage {wanted['stage']} needs --init: it trains a part of a model that exists")
    for key in ("refine_steps", "unrefined"):
        if wanted[key] is not None and wanted["stage"] != "decoder":
            raise click.UsageError(f"--{key.replace('_', '-')} is for --stage decoder")
    if wanted["dead_zone"] and (wanted["stage"] == "prior" or wanted["unrefined"] == 0):
        raise click.UsageError("--dead-zone needs unrefined crops: not --stage prior, nor --unrefined 0")
    if wanted["steps"] is None and wanted["minutes"] is None:
        raise click.UsageError("give the length of the run: --steps or --minutes")
    if checkpoint.exists():
        raise click.UsageError(f"{checkpoint} exists: continue with --resume {checkpoint}, or remove it")


def check_files(
    sources: tuple[Path, ...],
    out: Path,
    checkpoint: Path,
    also_read: tuple[Path | None, ...],
    log: Path | None,
) -> None:
    """Refuse to write over a file that is read, and a log that cannot be written."""
    read = {path.resolve() for path in (*sources, *also_read) if path is not None}
    if out.resolve() in read:
        raise click.UsageError(f"--out '{out}' would overwrite a file that this command reads")
    if log is None:
        return
    if log.resolve() in read | {out.resolve(), checkpoint.resolve()} or suffix(log.name) in IMAGE_SUFFIXES:
        raise click.UsageError(f"--log '{log}' would overwrite a model, a checkpoint or an image")
    if not log.parent.is_dir():
        raise click.UsageError(f"--log '{log}': no such folder")


def device(name: str) -> torch.device:
    from ..device import device_of

    try:
        return device_of(name)
    except ValueError:
        raise click.UsageError(f"--device '{name}': there is no such device") from None


def resumed(resume: Path | None, device: torch.device, wanted: dict[str, Any]) -> State | None:
    """The state of a checkpoint with the recipe changed by options; None without a checkpoint."""
    if resume is None:
        return None
    from ..training.checkpoint import load_checkpoint

    changed = {key: value for key, value in wanted.items() if value is not None}
    if "steps" in changed or "minutes" in changed:
        changed = {"steps": None, "minutes": None, **changed}
    if device.type == "cpu":
        changed.setdefault("compile", False)
    if not reduced_precision(device):
        changed.setdefault("bf16", False)
    return load_checkpoint(resume, device, **changed)


def initial_file(init: str | None) -> Path | None:
    """The file of a model or checkpoint.

    Raises
    ------
    ModelNotFoundError
    """
    if init is None or Path(init).suffix == ".ckpt":
        return None if init is None else Path(init)
    from ..models.catalogue import find_model

    return find_model(init)


def initial_weights(init: Path, wanted: dict[str, Any], console: Output) -> InitialWeights:
    """Weights of the model or checkpoint `init`; what the recipe records of them is entered into `wanted`."""
    from ..training.initial_weights import read_initial

    initial = read_initial(init, wanted["architecture"])
    wanted.update(architecture=initial.architecture, init=initial.source, new=initial.new)
    fresh = f"; new: {', '.join(initial.new)}" if initial.new else ""
    unused = f"; not used: {', '.join(initial.unused)}" if initial.unused else ""
    output.note(console, f"initial weights: {initial.source}{fresh}{unused}")
    return initial


def recipe_of(device: torch.device, wanted: dict[str, Any]) -> Recipe:
    """The recipe of a new run.

    Raises
    ------
    TrainingError
        When the package of its optimizer is not installed.
    """
    from importlib.util import find_spec

    from ..device import reduced_precision
    from ..training.optimizer import soap_class
    from ..training.recipe import standard_recipe

    changed = {key: value for key, value in wanted.items() if value is not None}
    changed.setdefault("compile", device.type == "cuda" and find_spec("triton") is not None)
    changed.setdefault("bf16", reduced_precision(device))
    recipe = standard_recipe(changed.pop("architecture", "lite"), **changed)
    if recipe.optimizer == "soap":
        soap_class()
    return recipe
