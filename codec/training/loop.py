"""The training loop: limited by steps or by time, with checkpoints from which a run resumes.

photographs ─► batches ─► losses of the stage ─► SOAP and Adam ─► EMA ─► checkpoint ─► (export.py) model file
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..memory import keep_freed_memory
from ..metrics import psnr_of_mse, rd_loss
from ..settings import ANCHORS
from .checkpoint import State, save_checkpoint
from .crops import upload
from .optimizer import set_learning_rate, update
from .recipe import TrainingError
from .stages import Source, stage_losses
from .validation import validate

log = logging.getLogger(__name__)

_LOG_EVERY = 20.0  # seconds
_MEDIAN_EVERY = 250  # steps


def progress(state: State) -> float:
    """The completed part of the run, 0..1."""
    done = [0.0]
    if state.recipe.steps is not None:
        done.append(state.step / state.recipe.steps if state.recipe.steps > 0 else 1.0)
    if state.recipe.minutes is not None:
        done.append(state.seconds / (60 * state.recipe.minutes) if state.recipe.minutes > 0 else 1.0)
    return min(1.0, max(done))


# ---------------------------------------------------------------------------------------------------- one step


@torch.no_grad()
def _update_ema(state: State) -> None:
    decay = min(state.recipe.ema, (1 + state.step) / (5 + state.step))  # mean age: at first a fifth of the steps
    averages: list[Tensor] = list(state.ema.parameters())
    weights: list[Tensor] = list(state.model.parameters())
    torch._foreach_lerp_(averages, weights, 1 - decay)


def _batch_shape(state: State) -> tuple[int, int]:
    """Crops of the next batch, and their side in pixels."""
    recipe = state.recipe
    if recipe.final_crop > 0 and progress(state) >= recipe.final_from:
        return max(1, recipe.batch // 2), recipe.final_crop
    return recipe.batch, recipe.crop


def draw_anchors(batch: int, generator: torch.Generator) -> Tensor:
    """Indexes (B,) int64 of anchors in random order: each as often as the others, or once more.

    Independent draws would increase the variance of the gradient of g_s by a fifth (docs/experiments.md).
    """
    first = torch.randint(len(ANCHORS), (), generator=generator)
    return (torch.randperm(batch, generator=generator) + first) % len(ANCHORS)


def step(state: State, source: Source, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One optimization step.

    The host synchronizes with a GPU only in every 250th step, which updates the medians of z.

    Returns
    -------
    loss : Tensor ()
    anchor : Tensor (B,) int64
    bpp, mse : Tensor (B,) float32
        As in `objective.Losses`; all on the device.
    """
    recipe, model = state.recipe, state.model
    batch, size = _batch_shape(state)
    x = source.sample(batch, size, state.data)
    anchor = upload(draw_anchors(batch, state.data), device)
    if state.step % _MEDIAN_EVERY == 0:
        model.density.update_median()
        state.ema.density.update_median()
    set_learning_rate(state.optimizers, recipe, state.step, progress(state))
    losses, anchor = stage_losses(state, x, anchor)
    model.zero_grad(set_to_none=True)
    losses.loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    update(state.optimizers, recipe.bf16)
    state.step += 1
    state.crops += batch
    _update_ema(state)
    return losses.loss.detach(), anchor, losses.bpp, losses.mse


# -------------------------------------------------------------------------------------------------------- run


def _diverged(state: State, checkpoint: Path) -> TrainingError:
    return TrainingError(f"step {state.step}: the loss is not a number; resume {checkpoint} with a lower learning rate")


def _check_finite(state: State, sums: Tensor, checkpoint: Path) -> None:
    """Stop a diverged run before it overwrites the last good checkpoint."""
    if not all(bool(torch.isfinite(v).all()) for v in (sums, *state.model.parameters())):
        raise _diverged(state, checkpoint)


def _summary(state: State, sums: Tensor, crops_per_second: float) -> dict[str, Any]:
    """Log record of the steps since the last one; `sums` (A, 3) holds count, Σ bpp and Σ MSE of each anchor."""
    line: dict[str, Any] = {
        "step": state.step,
        "progress": round(progress(state), 4),
        "seconds": round(state.seconds, 1),
        "crops_per_second": round(crops_per_second, 2),
        "bpp": [],
        "psnr": [],
        "loss": [],
    }
    for lmbda, (count, bpp, mse) in zip(state.model.anchors, sums.tolist(), strict=True):
        line["bpp"].append(round(bpp / count, 4) if count else None)
        line["psnr"].append(round(psnr_of_mse(mse / count), 3) if mse > 0 else None)
        line["loss"].append(round(rd_loss(bpp / count, mse / count, lmbda), 4) if count else None)
    return line


@keep_freed_memory()
def train(
    state: State,
    source: Source,
    device: torch.device,
    checkpoint: Path,
    validation: list[Tensor] | None = None,
    log_file: Path | None = None,
    save_every: float = 300.0,
    report: Callable[[dict[str, Any]], None] | None = None,
    tick: Callable[[State], bool] | None = None,
) -> State:
    """Train until the steps or minutes of the recipe are reached.

    Parameters
    ----------
    state : State
        Changed in place.
    source : Crops or CachedLatents
        From `stages.source_of`.
    checkpoint : Path
        Written every `save_every` seconds and at the end.
    validation : list of Tensor (3, H, W) uint8, optional
        Images on which the averaged model is evaluated after each checkpoint.
    log_file : Path, optional
        Log records are appended to it as JSON lines.
    report : callable, optional
        Called with each log record.
    tick : callable, optional
        Called after each step; False ends training after a last checkpoint.

    Raises
    ------
    TrainingError
        When the last checkpoint cannot be written (earlier failures are logged as warnings), or the loss is not a
        number.
    """
    saved = logged = time.monotonic()
    count, sums = 0, torch.zeros(len(ANCHORS), 3, device=device)  # per anchor: count, Σ bpp, Σ MSE

    def emit(record: dict[str, Any]) -> None:
        if log_file is not None:
            try:
                with log_file.open("a") as stream:
                    stream.write(json.dumps(record) + "\n")
            except OSError as error:
                log.warning("%s: %s", log_file, error.strerror or error)
        if report is not None:
            report(record)

    def run_validation() -> None:
        if validation:
            emit({"step": state.step, "validation": validate(state.ema, validation, device)})

    running = True
    while running and progress(state) < 1.0:
        started, crops_before = time.monotonic(), state.crops
        try:
            _, anchor, bpp, mse = step(state, source, device)
        except torch.linalg.LinAlgError:  # SOAP's preconditioners are not finite
            raise _diverged(state, checkpoint) from None
        sums.index_add_(0, anchor, torch.stack([torch.ones_like(bpp), bpp, mse], 1))
        count += state.crops - crops_before
        now = time.monotonic()
        state.seconds += now - started
        running = tick is None or tick(state)
        if now - logged > _LOG_EVERY or progress(state) >= 1.0:
            _check_finite(state, sums, checkpoint)
            now = time.monotonic()
            emit(_summary(state, sums, count / max(now - logged, 1e-9)))
            logged, count = now, 0
            sums.zero_()
        if now - saved > save_every and progress(state) < 1.0 and running:
            _check_finite(state, sums, checkpoint)
            try:
                save_checkpoint(state, checkpoint)
            except TrainingError as error:
                log.warning("%s", error)
            run_validation()
            saved = logged = time.monotonic()
            count = 0
            sums.zero_()
    _check_finite(state, sums, checkpoint)
    save_checkpoint(state, checkpoint)
    if running:
        run_validation()
    return state
