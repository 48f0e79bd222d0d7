"""Find models: built in, in the user's data folder, or by path. Reads headers only; no torch."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..networks.architecture import ARCHITECTURES, architecture_from_dict
from ..settings import LEVELS

Read = TypeVar("Read")

SUFFIX = ".safetensors"
FORMAT = "sgacodec-model-1"
ANCHOR_RANGE = 1e-6, 1e6  # the least and the greatest λ of a model
_MAX_HEADER = 1 << 22  # bytes; a model has some hundred tensors, with about 100 bytes of header each
_MAX_SIZE = 1 << 31  # bytes of a model file, which is read into memory


class ModelNotFoundError(LookupError):
    """No model has the name or id; the message names it and the folders that were searched."""

    def __str__(self) -> str:
        return str(self.args[0])


class ModelError(ValueError):
    """A file is not a model of this program, or is damaged."""


@dataclass(frozen=True)
class ModelInfo:
    """A model file and its JSON metadata."""

    name: str
    path: Path
    id: str
    architecture: dict[str, Any]
    metadata: dict[str, Any]


def builtin_folder() -> Path:
    """Folder of the models that are installed with the package."""
    weights = importlib.import_module("..weights", __package__)
    return Path(next(iter(weights.__path__)))


def user_folder() -> Path:
    """Folder of imported and trained models; the environment variable SGACODEC_MODELS overrides it."""
    if os.environ.get("SGACODEC_MODELS"):
        return Path(os.environ["SGACODEC_MODELS"])
    import platformdirs

    return Path(platformdirs.user_data_dir("sgacodec")) / "models"


def read_info(path: Path) -> ModelInfo:
    """Read the metadata of a model file.

    Raises
    ------
    ModelError
        When it is not a model file, or truncated, or entries of its metadata are missing or of the wrong type.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for a writer
            raise ModelError(f"{path}: not a regular file")
        if status.st_size > _MAX_SIZE:
            raise ModelError(f"{path}: too large for a model file")
        with path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if not 2 <= size <= _MAX_HEADER:
                raise ValueError("no safetensors header")
            header = json.loads(stream.read(size))
        metadata = json.loads(header["__metadata__"]["sgacodec"])
        if metadata["format"] != FORMAT:
            raise ModelError(f"{path}: a model of another format ({metadata['format']})")
        stored = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        if status.st_size < 8 + size + stored:
            raise ModelError(f"{path}: truncated, {status.st_size} bytes of {8 + size + stored}")
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from None
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path}: not a model file of sgacodec") from None
    problem = _problem(metadata)
    if problem:
        raise ModelError(f"{path}: damaged model file ({problem})")
    return ModelInfo(metadata["name"], path, metadata["id"], metadata["architecture"], metadata)


def _problem(metadata: dict[str, Any]) -> str:
    """Which of the entries that every command reads is missing or wrong; empty where none is."""
    get = metadata.get
    anchors, levels, model_id, bits = get("anchors"), get("levels"), get("id"), get("bits", [])
    if not isinstance(get("name"), str):
        return "name: not a text"
    if not isinstance(model_id, str) or not re.fullmatch("[0-9a-f]{8}", model_id):
        return "id: not eight hexadecimal digits"
    if not isinstance(anchors, list) or not anchors or not all(type(a) in (int, float) for a in anchors):
        return "anchors: not a list of numbers"
    low, high = ANCHOR_RANGE
    if not (low <= anchors[0] and anchors[-1] <= high and all(a < b for a, b in itertools.pairwise(anchors))):
        return f"anchors: not ascending numbers from {low:g} to {high:g}"
    if type(levels) is not int or not 1 <= levels <= LEVELS:
        return f"levels: not a number from 1 to {LEVELS}"
    if not isinstance(bits, list) or not all(type(b) is int for b in bits):
        return "bits: not a list of integers"
    try:
        architecture_from_dict(get("architecture"))
    except ValueError as error:
        return str(error)
    return ""


def survey() -> list[tuple[Path, ModelInfo | ModelError]]:
    """Every model file, the built-in ones, then those in the user's folder: its metadata, or why it has none."""
    found: list[tuple[Path, ModelInfo | ModelError]] = []
    for folder in (builtin_folder(), user_folder()):
        for path in sorted(folder.glob(f"*{SUFFIX}")) if os.path.isdir(folder) else []:
            try:
                found.append((path, read_info(path)))
            except ModelError as error:
                found.append((path, error))
    return found


def list_models() -> list[ModelInfo]:
    """The models of :func:`survey` that can be read."""
    return [info for _, info in survey() if isinstance(info, ModelInfo)]


def builtin_models() -> list[ModelInfo]:
    """Those of them that are installed with the package."""
    return [info for info in list_models() if info.path.parent == builtin_folder()]


def reserved_names() -> set[str]:
    """Names of models that are built in, or may be in another version."""
    return {*ARCHITECTURES, *(info.name for info in builtin_models())}


def find_model(name: str) -> Path:
    """File of a model by its name, or by its path, which has a folder or the suffix .safetensors.

    Raises
    ------
    ModelNotFoundError
    """
    if os.sep in name or name.endswith(SUFFIX):
        if Path(name).is_file():
            return Path(name)
        raise ModelNotFoundError(f"no model file {name}")
    for info in list_models():
        if info.name == name:
            return info.path
    known = ", ".join(info.name for info in list_models()) or "none"
    hint = f"; the file of a model has a name that ends in {SUFFIX}" if Path(name).is_file() else ""
    raise ModelNotFoundError(f"no model named {name!r} (known: {known}; looked in {_folders()}){hint}")


def read_by_id(model_id: bytes, read: Callable[[Path], Read]) -> Read:
    """Read the model with this id, 4 bytes as in a .sga file; of several files with the id, the first that is sound.

    Raises
    ------
    ModelNotFoundError
    ModelError
        That of the first file, where `read` refuses all.
    """
    refused: ModelError | None = None
    for info in list_models():
        if info.id == model_id.hex():
            try:
                return read(info.path)
            except ModelError as error:
                refused = refused or error
    if refused is not None:
        raise refused
    raise ModelNotFoundError(
        f"the file needs the model with id {model_id.hex()}, which is not installed (looked in {_folders()}; "
        "give its file with --model, or import it)"
    )


def _folders() -> str:
    return f"{builtin_folder()} and {user_folder()}"
