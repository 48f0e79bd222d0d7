"""One step of refinement: relaxed loss, gradient, Adam. Eager on CPUs, captured as a CUDA graph on GPUs."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..device import reduced_precision
from ..models.level import LevelModel
from ..rounding import Rounding
from ..settings import Settings
from .layers import replace_layers, subpixel
from .noise import noise_pool, noise_window
from .objective import Batch, EntropyParameters, relaxed_loss, relaxed_parameters

log = logging.getLogger(__name__)

_GRAPH_WARM_UP = 3  # eager iterations that CUDA wants before a capture


def prepared(level: LevelModel) -> LevelModel:
    """The level with copies of h_s and g_s that do the same in less time on its device, for refinement alone.

    Where convolutions run in bfloat16 they hold the bfloat16 weights that autocast would make anew in every step; the
    last layer of h_s stays float32: it gives σ and μ. Other CPUs get layers with written-down gradients.
    """
    networks = level.folded.networks
    h_s, g_s = copy.deepcopy(networks.h_s), subpixel(copy.deepcopy(networks.g_s))
    if reduced_precision(level.device):
        h_s[:-1].bfloat16()
        g_s.bfloat16()
    elif level.device.type == "cpu":
        replace_layers(h_s)
        replace_layers(g_s)
    return replace(level, folded=replace(level.folded, networks=replace(networks, h_s=h_s, g_s=g_s)))


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
    schedule = enumerate(zip(annealing.temperatures(steps), annealing.learning_rates(steps), strict=True))
    moving = annealing.steps_of_z(steps)
    generator = torch.Generator(device=level.device).manual_seed(settings.seed)
    offsets = torch.Generator().manual_seed(settings.seed)
    pools = [noise_pool(v.shape, rounding, generator=generator, device=level.device) for v in (y, z)]
    bf16 = reduced_precision(level.device)
    optimizer = torch.optim.Adam([y, z], fused=True)
    given: EntropyParameters

    def window(pool: Tensor | None, v: Tensor) -> Tensor | None:
        if pool is None:
            return None
        room = pool.shape[-1] - v.numel() + 1
        return noise_window(pool, v.shape, int(torch.randint(room, (1,), generator=offsets)))

    def step() -> None:
        nonlocal given
        done, (tau, rate) = next(schedule)
        noise = window(pools[0], y)
        if done < moving:
            given = relaxed_parameters(level, batch, z, tau, rounding, window(pools[1], z), bf16)
        elif done == moving:
            given = settle(level, batch, z, bf16)
        loss = relaxed_loss(level, batch, y, given, tau, rounding, noise, settings.lmbda, settings.metric, bf16)
        y.grad, z.grad = _gradients(loss, y, z if done < moving else None)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()

    return step


@torch.no_grad()
def settle(level: LevelModel, batch: Batch, z: Tensor, bf16: bool) -> EntropyParameters:
    """Round z hard, in place and for good: from here on y alone moves, and μ and σ are what they are."""
    median = level.folded.density.median
    z.sub_(median).round_().add_(median)
    return relaxed_parameters(level, batch, z, 1.0, Rounding("ste"), None, bf16)


def _gradients(loss: Tensor, y: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Of y and of z; without a gradient Adam leaves z alone. Fused Adam wants the memory layout of the latents."""
    found = torch.autograd.grad(loss.sum(), y if z is None else (y, z))
    return found[0].contiguous(), None if z is None else found[1].contiguous()


def _captured(
    level: LevelModel, batch: Batch, y: Tensor, z: Tensor, settings: Settings, steps: int
) -> Callable[[], None]:
    """The whole step as a CUDA graph: temperature and learning rate are read on the device by a step counter.

    There are two graphs: one while z moves, one after it has settled.
    """
    device = level.device
    rounding, annealing = settings.rounding(), settings.annealing(steps)
    moving = annealing.steps_of_z(steps)
    last = 2 * _GRAPH_WARM_UP * [0.0]  # warm-up iterations count on past the end; what they read does not matter
    temperatures = torch.tensor(annealing.temperatures(steps) + [1.0 for _ in last], device=device)
    rates = torch.tensor(annealing.learning_rates(steps) + last, device=device)
    count = torch.zeros(1, dtype=torch.int64, device=device)
    rate = torch.zeros((), device=device)
    tau = torch.ones((), device=device)
    optimizer = torch.optim.Adam([y, z], lr=rate, fused=True, capturable=True)
    start = y.detach().clone(), z.detach().clone()
    settled = settle(level, batch, z.detach().clone(), bf16=True)  # its tensors are what the second graph reads

    def body(alone: bool) -> None:
        tau.copy_(temperatures[count].squeeze(0))
        rate.copy_(rates[count].squeeze(0))
        with torch.autocast(device.type, enabled=False, cache_enabled=False):  # a graph cannot cache casts
            given = settled if alone else relaxed_parameters(level, batch, z, tau, rounding, None, bf16=True)
            loss = relaxed_loss(level, batch, y, given, tau, rounding, None, settings.lmbda, settings.metric, bf16=True)
        y.grad, z.grad = _gradients(loss, y, None if alone else z)
        optimizer.step()
        count.add_(1)

    torch.cuda.manual_seed(settings.seed)  # the noise of a graph comes from the device's own generator
    kinds = (False, True) if moving < steps else (False,)
    graphs = [_capture(functools.partial(body, alone), device) for alone in kinds]
    with torch.no_grad():  # undo the warm-up
        y.copy_(start[0])
        z.copy_(start[1])
        count.zero_()
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()
    done = itertools.count()

    def step() -> None:
        number = next(done)
        if number == moving:
            found = settle(level, batch, z, bf16=True)
            settled.parameters.copy_(found.parameters)
            settled.z_bits.copy_(found.z_bits)
        graphs[number >= moving].replay()

    return step


def _capture(body: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_GRAPH_WARM_UP):
            body()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph
