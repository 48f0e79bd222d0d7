"""Schedules of temperature and learning rate: the published ones, and the default for any number of steps."""

import itertools
import math

import pytest

from sgacodec.annealing import LR_FLOOR, SCHEDULES, Annealing, learning_rate, temperature
from sgacodec.rounding import METHODS


def test_exp_is_the_papers_formula() -> None:
    """Guards against a schedule that is not SGA+'s: τ = min(τmax, e^(−0.001·t)), 0.61 after 500 iterations."""
    taus = Annealing.published("ssl").temperatures(2000)
    assert taus[0] == 1.0
    assert taus[500] == pytest.approx(math.exp(-0.5))
    assert taus[-1] == pytest.approx(math.exp(-1.999))
    assert temperature("exp", 100, 2000, tau_max=0.5) == 0.5


def test_sga_is_the_papers_formula_at_its_budget_and_scaled_at_others() -> None:
    """Guards against a baseline that is not SGA, or stays at its first temperature for 500 steps."""
    taus = Annealing.published("atanh").temperatures(2000)
    assert taus[:701] == [0.5] * 701
    assert taus[1700] == pytest.approx(0.5 * math.exp(-1))
    short = Annealing.published("atanh").temperatures(500)
    assert short == pytest.approx(taus[::4])


def test_published_deterministic_annealing() -> None:
    """Guards against another danneal than that of SGA's authors, who divide by min(0.2, e^(−0.004·t)) once."""
    squared = [tau**2 for tau in Annealing.published("danneal").temperatures(2000)]
    assert squared == pytest.approx([min(0.2, math.exp(-0.004 * t)) for t in range(2000)])


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 100, 500, 2000])
@pytest.mark.parametrize("tau_max", [0.7, 1.0])
def test_cold_ends_cold_in_every_budget(steps: int, tau_max: float) -> None:
    """Guards against a short run that ends at a high temperature, where the final rounding costs its gain."""
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
    """Guards against a temperature that rises: latents near integers would leave them again."""
    taus = Annealing(schedule).temperatures(steps)
    assert taus == sorted(taus, reverse=True)
    assert all(0 < tau <= 1 for tau in taus)


def test_learning_rates() -> None:
    """Guards against a learning rate that does not decay, or reaches zero before the last step."""
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
    """Guards against a method or number of steps without a default, and a learning rate that grows with the steps."""
    settings = Annealing.default(method, steps)
    assert len(settings.temperatures(steps)) == len(settings.learning_rates(steps)) == steps
    assert settings.lr >= Annealing.default(method, 2 * steps).lr
    if steps:
        assert settings.temperatures(steps)[-1] == settings.tau_end


def test_only_expected_bits_have_less_noise_and_the_variance_of_the_rounding() -> None:
    """Guards against constants of the expected bits for other methods, and a short run with the noise of a long one."""
    noise = [Annealing.default("ssl", steps).noise for steps in (24, 96, 150, 600)]
    assert noise == pytest.approx([0.2, 0.4, 0.5, 0.5])
    assert Annealing.default("ssl", 100).variances(3) == pytest.approx([0.5, 0.75, 1.0])
    others = [Annealing.default("linear", 96), Annealing.default("ssl", 96, 3), Annealing.default("ssl", 96, 2, False)]
    for other in (*others, Annealing.published("ssl")):
        assert (other.noise, other.variance) == (1.0, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "linear"}, "allowed: exp, sga, cold"),
        ({"lr_schedule": "step"}, "allowed: constant, cosine"),
        ({"tau_max": 0.0}, "tau_max"),
        ({"tau_max": 1e-30}, "tau_max"),
        ({"tau_end": -1.0}, "tau_end"),
        ({"lr": math.nan}, "lr"),
        ({"rate": -0.1}, "rate"),
        ({"schedule": "cold", "tau_max": 0.05}, "tau_end"),
    ],
)
def test_wrong_settings_are_named(options: dict, message: str) -> None:
    """Guards against settings that lead to NaN in place of an error message."""
    with pytest.raises(ValueError, match=message):
        Annealing(**options)


def test_wrong_steps_and_methods_are_refused() -> None:
    """Guards against a loop that runs past the end of its schedule, and against unknown methods."""
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


@pytest.mark.parametrize("schedule", ["exp", "sga"])
def test_the_temperature_stays_within_float32(schedule: str) -> None:
    """Guards against long runs, or large rates, that end in an error: 1/τ leaves the range of float32."""
    assert temperature(schedule, 99_999, 100_000) >= 1e-6
    assert temperature(schedule, 2, 3, rate=50.0) == 1e-6
