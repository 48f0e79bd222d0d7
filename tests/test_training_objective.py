"""Closed-form gradients of the training objective, against autograd of the plain formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sgacodec import latents
from sgacodec.coding.range_coder import bits_of
from sgacodec.coding.tables import SCALES, gaussian_tables, scale_table
from sgacodec.density import SCALE_BOUND, gaussian_bits, lower_bound
from sgacodec.hyperprior import GainedHyperprior
from sgacodec.networks.architecture import Architecture, Context
from sgacodec.networks.lite import LiteAnalysis, LiteSynthesis
from sgacodec.training.objective import lambdas, losses, squared_error
from sgacodec.training.rate import coded_symbols, gaussian_dead_zone


def plain_symbols(
    y: Tensor,
    parameters: Tensor,
    log_gain: Tensor,
    noise: Tensor | None,
    log_scale: bool,
    refined: bool,
    dead_zone: bool,
) -> tuple[Tensor, Tensor]:
    """Guards against a wrong source of a gradient: rounded symbols for σ and μ, symbols with noise for y.

    If refined, symbols are constants: μ has the gradient of ŷ.
    """
    scale, mean = parameters.chunk(2, -1)
    sigma = lower_bound((scale.exp() if log_scale else scale) * log_gain.exp(), SCALE_BOUND)
    mu = mean * log_gain.exp()
    rounded = torch.round(y - mu).detach()
    if dead_zone:
        rounded[(y - mu).abs() < gaussian_dead_zone(sigma)] = 0
    bits = gaussian_bits(rounded if refined else rounded + mu.detach() - mu, sigma).sum(dim=(1, 2, 3))
    if noise is not None:
        smooth = gaussian_bits(y - mu.detach() + noise, sigma.detach()).sum(dim=(1, 2, 3))
        bits = bits + smooth - smooth.detach()
    return rounded + mu if refined else y + (rounded + mu - y).detach(), bits


@pytest.mark.parametrize("log_scale", [True, False])
@pytest.mark.parametrize(
    ("noisy", "refined", "dead_zone"),
    [(True, False, False), (False, False, False), (False, True, False), (True, False, True)],
)
def test_gradients_of_coded_symbols(log_scale: bool, noisy: bool, refined: bool, dead_zone: bool) -> None:
    """Guards against a wrong gradient, which would train badly without any error."""
    torch.manual_seed(0)
    shape = (3, 6, 5, 4)
    y = 3 * torch.randn(3, 4, 6, 5).permute(0, 2, 3, 1)  # as from a network whose output is not channels-last
    mean, scale = torch.randn(shape), torch.randn(shape) - 1 if log_scale else 2 * torch.rand(shape) - 0.2
    inputs = (y, torch.cat((scale, mean), -1), 0.5 * torch.randn(3, 1, 1, 4))
    noise = torch.rand(shape) - 0.5 if noisy else None
    weights = torch.rand(3), torch.randn(shape)
    results = []
    for function in (coded_symbols, plain_symbols):
        given = [v.clone().requires_grad_(noisy or k > 0) for k, v in enumerate(inputs)]
        y_hat, bits = function(*given, noise, log_scale, refined, dead_zone)
        ((weights[0] * bits).sum() + (weights[1] * y_hat).sum()).backward()
        results.append((y_hat.detach(), bits.detach(), *(v.grad for v in given if v.requires_grad)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_the_dead_zone_is_that_of_unrefined_files() -> None:
    """Guards against a model that is trained for another rounding than that of `encode --method none`."""
    tables = gaussian_tables()
    coded = latents.dead_zone_of(torch.from_numpy(bits_of(1, tables) - bits_of(0, tables)))
    sigma = torch.from_numpy(scale_table()).float()
    np.testing.assert_allclose(gaussian_dead_zone(sigma), coded, atol=0.01)
    y = torch.linspace(-1.2, 1.2, 1000)[:, None].repeat(1, SCALES)[None, None]
    parameters = torch.cat((sigma.log(), torch.zeros(SCALES))).expand(1, 1, 1000, -1)
    y_hat, _ = coded_symbols(y, parameters, torch.zeros(1, 1, 1, SCALES), None, True, dead_zone=True)
    assert torch.equal(y_hat == 0, y.abs() < gaussian_dead_zone(sigma))


def test_large_latents_are_coded_in_blocks() -> None:
    """Images are independent of each other, however they are divided into blocks."""
    torch.manual_seed(0)
    y, parameters = 3 * torch.randn(3, 40, 30, 16), torch.randn(3, 40, 30, 32)
    log_gain, noise = torch.randn(3, 1, 1, 16), torch.rand(3, 40, 30, 16) - 0.5
    y_hat, bits = coded_symbols(y, parameters, log_gain, noise, True)
    for k in range(3):
        one = slice(k, k + 1)
        alone, bits_alone = coded_symbols(y[one], parameters[one], log_gain[one], noise[one], True)
        assert torch.equal(y_hat[one], alone)
        assert float(bits[k]) == pytest.approx(float(bits_alone), rel=1e-6)


def test_squared_error_is_that_of_the_pixels() -> None:
    """Pixels are compared before the pixel shuffle of g_s."""
    torch.manual_seed(0)
    g_s = LiteSynthesis(8, 12, 4, 8, 1)
    x = torch.rand(2, 3, 64, 96)
    y_hat = torch.randn(2, 8, 4, 6, requires_grad=True)
    weight = torch.tensor([1.0, 3.0])
    expected = (g_s(y_hat) - x).square().mean(dim=(1, 2, 3))
    (grad,) = torch.autograd.grad((weight * expected).sum(), y_hat)
    ours = squared_error(g_s, y_hat, x)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad((weight * ours).sum(), y_hat)[0], grad)


def test_lapped_transform_is_the_convolution() -> None:
    """Under autocast the weight of the 24×24 convolution gets its gradient by a product in bfloat16."""
    torch.manual_seed(0)
    g_a = LiteAnalysis(8, 4, 8, 0)
    x = torch.rand(2, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    target = torch.randn(2, 8, 4, 6)
    found = []
    for bf16 in (False, True):
        g_a.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            y = g_a(x) - g_a.residual(x - 0.5)
        (y.float() * target).sum().backward()
        found.append((y.detach().float(), g_a.linear.weight.grad, g_a.linear.bias.grad))
    for ours, expected in zip(found[1], found[0], strict=True):
        assert float((ours - expected).norm()) < 0.01 * float(expected.norm())


@pytest.mark.slow  # tracing takes ten seconds
def test_the_loss_compiles_as_one_graph() -> None:
    """Guards against graph breaks, which make compiled training on a GPU slow."""
    torch.manual_seed(0)
    context = Context((8, 16), past=8, near=8, hidden=8)
    model = GainedHyperprior(Architecture("lite", N=8, M=24, scale="exp", width=4, hidden=4, inner=4, context=context))
    x, anchor = torch.rand(2, 3, 64, 64), torch.tensor([0, 3])
    noise = torch.rand(2, 8, 1, 1) - 0.5, torch.rand(2, 24, 4, 4) - 0.5
    found = []
    for run in (losses, torch.compile(losses, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        loss = run(model, x, anchor, lambdas(model, anchor), *noise)[0]
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for compiled, eager in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
