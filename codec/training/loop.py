"""The training loop: time-boxed or step-boxed, checkpointed, exactly resumable.

photographs ─► crops ─► forward ─► Adam ─► EMA ─► checkpoint ─► (export.py) model file
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..hyperprior import GainedHyperprior, fold
from ..metrics import psnr_of_mse, rd_loss
from ..settings import ANCHORS
from .checkpoint import State, TrainingError, save_checkpoint
from .crops import Crops, upload
from .export import estimate
from .model import compiled_losses, forward

log = logging.getLogger(__name__)

_LOG_EVERY = 20.0  # seconds
_MEDIAN_EVERY = 250  # steps


def progress(state: State) -> float:
    """How much of the run is done, 0..1."""
    done = [0.0]
    if state.recipe.steps is not None:
        done.append(state.step / max(1, state.recipe.steps))
    if state.recipe.minutes is not None:
        done.append(state.seconds / (60 * state.recipe.minutes) if state.recipe.minutes > 0 else 1.0)
    return min(1.0, max(done))


# ---------------------------------------------------------------------------------------------------- one step


def _set_learning_rate(state: State) -> None:
    recipe = state.recipe
    decay = 0.5 * (1 + math.cos(math.pi * progress(state)))
    rate = recipe.lr_end + (recipe.lr - recipe.lr_end) * decay
    rate *= min(1.0, (state.step + 1) / max(1, recipe.warmup))
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group["factor"]


@torch.no_grad()
def _update_ema(state: State) -> None:
    decay = min(state.recipe.ema, (1 + state.step) / (10 + state.step))
    ours: list[Tensor] = list(state.ema.parameters())
    theirs: list[Tensor] = list(state.model.parameters())
    torch._foreach_lerp_(ours, theirs, 1 - decay)


def step(state: State, crops: Crops, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One optimisation step; returns loss (scalar), and anchor, bpp, mse of each image, all on the device.

    The host waits for a GPU in one step of 250 only, when the median of z is found anew.
    """
    recipe, model = state.recipe, state.model
    final = recipe.final_crop > 0 and progress(state) >= recipe.final_from
    batch, size = (max(1, recipe.batch // 2), recipe.final_crop) if final else (recipe.batch, recipe.crop)
    x = crops.sample(batch, size, state.data)
    anchor = upload(torch.randint(len(ANCHORS), (batch,), generator=state.data), device)
    if state.step % _MEDIAN_EVERY == 0:
        model.density.update_median()
        state.ema.density.update_median()
    _set_learning_rate(state)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.bf16):
        losses = forward(model, x, anchor, state.noise, compiled_losses() if recipe.compile else None)
    state.optimizer.zero_grad(set_to_none=True)
    losses.loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    state.optimizer.step()
    state.step += 1
    state.crops += batch
    _update_ema(state)
    return losses.loss.detach(), anchor, losses.bpp, losses.mse


# -------------------------------------------------------------------------------------------------- validation


@torch.no_grad()
def validate(model: GainedHyperprior, images: list[Tensor], device: torch.device) -> list[tuple[float, float]]:
    """Estimated (bpp, PSNR in dB) of the hard-rounded model at each anchor over validation photographs.

    The rate is an estimate from the float densities, for watching training only.
    """
    curve = []
    for lmbda in model.anchors:
        plain = fold(model, lmbda)
        rows = [estimate(plain, image.to(device)) for image in images]
        bpp = sum(r[0] for r in rows) / len(rows)
        psnr = sum(r[1] for r in rows) / len(rows)
        curve.append((bpp, psnr))
    return curve


# ----------------------------------------------------------------------------------------------------- the run


def _check_finite(state: State, sums: Tensor, checkpoint: Path) -> None:
    """Stop before a checkpoint of weights that are lost replaces a good one."""
    if not bool(torch.isfinite(sums).all()):
        raise TrainingError(
            f"step {state.step}: the loss is not a number any more; resume {checkpoint} with a lower learning rate"
        )


def _summary(state: State, sums: Tensor, crops_per_second: float) -> dict[str, Any]:
    """The line of a stretch of training; `sums` (A, 3) holds images, bpp and MSE of each anchor."""
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
        seen = count > 0 and mse > 0
        line["bpp"].append(round(bpp / count, 4) if seen else None)
        line["psnr"].append(round(psnr_of_mse(mse / count), 3) if seen else None)
        line["loss"].append(round(rd_loss(bpp / count, mse / count, lmbda), 4) if seen else None)
    return line


def train(
    state: State,
    crops: Crops,
    device: torch.device,
    checkpoint: Path,
    validation: list[Tensor] | None = None,
    log_file: Path | None = None,
    save_every: float = 300.0,
    report: Callable[[dict[str, Any]], None] | None = None,
    tick: Callable[[State], bool] | None = None,
) -> State:
    """Run until the recipe's steps or minutes are done; checkpoint every `save_every` seconds and at the end.

    Parameters
    ----------
    validation : list of Tensor (3, H, W) uint8, optional
        Photographs on which the EMA model is judged after each checkpoint.
    log_file : Path, optional
        JSON lines are appended to it.
    report : callable, optional
        Told each JSON line.
    tick : callable, optional
        Called after each step; False ends the run there, after a last checkpoint.

    Raises
    ------
    TrainingError
        When the last checkpoint cannot be written (for an earlier one it is a warning), or the loss is no number.
    """
    saved = logged = time.monotonic()
    count, sums = 0, torch.zeros(len(ANCHORS), 3, device=device)  # per anchor: images, bpp, mse

    def emit(record: dict[str, Any]) -> None:
        if log_file is not None:
            try:
                with log_file.open("a") as stream:
                    stream.write(json.dumps(record) + "\n")
            except OSError as error:
                log.warning("%s: %s", log_file, error.strerror or error)
        if report is not None:
            report(record)

    def judge() -> None:
        if validation:
            emit({"step": state.step, "validation": validate(state.ema, validation, device)})

    going = True
    while going and progress(state) < 1.0:
        begun = time.monotonic()
        before = state.crops
        _, anchor, bpp, mse = step(state, crops, device)
        sums.index_add_(0, anchor, torch.stack([torch.ones_like(bpp), bpp, mse], 1))
        count += state.crops - before
        now = time.monotonic()
        state.seconds += now - begun
        going = tick is None or tick(state)
        if now - logged > _LOG_EVERY or progress(state) >= 1.0:
            _check_finite(state, sums, checkpoint)
            now = time.monotonic()
            emit(_summary(state, sums, count / max(now - logged, 1e-9)))
            logged, count = now, 0
            sums.zero_()
        if now - saved > save_every and progress(state) < 1.0 and going:
            _check_finite(state, sums, checkpoint)
            try:
                save_checkpoint(state, checkpoint)
            except TrainingError as error:
                log.warning("%s", error)
            judge()
            saved = logged = time.monotonic()
            count = 0
            sums.zero_()
    save_checkpoint(state, checkpoint)
    if going:
        judge()
    return state
