"""Noise of relaxed rounding: its distribution, its extremes and the pool."""

import math
from typing import Any

import pytest
import torch

from sgacodec.refine.curves import probabilities
from sgacodec.refine.noise import noise_pool, noise_window, sample_noise
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


def test_noise_pool() -> None:
    """Guards against a pool that is too small, and against windows that are copies."""
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
