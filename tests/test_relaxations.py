"""Relaxed rounding against the papers' formulas, written out plainly here in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sgacodec.refine.curves import log_weights, probabilities
from sgacodec.refine.noise import noise_pool, noise_window, sample_noise
from sgacodec.refine.relaxations import BLOCK, relax
from sgacodec.rounding import METHODS, THREE_CLASS_METHODS, Rounding, rounding

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
    """Gumbel noise of every class, and the same as `relax` takes it."""
    if how.method == "danneal":
        return torch.zeros(2, *shape, dtype=torch.float64), None
    g = -torch.log(-torch.log(torch.rand(how.classes, *shape, dtype=torch.float64)))
    return g, g[1] - g[0] if how.classes == 2 else torch.stack((g[0] - g[1], g[2] - g[1]))


def grid(dtype: torch.dtype = torch.float64) -> Tensor:
    """Latents between the integers and half-integers, none nearer than 0.003 to either."""
    fractions = torch.cat((torch.linspace(0.003, 0.497, 40), torch.linspace(0.503, 0.997, 40)))
    return (fractions.to(dtype) + torch.tensor([-7.0, -1, 0, 12], dtype=dtype)[:, None]).reshape(-1)


@pytest.mark.parametrize("tau", [1.0, 0.5, 0.15])
@pytest.mark.parametrize("how", WEIGHTED, ids=name)
def test_value_and_gradient_are_those_of_the_formula(how: Rounding, tau: float) -> None:
    """Else the codec refines with something that is not SGA or SGA+, however well it is named."""
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
    """Else the optimiser is told a wrong direction and refinement stalls or diverges."""
    torch.manual_seed(2)
    v = grid()[::16].requires_grad_()
    _, noise = gumbel_noise(how, tuple(v.shape))
    tau = torch.tensor(0.6, dtype=torch.float64) if tensor_tau else 0.6
    assert torch.autograd.gradcheck(lambda x: relax(x, tau, how, noise=noise), v)


@pytest.mark.parametrize("how", [rounding("ste"), rounding("noise")], ids=name)
def test_baselines(how: Rounding) -> None:
    """Else the straight-through and noise baselines of the comparison are not what they are called."""
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
    """Else figure 1 of the report shows other functions than the ones that ran."""
    v = grid()
    classes, p = probabilities(v, how)
    logits = f((v - classes).abs(), how)
    torch.testing.assert_close(p, torch.softmax(logits, 0), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(log_weights((v - classes).abs(), how), logits, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(p.sum(0), torch.ones_like(v))


def test_curves_at_a_quarter() -> None:
    """Else the slopes of figure 1 are off: the numbers are computed by hand."""
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
    """Else refinement drifts: latents are pushed up more readily than down."""
    u = torch.linspace(0.001, 0.999, 501, dtype=torch.float64)
    upper = probabilities(u, how)[1][1]
    assert (upper.diff() > 0).all()
    torch.testing.assert_close(upper + upper.flip(0), torch.ones_like(u))


@pytest.mark.parametrize("how", THREE, ids=name)
def test_three_class_curves_are_symmetric(how: Rounding) -> None:
    """Else a third class favours one direction; and the nearest class must stay the likeliest."""
    w = torch.linspace(-0.499, 0.499, 401, dtype=torch.float64)
    _, p = probabilities(w, how)
    torch.testing.assert_close(p, p.flip(0, 1))
    assert (p.argmax(0) == 1).all()
    torch.testing.assert_close(relax(-w, 1e3, how), -relax(w, 1e3, how), atol=0.02, rtol=0)


def test_ssl_of_slope_one_is_linear() -> None:
    """Else `--ssl-a 1` is not the identity that the paper says it is."""
    v, noise = grid(), torch.randn(320, dtype=torch.float64)
    torch.testing.assert_close(
        relax(v, 0.4, rounding("ssl", a=1), noise=noise), relax(v, 0.4, rounding("linear"), noise=noise)
    )


@pytest.mark.parametrize("tau", [1e-3, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("how", ALL, ids=name)
def test_values_and_gradients_are_finite_everywhere(how: Rounding, tau: float) -> None:
    """Else one latent on an integer turns a whole image into NaN."""
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
    """Else a draw that comes once in ten million elements ends a long run."""
    v = torch.linspace(-2, 2, 401).requires_grad_()
    noise = torch.full((2, 401) if how.classes == 3 else (401,), extreme)
    v_hat = relax(v, 1e-3, how, noise=noise)
    (grad,) = torch.autograd.grad(v_hat.sum(), v)
    assert v_hat.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("how", WEIGHTED, ids=name)
def test_cold_is_hard(how: Rounding) -> None:
    """Else annealing never reaches integers and the final rounding changes the image."""
    v = grid(torch.float32)
    v_hat = relax(v, 0.02, how, generator=torch.Generator().manual_seed(3))
    assert ((v_hat - v_hat.round()).abs() < 0.01).float().mean() > 0.8


@pytest.mark.parametrize("how", [h for h in WEIGHTED if h.stochastic], ids=name)
def test_classes_are_drawn_as_often_as_their_weights_say(how: Rounding) -> None:
    """Else the noise is not Gumbel noise: the argmax of logits + G must follow softmax(logits)."""
    n = 200_000
    for at in (0.2, 0.45, 0.7):
        v = torch.full((n,), at)
        v_hat = relax(v, 1.0, how, generator=torch.Generator().manual_seed(4))
        classes, p = probabilities(v[:1].double(), how)
        if how.classes == 2:  # p₂ > ½ exactly when the upper class wins
            assert (v_hat > classes[0].item() + 0.5).double().mean().item() == pytest.approx(p[1].item(), abs=0.006)
        noise = sample_noise((n,), how, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        assert noise is not None
        logits = p.log()
        if how.classes == 2:
            scores = torch.stack((logits[0].expand(n), logits[1] + noise))
        else:
            scores = torch.stack((logits[0] + noise[0], logits[1].expand(n), logits[2] + noise[1]))
        frequency = torch.bincount(scores.argmax(0), minlength=how.classes) / n
        torch.testing.assert_close(frequency.double(), p[:, 0], atol=0.006, rtol=0)


def test_three_class_noise_is_a_difference_of_gumbels() -> None:
    """Else three-class rounding samples another distribution than a Gumbel-softmax."""
    noise = sample_noise((400_000,), rounding("ssl", 3), generator=torch.Generator().manual_seed(6))
    assert noise is not None
    assert noise.isfinite().all()
    x, y = noise.double()
    for s in (-2.0, 0.0, 1.5):
        for t in (-1.0, 0.5, 3.0):
            expected = 1 / (1 + math.exp(-s) + math.exp(-t))
            assert ((x <= s) & (y <= t)).double().mean().item() == pytest.approx(expected, abs=0.005)
    assert torch.corrcoef(noise)[0, 1].item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("how", [h for h in ALL if h.stochastic], ids=name)
@pytest.mark.parametrize("drawn", [0.0, 1 - 2.0**-24])
def test_the_ends_of_the_uniform_generator(how: Rounding, drawn: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the exact 0 that torch.rand returns once in 17 million draws makes an infinite latent."""
    monkeypatch.setattr(torch, "rand", lambda size, **_: torch.full(size, drawn))
    noise = sample_noise((4,), how)
    assert noise is not None
    assert noise.isfinite().all()


def test_noise_pool() -> None:
    """Else refinement on a CPU sees less noise than it asks for, or pays for every draw."""
    shape = (1, 3, 4, 5)
    for how in ALL:
        pool = noise_pool(shape, how, generator=torch.Generator().manual_seed(7))
        if not how.stochastic:
            assert pool is None
            continue
        assert pool is not None
        last = pool.shape[-1] - 60
        assert last >= 60
        window = noise_window(pool, shape, last)
        assert window.shape == ((2, *shape) if how.classes == 3 else shape)
        assert window.data_ptr() == pool[..., last:].data_ptr()
        assert relax(torch.rand(shape), 0.5, how, noise=window).shape == shape
        with pytest.raises(ValueError, match="offset"):
            noise_window(pool, shape, last + 1)


def test_a_seed_repeats_a_run() -> None:
    """Else `--seed` does nothing and a result cannot be had twice."""
    v = torch.randn(2, 3, 4)
    for how in ALL:
        first, second = (relax(v, 0.5, how, torch.Generator().manual_seed(8)) for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize("how", ALL, ids=name)
def test_shapes_layouts_and_types(how: Rounding) -> None:
    """Else channels-last, bf16 or large latents give a silently different result."""
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

    large = torch.randn(BLOCK + 77).requires_grad_()
    noise = sample_noise(large.shape, how)
    whole = relax(large, 0.5, how, noise=noise)
    (whole_grad,) = torch.autograd.grad(whole.sum(), large)
    parts, grads = [], []
    for part in (slice(0, 1000), slice(1000, None)):
        piece = large[part].detach().contiguous().requires_grad_()
        out = relax(
            piece[: BLOCK // 2],
            0.5,
            how,
            noise=None if noise is None else noise[..., part][..., : BLOCK // 2],
        )
        parts.append(out)
        grads.append(torch.autograd.grad(out.sum(), piece)[0][: BLOCK // 2])
    torch.testing.assert_close(parts[0], whole[:1000])
    torch.testing.assert_close(parts[1], whole[1000 : 1000 + BLOCK // 2])
    torch.testing.assert_close(grads[1], whole_grad[1000 : 1000 + BLOCK // 2])


@pytest.mark.parametrize("how", ALL, ids=name)
def test_compiles_without_a_graph_break(how: Rounding) -> None:
    """Else the CUDA loop cannot fuse or capture a step and loses most of its speed."""
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
    """Else refinement on a GPU falls back to launching every small kernel. Needs a GPU."""
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sgd"}, "allowed: ste, noise, danneal, atanh, linear, cosine, ssl"),
        ({"method": "ssl", "classes": 4}, "classes must be 2 or 3"),
        *[
            ({"method": m, "classes": 3}, "three classes: linear, cosine, ssl")
            for m in METHODS
            if m not in THREE_CLASS_METHODS
        ],
        ({"method": "linear", "a": 2.0}, "a is for method ssl only"),
        ({"method": "linear", "classes": 3, "a": 2.0}, "a is for method ssl only"),
        ({"method": "ssl", "r": 0.9}, "r is for three classes only"),
        ({"method": "cosine", "n": 2.0}, "n is for three classes only"),
        ({"method": "ssl", "a": 0.0}, "a must be above 0"),
        ({"method": "ssl", "a": math.nan}, "a must be above 0"),
        ({"method": "ssl", "classes": 3, "r": 1.1}, "r must be above 0 and at most 1"),
        ({"method": "ssl", "classes": 3, "n": math.inf}, "n must be above 0 and at most"),
    ],
)
def test_wrong_combinations_are_refused_with_what_is_allowed(options: dict, message: str) -> None:
    """Else an option is ignored in silence, and a sweep over it shows a flat line."""
    with pytest.raises(ValueError, match=message):
        rounding(**options)


def test_published_settings() -> None:
    """Else the defaults are not the paper's."""
    assert rounding("ssl") == Rounding("ssl", 2, a=2.3)
    assert rounding("ssl", 3) == Rounding("ssl", 3, a=1.4, r=0.98, n=1.4)
    assert rounding("cosine", 3) == Rounding("cosine", 3, r=0.98, n=2.0)


def test_misuse_of_relax_is_refused() -> None:
    """Else a temperature of 0 gives NaN, and noise handed to a method without any is lost."""
    v = torch.zeros(3)
    for tau in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="above 0"):
            relax(v, tau, rounding("ssl"))
    with pytest.raises(ValueError, match="takes no noise"):
        relax(v, 1.0, rounding("ste"), noise=v)
    with pytest.raises(ValueError, match="no class weights"):
        probabilities(v, rounding("noise"))
