"""Changed copies of model files, as damage or a hostile exporter makes them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from sgacodec.models import file as model_file
from sgacodec.models.catalogue import ModelError
from sgacodec.models.file import read_model

CLEAR_PEAK = Path("/proc/self/clear_refs")
Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], None]


def contents(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with safe_open(str(path), "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["sgacodec"])  # noqa: SIM118


def tampered(path: Path, target: Path, change: Change, *, new_id: bool) -> Path:
    """A changed copy; with `new_id` under the right id, as by somebody who knows how it is computed."""
    tensors, metadata = contents(path)
    change(tensors, metadata)
    if new_id:
        with contextlib.suppress(KeyError):  # no id can be computed
            metadata["id"] = model_file.model_id(tensors, metadata)
    data = save({k: v.contiguous() for k, v in sorted(tensors.items())}, metadata={"sgacodec": json.dumps(metadata)})
    target.write_bytes(data)
    return target


def assert_refused(path: Path) -> None:
    with pytest.raises(ModelError) as error:
        read_model(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def set_tensor(key: str, value: torch.Tensor) -> Change:
    return lambda tensors, _: tensors.__setitem__(key, value)


def change_tensor(key: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors, _: tensors.__setitem__(key, function(tensors[key]))


def set_metadata(key: str, value: Any) -> Change:
    return lambda _, metadata: metadata.__setitem__(key, value)


def drop(key: str) -> Change:
    return lambda tensors, _: tensors.__delitem__(key)


def peak() -> int:
    """Largest memory of this process since the peak was reset, MiB."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) >> 10
