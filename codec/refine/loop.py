"""The refinement loop: from the encoder's latents to better ones for the same decoder.

    unrefined y, z ─► [ relax ─► loss ─► gradient ─► Adam ] × steps ─► the best true loss seen
                          temperature and learning rate fall

It starts at the unrefined latents and keeps what has the lowest true loss, so it never returns anything worse.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model_file import LevelModel
from .objective import Batch, Candidate, Problem, relaxed_loss
from .relaxations import noise_pool, noise_window
from .settings import Settings

_CHECKS = (0.6, 0.75, 0.85, 0.93, 1.0)  # when the true loss is looked at, as parts of the run
_WARM_UP = 3  # steps that are timed before a run with a time limit


@dataclass(frozen=True)
class Progress:
    """State of a refinement: bpp and PSNR (dB) of the best candidates so far, means over the images."""

    step: int
    steps: int
    bpp: float
    psnr: float


def reduced_precision(device: torch.device) -> bool:
    """Whether bfloat16 convolutions are faster than float32 ones: on CUDA, and on CPUs with matrix tiles (AMX)."""
    if device.type == "cuda":
        return True
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported and supported())


def refine(
    level: LevelModel,
    problems: list[Problem],
    unrefined: list[Candidate],
    settings: Settings,
    progress: Callable[[Progress], None] | None = None,
) -> tuple[list[Candidate], int]:
    """Refine the latents of images of one padded shape together.

    Returns
    -------
    list of Candidate, int
        The best candidate of each image, never worse than its unrefined one, and the number of steps done.
    """
    best = list(unrefined)
    batch = Batch(
        x=torch.cat([p.x for p in problems]).to(level.device, memory_format=torch.channels_last),
        weight=torch.cat([p.weight for p in problems]).to(level.device),
        scale=torch.tensor([1 / p.pixels for p in problems], device=level.device),
    )
    y = torch.cat([c.y for c in unrefined]).permute(0, 2, 3, 1).contiguous()
    z = torch.cat([c.z for c in unrefined]).permute(0, 2, 3, 1).contiguous()

    def check(step: int, steps: int, y: Tensor, z: Tensor) -> None:
        for i, problem in enumerate(problems):
            candidate = problem.evaluate(
                y[i : i + 1].permute(0, 3, 1, 2).clone(), z[i : i + 1].permute(0, 3, 1, 2).clone()
            )
            if candidate.loss < best[i].loss:
                best[i] = candidate
        report(step, steps)

    def report(step: int, steps: int) -> None:
        if progress is not None:
            count = len(problems)
            bpp = sum(c.bits / p.pixels for c, p in zip(best, problems, strict=True)) / count
            mse = sum(c.mse for c in best) / count
            psnr = -10 * torch.log10(torch.tensor(max(mse, 1e-12))).item()
            progress(Progress(step, steps, bpp, psnr))

    steps = settings.steps
    if settings.time_limit is not None:
        steps = min(steps, _steps_in(settings.time_limit, level, batch, y, z, settings))
    report(0, steps)
    if steps:
        anneal(level, batch, y, z, settings, steps, check, report)
    return best, steps


def _steps_in(
    seconds: float, level: LevelModel, batch: Batch, y: Tensor, z: Tensor, settings: Settings
) -> int:
    """How many steps fit into the time, by timing a few (their result is thrown away)."""
    begun = time.perf_counter()
    stamps: list[float] = []
    anneal(
        level,
        batch,
        y.clone(),
        z.clone(),
        settings,
        _WARM_UP,
        lambda *_: None,
        lambda *_: stamps.append(time.perf_counter()),
    )
    each = min(b - a for a, b in itertools.pairwise(stamps))
    left = seconds - (time.perf_counter() - begun)
    return max(0, int(0.85 * left / each))  # the checks of the true loss take the rest


def anneal(
    level: LevelModel,
    batch: Batch,
    y: Tensor,
    z: Tensor,
    settings: Settings,
    steps: int,
    check: Callable[[int, int, Tensor, Tensor], None],
    report: Callable[[int, int], None],
) -> None:
    """Run one whole annealing of y and z (channels last), changed in place.

    `check(step, steps, y, z)` is called at a few steps towards the end and at the end, `report` at the others.
    """
    rounding, annealing = settings.rounding(), settings.annealing(steps)
    temperatures, rates = annealing.temperatures(steps), annealing.learning_rates(steps)
    checks = {max(1, round(part * steps)) for part in _CHECKS}
    generator = torch.Generator(device=level.device).manual_seed(settings.seed)
    offsets = torch.Generator().manual_seed(settings.seed)
    pools = [noise_pool(v.shape, rounding, generator=generator, device=level.device) for v in (y, z)]
    bf16 = reduced_precision(level.device)
    y.requires_grad_(True)
    z.requires_grad_(True)
    optimizer = torch.optim.Adam([y, z], lr=rates[0], fused=True)

    for step in range(steps):
        noise: list[Tensor | None] = []
        for pool, v in zip(pools, (y, z), strict=True):
            if pool is None:
                noise.append(None)
                continue
            room = pool.shape[-1] - v.numel() + 1
            offset = int(torch.randint(room, (1,), generator=offsets))
            noise.append(noise_window(pool, v.shape, offset))
        loss = relaxed_loss(
            level,
            batch,
            y,
            z,
            temperatures[step],
            rounding,
            (noise[0], noise[1]),
            settings.lmbda,
            settings.metric,
            bf16,
        )
        y.grad, z.grad = torch.autograd.grad(loss.sum(), (y, z))
        optimizer.param_groups[0]["lr"] = rates[step]
        optimizer.step()
        done = step + 1
        if done in checks:
            check(done, steps, y.detach(), z.detach())
        else:
            report(done, steps)
