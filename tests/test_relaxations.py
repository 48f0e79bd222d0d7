"""Relaxed rounding against the papers' formulas, written out here in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sgacodec.refine.noise import sample_noise
from sgacodec.refine.probabilities import log_weights, probabilities
from sgacodec.refine.relaxations import block_size, relax
from sgacodec.rounding import THREE_CLASS_METHODS, Rounding, rounding

TWO = [rounding(m) for m in ("danneal", "atanh", "linear", "cosine", "ssl")] + [rounding("ssl", a=0.7)]
THREE = [rounding(m, 3) for m in THREE_CLASS_METHODS]
WEIGHTED = TWO + THREE
ALL = [rounding("ste"), rounding("noise"), *WEIGHTED]


def name(case: Any) -> str | None:
    return f"{case.method}{case.classes}-a{case.a:g}" if isinstance(case, Rounding) else None


def f(distance: Tensor, how: Rounding) -> Tensor:
    """Log-weight of a class, straight from the tables of the papers."""

    def sigma_logit(p: Tensor) -> Tensor:
        return 1 / (1 + (p / (1 - p)) ** how.a)  # σ(−a·logit(p))

    if how.classes == 3:
        scaled = how.r * distance
        if how.method == "linear":
            return how.n * torch.log((1 - scaled).clamp(1e-6))
        if how.method == "cosine":
            return how.n * torch.log(torch.cos(math.pi / 2 * scaled.clamp(max=1 - 1e-6)))
        return how.n * torch.log(sigma_logit(scaled / 1.5))
    if how.method == "linear":
        return torch.log(1 - distance)
    if how.method == "cosine":
        return torch.log(torch.cos(math.pi * distance / 2) ** 2)
    if how.method == "ssl":
        return torch.log(sigma_logit(distance))
    return -torch.atanh(distance)


def plain(v: Tensor, tau: float, how: Rounding, gumbel: Tensor) -> Tensor:
    """Σ class·softmax((f/τ + G)/τ) with explicit classes and Gumbel noise (classes, *v.shape)."""
    with torch.no_grad():
        classes = torch.stack(
            [v.round() - 1, v.round(), v.round() + 1] if how.classes == 3 else [v.floor(), v.floor() + 1]
        )
    p = torch.softmax((f((v - classes).abs(), how) / tau + gumbel) / tau, dim=0)
    return (p * classes).sum(0)


def gumbel_noise(how: Rounding, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """Gumbel noise of every class, and the same noise in the form that `relax` takes."""
    if how.method == "danneal":
        return torch.zeros(2, *shape, dtype=torch.float64), None
    g = -torch.log(-torch.log(torch.rand(how.classes, *shape, dtype=torch.float64)))
    return g, g[1] - g[0] if how.classes == 2 else torch.stack((g[0] - g[1], g[2] - g[1]))


def grid(dtype: torch.dtype = torch.float64) -> Tensor:
    """Latents at least 0.003 away from integers and half-integers."""
    fractions = torch.cat((torch.linspace(0.003, 0.497, 40), torch.linspace(0.503, 0.997, 40)))
    return (fractions.to(dtype) + torch.tensor([-7.0, -1, 0, 12], dtype=dtype)[:, None]).reshape(-1)


@pytest.mark.parametrize("tau", [1.0, 0.5, 0.15])
@pytest.mark.parametrize("how", WEIGHTED, ids=name)
def test_value_and_gradient_are_those_of_the_formula(how: Rounding, tau: float) -> None:
    """Guards against a relaxation that is not the one of SGA or SGA+ with this name."""
    torch.manual_seed(1)
    v = grid().requires_grad_()
    gumbel, noise = gumbel_noise(how, tuple(v.shape))
    expected = plain(v, tau, how, gumbel)
    actual = relax(v, tau, how, noise=noise)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    (expected_grad,) = torch.autograd.grad(expected.sum(), v)
    (actual_grad,) = torch.autograd.grad(actual.sum(), v)
    torch.testing.assert_close(actual_grad, expected_grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("tensor_tau", [False, True])
@pytest.mark.parametrize("how", WEIGHTED, ids=name)
def test_gradient_matches_finite_differences(how: Rounding, tensor_tau: bool) -> None:
    """Guards against a wrong derivative, with which refinement stalls or diverges."""
    torch.manual_seed(2)
    v = grid()[::16].requires_grad_()
    _, noise = gumbel_noise(how, tuple(v.shape))
    tau = torch.tensor(0.6, dtype=torch.float64) if tensor_tau else 0.6
    assert torch.autograd.gradcheck(lambda x: relax(x, tau, how, noise=noise), v)


@pytest.mark.parametrize("how", [rounding("ste"), rounding("noise")], ids=name)
def test_baselines(how: Rounding) -> None:
    """Guards against baselines that are not straight-through rounding and uniform noise."""
    v = (torch.randn(1000) * 4).requires_grad_()
    v_hat = relax(v, 1.0, how, generator=torch.Generator().manual_seed(0))
    if how.method == "ste":
        torch.testing.assert_close(v_hat, v.round())
    else:
        assert 0.45 < (v_hat - v).abs().max() <= 0.5 + 1e-5
        assert abs((v_hat - v).mean()) < 0.05
    (grad,) = torch.autograd.grad((v_hat * 3).sum(), v)
    assert (grad == 3).all()


@pytest.mark.parametrize("how", WEIGHTED, ids=name)
def test_curves_match_the_formulas(how: Rounding) -> None:
    """Guards against curves of figure 1 that differ from the formulas."""
    v = grid()
    classes, p = probabilities(v, how)
    logits = f((v - classes).abs(), how)
    torch.testing.assert_close(p, torch.softmax(logits, 0), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(log_weights((v - classes).abs(), how), logits, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(p.sum(0), torch.ones_like(v))


def test_curves_at_a_quarter() -> None:
    """Guards against wrong slopes in figure 1: these numbers are computed by hand."""
    at = torch.tensor([0.25], dtype=torch.float64)
    upper = {m: probabilities(at, rounding(m))[1][1].item() for m in ("linear", "cosine", "ssl", "atanh")}
    assert upper["linear"] == pytest.approx(0.25)
    assert upper["cosine"] == pytest.approx(math.sin(math.pi / 8) ** 2)
    assert upper["ssl"] == pytest.approx(1 / (1 + 3**2.3))
    weights = math.sqrt(0.75 / 1.25), math.sqrt(0.25 / 1.75)  # e^(−atanh u) = √((1−u)/(1+u))
    assert upper["atanh"] == pytest.approx(weights[1] / sum(weights))
    half = torch.full((1,), 0.5)
    assert all(probabilities(half, how)[1][1].item() == pytest.approx(0.5) for how in TWO)


@pytest.mark.parametrize("how", TWO, ids=name)
def test_two_class_curves_rise_and_are_symmetric(how: Rounding) -> None:
    """Guards against a drift of latents in one direction."""
    u = torch.linspace(0.001, 0.999, 501, dtype=torch.float64)
    upper = probabilities(u, how)[1][1]
    assert (upper.diff() > 0).all()
    torch.testing.assert_close(upper + upper.flip(0), torch.ones_like(u))


@pytest.mark.parametrize("how", THREE, ids=name)
def test_three_class_curves_are_symmetric(how: Rounding) -> None:
    """Guards against a third class that favours one direction, or exceeds the nearest class."""
    w = torch.linspace(-0.499, 0.499, 401, dtype=torch.float64)
    _, p = probabilities(w, how)
    torch.testing.assert_close(p, p.flip(0, 1))
    assert (p.argmax(0) == 1).all()
    torch.testing.assert_close(relax(-w, 1e3, how), -relax(w, 1e3, how), atol=0.02, rtol=0)


def test_ssl_of_slope_one_is_linear() -> None:
    """Guards against an `--ssl-a 1` that differs from `linear`, contrary to the paper."""
    v, noise = grid(), torch.randn(320, dtype=torch.float64)
    torch.testing.assert_close(
        relax(v, 0.4, rounding("ssl", a=1), noise=noise), relax(v, 0.4, rounding("linear"), noise=noise)
    )


@pytest.mark.parametrize("tau", [1e-3, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("how", ALL, ids=name)
def test_values_and_gradients_are_finite_everywhere(how: Rounding, tau: float) -> None:
    """Guards against NaN in all latents after one of them is exactly an integer."""
    special = torch.tensor([0.0, -0.0, 1, -1, 0.5, -0.5, 1.5, 2.5, 1e6, -1e6, 1e6 + 0.5, 1e30, -1e30])
    tiny = torch.tensor([1e-45, 1e-30, 1e-8, 1e-7, 1e-6, 2e-6, 1e-5, 1.1e-5, 1e-3])
    near = torch.cat([k + s * tiny for k in (0.0, 0.5, 1.0, -3.0) for s in (1, -1)])
    v = torch.cat((special, near)).repeat(200).requires_grad_()
    for seed in range(3):
        v_hat = relax(v, tau, how, generator=torch.Generator().manual_seed(seed))
        (grad,) = torch.autograd.grad(v_hat.sum(), v)
        assert v_hat.isfinite().all()
        assert grad.isfinite().all()
        limit = 1.5 if how.classes == 3 else 1.0
        assert ((v_hat - v).abs() <= limit + v.abs() * 1e-6).all()


@pytest.mark.parametrize("how", [h for h in ALL if h.stochastic], ids=name)
@pytest.mark.parametrize("extreme", [-17.3, 0.0, 17.3])
def test_extreme_noise_stays_finite(how: Rounding, extreme: float) -> None:
    """Guards against infinite values at noise that is drawn once in ten million elements."""
    v = torch.linspace(-2, 2, 401).requires_grad_()
    noise = torch.full((2, 401) if how.classes == 3 else (401,), extreme)
    v_hat = relax(v, 1e-3, how, noise=noise)
    (grad,) = torch.autograd.grad(v_hat.sum(), v)
    assert v_hat.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("how", WEIGHTED, ids=name)
def test_cold_is_hard(how: Rounding) -> None:
    """Guards against an annealing that ends between integers, so that the final rounding changes the image."""
    v = grid(torch.float32)
    v_hat = relax(v, 0.02, how, generator=torch.Generator().manual_seed(3))
    assert ((v_hat - v_hat.round()).abs() < 0.01).float().mean() > 0.8


def test_a_seed_repeats_a_run() -> None:
    """Guards against a seed that is ignored."""
    v = torch.randn(2, 3, 4)
    for how in ALL:
        first, second = (relax(v, 0.5, how, torch.Generator().manual_seed(8)) for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize("how", ALL, ids=name)
def test_shapes_layouts_and_types(how: Rounding) -> None:
    """Guards against other results for channels-last, bfloat16 or large latents."""
    torch.manual_seed(9)
    v = torch.randn(2, 5, 3, 4)
    noise = sample_noise(v.shape, how)
    expected = relax(v, 0.5, how, noise=noise)
    assert expected.dtype == torch.float32
    last = v.contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.testing.assert_close(relax(last, torch.tensor(0.5), how, noise=noise), expected)
    assert relax(v.bfloat16(), 0.5, how).dtype == torch.float32
    assert relax(torch.empty(0, 4), 0.5, how).shape == (0, 4)
    assert v.equal(last)  # the input is never written to

    large = torch.randn(block_size() + 77).requires_grad_()
    noise = sample_noise(large.shape, how)
    whole = relax(large, 0.5, how, noise=noise)
    (whole_grad,) = torch.autograd.grad(whole.sum(), large)
    parts, grads = [], []
    for part in (slice(0, 1000), slice(1000, None)):
        piece = large[part].detach().contiguous().requires_grad_()
        out = relax(
            piece[: block_size() // 2],
            0.5,
            how,
            noise=None if noise is None else noise[..., part][..., : block_size() // 2],
        )
        parts.append(out)
        grads.append(torch.autograd.grad(out.sum(), piece)[0][: block_size() // 2])
    torch.testing.assert_close(parts[0], whole[:1000])
    torch.testing.assert_close(parts[1], whole[1000 : 1000 + block_size() // 2])
    torch.testing.assert_close(grads[1], whole_grad[1000 : 1000 + block_size() // 2])


@pytest.mark.parametrize("how", ALL, ids=name)
def test_compiles_without_a_graph_break(how: Rounding) -> None:
    """Guards against host synchronization or data-dependent shapes, with which a step cannot be captured."""
    v = torch.randn(50).requires_grad_()
    noise = sample_noise(v.shape, how)

    def step(v: Tensor, tau: Tensor) -> Tensor:
        return (relax(v, tau, how, noise=noise) ** 2).sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    tau = torch.tensor(0.5)
    (expected,) = torch.autograd.grad(step(v, tau), v)
    (actual,) = torch.autograd.grad(compiled(v, tau), v)
    torch.testing.assert_close(actual, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("how", ALL, ids=name)
def test_cuda_graph_captures_a_step(how: Rounding) -> None:
    """Guards against a relaxation that cannot be captured in a CUDA graph. Needs a GPU."""
    v = torch.randn(3, 1000, device="cuda").requires_grad_()
    tau = torch.tensor(0.5, device="cuda")
    noise = sample_noise(v.shape, how, device="cuda")

    def step() -> Tensor:
        return torch.autograd.grad((relax(v, tau, how, noise=noise) ** 2).sum(), v)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    tau.fill_(0.2)
    graph.replay()
    torch.testing.assert_close(captured, step())


def test_misuse_of_relax_is_refused() -> None:
    """Guards against NaN from a temperature of 0, and against noise that is ignored."""
    v = torch.zeros(3)
    for tau in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="above 0"):
            relax(v, tau, rounding("ssl"))
    with pytest.raises(ValueError, match="takes no noise"):
        relax(v, 1.0, rounding("ste"), noise=v)
    with pytest.raises(ValueError, match="no class weights"):
        probabilities(v, rounding("noise"))
