"""Schedules: the published ones to the digit, ours cold at the end of any budget."""

import itertools
import math

import pytest

from sgacodec.annealing import LR_FLOOR, SCHEDULES, Annealing, learning_rate, temperature
from sgacodec.rounding import METHODS


def test_exp_is_the_papers_formula() -> None:
    """Else nobody could reproduce SGA+: τ = min(τmax, e^(−0.001·t)), 0.61 after 500 iterations."""
    taus = Annealing.published("ssl").temperatures(2000)
    assert taus[0] == 1.0
    assert taus[500] == pytest.approx(math.exp(-0.5))
    assert taus[-1] == pytest.approx(math.exp(-1.999))
    assert temperature("exp", 100, 2000, tau_max=0.5) == 0.5


def test_sga_is_the_papers_formula_at_its_budget_and_scaled_at_others() -> None:
    """Else the SGA baseline is not SGA, or a 500-step run of it never leaves its first temperature."""
    taus = Annealing.published("atanh").temperatures(2000)
    assert taus[:701] == [0.5] * 701
    assert taus[1700] == pytest.approx(0.5 * math.exp(-1))
    short = Annealing.published("atanh").temperatures(500)
    assert short == pytest.approx(taus[::4])


def test_published_deterministic_annealing() -> None:
    """Else the danneal baseline is not that of SGA's authors, who divide by min(0.2, e^(−0.004·t)) once."""
    squared = [tau**2 for tau in Annealing.published("danneal").temperatures(2000)]
    assert squared == pytest.approx([min(0.2, math.exp(-0.004 * t)) for t in range(2000)])


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 100, 500, 2000])
@pytest.mark.parametrize("tau_max", [0.7, 1.0])
def test_cold_ends_cold_in_every_budget(steps: int, tau_max: float) -> None:
    """Else `--steps 20` stops hot: the relaxed latents are far from integers and rounding undoes the work."""
    taus = Annealing("cold", tau_max=tau_max, tau_end=0.1).temperatures(steps)
    assert len(taus) == steps
    assert taus[-1] == 0.1
    if steps > 1:
        assert taus[0] == tau_max
        ratios = [b / a for a, b in itertools.pairwise(taus)]
        assert ratios == pytest.approx([ratios[0]] * (steps - 1))
        assert ratios[0] < 1


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 7, 500])
def test_temperature_never_rises(schedule: str, steps: int) -> None:
    """Else latents that had settled are shaken loose again."""
    taus = Annealing(schedule).temperatures(steps)
    assert taus == sorted(taus, reverse=True)
    assert all(0 < tau <= 1 for tau in taus)


def test_learning_rates() -> None:
    """Else the last steps overshoot (no decay) or do nothing (a rate of zero)."""
    assert Annealing.published("ssl").learning_rates(3) == [0.005] * 3
    rates = Annealing(lr=0.02, lr_schedule="cosine").learning_rates(101)
    assert rates[0] == 0.02
    assert rates[50] == pytest.approx(0.01 * (1 + LR_FLOOR))
    assert rates[-1] == pytest.approx(0.02 * LR_FLOOR)
    assert rates == sorted(rates, reverse=True)
    assert learning_rate("cosine", 0, 1, 0.02) == 0.02


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [0, 1, 20, 500, 2000])
def test_defaults_exist_for_every_method_and_budget(method: str, steps: int) -> None:
    """Else `--method X --steps N` crashes before it starts, or more steps come with larger ones."""
    settings = Annealing.default(method, steps)
    assert len(settings.temperatures(steps)) == len(settings.learning_rates(steps)) == steps
    assert settings.lr >= Annealing.default(method, 2 * steps).lr
    if steps:
        assert settings.temperatures(steps)[-1] == settings.tau_end


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "linear"}, "allowed: exp, sga, cold"),
        ({"lr_schedule": "step"}, "allowed: constant, cosine"),
        ({"tau_max": 0.0}, "tau_max"),
        ({"tau_end": -1.0}, "tau_end"),
        ({"lr": math.nan}, "lr"),
        ({"rate": -0.1}, "rate"),
        ({"schedule": "cold", "tau_max": 0.05}, "tau_end"),
    ],
)
def test_wrong_settings_are_named(options: dict, message: str) -> None:
    """Else a mistyped option gives NaN latents after a minute instead of a sentence at once."""
    with pytest.raises(ValueError, match=message):
        Annealing(**options)


def test_wrong_steps_and_methods_are_refused() -> None:
    """Else an off-by-one in a loop goes unseen: one step too many, past the end of the schedule."""
    with pytest.raises(ValueError, match="step must be"):
        temperature("cold", 10, 10)
    with pytest.raises(ValueError, match="step must be"):
        learning_rate("cosine", -1, 10, 0.1)
    with pytest.raises(ValueError, match="at least 0"):
        Annealing().temperatures(-1)
    with pytest.raises(ValueError, match="allowed: ste"):
        Annealing.published("best")
    with pytest.raises(ValueError, match="allowed: ste"):
        Annealing.default("best", 10)
