"""R-D sweeps with encoded files: images × (λ, method, steps).

    image ─► encode ─► files/<setting>/<image>.sga ─► read ─► decode ─► compare 8-bit pixels ─► row of results.tsv

The rate is the size of the file, the distortion is that of the pixels decoded from it. Transparency, ICC, EXIF and XMP
are not coded, because published curves do not include them.

Rows are appended as they are measured. An interrupted sweep that is run again with the same arguments measures only the
missing rows; an existing row is used if its setting, model id and image (name and content) are the same.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .. import metrics
from ..image import read_image
from ..picture import Picture
from ..settings import Settings
from .rows import Row, append_row, key, printable, read_rows, repair, rounded

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".avif")
TABLE, FILES = "results.tsv", "files"
_PROBE = 64  # pixels a side of the image for `_model_at`: one hyper-latent


class CodecLike(Protocol):
    """The methods of :class:`sgacodec.api.Codec` that a sweep uses."""

    def encode(self, pictures: Sequence[Picture], settings: Settings) -> Sequence[Any]: ...

    def decode(self, data: bytes, *, max_pixels: int) -> Any: ...


@dataclass(frozen=True)
class Sweep:
    """Results of a sweep.

    Attributes
    ----------
    rows : list of Row
        One per image and setting, measured now or read from the table.
    failed : dict
        Error messages by image name.
    """

    rows: list[Row]
    failed: dict[str, str]


def find_images(paths: Iterable[Path]) -> dict[str, Path]:
    """Collect images by the name that identifies them in the table; folders are searched recursively.

    The name is that of the file, preceded by as many parent folders as needed to be unique.

    Raises
    ------
    ValueError
        If a path does not exist or a folder holds no image.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
            if not inside:
                raise ValueError(f"{path}: no images in this folder")
            found |= dict.fromkeys(_absolute(p) for p in inside)
        elif path.exists():
            found[_absolute(path)] = None
        else:
            raise ValueError(f"{path}: no such file or folder")
    names = {p: p.name for p in found}
    depth = 1
    while len(set(names.values())) < len(names):
        depth += 1
        taken = Counter(names.values())
        names = {p: "/".join(p.parts[-depth:]) if taken[n] > 1 else n for p, n in names.items()}
    return {printable(name.lstrip("/")): path for path, name in names.items()}


def _absolute(path: Path) -> Path:
    """The absolute path; symbolic links are not resolved."""
    return Path(os.path.abspath(path))


def settings_grid(
    lmbdas: Iterable[float],
    methods: Iterable[str],
    steps: Iterable[int] = (500,),
    *,
    classes: int | None = None,
    seed: int = 0,
) -> list[Settings]:
    """All combinations without duplicates; method "none" has neither steps, classes nor a seed.

    Raises
    ------
    ValueError
        If a combination is invalid.
    """
    steps, lmbdas = list(steps), list(lmbdas)
    grid = []
    for method in dict.fromkeys(methods):
        for count in dict.fromkeys(steps if method != "none" else steps[:1]):
            for lmbda in dict.fromkeys(lmbdas):
                settings = Settings(lmbda=lmbda, method=method)
                if method != "none":
                    settings = replace(settings, classes=classes, steps=count, seed=seed)
                settings.validate()
                grid.append(settings)
    return grid


def run(
    codec: CodecLike,
    images: Mapping[str, Path],
    grid: Sequence[Settings],
    out: Path,
    *,
    crop: int | None = None,
    progress: Callable[[str, str | None], None] | None = None,
) -> Sweep:
    """Measure every image at every setting and append each row to ``out/results.tsv`` at once.

    Images that cannot be read or coded are recorded in `Sweep.failed`; the sweep continues.

    Parameters
    ----------
    codec : Codec
        Encodes and decodes, one image at a time.
    images : mapping
        Files by name, as returned by :func:`find_images`.
    grid : sequence of Settings
        As returned by :func:`settings_grid`.
    out : Path
        Folder for the table and the .sga files; created if missing.
    crop : int, optional
        Measure only the central square of this side in pixels.
    progress : callable, optional
        Called after each measurement with the image's name, and an error message or None.

    Raises
    ------
    ValueError
        If the table in `out` is damaged or has other columns.
    OSError
        If `out` cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    table = out / TABLE
    repair(table)
    known = {key(row): row for row in (read_rows(table) if table.exists() else [])}
    models = {lmbda: _model_at(codec, lmbda) for lmbda in dict.fromkeys(s.lmbda for s in grid)}
    identities = {name: {"name": name, "image_id": _image_id(path)} for name, path in images.items()}
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for settings in grid:
        setting = _setting_cells(settings, crop) | models[settings.lmbda]
        for name, path in images.items():
            message = None
            identity = identities[name] | setting
            row = known.get(key(identity))
            if row is None:
                file = out / FILES / _slug(setting) / f"{name}.sga"
                try:
                    row = rounded(identity | _measure(codec, path, settings, crop, file))
                except OSError:  # for example a full disk: later results would be lost, too
                    raise
                except Exception as error:  # any error of one image; the others are still measured
                    message = " ".join(str(error).split()) or type(error).__name__
                    failed.setdefault(name, message)
                else:
                    append_row(table, row)
            if row is not None:
                rows.append(row)
            if progress is not None:
                progress(name, message)
    return Sweep(rows, failed)


def _measure(codec: CodecLike, path: Path, settings: Settings, crop: int | None, file: Path) -> Row:
    """Encode an image to `file`, decode the file, and return the measured columns."""
    picture = replace(read_image(path), alpha=None, icc=None, exif=None, xmp=None)
    if crop is not None:
        picture = replace(picture, pixels=centre(picture.pixels, crop))
    start = time.perf_counter()
    encoded = codec.encode([picture], settings)[0]
    seconds_encode = time.perf_counter() - start
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(encoded.data)

    data = file.read_bytes()
    height, width = picture.pixels.shape[:2]
    start = time.perf_counter()
    decoded = codec.decode(data, max_pixels=height * width).picture.pixels
    seconds_decode = time.perf_counter() - start
    error = metrics.mse(picture.pixels, decoded)
    psnr = metrics.psnr(picture.pixels, decoded)
    bpp = 8 * len(data) / (height * width)
    report = encoded.report
    loss = metrics.rd_loss(bpp, error, settings.lmbda)
    gain = float(report["rd_loss_unrefined"]) - float(report["rd_loss"])  # both exclude the header
    return {
        "pixels": height * width,
        "bytes": len(data),
        "bpp": bpp,
        "psnr": psnr if math.isfinite(psnr) else None,
        "ms_ssim": metrics.ms_ssim(picture.pixels, decoded),
        "rd_loss": loss,
        "rd_loss_unrefined": loss + gain,
        "seconds_encode": seconds_encode,
        "seconds_decode": seconds_decode,
        "device": str(report["device"]),
        "model": report["model"],
        "model_id": report["model_id"],
        "level": report["level"],
        "version": version("sgacodec"),
    }


def centre(pixels: np.ndarray, side: int) -> np.ndarray:
    """The central square of `side` pixels of (H, W, 3); an axis shorter than `side` is not cropped."""
    height, width = pixels.shape[:2]
    top, left = max(0, height - side) // 2, max(0, width - side) // 2
    return np.ascontiguousarray(pixels[top : top + side, left : left + side])


def _image_id(path: Path) -> str:
    """Hash of a file's content, by which an edited image is measured again; empty if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    except OSError:
        return ""


def _model_at(codec: CodecLike, lmbda: float) -> Row:
    """The id of the model that the codec uses for λ, found by encoding a small grey image."""
    square = Picture(np.full((_PROBE, _PROBE, 3), 128, np.uint8))
    report = codec.encode([square], Settings(lmbda=lmbda, method="none"))[0].report
    return {"model_id": report["model_id"]}


def _setting_cells(settings: Settings, crop: int | None) -> Row:
    return {
        "lambda": float(settings.lmbda),
        "method": settings.method,
        "classes": settings.rounding_classes,
        "steps": settings.annealing_steps,
        "seed": settings.seed,
        "crop": crop,
    }


def _slug(setting: Row) -> str:
    """Folder name of a setting."""
    parts = [f"lambda{setting['lambda']:.8g}", setting["method"]]
    if setting["method"] != "none":
        parts += [f"classes{setting['classes']}", f"steps{setting['steps']}", f"seed{setting['seed']}"]
    if setting["crop"] is not None:
        parts.append(f"crop{setting['crop']}")
    return "-".join([*parts, setting["model_id"]])
