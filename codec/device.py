"""Compute devices: names, and whether they are fast in reduced precision. torch is imported on first use."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_NAME = re.compile(r"auto|cpu(:0)?|cuda(:\d+)?")


def check_device_name(name: str) -> None:
    """Raise ValueError unless a device can have this name."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"no such device: {name!r} (auto, cpu, cuda, cuda:0, …)")


def device_of(name: str) -> torch.device:
    """The device that a name stands for: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:1".

    Raises
    ------
    ValueError
        When there is no such device.
    """
    import torch

    check_device_name(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"no such device: {name!r} ({torch.cuda.device_count()} CUDA devices here)")
    return torch.device("cpu" if kind == "cpu" else name)  # not cpu:0, which compares as different


def reduced_precision(device: torch.device) -> bool:
    """Whether bfloat16 convolutions are faster than float32 ones: on CUDA, and on CPUs with AMX or AVX512_BF16."""
    import torch

    if device.type == "cuda":
        return True
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check is not None and check() for check in checks)


@contextlib.contextmanager
def deterministic_convolutions() -> Iterator[None]:
    """Context manager, or decorator, within which cuDNN computes the same bits in every run."""
    import torch

    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before
