"""Files are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sgacodec.atomic import atomic_file, write_whole


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


def test_bytes_are_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an empty file after a crash of the machine."""
    calls = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda number: calls.append(os.fstat(number).st_size))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("replace") or replace(a, b))
    with atomic_file(tmp_path / "out") as file:
        file.write(b"new")
    assert calls == [3, "replace"]


@pytest.mark.skipif(os.name != "posix", reason="needs symbolic links")
def test_a_link_is_followed(tmp_path: Path) -> None:
    """Guards against a checkpoint that is not where its link points, for example on a larger disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    for data in (b"first", b"second"):
        write_whole(tmp_path / "out", data)
        assert (tmp_path / "out").is_symlink()
        assert (tmp_path / "disk" / "out").read_bytes() == data


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
@pytest.mark.parametrize("mode", [0o600, 0o664, 0o444])
def test_permissions_are_kept(tmp_path: Path, mode: int) -> None:
    """Guards against a private file that everybody can read after it was overwritten."""
    path = tmp_path / "out"
    path.write_bytes(b"old")
    path.chmod(mode)
    with atomic_file(path) as file:
        (temporary,) = tmp_path.glob(".*")
        assert temporary.stat().st_mode & 0o777 == mode
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == mode
