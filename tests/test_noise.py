"""Noise of relaxed rounding: its distribution, its extremes and the pool."""

import math
from typing import Any

import pytest
import torch

from sgacodec.refine.noise import NoiseSequence, sample_noise
from sgacodec.refine.probabilities import probabilities
from sgacodec.refine.relaxations import relax
from sgacodec.rounding import METHODS, THREE_CLASS_METHODS, Rounding, rounding

ALL = [rounding(m) for m in METHODS] + [rounding(m, 3) for m in THREE_CLASS_METHODS]
WEIGHTED = [how for how in ALL if how.method not in ("ste", "noise")]


def name(case: Any) -> str | None:
    return f"{case.method}{case.classes}" if isinstance(case, Rounding) else None


@pytest.mark.parametrize("how", [h for h in WEIGHTED if h.stochastic], ids=name)
def test_classes_are_drawn_as_often_as_their_weights_say(how: Rounding) -> None:
    """Guards against noise that is not Gumbel noise: the argmax of logits + G must follow softmax(logits)."""
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
    """Guards against another distribution than that of the Gumbel-softmax: the joint CDF is known."""
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
    """Guards against infinite noise at the exact 0 that torch.rand returns once in 17 million draws."""
    monkeypatch.setattr(torch, "rand", lambda size, **_: torch.full(size, drawn))
    noise = sample_noise((4,), how)
    assert noise is not None
    assert noise.isfinite().all()


@pytest.mark.parametrize("how", ALL, ids=name)
def test_noise_of_a_sequence_is_distributed_as_independent_noise(how: Rounding) -> None:
    """Guards against a rotation that leaves [0, 1), and against one variable that both classes share."""
    sequence = NoiseSequence((40_000,), how, period=8)
    generator = torch.Generator().manual_seed(7)
    steps = []
    for _ in range(16):
        sequence.prepare(generator)
        steps.append(sequence.next())
    if not how.stochastic:
        assert steps == [None] * len(steps)
        return
    levels = torch.linspace(0.05, 0.95, 10)
    for found in steps[1], torch.cat([noise for noise in steps if noise is not None], -1):
        assert found is not None
        expected = sample_noise((640_000,), how, generator=torch.Generator().manual_seed(8))
        assert expected is not None
        torch.testing.assert_close(found.quantile(levels, -1), expected.quantile(levels, -1), atol=0.05, rtol=0)
        if how.classes == 3:
            correlation = float(torch.corrcoef(found)[0, 1])
            assert correlation == pytest.approx(float(torch.corrcoef(expected)[0, 1]), abs=0.03)


@pytest.mark.parametrize("how", [h for h in ALL if h.stochastic], ids=name)
def test_means_over_a_period_vary_less_than_those_of_independent_noise(how: Rounding) -> None:
    """What the sequence is for: the variance of the mean relaxed value of the steps of a period."""
    v = torch.full((20_000,), 0.4)
    generator = torch.Generator().manual_seed(9)
    sequence = NoiseSequence(v.shape, how, period=8)
    means = []
    for period in range(2):
        sequence.prepare(generator)
        drawn = [sequence.next() if period else sample_noise(v.shape, how, generator=generator) for _ in range(8)]
        means.append(torch.stack([relax(v, 1.0, how, noise=noise) for noise in drawn]).mean(dim=0))
    assert means[1].mean().item() == pytest.approx(means[0].mean().item(), abs=0.02)
    assert means[1].var() < 0.5 * means[0].var()


def test_period() -> None:
    """Guards against a period that is not kept: independent numbers at its begin, rotated ones within it."""
    for period in (1, 3):
        sequence = NoiseSequence((10_000,), rounding("noise"), period)
        generator = torch.Generator().manual_seed(10)
        steps = []
        for _ in range(7):
            sequence.prepare(generator)
            noise = sequence.next()
            assert noise is not None
            steps.append(noise)
        for step in range(1, 7):
            rotation = (steps[step] - steps[step - 1]).remainder(1)
            assert (rotation.std() < 1e-3) == (step % period != 0)
