"""The content of .sga files from pictures: of a batch at one λ, or of one picture with λ steered to a target."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from . import bitstream, latents
from .alpha import encode_alpha
from .bitstream import SgaFile
from .models.level import LevelModel
from .picture import Picture
from .refine.aim import SLACK_RATE, Aim
from .refine.loop import Progress, Trace, refine
from .refine.problem import Problem, with_lambda_of
from .refine.start import starting_point
from .refine.steer import PartialAnnealing, meet_aim, refine_to
from .refine.steer_tiles import meet_aim_in_tiles, refine_tiles_to
from .refine.tiles import needs_tiles, refine_tiles
from .reports import Refinement
from .settings import Settings

_CODER_BYTES = 4  # of the ends of the coded z and y, and the lengths of their sections, in the mean
_CORRECTIONS = 2  # of a file that is too large or too small, once its bytes are known


def encode_batch(
    level: LevelModel,
    pictures: list[Picture],
    rois: list[np.ndarray | None],
    settings: Settings,
    progress: Callable[[Progress], None] | None,
    trace: Trace | None = None,
    plain: LevelModel | None = None,
) -> list[tuple[bytes, Refinement]]:
    """The .sga files of pictures of one padded size, refined together.

    Parameters
    ----------
    level, plain : LevelModel
        The level of refined files, and that of unrefined ones, which may be of another model: the result is never
        worse than they are. None: `level`.

    Raises
    ------
    RuntimeError
        When a payload does not decode to the same integers.
    """
    problems = [
        Problem.of(level, p, roi, settings.lmbda, settings.metric) for p, roi in zip(pictures, rois, strict=True)
    ]
    plain = plain or level
    bounds = [replace(problem, level=plain, dead_zone=True) for problem in problems]
    # before `best` exists: the latents of a large picture take much memory
    unrefined = [starting_point(bound).loss for bound in bounds] if settings.refines else []
    best = [starting_point(problem) for problem in (problems if settings.refines else bounds)]
    unrefined = unrefined or [candidate.loss for candidate in best]
    steps = 0
    if settings.refines:
        if needs_tiles(*problems[0].shape):
            best[0], steps = refine_tiles(level, problems[0], best[0], settings, progress)
        else:
            best, steps = refine(level, problems, best, settings, progress, trace)
    coded = []
    for picture, bound, loss in zip(pictures, bounds, unrefined, strict=True):
        found, used = best.pop(0), level
        if found.loss > loss:
            found, used = starting_point(bound), plain
        refinement = Refinement(steps=steps, mse=found.mse, loss=found.loss, unrefined_loss=loss, level=used)
        payload = latents.pack(used, found.y, found.z, found.quantized)
        del found  # the float latents of a large picture take more memory than its pixels
        coded.append((_checked_file(used, picture, payload), refinement))
    return coded


def encode_to_target(
    level: LevelModel,
    picture: Picture,
    roi: np.ndarray | None,
    settings: Settings,
    progress: Callable[[Progress], None] | None,
    has_other_level: Callable[[float], bool] | None,
    begun: PartialAnnealing | None = None,
) -> tuple[bytes, Refinement]:
    """The .sga file of a picture whose λ is steered to the target during its refinement; raises as `refine_to`."""
    problem = Problem.of(level, picture, roi, settings.lmbda, settings.metric)
    unrefined = starting_point(problem)
    until = settings.deadline(time.perf_counter())
    beside = len(_file(level, picture, b"", b""))
    size = settings.target_size
    if settings.target_bpp is not None:
        size = int(settings.target_bpp * problem.pixels / 8)
    if size is None:
        assert settings.target_psnr is not None
        aim = Aim(mse=max(1e-30, 10 ** (-settings.target_psnr / 10)))  # not 0, whose logarithm is taken
    else:
        aim = Aim(bits=8.0 * max(1, size - beside - _CODER_BYTES))
    tiled = needs_tiles(*problem.shape)
    if tiled:
        found, steps, lmbda = refine_tiles_to(level, problem, unrefined, settings, aim, progress, has_other_level)
    else:
        found, steps, lmbda = refine_to(level, problem, unrefined, settings, aim, progress, has_other_level, begun)
    unrefined = with_lambda_of(unrefined, problem, problem := replace(problem, lmbda=lmbda))
    payload = latents.pack(level, found.y, found.z, found.quantized)
    for _ in range(_CORRECTIONS):
        missing = 0 if size is None else size - len(_file(level, picture, payload.z, payload.y))
        if size is None or 0 <= missing <= SLACK_RATE * size or found.bits + 8 * missing <= 0:
            break
        meet = meet_aim_in_tiles if tiled else meet_aim
        found = meet(level, problem, found, Aim(bits=found.bits + 8 * missing), until)
        payload = latents.pack(level, found.y, found.z, found.quantized)
    refinement = Refinement(
        steps=steps,
        mse=found.mse,
        loss=found.loss,
        unrefined_loss=unrefined.loss,
        level=level,
        lmbda=lmbda,
    )
    return _checked_file(level, picture, payload), refinement


def _checked_file(level: LevelModel, picture: Picture, payload: latents.Payload) -> bytes:
    """The content of a .sga file, whose payload has been decoded.

    Raises
    ------
    RuntimeError
        When it does not decode to the same integers.
    """
    if latents.unpack(level, payload.z, payload.y, *picture.pixels.shape[:2]).digest() != payload.digest:
        raise RuntimeError("internal error: the coded bytes do not decode to the same integers")
    return _file(level, picture, payload.z, payload.y)


def _file(level: LevelModel, picture: Picture, z: bytes, y: bytes) -> bytes:
    """The content of a .sga file."""
    height, width = picture.pixels.shape[:2]
    file = SgaFile(
        model_id=bytes.fromhex(level.model_id),
        level=level.level,
        width=width,
        height=height,
        z=z,
        y=y,
        grey=picture.grey,
        alpha=None if picture.alpha is None else encode_alpha(picture.alpha),
        icc=picture.icc,
        exif=picture.exif,
        xmp=picture.xmp,
    )
    return bitstream.write(file)
