"""The table of a sweep: one row per image and setting, in a TSV file.

    append_row ─► results.tsv ─ repair, read_rows ─► rows ─ means ─► one row per setting

Each row is flushed to the disk when it is written, so a killed sweep loses at most the row being written.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # by column: str, int, float, or None (unknown, undefined or infinite)

_TEXT = ("name", "device", "model", "model_id", "method", "image_id", "version")
_WHOLE = ("pixels", "bytes", "level", "classes", "steps", "seed", "crop")
COLUMNS = (
    "name",  # of the image file
    "pixels",
    "bytes",  # of the .sga file
    "bpp",  # 8·bytes/pixels
    "psnr",  # dB, of the decoded 8-bit image; empty if identical to the original
    "ms_ssim",  # empty when a side is below 161 pixels
    "rd_loss",  # λ·255²·MSE + bpp of the file
    "rd_loss_unrefined",  # rd_loss plus the gain that the encoder reports; equal to rd_loss for method none
    "seconds_encode",
    "seconds_decode",
    "device",
    "model",
    "model_id",
    "lambda",
    "level",
    "method",
    "classes",
    "steps",
    "seed",
    "crop",  # side of the central square that was measured; empty for the whole image
    "image_id",  # first 12 hex digits of the image file's SHA-256
    "version",  # of sgacodec
)
SETTING = ("lambda", "method", "classes", "steps", "seed", "crop", "model_id")  # columns that identify a setting
MEASURED = ("bpp", "psnr", "ms_ssim", "rd_loss", "rd_loss_unrefined", "seconds_encode", "seconds_decode")


def key(row: Row) -> tuple[str, ...]:
    """Image and setting of a row as they are written; equal for repeated measurements."""
    return tuple(_cell(row[column]) for column in ("name", "image_id", *SETTING))


def rounded(row: Row) -> Row:
    """The row with numbers rounded as in the file, so that resumed and uninterrupted sweeps give equal means."""
    return _parse([_cell(row[column]) for column in COLUMNS])


def append_row(path: Path, row: Row) -> None:
    """Append a row to the table and flush it to the disk; a new table begins with the header."""
    line = "\t".join(_cell(row[column]) for column in COLUMNS) + "\n"
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        if file.tell() == 0:
            line = "\t".join(COLUMNS) + "\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


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
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a table of sgacodec eval (not text)") from error
    if lines == [""]:
        return []
    if tuple(lines[0].split("\t")) != COLUMNS:
        raise ValueError(f"{path}: not a table of this version of sgacodec eval (other columns)")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        if not line:
            continue
        try:
            rows.append(_parse(line.split("\t")))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: damaged row") from error
    return list({(row["name"], *_setting(row)): row for row in rows}.values())


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
    """Averages over the images of each setting, sorted by method, classes, steps and λ.

    As in CompressAI's published curves, PSNR is averaged in dB, and bpp as the mean of the images' bpp. A mean that
    includes a None is None.

    Returns
    -------
    list of Row
        With the columns of `SETTING` and `MEASURED`, and images (count), bytes (sum), model, level, device.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(_setting(row), []).append(row)
    summary = []
    for group in groups.values():
        first = group[0]
        mean: Row = {column: first[column] for column in ("model", "level", *SETTING)}
        mean["images"] = len(group)
        mean["bytes"] = sum(row["bytes"] for row in group)
        mean["device"] = ", ".join(sorted({row["device"] for row in group}))
        for column in MEASURED:
            mean[column] = _mean([row[column] for row in group])
        summary.append(mean)
    return sorted(summary, key=lambda r: (r["method"] != "none", r["method"], r["classes"], r["steps"], r["lambda"]))


def _setting(row: Row) -> tuple[Any, ...]:
    return tuple(row[column] for column in SETTING)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.8g}" if isinstance(value, float) else str(value)


def _parse(cells: Sequence[str]) -> Row:
    row: Row = {}
    for column, cell in zip(COLUMNS, cells, strict=True):
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
