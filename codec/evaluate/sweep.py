"""R-D sweeps with encoded files: images × coders (ours at λ, method, steps; peers at their qualities).

    image ─► encode ─► files/<setting>/<image>.sga ─► read ─► decode ─► compare 8-bit pixels ─► row of results.tsv

The rate is the size of the file, the distortion is that of the pixels decoded from it. Transparency, ICC, EXIF and XMP
are not coded, because published curves do not include them.

Rows are appended as they are measured. An interrupted sweep that is run again with the same arguments measures only the
missing rows; an existing row is used if its setting, model id and image (name and content) are the same.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from .. import metrics
from ..atomic import write_whole
from ..folders import images_below
from ..image import read_image
from ..picture import Picture
from .coders import Coder
from .rows import (
    COLUMNS,
    TRACE_COLUMNS,
    Row,
    append_rows,
    check_columns,
    key,
    named_errors,
    printable,
    read_rows,
    read_traces,
    repair,
    rounded,
)

TABLE, TRACES, FILES = "results.tsv", "traces.tsv", "files"


@dataclass(frozen=True)
class Sweep:
    """Results of a sweep.

    Attributes
    ----------
    rows : list of Row
        One per image and setting, measured now or read from the table.
    failed : dict
        Error messages by image name.
    traces : list of Row
        Steps of the refinements that were traced.
    """

    rows: list[Row]
    failed: dict[str, str]
    traces: list[Row] = field(default_factory=list)


def find_images(paths: Iterable[Path]) -> dict[str, Path]:
    """Collect images by the name that identifies them in the table; folders are searched recursively.

    The name is that of the file, preceded by as many parent folders as needed to be unique.

    Raises
    ------
    ValueError
        If a path does not exist, a folder holds no image, or names differ in unprintable characters only.
    OSError
        If a folder cannot be read.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            inside = images_below(str(path))
            if not inside:
                raise ValueError(f"{path}: no images in this folder")
            found |= dict.fromkeys(_absolute(path / name) for name in inside)
        elif path.exists():
            found[_absolute(path)] = None
        else:
            raise ValueError(f"{path}: no such file or folder")
    names = {p: printable(p.name) for p in found}
    depth = 1
    while len(set(names.values())) < len(names):
        depth += 1
        taken = Counter(names.values())
        if depth > max(len(p.parts) for p in found):
            raise ValueError(f"several images would be called {taken.most_common(1)[0][0].lstrip('/')}")
        names = {p: printable("/".join(p.parts[-depth:])) if taken[n] > 1 else n for p, n in names.items()}
    return {name.lstrip("/"): path for path, name in names.items()}


def _absolute(path: Path) -> Path:
    """The absolute path; symbolic links are not resolved."""
    return Path(os.path.abspath(path))


def run(
    coders: Sequence[Coder],
    images: Mapping[str, Path],
    out: Path,
    *,
    flip: bool = False,
    progress: Callable[[str, str | None], None] | None = None,
) -> Sweep:
    """Measure every image with every coder and append each row to ``out/results.tsv`` at once.

    Images that cannot be read or coded are recorded in `Sweep.failed`; the sweep continues.

    Parameters
    ----------
    coders : sequence of Coder
        As returned by `coders.own_coders` and `coders.peer_coders`.
    images : mapping
        Files by name, as returned by :func:`find_images`.
    out : Path
        Folder for the tables and the encoded files; created if missing.
    flip : bool
        Measure the perceptual error FLIP (package flip-evaluator).
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
    table, traces = out / TABLE, out / TRACES
    for path, columns in ((table, COLUMNS), (traces, TRACE_COLUMNS)):
        repair(path)
        check_columns(path, columns)
    known = {key(row): row for row in (read_rows(table) if table.exists() else [])}
    identities = {name: {"name": name, "image_id": _image_id(path)} for name, path in images.items()}
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for coder in coders:
        for name, path in images.items():
            message = None
            identity = identities[name] | coder.setting
            row = known.get(key(identity))
            if row is None or (flip and row["flip"] is None):
                file = file_of(out / FILES, coder, name)
                try:
                    measured, trace = measure(coder, path, file, flip)
                except Exception as error:  # any error of one image; the others are still measured
                    if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
                        raise  # for example a full disk: later results would be lost, too
                    row = None
                    message = " ".join(str(error).split()) or type(error).__name__
                    failed.setdefault(name, message)
                else:
                    row = rounded(identity | measured)
                    if trace:  # first, so that a row has its whole trace
                        append_rows(traces, [identity | step for step in trace], TRACE_COLUMNS)
                    append_rows(table, [row])
            if row is not None:
                rows.append(row)
            if progress is not None:
                progress(name, message)
    keys = {key(row) for row in rows if "trace=" in row["options"]}
    return Sweep(rows, failed, [row for row in read_traces(traces) if key(row) in keys] if keys else [])


def file_of(folder: Path, coder: Coder, name: str) -> Path:
    """The encoded file of an image."""
    return row_file(folder, {"name": name} | coder.setting, coder.suffix)


def row_file(folder: Path, row: Row, suffix: str) -> Path:
    """The encoded file of a row."""
    return folder / _slug(row) / f"{row['name']}{suffix}"


def picture_of(path: Path, crop: int | None) -> Picture:
    """The image without transparency and metadata, or its central square of side `crop`."""
    picture = replace(read_image(path), alpha=None, icc=None, exif=None, xmp=None)
    return picture if crop is None else replace(picture, pixels=centre(picture.pixels, crop))


def measure(coder: Coder, path: Path, file: Path, flip: bool = False) -> tuple[Row, Sequence[Row]]:
    """Encode an image to `file` and decode the file; the measured columns, and the rows of the trace."""
    picture = picture_of(path, coder.setting["crop"])
    start = time.perf_counter()
    coded = coder.encode(picture)
    seconds_encode = time.perf_counter() - start
    with named_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, coded.data)

    data = file.read_bytes()
    height, width = picture.pixels.shape[:2]
    start = time.perf_counter()
    decoded = coder.decode(data, height * width)
    seconds_decode = time.perf_counter() - start
    error = metrics.mse(picture.pixels, decoded)
    psnr = metrics.psnr(picture.pixels, decoded)
    bpp = 8 * len(data) / (height * width)
    lmbda = coder.setting["lambda"]
    loss = None if lmbda is None else metrics.rd_loss(bpp, error, lmbda)
    row = {
        "pixels": height * width,
        "bytes": len(data),
        "bpp": bpp,
        "psnr": psnr if math.isfinite(psnr) else None,
        "ms_ssim": metrics.ms_ssim(picture.pixels, decoded),
        "flip": metrics.flip(picture.pixels, decoded) if flip else None,
        "rd_loss": loss,
        "rd_loss_unrefined": None if loss is None else loss + coded.gain,
        "seconds_encode": seconds_encode,
        "seconds_decode": seconds_decode,
        "version": version("sgacodec"),
    }
    return row | coded.columns, coded.trace


def centre(pixels: np.ndarray, side: int) -> np.ndarray:
    """The central square of `side` pixels of (H, W, 3); an axis shorter than `side` is not cropped."""
    height, width = pixels.shape[:2]
    top, left = max(0, height - side) // 2, max(0, width - side) // 2
    return np.ascontiguousarray(pixels[top : top + side, left : left + side])


def _image_id(path: Path) -> str:
    """Hash of a file's content, by which an edited image is measured again; empty if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # a device, which may have no end
                return ""
            while piece := file.read(2**20):
                digest.update(piece)
    except OSError:
        return ""
    return digest.hexdigest()[:12]


def _slug(setting: Row) -> str:
    """Folder name of a setting."""
    if setting["lambda"] is None:
        parts = [setting["method"], f"quality{setting['quality']:g}"]
    else:
        parts = [f"lambda{setting['lambda']:.8g}", setting["method"]]
        if setting["method"] != "none":
            parts += [f"classes{setting['classes']}", f"steps{setting['steps']}", f"seed{setting['seed']}"]
    if setting["crop"] is not None:
        parts.append(f"crop{setting['crop']}")
    parts += [option.replace(":", "") for option in setting["options"].split()]
    return "-".join([*parts, re.sub(r"[^\w.]+", "_", setting["model_id"])])
