"""Encoders that a sweep measures: our codec at each setting, and peers at each quality, behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np

from ..bitstream import DEFAULT_MAX_PIXELS
from ..models.cache import LevelCache
from ..picture import Picture
from ..refine.loop import Trace, TracePoint
from ..settings import STEPS, Settings
from . import peers
from .peers import Peer
from .rows import Row

_OTHER = ("level_lambda", "schedule", "tau_max", "rate", "lr", "rounds", "ssl_a", "r", "n")  # settings in `options`


class CodecLike(Protocol):
    """What a sweep uses of :class:`sgacodec.api.Codec`."""

    levels: LevelCache

    def encode(
        self, pictures: Sequence[Picture], settings: Settings, *, trace: Trace | None = None
    ) -> Sequence[Any]: ...

    def decode(self, data: bytes, *, max_pixels: int) -> Any: ...


@dataclass(frozen=True)
class Coded:
    """A file, and what its encoder reports.

    Attributes
    ----------
    data : bytes
        The file.
    columns : Row
        The columns device, model and level.
    gain : float
        By how much refinement lowered the loss.
    trace : sequence of Row
        Steps of the refinement.
    """

    data: bytes
    columns: Row
    gain: float = 0.0
    trace: Sequence[Row] = ()


@dataclass(frozen=True)
class Coder:
    """An encoder at one setting, and its decoder.

    Attributes
    ----------
    setting : Row
        The columns of `rows.SETTING`.
    suffix : str
        Of its files.
    encode : callable
        Picture → Coded.
    decode : callable
        File, and the number of its pixels → pixels (H, W, 3) uint8.
    """

    setting: Row
    suffix: str
    encode: Callable[[Picture], Coded]
    decode: Callable[[bytes, int], np.ndarray]


def settings_grid(
    lmbdas: Iterable[float],
    methods: Iterable[str],
    steps: Iterable[int | None] = (STEPS,),
    *,
    classes: int | None = None,
    seed: int = 0,
    **others: Any,
) -> list[Settings]:
    """All combinations without duplicates; method "none" has neither steps, classes, a seed nor `others`.

    Parameters
    ----------
    steps : iterable of int or None
        None: the default of the device, which `Settings.on_device` sets.
    others : optional
        Further settings of the refinement, for example ``schedule="exp"``; `level_lambda` is for method none, too.

    Raises
    ------
    ValueError
        If a combination is invalid.
    """
    steps, lmbdas = list(steps), list(lmbdas)
    given = {name: value for name, value in others.items() if value is not None}
    grid = []
    for method in dict.fromkeys(methods):
        for count in dict.fromkeys(steps if method != "none" else steps[:1]):
            for lmbda in dict.fromkeys(lmbdas):
                settings = Settings(lmbda=lmbda, method=method, level_lambda=given.get("level_lambda"))
                if method != "none":
                    settings = replace(settings, classes=classes, steps=count, seed=seed, **given)
                settings.validate()
                grid.append(settings)
    return grid


def own_coders(
    codec: CodecLike, grid: Sequence[Settings], crop: int | None = None, trace: int | None = None
) -> list[Coder]:
    """Our codec at each setting of the grid.

    Parameters
    ----------
    crop : int, optional
        Side of the central square that is measured.
    trace : int, optional
        Record the refinement every so many steps. Its seconds then include the recording.
    """
    return [_own(codec, settings, crop, trace if settings.refines else None) for settings in grid]


def _own(codec: CodecLike, settings: Settings, crop: int | None, trace: int | None) -> Coder:
    model = codec.levels.model_for(settings)

    def encode(picture: Picture) -> Coded:
        points: list[TracePoint] = []
        recorder = None if trace is None else Trace(every=trace, record=lambda _, point: points.append(point))
        encoded = codec.encode([picture], settings, trace=recorder)[0]
        report = encoded.report
        return Coded(
            data=encoded.data,
            columns={"device": str(report["device"]), "model": model.name, "level": report["level"]},
            gain=float(report["rd_loss_unrefined"]) - float(report["rd_loss"]),  # both exclude the header
            trace=[asdict(point) for point in points],
        )

    def decode(data: bytes, pixels: int) -> np.ndarray:
        decoded: np.ndarray = codec.decode(data, max_pixels=max(pixels, DEFAULT_MAX_PIXELS)).picture.pixels
        return decoded

    others = {name: getattr(settings, name) for name in _OTHER} | {"trace": trace}
    setting = {
        "lambda": float(settings.lmbda),
        "quality": None,
        "method": settings.method,
        "classes": settings.rounding_classes,
        "steps": settings.annealing_steps,
        "seed": settings.seed,
        "crop": crop,
        "options": _text({name: value for name, value in others.items() if value is not None}),
        "model_id": model.id,
    }
    return Coder(setting=setting, suffix=".sga", encode=encode, decode=decode)


def peer_coders(names: Iterable[str], crop: int | None = None) -> tuple[list[Coder], list[str]]:
    """The peers of these names at every chroma format and quality, and a message for each that is not available."""
    coders: list[Coder] = []
    missing = []
    for name in dict.fromkeys(names):
        try:
            peer, found = peers.available(name)
        except peers.PeerUnavailableError as error:
            missing.append(str(error))
            continue
        for subsampling in peer.subsamplings:
            coders += [_peer(peer, found, subsampling, quality, crop) for quality in peer.qualities]
    return coders, missing


def _peer(peer: Peer, found: str, subsampling: str, quality: int, crop: int | None) -> Coder:
    def encode(picture: Picture) -> Coded:
        try:
            data = peers.encode(peer, subsampling, quality, picture.pixels)
        except OSError as error:  # of Pillow's encoder: this is no full disk
            raise RuntimeError(f"{peer.name}: {error}") from error
        return Coded(data, {"device": "cpu", "model": peer.encoder, "level": None})

    setting = {
        "lambda": None,
        "quality": float(quality),
        "method": peer.name,
        "classes": None,
        "steps": None,
        "seed": None,
        "crop": crop,
        "options": _text(peer.options(subsampling)),
        "model_id": found,
    }
    return Coder(setting=setting, suffix=f".{peer.name}", encode=encode, decode=lambda data, _: peers.decode(data))


def _text(options: dict[str, Any]) -> str:
    """The column `options`."""
    return " ".join(f"{name}={f'{value:g}' if isinstance(value, float) else value}" for name, value in options.items())
