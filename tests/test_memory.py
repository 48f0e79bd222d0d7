"""Freed memory stays with the process while a refinement runs, and is released afterwards."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from sgacodec.memory import keep_freed_memory, release_free_memory

SIZE = 50 << 20  # floats, 200 MiB: more than glibc keeps by default
STATUS = Path("/proc/self/status")


def resident() -> int:
    """Memory of this process, MiB."""
    return int(STATUS.read_text().split("VmRSS:")[1].split()[0]) >> 10


glibc_on_linux = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not STATUS.exists(),
    reason="needs glibc on Linux: malloc is configured there only",
)


@glibc_on_linux
def test_freed_memory_is_kept_until_the_context_ends() -> None:
    """Guards against slow steps (memory not kept) and against a process that stays large (not released)."""
    before = resident()
    torch.ones(SIZE)
    assert resident() < before + 50
    with keep_freed_memory():
        torch.ones(SIZE)
        assert resident() > before + 150
    assert resident() < before + 50


@glibc_on_linux
def test_free_memory_between_other_tensors_is_released() -> None:
    """Guards against memory that grows with each tile of a large picture, by fragmentation."""
    with keep_freed_memory():
        freed, kept = torch.ones(SIZE), torch.ones(1 << 20)
        before = resident()
        del freed
        assert resident() > before - 50
        release_free_memory()
        assert resident() < before - 150
        assert float(kept.sum()) == 1 << 20


def test_errors_pass_through() -> None:
    """Guards against errors of a refinement that are lost in the context manager."""
    with pytest.raises(KeyError), keep_freed_memory():
        raise KeyError
