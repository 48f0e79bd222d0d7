"""The tables of a sweep: one row per image and setting, and one per step of a trace, in TSV files.

    append_rows ─► results.tsv ─ repair, read_rows ─► rows ─ means ─► one row per setting

Each row is flushed to the disk when it is written, so a killed sweep loses at most the row being written.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # by column: str, int, float, or None (unknown, undefined or infinite)

_TEXT = ("name", "device", "model", "model_id", "method", "image_id", "version", "options")
_WHOLE = ("pixels", "bytes", "level", "classes", "steps", "seed", "crop", "step")
COLUMNS = (
    "name",  # of the image file
    "pixels",
    "bytes",  # of the file
    "bpp",  # 8·bytes/pixels
    "psnr",  # dB, of the decoded 8-bit image; empty if identical to the original
    "ms_ssim",  # empty when a side is below 161 pixels
    "flip",  # mean FLIP error (0..1, perceptual); empty unless asked for
    "rd_loss",  # λ·255²·MSE + bpp of the file; empty for peers, which have no λ
    "rd_loss_unrefined",  # rd_loss plus the gain that the encoder reports; equal to rd_loss for method none
    "seconds_encode",
    "seconds_decode",
    "device",
    "model",  # for peers: the encoder
    "model_id",  # for peers: its version
    "lambda",
    "level",
    "method",  # of the refinement, or the name of a peer
    "classes",
    "steps",
    "seed",
    "crop",  # side of the central square that was measured; empty for the whole image
    "options",  # other settings that are not the default, as "name=value name=value"
    "quality",  # of a peer
    "image_id",  # first 12 hex digits of the image file's SHA-256
    "version",  # of sgacodec
)
CURVE = ("method", "classes", "steps", "seed", "crop", "options")  # columns that identify a curve
SETTING = ("lambda", "quality", *CURVE, "model_id")  # columns that identify a setting
MEASURED = ("bpp", "psnr", "ms_ssim", "flip", "rd_loss", "rd_loss_unrefined", "seconds_encode", "seconds_decode")
TRACE_COLUMNS = (
    "name",
    "image_id",
    *SETTING,
    "step",
    "true_loss",  # λ·255²·MSE + bpp of hard integers and 8-bit pixels, without the header
    "relaxed_loss",  # of softly rounded latents; empty before the first step and after the last pass
    "bpp",
    "psnr",
)
_ADDED = ("flip", "options", "quality")  # columns that tables of older versions lack


def key(row: Row) -> tuple[str, ...]:
    """Image and setting of a row as they are written; equal for repeated measurements."""
    return tuple(_cell(row[column]) for column in ("name", "image_id", *SETTING))


def rounded(row: Row) -> Row:
    """The row with numbers rounded as in the file, so that resumed and uninterrupted sweeps give equal means."""
    return _parse(COLUMNS, [_cell(row[column]) for column in COLUMNS])


def append_rows(path: Path, rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> None:
    """Append rows to a table and flush them to the disk; a new table begins with the header."""
    with named_errors(path), open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write(table_text(rows, columns, header=file.tell() == 0))
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Give errors of writing, such as that of a full disk, the name of the file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def table_text(rows: Sequence[Row], columns: Sequence[str] = COLUMNS, header: bool = True) -> str:
    """Rows as they are written."""
    lines = ["\t".join(columns)] if header else []
    lines += ["\t".join(_cell(row[column]) for column in columns) for row in rows]
    return "".join(line + "\n" for line in lines)


def repair(path: Path) -> None:
    """Remove an incomplete last line; a missing file is not an error."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with open(path, "r+b") as file:
            file.truncate(whole)


def read_rows(path: Path) -> list[Row]:
    """Read a table; of an image that was edited and measured again, the later row.

    Raises
    ------
    ValueError
        If the file is not such a table; the message names the line.
    OSError
        If it cannot be read.
    """
    return list({(row["name"], *_setting(row)): row for row in _read(path, COLUMNS, _ADDED)}.values())


def read_traces(path: Path) -> list[Row]:
    """Read a table of traces; of a step that was measured again, the later row.

    Raises
    ------
    ValueError, OSError
        As :func:`read_rows`.
    """
    rows = _read(path, TRACE_COLUMNS)
    return list({(row["name"], *_setting(row), row["step"], row["relaxed_loss"] is None): row for row in rows}.values())


def check_columns(path: Path, columns: Sequence[str] = COLUMNS) -> None:
    """Raise ValueError if the table, where there is one, has other columns, so that no row can be appended."""
    if path.exists() and path.stat().st_size and path.read_bytes().split(b"\n")[0] != "\t".join(columns).encode():
        raise ValueError(f"{path}: not a table of this version of sgacodec eval (other columns)")


def _read(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> list[Row]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a table of sgacodec eval (not text)") from error
    if lines == [""]:
        return []
    header = lines[0].split("\t")
    missing = [column for column in columns if column not in header]
    if not set(missing) <= set(optional) or set(header) - set(columns) or len(set(header)) < len(header):
        raise ValueError(f"{path}: not a table of this version of sgacodec eval (other columns)")
    absent = {column: "" if column in _TEXT else None for column in missing}
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        if not line:
            continue
        try:
            rows.append(absent | _parse(header, line.split("\t")))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: damaged row") from error
    return rows


def common_images(rows: Iterable[Row]) -> tuple[list[Row], list[str]]:
    """The rows of images that were measured at every setting, and the names of the other images.

    All points of a curve must be means over the same images.
    """
    rows = list(rows)
    names: dict[tuple[Any, ...], set[str]] = {}
    for row in rows:
        names.setdefault(_setting(row), set()).add(row["name"])
    everywhere = set.intersection(*names.values()) if names else set()
    return [r for r in rows if r["name"] in everywhere], sorted({r["name"] for r in rows} - everywhere)


def means(rows: Iterable[Row]) -> list[Row]:
    """Averages over the images of each setting, sorted by method, classes, steps, options and λ; peers last.

    As in CompressAI's published curves, PSNR is averaged in dB, and bpp as the mean of the images' bpp. A mean that
    includes a None is None.

    Returns
    -------
    list of Row
        With the columns of `SETTING` and `MEASURED`, and images (count), bytes, pixels (sums), model, level, device.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(_setting(row), []).append(row)
    summary = []
    for group in groups.values():
        first = group[0]
        mean: Row = {column: first[column] for column in ("model", "level", *SETTING)}
        mean["images"] = len(group)
        for column in ("bytes", "pixels"):
            mean[column] = sum(row[column] for row in group)
        mean["device"] = ", ".join(sorted({row["device"] for row in group}))
        for column in MEASURED:
            mean[column] = _mean([row[column] for row in group])
        summary.append(mean)
    return sorted(summary, key=_order)


def _order(point: Row) -> tuple[Any, ...]:
    """Method none first, peers last; along each curve by λ or quality."""
    curve = (point["method"], point["classes"] or 0, point["steps"] or 0, point["options"])
    return point["lambda"] is None, point["method"] != "none", *curve, point["lambda"] or 0.0, point["quality"] or 0.0


def _setting(row: Row) -> tuple[Any, ...]:
    return tuple(row[column] for column in SETTING)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.8g}" if isinstance(value, float) else str(value)


def _parse(columns: Sequence[str], cells: Sequence[str]) -> Row:
    row: Row = {}
    for column, cell in zip(columns, cells, strict=True):
        if column in _TEXT:
            row[column] = cell
        elif cell == "":
            row[column] = None
        else:
            row[column] = int(cell) if column in _WHOLE else float(cell)
    return row


def printable(text: str) -> str:
    """`text` with an underscore for each control character, which would break a table or be obeyed by a terminal."""
    return "".join(c if c.isprintable() else "_" for c in text)


def seconds_per_megapixel(points: Sequence[Row], what: str) -> float:
    """Mean seconds to "encode" or "decode" a megapixel, over the means of several settings."""
    return sum(p[f"seconds_{what}"] * 1e6 * p["images"] / p["pixels"] for p in points) / len(points)
