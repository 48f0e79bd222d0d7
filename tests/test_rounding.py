"""The hyperparameters of relaxed rounding: published defaults, and combinations that are refused."""

import math

import pytest

from sgacodec.rounding import METHODS, THREE_CLASS_METHODS, Rounding, rounding


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
    """Guards against options that are ignored: the message says what is allowed."""
    with pytest.raises(ValueError, match=message):
        rounding(**options)


def test_published_settings() -> None:
    """Guards against defaults other than the paper's."""
    assert rounding("ssl") == Rounding("ssl", 2, a=2.3)
    assert rounding("ssl", 3) == Rounding("ssl", 3, a=1.4, r=0.98, n=1.4)
    assert rounding("cosine", 3) == Rounding("cosine", 3, r=0.98, n=2.0)
