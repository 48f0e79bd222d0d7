"""URLs of remote stores on the command line. The store is that of fsspec in memory; the codec is that of fake_codec."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import test_cli
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from test_cli import Run, picture

from sgacodec.cli import urls

run = test_cli.run


@pytest.fixture
def store(tmp_path: Path, run: Run) -> Iterator[MemoryFileSystem]:
    """A store with photos/a.png, photos/sub/b.png and files that are no images."""
    fs = fsspec.filesystem("memory")
    for name in ("a.png", "sub/b.png", ".hidden/c.png", "notes.txt"):
        fs.pipe_file(f"/photos/{name}", picture(tmp_path / "one.png").read_bytes())
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def stored(fs: MemoryFileSystem, folder: str) -> list[str]:
    return sorted(name.removeprefix(f"/{folder}/") for name in fs.find(f"/{folder}"))


def test_a_folder_of_a_store_and_back(run: Run, store: MemoryFileSystem) -> None:
    """`encode`, `info` and `decode` read and write URLs; a prefix stands for the images below it."""
    result = run("encode", "memory://photos", "--out-dir", "memory://small/x", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    assert [json.loads(line)["input"] for line in result.stdout.splitlines()] == [
        "memory://photos/a.png",
        "memory://photos/sub/b.png",
    ]
    assert stored(store, "small") == ["x/a.sga", "x/sub/b.sga"]
    result = run("info", "--json", "memory://small/x/a.sga")
    assert json.loads(result.stdout)["width"] == 20
    assert run("decode", "memory://small", "--out-dir", "memory://back").exit_code == 0
    assert stored(store, "back") == ["x/a.png", "x/sub/b.png"]
    with store.open("/back/x/a.png") as back, store.open("/photos/a.png") as original:
        assert Image.open(back).tobytes() == Image.open(original).tobytes()


def test_single_files_between_stores(run: Run, store: MemoryFileSystem, tmp_path: Path) -> None:
    """IN and OUT may be URLs or paths, also file:// URLs, and so may --files-from."""
    assert run("encode", "memory://photos/a.png", f"file://{tmp_path}/new/a.sga", "--device", "cpu").exit_code == 0
    assert run("decode", "new/a.sga", "memory://back/a.png").exit_code == 0
    assert stored(store, "back") == ["a.png"]
    store.pipe_file("/list", b"memory://photos/a.png\nmemory://photos/sub/b.png\n")
    assert run("encode", "--files-from", "memory://list", "--out-dir", "out", "--device", "cpu").exit_code == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["a.sga", "b.sga"]
    (tmp_path / "list").write_text("memory://photos/a.png\n")
    line = ["--files-from", f"file://{tmp_path}/list", "--out-dir", "listed", "--device", "cpu"]
    assert run("encode", *line).exit_code == 0


@pytest.mark.parametrize(
    ("url", "name", "folder", "inner"),
    [
        ("s3://b/photo.png", "photo.png", "s3://b/x/", "s3://b/x/y.png"),
        ("https://a.org/photo.png?size=1", "photo.png", "https://a.org/x", "https://a.org/x/y.png"),
        ("simplecache::s3://b/photo.png", "photo.png", "simplecache::s3://b/x", "simplecache::s3://b/x/y.png"),
        ("zip://sub/photo.png::s3://b/a.zip", "photo.png", "zip://::s3://b/a.zip", "zip://y.png::s3://b/a.zip"),
        ("zip://p.png::simplecache::s3://b/a", "p.png", "zip://x::c::s3://b/a", "zip://x/y.png::c::s3://b/a"),
    ],
)
def test_names_in_urls(url: str, name: str, folder: str, inner: str) -> None:
    """The last part of a URL names the output; in a chained one, that of the first part with a path."""
    assert urls.file_name(url) == name
    assert urls.join(folder, "y.png") == inner


def test_an_archive_is_a_folder(run: Run, tmp_path: Path) -> None:
    """Files in a zip are inputs."""
    picture(tmp_path / "a.png")
    with zipfile.ZipFile("photos.zip", "w") as archive:
        archive.write("a.png", "sub/a.png")
    for name in (f"zip://::file://{tmp_path}/photos.zip", f"zip://sub/a.png::file://{tmp_path}/photos.zip"):
        assert run("encode", name, "--out-dir", "out", "--device", "cpu").exit_code == 0
    assert sorted(str(path.relative_to("out")) for path in Path("out").rglob("*.sga")) == ["a.sga", "sub/a.sga"]


@pytest.mark.parametrize("count", [2, 40])
def test_no_overwrite_in_a_store(run: Run, store: MemoryFileSystem, count: int) -> None:
    """--no-overwrite skips objects that exist, whether they are few or many."""
    for i in range(count - 2):
        store.cp_file("/photos/a.png", f"/photos/{i}.png")
    line = ["encode", "memory://photos", "--out-dir", "memory://out", "--device", "cpu", "--no-overwrite", "--json"]
    assert run(*line).exit_code == 0
    store.rm_file("/out/a.sga")
    store.pipe_file("/out/sub/b.sga", b"mine")
    result = run(*line)
    skipped = [json.loads(text).get("skipped", False) for text in result.stdout.splitlines()]
    assert sorted(skipped) == [False] + [True] * (count - 1)
    assert store.cat_file("/out/sub/b.sga") == b"mine"


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("encode memory://photos/absent.png a.sga", 1, "memory://photos/absent.png: No such file or directory"),
        ("encode memory://photos/notes.txt memory://notes.sga", 0, ""),
        ("decode memory://photos/a.png memory://x.jpg", 3, "memory://photos/a.png: not a .sga file"),
        ("info memory://absent.sga", 1, "memory://absent.sga: No such file or directory"),
        ("encode nowhere://a.png a.sga", 1, "nowhere://a.png: Protocol not known: nowhere"),
        ("encode a.png memory://photos/a.png", 2, "is not named like an .sga file"),
        ("encode memory://photos/a.png https://example.org/a.sga", 2, "cannot be written"),
        ("encode memory://photos memory:///photos/a.png --out-dir memory://o", 2, "would both be written"),
        ("decode memory://photos/a.png memory:///photos/a.png", 2, "is the input itself"),
        ("encode memory://photos a.sga", 2, "is a folder"),
    ],
)
def test_mistakes_are_one_line(run: Run, store: MemoryFileSystem, line: str, code: int, said: str) -> None:
    """Guards against tracebacks and silence where a store or an object does not exist."""
    result = run(*line.split(), *(["--device", "cpu"] if line.startswith("encode") else []))
    assert result.exit_code == code, result.output
    assert said in result.stderr
    assert bool(said) == (len(result.stderr.splitlines()) > 0)


def test_a_store_that_fails_loses_one_file(run: Run, store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the store while it writes is one line, and the other files are written."""
    original = MemoryFileSystem.pipe_file

    def failing(self: MemoryFileSystem, path: str, value: bytes, **options: Any) -> None:
        if path.endswith("a.sga"):
            raise RuntimeError("AccessDenied:\n no permission")
        original(self, path, value, **options)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", failing)
    result = run("encode", "memory://photos", "--out-dir", "memory://out", "--device", "cpu")
    assert result.exit_code == 1
    assert result.stderr == "sgacodec: memory://out/a.sga: AccessDenied: no permission\n"
    assert stored(store, "out") == ["sub/b.sga"]


def test_stores_without_a_single_put_get_a_moved_file(store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against half a file under its own name when a store like SFTP fails while a file is written."""
    monkeypatch.setattr(urls, "_SINGLE_PUT", frozenset())
    urls.write("memory://new/sub/a.sga", b"old")
    assert store.cat_file("/new/sub/a.sga") == b"old"
    original = MemoryFileSystem.pipe_file

    def broken(self: MemoryFileSystem, path: str, value: bytes, **options: Any) -> None:
        original(self, path, value[:1], **options)
        raise OSError("connection lost")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", broken)
    with pytest.raises(OSError, match="connection lost"):
        urls.write("memory://new/sub/a.sga", b"new")
    assert stored(store, "new") == ["sub/a.sga"]
    assert store.cat_file("/new/sub/a.sga") == b"old"


@pytest.mark.parametrize("name", ["photo.png", "./a://b", "C:/photo.png", "-", "file:///a.png", "a:b", "ab::c.png"])
def test_what_is_no_url(name: str) -> None:
    """Guards against local names that are sent to fsspec."""
    assert not urls.is_url(name)
    assert urls.is_url("simplecache::s3://bucket/photo.png")


class StatusError(Exception):
    """What aiohttp raises for a status."""

    def __init__(self, status: int) -> None:
        self.status = status


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (StatusError(404), "No such file or directory"),
        (StatusError(403), "the server answers with status 403"),
        (ConnectionRefusedError("Cannot connect to host"), "Cannot connect to host"),
        (None, "No such file or directory"),
    ],
)
def test_what_a_web_server_answers_is_told(cause: Exception | None, message: str) -> None:
    """fsspec turns all errors of HTTP into FileNotFoundError; only one of them says that there is no file."""
    with pytest.raises(OSError, match=message), urls._explained("http://host/a.sga"):
        raise FileNotFoundError("http://host/a.sga") from cause
