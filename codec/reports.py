"""The reports of `Codec`: values of one encoding or decoding, ready for JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .bitstream import SgaFile
from .metrics import psnr_of_mse
from .models.level import LevelModel
from .picture import Picture
from .settings import Settings


@dataclass(frozen=True)
class Refinement:
    """Figures of one picture before and after its refinement.

    Attributes
    ----------
    steps : int
        Iterations of the annealing; 0 with method none.
    mse : float
        Of the visible 8-bit pixels of the result, for pixels scaled to 0..1.
    loss, unrefined_loss : float
        λ·255²·distortion + bits per pixel of the payload, of the result and of the unrefined latents.
    level : LevelModel
        Model and level of the file.
    lmbda : float, optional
        Where it was steered to a target: λ of the losses. None: that of the settings.
    """

    steps: int
    mse: float
    loss: float
    unrefined_loss: float
    level: LevelModel
    lmbda: float | None = None


def encoding_report(
    picture: Picture, settings: Settings, refinement: Refinement, data: bytes, seconds: float
) -> dict[str, Any]:
    """See `Codec.encode`."""
    height, width = picture.pixels.shape[:2]
    return {
        "width": width,
        "height": height,
        "bytes": len(data),
        "bpp": 8 * len(data) / (width * height),
        "psnr": psnr_of_mse(refinement.mse) if refinement.mse > 0 else None,
        "lambda": settings.lmbda if refinement.lmbda is None else refinement.lmbda,
        "level": refinement.level.level,
        "model": refinement.level.model_name,
        "model_id": refinement.level.model_id,
        "method": settings.method,
        "classes": settings.rounding_classes if settings.method != "none" else None,
        "steps": refinement.steps,
        "seconds": round(seconds, 3),
        "device": str(refinement.level.device),
        "rd_loss": refinement.loss,
        "rd_loss_unrefined": refinement.unrefined_loss,
    }


def decoding_report(level: LevelModel, file: SgaFile, digest: str, seconds: float) -> dict[str, Any]:
    """See `Codec.decode`; `digest` is that of the integers."""
    return {
        "width": file.width,
        "height": file.height,
        "model": level.model_name,
        "model_id": level.model_id,
        "level": file.level,
        "lambda": level.lmbda,
        "integers": digest,
        "seconds": round(seconds, 3),
        "device": str(level.device),
    }
