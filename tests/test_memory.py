"""Freed memory stays with the process while a refinement runs, and only then."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from sgacodec.memory import freed_memory_kept, give_back

SIZE = 50 << 20  # floats, 200 MiB: more than glibc keeps by itself
STATUS = Path("/proc/self/status")


def resident() -> int:
    """Memory of this process, MiB."""
    return int(STATUS.read_text().split("VmRSS:")[1].split()[0]) >> 10


glibc_on_linux = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not STATUS.exists(),
    reason="other C libraries are left as they are: needs glibc on Linux",
)


@glibc_on_linux
def test_what_is_freed_stays_until_the_end() -> None:
    before = resident()
    torch.ones(SIZE)
    assert resident() < before + 50
    with freed_memory_kept():
        torch.ones(SIZE)
        assert resident() > before + 150
    assert resident() < before + 50


@glibc_on_linux
def test_what_is_free_between_other_tensors_is_given_back() -> None:
    """Else: tensors of many sizes leave holes, and a large picture takes the memory of its tiles over and over."""
    with freed_memory_kept():
        freed, kept = torch.ones(SIZE), torch.ones(1 << 20)
        before = resident()
        del freed
        assert resident() > before - 50
        give_back()
        assert resident() < before - 150
        assert float(kept.sum()) == 1 << 20


def test_errors_pass_through() -> None:
    with pytest.raises(KeyError), freed_memory_kept():
        raise KeyError
