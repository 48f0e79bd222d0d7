"""Bjøntegaard deltas."""

from __future__ import annotations

import math

import pytest

from sgacodec.evaluate.bd import Curve, bd_psnr, bd_rate, shared_psnr

# Published means over the 24 Kodak images: CompressAI's results/image/kodak, and the files of Yang et al. 2020.
MBT2018_MEAN = Curve(
    "mbt2018-mean",
    (0.1239, 0.1980, 0.3072, 0.4606, 0.6617, 0.9144, 1.2342, 1.6191),
    (27.699, 29.359, 31.129, 32.951, 34.968, 36.911, 38.838, 40.633),
)
VTM = Curve(
    "VTM",
    (0.0482, 0.1125, 0.2458, 0.4905, 0.8748, 1.4308, 2.3246, 3.6326),
    (26.145, 28.493, 31.200, 34.262, 37.420, 40.424, 43.506, 46.592),
)
JPEG = Curve(
    "JPEG",
    (0.2212, 0.3266, 0.4231, 0.5084, 0.5879, 0.6601, 0.7289, 0.7860, 0.8497, 0.9060, 0.9644, 1.0372, 1.1274, 1.2398,
     1.3688, 1.5718, 1.8588, 2.3502, 3.4013),
    (23.780, 26.577, 28.042, 29.042, 29.785, 30.378, 30.903, 31.308, 31.705, 32.059, 32.399, 32.790, 33.235, 33.793,
     34.394, 35.239, 36.329, 37.912, 40.557),
)  # fmt: skip
YANG_BASE = Curve(
    "Yang et al. 2020, base",
    (0.0830, 0.1630, 0.2613, 0.4050, 0.6034, 0.8492, 1.1611),
    (26.470, 28.628, 30.446, 32.327, 34.230, 36.332, 38.334),
)
YANG_SGA = Curve(
    "Yang et al. 2020, SGA",
    (0.0947, 0.1848, 0.2903, 0.4324, 0.6218, 0.8824, 1.1741),
    (27.463, 29.838, 31.644, 33.417, 35.212, 37.357, 39.196),
)

RATES = (0.12, 0.2, 0.31, 0.46, 0.66, 0.91, 1.23)
BASE = Curve("base", RATES, tuple(40 + 10.5 * math.log10(r) for r in RATES))


def scaled(factor: float, gain: float = 0.0) -> Curve:
    return Curve("scaled", tuple(factor * r for r in BASE.bpp), tuple(q + gain for q in BASE.psnr))


@pytest.mark.parametrize(
    ("curve", "anchor", "percent"),
    [(VTM, MBT2018_MEAN, -17.55), (JPEG, MBT2018_MEAN, 137.85), (YANG_SGA, YANG_BASE, -15.2)],
    ids=["VTM", "JPEG", "SGA"],
)
def test_bd_rate_of_published_curves_is_as_published(curve: Curve, anchor: Curve, percent: float) -> None:
    """Guards against BD-rates that cannot be compared with those of other publications."""
    assert bd_rate(curve, anchor) == pytest.approx(percent, abs=0.06)


@pytest.mark.parametrize("factor", [0.9, 1.0, 1.25])
def test_bd_rate_of_a_shifted_curve(factor: float) -> None:
    """A factor of all rates is the BD-rate."""
    assert bd_rate(scaled(factor), BASE) == pytest.approx(100 * (factor - 1), abs=1e-9)


def test_bd_psnr_of_a_raised_curve() -> None:
    """An offset of all PSNR values is the BD-PSNR."""
    assert bd_psnr(scaled(1, 0.5), BASE) == pytest.approx(0.5)
    assert bd_psnr(BASE, scaled(1, 0.5)) == pytest.approx(-0.5)


def test_order_and_repetition_of_points_do_not_matter() -> None:
    """CompressAI lists the points of some codecs in falling order."""
    curve = scaled(0.9)
    turned = Curve("turned", curve.bpp[::-1] + curve.bpp[:1], curve.psnr[::-1] + curve.psnr[:1])
    assert bd_rate(turned, BASE) == pytest.approx(bd_rate(curve, BASE))


def test_psnr_range_of_bd_rate() -> None:
    """Reports show the PSNR range beside each BD-rate."""
    part = Curve("part", BASE.bpp[:4], BASE.psnr[:4])
    assert shared_psnr(part, BASE) == (BASE.psnr[0], BASE.psnr[3])


@pytest.mark.parametrize(
    ("curve", "why"),
    [
        (scaled(1, 40), "share no PSNR"),
        (Curve("point", (0.5,), (30.0,)), "two different points"),
        (Curve("falling", (0.2, 0.3, 0.4), (30.0, 29.0, 31.0)), "does not rise"),
        (Curve("ragged", (0.2, 0.3), (30.0,)), "2 rates"),
        (Curve("lossless", (0.2, 3.0), (30.0, math.inf)), "finite"),
        (Curve("free", (0.0, 0.3), (30.0, 31.0)), "positive"),
    ],
)
def test_curves_that_cannot_be_compared_are_an_error(curve: Curve, why: str) -> None:
    """Guards against NaN and against extrapolation."""
    with pytest.raises(ValueError, match=why):
        bd_rate(curve, BASE)


def test_bd_psnr_needs_overlapping_rates() -> None:
    """Guards against extrapolation of BD-PSNR."""
    with pytest.raises(ValueError, match="share no rate"):
        bd_psnr(scaled(100), BASE)
