"""Compute devices: chosen by name, and what they are fast at."""

from __future__ import annotations

import torch


def device_of(name: str) -> torch.device:
    """The device that a name stands for: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:1".

    Raises
    ------
    ValueError
        When there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise ValueError(f"no such device: {name!r} (auto, cpu, cuda, cuda:0, …)")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"no such device: {name!r} ({torch.cuda.device_count()} CUDA devices here)")
    return device


def reduced_precision(device: torch.device) -> bool:
    """Whether bfloat16 convolutions are faster than float32 ones: on CUDA, and on CPUs with matrix tiles (AMX)."""
    if device.type == "cuda":
        return True
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported and supported())
