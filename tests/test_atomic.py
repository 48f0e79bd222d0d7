"""Files are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sgacodec.atomic import atomic_file


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("foreign")])
def test_an_exception_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    """Guards against a half-written file, a lost old one, and temporary files that pile up."""
    path = tmp_path / "out"
    path.write_bytes(b"old")

    def fail() -> None:
        with atomic_file(path) as file:
            file.write(b"new")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out"]
    with atomic_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("sync", [False, True])
def test_bytes_are_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: bool) -> None:
    """Guards against an empty checkpoint after a crash of the machine."""
    calls = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda number: calls.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("replace") or replace(a, b))
    with atomic_file(tmp_path / "out", sync=sync) as file:
        file.write(b"new")
    assert calls == (["fsync", "replace"] if sync else ["replace"])
