"""The relaxed passes of refinement against autograd through the context model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sgacodec.checkerboard import pick
from sgacodec.density import SCALE_BOUND, gaussian_bits
from sgacodec.models.level import LevelModel, Model
from sgacodec.networks.context import ContextPass, code_passes, last_layer, parts_of, whole_grid
from sgacodec.refine import fused
from sgacodec.refine.context import coded_passes, group_inputs, relaxed_passes
from sgacodec.refine.frozen_context import FrozenContext
from sgacodec.refine.fused import Relaxation, coded_latents
from sgacodec.refine.noise import sample_noise
from sgacodec.refine.objective import frozen_context
from sgacodec.rounding import Rounding, rounding

KINDS = ("exp", "linear", "groups")  # the models of the fixture `contexts`
TAU = 0.6
Results = tuple[Tensor, ...]  # ŷ and its bits; then gradients by y and by the features of h_s


@dataclass(frozen=True)
class Case:
    """Latents, features of h_s, noise and weights of the results that are differentiated."""

    level: LevelModel
    how: Rounding
    y: Tensor
    features: Tensor
    noise: Tensor | None
    active: Tensor | None
    towards: Tensor
    weight: Tensor
    curvature: Tensor | None = None

    @property
    def log_scale(self) -> bool:
        return self.level.folded.architecture.scale == "exp"

    def results(self, y_hat: Tensor, bits: Tensor, *by: Tensor) -> Results:
        loss = (y_hat * self.towards).sum() + (bits * self.weight).sum()
        return y_hat.detach(), bits.detach(), *torch.autograd.grad(loss, by)


def case_of(level: LevelModel, how: Rounding, active: bool = False, B: int = 2) -> Case:
    generator = torch.Generator().manual_seed(3)
    h, w = 8, 12
    folded = level.folded
    z_hat = 2 * torch.randn(B, folded.architecture.N, h // 4, w // 4, generator=generator)
    with torch.no_grad():
        features = folded.networks.h_s[:-1](z_hat).permute(0, 2, 3, 1)
    y = 3 * folded.y_unit * torch.randn(B, h, w, folded.architecture.M, generator=generator)
    return Case(
        level=level,
        how=how,
        y=y,
        features=features,
        noise=sample_noise(y.shape, how, generator=generator),
        active=torch.rand(1, h, w, 1, generator=generator) < 0.7 if active else None,
        towards=torch.randn(y.shape, generator=generator),
        weight=torch.tensor([0.3, 0.05])[:B],
    )


def of_autograd(case: Case) -> Results:
    """Results of the context model itself, pass by pass."""
    folded = case.level.folded
    assert folded.context is not None
    y, features = case.y.clone().requires_grad_(), case.features.clone().requires_grad_()
    sources, parts, bits = parts_of(y, folded.context.context), list[Tensor](), list[Tensor]()

    def own(v: Tensor | None, current: ContextPass) -> Tensor | None:
        if v is None:
            return None
        v = v if v.shape[-1] == 1 else v[..., current.channels]
        grids = pick(v.reshape(-1, *v.shape[-3:]), current.half)
        return grids.reshape(*v.shape[:-3], *grids.shape[1:])

    def code(current: ContextPass) -> Tensor:
        noise, active = own(case.noise, current), own(case.active, current)
        curvature = None if case.curvature is None else case.curvature[current.channels]
        how = Relaxation(TAU, case.how, noise, active, curvature)
        found = coded_latents(sources[len(parts)], current.parameters, how, case.log_scale)
        parts.append(found[0])
        bits.append(found[1])
        return found[0]

    anchor, base = torch.zeros(1, dtype=torch.int64), last_layer(folded.networks.h_s, features)
    code_passes(folded.context, folded.context.mix_features(features), base, folded.y_unit, anchor, code)
    return case.results(whole_grid(parts, folded.context.context), torch.stack(bits).sum(0), y, features)


def in_rows(context: FrozenContext, noise: Tensor | None) -> Tensor | None:
    """Noise (…, B, h, w, M) with its positions in the order of rows."""
    if noise is None:
        return None
    B, h, w, M = noise.shape[-4:]
    flat = noise.reshape(*noise.shape[:-4], B * h * w, M)
    return flat.index_select(-2, context.tables(B, h, w).order).view(noise.shape)


def in_closed_form(case: Case, bf16: bool = False) -> Results:
    context = frozen_context(case.level, bf16)
    assert context is not None
    y, features = case.y.clone().requires_grad_(), case.features.clone().requires_grad_()
    parameters, mixed = context.parameters(features.bfloat16() if bf16 else features)
    noise = in_rows(context, case.noise)
    how = Relaxation(TAU, case.how, noise, case.active, case.curvature)
    found = relaxed_passes(y, parameters, mixed, context, None, how, case.log_scale)
    return case.results(*found, y, features)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("how", [rounding("ssl"), rounding("ssl", 3), rounding("danneal"), rounding("noise")])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_autograd(
    contexts: dict[str, Model], kind: str, how: Rounding, active: bool
) -> None:
    """Guards against a gradient that leaves out, or counts twice, a way from a latent to the bits of later ones."""
    case = case_of(contexts[kind].at(1), how, active)
    for ours, expected in zip(in_closed_form(case), of_autograd(case), strict=True):
        assert distance(ours, expected) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_expected_bits_and_gradients_are_those_of_autograd(contexts: dict[str, Model], kind: str) -> None:
    """Guards against the curvature of another channel, or against expected bits without their gradient by σ."""
    case = case_of(contexts[kind].at(1), rounding("ssl"))
    case = replace(case, curvature=torch.linspace(0, 9, case.y.shape[-1]))
    for ours, expected in zip(in_closed_form(case), of_autograd(case), strict=True):
        assert distance(ours, expected) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_constant_parameters_give_the_same_gradient_of_y(contexts: dict[str, Model], kind: str) -> None:
    """Guards against another gradient after z has been rounded, when what depends on it is prepared once."""
    case = case_of(contexts[kind].at(1), rounding("ssl"))
    context = frozen_context(case.level, False)
    assert context is not None
    y = case.y.clone().requires_grad_()
    with torch.no_grad():
        parameters, mixed = context.parameters(case.features)
        inputs = group_inputs(context, parameters, mixed)
    noise = in_rows(context, case.noise)
    how = Relaxation(TAU, case.how, noise)
    found = relaxed_passes(y, parameters, mixed, context, inputs, how, case.log_scale)
    for ours, expected in zip(case.results(*found, y), in_closed_form(case)[:3], strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_symbols_change_the_bits_of_later_ones(contexts: dict[str, Model], kind: str) -> None:
    """Guards against a wrong σ, μ or gradient in coordinate descent, where μ is constant for the gradient."""
    case = case_of(contexts[kind].at(1), rounding("ste"))
    folded, context = case.level.folded, frozen_context(case.level, False)
    assert folded.context is not None
    assert context is not None
    symbols = torch.round(case.y).requires_grad_()
    sources, parts, scales = parts_of(symbols, folded.context.context), list[Tensor](), list[Tensor]()
    bits: list[Tensor] = []

    def code(current: ContextPass) -> Tensor:
        scale, mu = current.parameters.chunk(2, -1)
        own = sources[len(parts)]
        sigma = (scale.exp() if case.log_scale else scale).clamp(min=SCALE_BOUND)
        bits.append(gaussian_bits(own.detach(), sigma).flatten(1).sum(1))
        parts.append(own + mu.detach())
        scales.append(scale)
        return parts[-1]

    with torch.no_grad():
        base, mixed = last_layer(folded.networks.h_s, case.features), folded.context.mix_features(case.features)
        given = context.parameters(case.features)
        inputs = group_inputs(context, *given)
    code_passes(folded.context, mixed, base, folded.y_unit, torch.zeros(1, dtype=torch.int64), code)
    y_hat, scale = (whole_grid(v, folded.context.context) for v in (parts, scales))
    ours = coded_passes(symbols, *given, context, inputs, case.log_scale)
    expected = case.results(y_hat, torch.stack(bits).sum(0), symbols)
    for a, b in zip((*case.results(*ours[:2], symbols), ours[2]), (*expected, scale.detach()), strict=True):
        assert distance(a, b) < 1e-3


def test_bfloat16_is_close(contexts: dict[str, Model]) -> None:
    """Guards against a mistake in what only bfloat16 does."""
    case = case_of(contexts["linear"].at(1), rounding("ste"))
    for ours, expected, tolerance in zip(
        in_closed_form(case, bf16=True), in_closed_form(case), (0.01, 0.01, 0.1, 0.2), strict=True
    ):
        assert distance(ours, expected) < tolerance


def test_blocks_of_rows(contexts: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against blocks of rows, which large pictures have, that are written to the wrong place."""
    case = case_of(contexts["linear"].at(1), rounding("danneal"), active=True)
    whole = in_closed_form(case)
    monkeypatch.setattr(fused, "block_size", lambda: 100)
    for ours, expected in zip(in_closed_form(case), whole, strict=True):
        assert distance(ours, expected) < 1e-5


def test_residuals_that_are_clamped_have_no_gradient(contexts: dict[str, Model]) -> None:
    """Guards against a gradient through a residual at its limit, where the layers see a constant."""
    case = case_of(contexts["exp"].at(1), rounding("ste"))
    far = F.one_hot(torch.arange(case.y.shape[-1]) % 3, 3)[:, 0] * 40.0
    case = Case(**{**case.__dict__, "y": case.y + far * case.level.folded.y_unit})
    for ours, expected in zip(in_closed_form(case), of_autograd(case), strict=True):
        assert distance(ours, expected) < 1e-3
