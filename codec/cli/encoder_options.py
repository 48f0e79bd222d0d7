"""Options of `sgacodec encode` for rate and refinement, and the settings that they make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from ..annealing import SCHEDULES
from ..settings import CPU_STEPS, EFFORTS, METHODS, STEPS, Settings
from . import options
from .exits import one_line

_TARGETS = ("target_bpp", "target_size", "target_psnr")


def _positive(name: str, metavar: str, help: str) -> Callable[[Any], Any]:
    """An option that takes a finite number above 0."""
    above_0 = click.FloatRange(min=0, min_open=True)
    return click.option(name, metavar=metavar, type=above_0, callback=options.finite, help=help)


_REFINEMENT = (
    _positive("--tau-max", "T", "Highest temperature.  [default: by method, 0.8 for ssl]"),
    click.option(
        "--rate",
        metavar="C",
        type=click.FloatRange(0),
        callback=options.finite,
        help="Decay of the temperature per step with the schedules exp and sga.  [default: by method, 0.001 or 0.002]",
    ),
    _positive("--lr", "LR", "Learning rate of Adam.  [default: by method and steps, 0.005 to 0.03]"),
    click.option("--schedule", type=click.Choice(SCHEDULES), help="Temperature schedule.  [default: cold]"),
    click.option(
        "--rounds",
        metavar="N",
        type=click.IntRange(0),
        help="Iterations of the last pass, a coordinate descent over integers.  [default: 0 for ssl with two classes, "
        "and with exp and sga; else it grows with the steps]",
    ),
    _positive("--ssl-a", "A", "Slope of ssl.  [default: 2.3; 1.4 with three classes]"),
    _positive("--r", "R", "Factor of the distance to a class, with three classes.  [default: 0.98]"),
    _positive("--n", "N", "Exponent of the weight of a class, with three classes.  [default: by method, 1.4 to 2]"),
    _positive(
        "--level-lambda",
        "L",
        "Lambda that selects the gains (rate level) of the model.  [default: lambda; 0.75 to 1 times lambda for "
        "refined files]",
    ),
)
_OPTIONS = (
    click.option(
        "--lambda",
        "lmbda",
        metavar="L",
        type=click.FloatRange(1e-4, 1),
        callback=options.finite,
        help="Rate-distortion trade-off: larger values give more bits and better quality.  [default: 0.0075]",
    ),
    _positive(
        "--target-bpp",
        "B",
        "Choose lambda so that the file has B bits per pixel. Where the best quality needs fewer, it has fewer.",
    ),
    click.option(
        "--target-size",
        metavar="BYTES",
        type=click.IntRange(1),
        help="Choose lambda so that the file is as large as possible, at most BYTES; an error if even the smallest one "
        "is larger.",
    ),
    _positive(
        "--target-psnr",
        "DB",
        "Choose lambda so that the file is as small as possible, of at least DB; an error if it cannot be reached.",
    ),
    click.option(
        "--method",
        type=click.Choice(METHODS),
        default="ssl",
        show_default=True,
        help="Rounding method of the refinement; ssl is the best.",
    ),
    options.classes,
    click.option(
        "--steps",
        metavar="N",
        type=click.IntRange(0),
        help=f"Refinement steps.  [default: {STEPS} on a GPU; {CPU_STEPS} on a CPU, fewer above 4 megapixels; at most "
        f"{STEPS} with --time-limit]",
    ),
    click.option(
        "--effort",
        metavar="0..4",
        type=click.IntRange(0, 4),
        help="Refinement steps by level: 0 (none), 50, 150, 500, 2000. Levels 0 to 3 take about 2, 25, 60 and "
        "180 seconds per megapixel on one CPU core.",
    ),
    _positive(
        "--time-limit",
        "S",
        "Refine for at most S seconds an image, in as many steps as fit; a search for a target counts as a whole.",
    ),
    click.option(
        "--metric",
        type=click.Choice(["mse", "ms-ssim"]),
        default="mse",
        show_default=True,
        help="Distortion to minimize.",
    ),
    click.option(
        "--seed", metavar="S", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Random seed."
    ),
    *_REFINEMENT,
)

encoder_options = options.applied(_OPTIONS)
refinement_options = options.applied(_REFINEMENT)


def settings_of(chosen: dict[str, Any]) -> Settings:
    """The encoder's settings.

    Parameters
    ----------
    chosen : dict
        Values of the options by name; None where an option was not given.

    Raises
    ------
    click.UsageError
        If options exclude each other or have no meaning together.
    """
    rates = [name for name in ("lmbda", *_TARGETS) if chosen[name] is not None]
    if len(rates) > 1:
        raise click.UsageError(f"{' and '.join(map(_flag, rates[:2]))} exclude each other")
    if chosen["steps"] is not None and chosen["effort"] is not None:
        raise click.UsageError("--effort and --steps exclude each other")
    if chosen["effort"] and chosen["method"] == "none":
        raise click.UsageError("--effort has no meaning with --method none")
    values = {name: value for name, value in chosen.items() if value is not None}
    effort = values.pop("effort", None)
    if effort is not None:
        values["steps"] = EFFORTS[effort]
    settings = Settings(**values)
    try:
        settings.validate()
    except ValueError as error:
        first, _, rest = one_line(error).partition(" ")
        raise click.UsageError(f"{_flag(first) if first in values else first} {rest}") from None
    return settings


def _flag(name: str) -> str:
    """The option of a setting."""
    return "--" + name.replace("lmbda", "lambda").replace("_", "-")
