"""Find models: built in, in the user's data folder, or by path. Reads headers only; no torch."""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIX = ".safetensors"
FORMAT = "sgacodec-model-1"
_MAX_HEADER = 1 << 22  # bytes; a model has some hundred tensors, with about 100 bytes of header each


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
        When it is not a model file.
    """
    try:
        with path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if not 2 <= size <= _MAX_HEADER:
                raise ValueError("no safetensors header")
            header = json.loads(stream.read(size))
        metadata = json.loads(header["__metadata__"]["sgacodec"])
        if metadata["format"] != FORMAT:
            raise ModelError(f"{path}: a model of another format ({metadata['format']})")
        float(min(metadata["anchors"]))  # TypeError or ValueError unless they are numbers
        return ModelInfo(str(metadata["name"]), path, str(metadata["id"]), metadata["architecture"], metadata)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path}: not a model file of sgacodec") from None


def list_models() -> list[ModelInfo]:
    """Built-in models, then those in the user's folder; files that cannot be read are left out."""
    found = []
    for folder in (builtin_folder(), user_folder()):
        if folder.is_dir():
            for path in sorted(folder.glob(f"*{SUFFIX}")):
                try:
                    found.append(read_info(path))
                except ModelError:
                    continue
    return found


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
    raise ModelNotFoundError(f"no model named {name!r} (known: {known}; looked in {_folders()})")


def find_model_by_id(model_id: bytes) -> ModelInfo:
    """The model with this id, 4 bytes as in a .sga file.

    Raises
    ------
    ModelNotFoundError
    """
    for info in list_models():
        if info.id == model_id.hex():
            return info
    raise ModelNotFoundError(
        f"the file needs the model with id {model_id.hex()}, which is not installed (looked in {_folders()}; "
        "give its file with --model, or import it)"
    )


def _folders() -> str:
    return f"{builtin_folder()} and {user_folder()}"
