"""One step of refinement: relaxed loss, gradient, Adam. Eager on CPUs, captured as a CUDA graph on GPUs.

While z is refined, every step computes the entropy parameters of y anew. After `Annealing.steps_of_z` steps, z is
rounded, what is computed from ẑ is constant, and only y is refined.
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from ..annealing import Annealing
from ..device import reduced_precision
from ..models.level import LevelModel
from ..rounding import Rounding
from ..settings import Settings
from .context import group_inputs
from .frozen_context import FrozenContext
from .layers import replace_layers, subpixel
from .noise import NoiseSequence
from .objective import (
    Batch,
    EntropyParameters,
    channel_curvature,
    frozen_context,
    relaxed_loss,
    relaxed_parameters,
)

log = logging.getLogger(__name__)

_GRAPH_WARM_UP = 3  # eager iterations on a side stream before a capture, as the CUDA documentation asks for


def prepare(level: LevelModel, bf16: bool | None = None) -> LevelModel:
    """A copy of the level whose h_s and g_s give the same results in less time on its device, for refinement only.

    Where convolutions run in bfloat16, the weights are converted once, which autocast would do in every step; the last
    layer of h_s, which gives σ and μ, stays float32. In float32 on a CPU, layers with a closed-form backward are used.

    Parameters
    ----------
    bf16 : bool, optional
        None: where it is faster.
    """
    networks = level.folded.networks
    h_s, g_s = copy.deepcopy(networks.h_s), subpixel(copy.deepcopy(networks.g_s))
    context = copy.deepcopy(level.folded.context)
    if reduced_precision(level.device) if bf16 is None else bf16:
        _reduce_precision(h_s[:-1])
        _reduce_precision(g_s)
    elif level.device.type == "cpu":
        replace_layers(h_s)
        replace_layers(g_s)
        if context is not None:
            replace_layers(context)
    folded = replace(level.folded, networks=replace(networks, h_s=h_s, g_s=g_s), context=context)
    return replace(level, folded=folded)


def _reduce_precision(network: nn.Module) -> None:
    """Hold in bfloat16, in place, the weights that autocast would convert: not those of depthwise convolutions."""
    for module in network.modules():
        depthwise = isinstance(module, nn.Conv2d) and module.groups > 1
        if not depthwise and not list(module.children()):
            module.bfloat16()


def stepper(
    level: LevelModel,
    batch: Batch,
    y: Tensor,
    z: Tensor,
    settings: Settings,
    steps: int,
    lmbda: Tensor | None = None,
    first: int = 0,
) -> Callable[[], Tensor]:
    """A function that does the next step, `first` … `steps` − 1, and returns the relaxed loss before it, (B,).

    Parameters
    ----------
    level : LevelModel
        From `prepare`.
    y, z : Tensor (B, H/16, W/16, M), (B, H/64, W/64, N) float32
        Latents, channels last; changed in place.
    lmbda : Tensor () float32, optional
        λ on the model's device, which may change between steps; None: that of the settings.
    """
    weight = settings.lmbda if lmbda is None else lmbda
    y.requires_grad_(True)
    z.requires_grad_(True)
    if steps and level.device.type == "cuda" and settings.metric == "mse":  # pytorch_msssim copies from the host
        start, step = (y.detach().clone(), z.detach().clone()), None
        try:
            with torch.cuda.device(level.device), torch.cuda.stream(torch.cuda.current_stream(level.device)):
                step = _captured(level, batch, y, z, settings, steps, weight, first)
        except RuntimeError as error:
            log.warning("no CUDA graph (%s); refining eagerly", str(error).splitlines()[0])
            y.grad = z.grad = None
        with torch.no_grad():  # undo the warm-up
            y.copy_(start[0])
            z.copy_(start[1])
        if step is not None:
            return step
    return _eager(level, batch, y, z, settings, steps, weight, first)


def _eager(
    level: LevelModel,
    batch: Batch,
    y: Tensor,
    z: Tensor,
    settings: Settings,
    steps: int,
    lmbda: float | Tensor,
    first: int,
) -> Callable[[], Tensor]:
    rounding, annealing = settings.rounding(), settings.annealing(max(1, steps))
    of_steps = (annealing.temperatures(steps), annealing.learning_rates(steps), annealing.variances(steps))
    schedule = itertools.islice(enumerate(zip(*of_steps, strict=True)), first, None)
    steps_of_z = annealing.steps_of_z(steps)
    generator = torch.Generator(device=level.device).manual_seed(settings.seed)
    noise_y, noise_z = _noise_sequences(y, z, rounding, annealing)
    bf16 = reduced_precision(level.device)
    context = frozen_context(level, bf16)
    descend = _adam((y, z))
    curvature = None if annealing.variance is None else channel_curvature(level, batch, y, bf16)
    given: EntropyParameters

    def step() -> Tensor:
        nonlocal given
        done, (tau, rate, part) = next(schedule)
        noise_y.prepare(generator)
        noise_z.prepare(generator)
        if done < steps_of_z:
            given = relaxed_parameters(level, batch, z, tau, rounding, noise_z.next(), bf16, context)
        elif done == steps_of_z:
            given = freeze_z(level, batch, z, bf16, context)
            if given.context is not None and given.mixed is not None:
                given = replace(given, inputs=group_inputs(given.context, given.parameters, given.mixed))
        counted = None if curvature is None else curvature * part
        loss = relaxed_loss(
            level, batch, y, given, tau, rounding, noise_y.next(), lmbda, settings.metric, bf16, counted
        )
        descend(_gradients(loss, y, z if done < steps_of_z else None), rate)
        return loss.detach()

    return step


def _noise_sequences(
    y: Tensor, z: Tensor, rounding: Rounding, annealing: Annealing
) -> tuple[NoiseSequence, NoiseSequence]:
    period = annealing.noise_period
    of_y, of_z = (NoiseSequence(v.shape, rounding, period, v.device, annealing.noise) for v in (y, z))
    return of_y, of_z


def _adam(latents: tuple[Tensor, Tensor]) -> Callable[[tuple[Tensor, Tensor | None], float], None]:
    """A step of Adam by gradients and a learning rate. The class `torch.optim.Adam` would import torch._dynamo."""
    states = [(v, torch.zeros_like(v), torch.zeros_like(v), torch.zeros((), device=v.device)) for v in latents]

    @torch.no_grad()
    def descend(gradients: tuple[Tensor, Tensor | None], rate: float) -> None:
        known = [(g, *state) for g, state in zip(gradients, states, strict=True) if g is not None]
        gradient, v, mean, square, steps = (list(column) for column in zip(*known, strict=True))
        adam(
            v, gradient, mean, square, [], steps, fused=True,
            amsgrad=False, beta1=0.9, beta2=0.999, lr=rate, weight_decay=0.0, eps=1e-8, maximize=False,
        )  # fmt: skip

    return descend


@torch.no_grad()
def freeze_z(
    level: LevelModel, batch: Batch, z: Tensor, bf16: bool, context: FrozenContext | None
) -> EntropyParameters:
    """Round z in place, and return what is computed from ẑ, which is constant from here on."""
    median = level.folded.density.median
    z.sub_(median).round_().add_(median)
    return relaxed_parameters(level, batch, z, 1.0, Rounding("ste"), None, bf16, context)


def _gradients(loss: Tensor, y: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients of y and z in the memory layout of the latents, as fused Adam requires; Adam skips a z without one."""
    gradients = torch.autograd.grad(loss.sum(), y if z is None else (y, z))
    return gradients[0].contiguous(), None if z is None else gradients[1].contiguous()


def _captured(
    level: LevelModel,
    batch: Batch,
    y: Tensor,
    z: Tensor,
    settings: Settings,
    steps: int,
    lmbda: float | Tensor,
    first: int = 0,
) -> Callable[[], Tensor]:
    """The whole step as a CUDA graph, which reads temperature and learning rate from tables by a counter on the device.

    The warm-up before a capture changes y and z; the caller restores them.
    There are two graphs: one for the steps that refine y and z, one for those that refine y only.
    """
    device = level.device
    rounding, annealing = settings.rounding(), settings.annealing(steps)
    steps_of_z = annealing.steps_of_z(steps)
    padding = 2 * _GRAPH_WARM_UP  # entries for warm-up iterations, whose results are discarded
    temperatures = torch.tensor(annealing.temperatures(steps) + padding * [1.0], device=device)
    rates = torch.tensor(annealing.learning_rates(steps) + padding * [0.0], device=device)
    parts = torch.tensor(annealing.variances(steps) + padding * [0.0], device=device)
    curvature = None if annealing.variance is None else channel_curvature(level, batch, y, True)
    count = torch.zeros(1, dtype=torch.int64, device=device)
    rate = torch.zeros((), device=device)
    tau = torch.ones((), device=device)
    relaxed = torch.zeros_like(batch.scale)
    generator = torch.Generator(device).manual_seed(settings.seed)
    noise_y, noise_z = _noise_sequences(y, z, rounding, annealing)
    optimizer = torch.optim.Adam([y, z], lr=rate, fused=True, capturable=True)
    context = frozen_context(level, bf16=True)
    frozen = freeze_z(level, batch, z.detach().clone(), True, context)  # its tensors are read by the second graph

    def body(y_only: bool) -> None:
        tau.copy_(temperatures[count].squeeze(0))
        rate.copy_(rates[count].squeeze(0))
        with torch.autocast(device.type, enabled=False, cache_enabled=False):  # a graph cannot cache casts
            if y_only:
                given = frozen
            else:
                given = relaxed_parameters(level, batch, z, tau, rounding, noise_z.next(), True, context)
            counted = None if curvature is None else curvature * parts[count]
            loss = relaxed_loss(
                level, batch, y, given, tau, rounding, noise_y.next(), lmbda, settings.metric, True, counted
            )
        y.grad, z.grad = _gradients(loss, y, None if y_only else z)
        optimizer.step()
        relaxed.copy_(loss.detach())
        count.add_(1)

    kinds = (False, True) if steps_of_z < steps else (False,)
    graphs = [_Graph(functools.partial(body, y_only), device) for y_only in kinds]
    with torch.no_grad():  # undo the warm-up, but for y and z
        count.fill_(first)
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()
    done = itertools.count(first)

    def step() -> Tensor:
        number = next(done)
        noise_y.prepare(generator)
        noise_z.prepare(generator)
        if number == steps_of_z:
            found = freeze_z(level, batch, z, True, context)
            frozen.parameters.copy_(found.parameters)
            frozen.z_bits.copy_(found.z_bits)
            if frozen.mixed is not None and found.mixed is not None:
                frozen.mixed.copy_(found.mixed)
        graphs[number >= steps_of_z].replay()
        return relaxed

    return step


class _Graph:
    """A function captured as a CUDA graph. It is kept: the graph has only the addresses of what it reads and writes."""

    def __init__(self, body: Callable[[], None], device: torch.device) -> None:
        self.body = body
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_GRAPH_WARM_UP):
                body()
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):  # torch's default stream for captures is of one device
            body()

    def replay(self) -> None:
        self.graph.replay()
