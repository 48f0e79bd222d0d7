"""Training recipes: the settings that determine the result of a run; no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..networks.architecture import ARCHITECTURES

OPTIMIZERS = ("soap", "adam")
FROZEN: dict[str, tuple[str, ...]] = {  # by stage: prefixes of the parameters that are not trained
    "joint": (),
    "prior": ("g_a.", "g_s.", "log_gain_y", "log_gain_d"),
    "decoder": ("log_gain_y", "log_gain_z"),
}
STAGES = tuple(FROZEN)


class TrainingError(ValueError):
    """Training cannot start or continue, for example because a checkpoint does not fit."""


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run; they are stored in its checkpoints and in the model file.

    Attributes
    ----------
    architecture : str
        Name in `networks.architecture.ARCHITECTURES`.
    steps, minutes : int, float, optional
        Length of the run, and horizon of the cosine decay. One of them is given; both may be raised on resume.
    batch, crop : int
        Crops per step, and their side in pixels, a multiple of 64.
    lr, lr_end : float
        Learning rate after the warm-up and at the end of the cosine decay.
    transforms, rest, new_factor : float
        Factors of the learning rate: for g_a and g_s, for the parameters that belong to neither of the other two, and
        for new modules.
    warmup : int
        Steps of linear warm-up.
    clip : float
        Largest norm of the gradient.
    ema : float
        Decay of the exponential moving average (EMA) of the weights; the averaged weights are exported. In the first
        4 / (1 − ema) steps the decay is lower, so that their mean age is a fifth of the steps so far.
    bf16 : bool
        Run convolutions in bfloat16.
    seed : int
        Of the weights, the crops and the noise.
    final_crop, final_from : int, float
        From progress `final_from` (0..1) on, crops have `final_crop` pixels a side and a batch has half as many of
        them; 0 omits this stage.
    compile : bool
        Use torch.compile for the loss.
    init : str
        Id of the model, or name of the checkpoint, whose weights the run started from; empty for new weights.
    optimizer : {"soap", "adam"}
        The optimizer of all parameters but the large layers of the transforms, which Adam trains.
    stage : {"joint", "prior", "decoder"}
        What is trained: everything; the prior on cached latents; or the decoder on refined latents, and the encoder for
        this decoder.
    refine_steps : int
        Steps of the refinement of a crop in stage "decoder".
    unrefined : float
        Weight of the loss of unrefined crops in stage "decoder", from which alone the encoder learns; 0 omits it.
    dead_zone : bool
        Round the latents of unrefined crops with the dead zone of `latents.quantize`.
    new : tuple of str
        Modules that the initial weights lacked.
    """

    architecture: str = "lite"
    steps: int | None = None
    minutes: float | None = None
    batch: int = 8
    crop: int = 256
    lr: float = 1e-3
    lr_end: float = 2e-5
    transforms: float = 0.3
    rest: float = 1.0
    new_factor: float = 1.0
    warmup: int = 600
    clip: float = 1.0
    ema: float = 0.999
    bf16: bool = False
    seed: int = 0
    final_crop: int = 0
    final_from: float = 0.85
    compile: bool = False
    init: str = ""
    optimizer: str = "adam"
    stage: str = "joint"
    refine_steps: int = 20
    unrefined: float = 0.5
    dead_zone: bool = False
    new: tuple[str, ...] = ()


def standard_recipe(architecture: str, **changed: Any) -> Recipe:
    """The default recipe of an architecture and a stage, with `changed` fields replaced.

    With initial weights (`init`) the warm-up is short, and what is not new is trained at a lower learning rate. Stage
    "prior" has twice the learning rate for what is new; stage "decoder" has Adam and a low one.

    Raises
    ------
    TrainingError
        When the architecture is unknown.
    """
    if architecture not in ARCHITECTURES:
        raise TrainingError(f"unknown architecture {architecture!r}; known: {', '.join(ARCHITECTURES)}")
    defaults = asdict(ARCHITECTURES[architecture].training)
    if changed.get("init"):
        defaults["warmup"] = 100
        if changed.get("new"):
            defaults["rest"] = 0.4
        else:
            defaults["lr"] *= 0.3
    if changed.get("stage") == "prior":
        defaults.update(lr=2 * defaults["lr"], rest=defaults.get("rest", 1.0) / 2, final_crop=0)
    elif changed.get("stage") == "decoder":
        defaults.update(lr=defaults["lr"] / 3, lr_end=defaults["lr_end"] / 4, rest=0.3, optimizer="adam", final_crop=0)
    return Recipe(**{"architecture": architecture, **defaults, **changed})
