"""One step of refinement: relaxed loss, gradient, Adam. Eager on CPUs, captured as a CUDA graph on GPUs."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..model_file import LevelModel
from .layers import replace_layers, subpixel
from .objective import Batch, relaxed_loss
from .relaxations import noise_pool, noise_window
from .settings import Settings

log = logging.getLogger(__name__)

_GRAPH_WARM_UP = 3  # eager iterations that CUDA wants before a capture


def reduced_precision(device: torch.device) -> bool:
    """Whether bfloat16 convolutions are faster than float32 ones: on CUDA, and on CPUs with matrix tiles (AMX)."""
    if device.type == "cuda":
        return True
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported and supported())


def prepared(level: LevelModel) -> LevelModel:
    """The level with copies of h_s and g_s that do the same in less time on its device, for refinement alone.

    Where convolutions run in bfloat16 they hold the bfloat16 weights that autocast would make anew in every step; the
    last layer of h_s stays float32: it gives σ and μ. Other CPUs get layers with written-down gradients.
    """
    networks = level.plain.networks
    h_s, g_s = copy.deepcopy(networks.h_s), subpixel(copy.deepcopy(networks.g_s))
    if reduced_precision(level.device):
        h_s[:-1].bfloat16()
        g_s.bfloat16()
    elif level.device.type == "cpu":
        replace_layers(h_s)
        replace_layers(g_s)
    return replace(level, plain=replace(level.plain, networks=replace(networks, h_s=h_s, g_s=g_s)))


def stepper(
    level: LevelModel, batch: Batch, y: Tensor, z: Tensor, settings: Settings, steps: int
) -> Callable[[], None]:
    """A function that does the next of `steps` steps of a `prepared` level, changing y and z (B, h, w, C) in place."""
    y.requires_grad_(True)
    z.requires_grad_(True)
    if steps and level.device.type == "cuda":
        try:
            with torch.cuda.device(level.device):  # whose generator is seeded and whose stream is captured
                return _captured(level, batch, y, z, settings, steps)
        except RuntimeError as error:
            log.warning("no CUDA graph (%s); refining eagerly", str(error).splitlines()[0])
    return _eager(level, batch, y, z, settings, steps)


def _eager(level: LevelModel, batch: Batch, y: Tensor, z: Tensor, settings: Settings, steps: int) -> Callable[[], None]:
    rounding, annealing = settings.rounding(), settings.annealing(max(1, steps))
    schedule = iter(zip(annealing.temperatures(steps), annealing.learning_rates(steps), strict=True))
    generator = torch.Generator(device=level.device).manual_seed(settings.seed)
    offsets = torch.Generator().manual_seed(settings.seed)
    pools = [noise_pool(v.shape, rounding, generator=generator, device=level.device) for v in (y, z)]
    bf16 = reduced_precision(level.device)
    optimizer = torch.optim.Adam([y, z], fused=True)

    def window(pool: Tensor | None, v: Tensor) -> Tensor | None:
        if pool is None:
            return None
        room = pool.shape[-1] - v.numel() + 1
        return noise_window(pool, v.shape, int(torch.randint(room, (1,), generator=offsets)))

    def step() -> None:
        tau, rate = next(schedule)
        noise = window(pools[0], y), window(pools[1], z)
        loss = relaxed_loss(level, batch, y, z, tau, rounding, noise, settings.lmbda, settings.metric, bf16)
        y.grad, z.grad = torch.autograd.grad(loss.sum(), (y, z))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()

    return step


def _captured(
    level: LevelModel, batch: Batch, y: Tensor, z: Tensor, settings: Settings, steps: int
) -> Callable[[], None]:
    """The whole step as one CUDA graph: temperature and learning rate are read on the device by a step counter."""
    device = level.device
    rounding, annealing = settings.rounding(), settings.annealing(steps)
    last = _GRAPH_WARM_UP * [0.0]  # warm-up iterations count on past the end; what they read does not matter
    temperatures = torch.tensor(annealing.temperatures(steps) + [1.0 for _ in last], device=device)
    rates = torch.tensor(annealing.learning_rates(steps) + last, device=device)
    count = torch.zeros(1, dtype=torch.int64, device=device)
    rate = torch.zeros((), device=device)
    tau = torch.ones((), device=device)
    optimizer = torch.optim.Adam([y, z], lr=rate, fused=True, capturable=True)
    y.grad, z.grad = torch.zeros_like(y), torch.zeros_like(z)
    start = y.detach().clone(), z.detach().clone()

    def body() -> None:
        tau.copy_(temperatures[count].squeeze(0))
        rate.copy_(rates[count].squeeze(0))
        with torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False, enabled=False):
            loss = relaxed_loss(level, batch, y, z, tau, rounding, (None, None), settings.lmbda, settings.metric, True)
        gradients = torch.autograd.grad(loss.sum(), (y, z))
        for v, gradient in zip((y, z), gradients, strict=True):
            assert v.grad is not None
            v.grad.copy_(gradient)
        optimizer.step()
        count.add_(1)

    torch.cuda.manual_seed(settings.seed)  # the noise of a graph comes from the device's own generator
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(_GRAPH_WARM_UP):
            body()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    with torch.no_grad():  # undo the warm-up
        y.copy_(start[0])
        z.copy_(start[1])
        count.zero_()
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()
    return graph.replay
