"""The command line with many files, pipes, signals and full disks. The codec is that of fake_codec."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import fake_codec
import pytest
import test_cli
from PIL import Image
from test_cli import Run, picture

from sgacodec import bitstream
from sgacodec.cli import batch, files, main, output, processes, storage, streams
from sgacodec.cli.files import Task
from sgacodec.refine.loop import Progress

run = test_cli.run
FAKE = [sys.executable, str(Path(fake_codec.__file__))]
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and device files")


@pytest.fixture
def photos(run: Run, tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "b.png", "sub/c.png"):
        picture(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def names(folder: str | Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


# ----------------------------------------------------------------------------------------------------- names


def test_out_dir_keeps_names(run: Run, photos: Path) -> None:
    """Outputs in --out-dir are named after their inputs, only known suffixes being replaced."""
    (photos / "a.png").rename(photos / "x.y.PNG")
    (photos / "b.png").rename(photos / "plain")
    result = run("encode", "photos/x.y.PNG", "photos/plain", "--out-dir", "new/out", "--device", "cpu")
    assert result.exit_code == 0
    assert names("new/out") == ["plain.sga", "x.y.sga"]
    Path("new/out/plain.sga").rename("new/out/plain")
    assert run("decode", "new/out/x.y.sga", "new/out/plain", "--out-dir", "back").exit_code == 0
    assert names("back") == ["plain.png", "x.y.png"]


def test_a_folder_stands_for_the_images_in_it(run: Run, photos: Path) -> None:
    """All images in subfolders are found; hidden ones are left out."""
    (photos / ".hidden.png").write_bytes(b"")
    for name, kind in (("m.mpo", "JPEG"), ("p.apng", "PNG")):
        Image.new("RGB", (20, 12)).save(photos / name, format=kind)
    assert run("encode", "photos", "--out-dir", "out", "--device", "cpu").exit_code == 0
    assert names("out") == ["a.sga", "b.sga", "m.sga", "p.sga", "sub/c.sga"]
    assert run("decode", "out", "--out-dir", "back").exit_code == 0
    assert names("back") == ["a.png", "b.png", "m.png", "p.png", "sub/c.png"]
    Path("empty").mkdir()
    assert run("encode", "empty", "--out-dir", "out").exit_code == 2


def test_two_inputs_never_share_an_output(run: Run, photos: Path) -> None:
    """Guards against two inputs that overwrite each other's output."""
    picture(photos / "a.bmp")
    result = run("encode", "photos/a.png", "photos/a.bmp", "--out-dir", "out")
    assert result.exit_code == 2
    assert "a.png" in result.stderr
    assert "a.bmp" in result.stderr
    assert not Path("out").exists()


@posix
@pytest.mark.parametrize(
    "line",
    [
        "decode a.png a.sga --out-dir .",
        "decode hard a.sga --out-dir .",
        "encode a.bmp a.sga --out-dir .",
        "encode a.png mask.sga --roi mask.sga",
        "encode a.png link.sga --roi mask.png",
        "encode a.png model.safetensors --model model.safetensors",
        "decode a.sga model.safetensors --model ./model.safetensors --format png",
        "encode --files-from list.sga --out-dir .",
    ],
)
def test_what_is_read_is_never_overwritten(run: Run, tmp_path: Path, line: str) -> None:
    """Guards against an input, a mask, a list or a model that is lost to the output of another input."""
    for name in ("a.png", "a.bmp", "mask.png"):
        picture(tmp_path / name)
    assert run("encode", "a.png", "a.sga", "--device", "cpu").exit_code == 0
    Path("mask.sga").write_bytes(Path("mask.png").read_bytes())
    Path("link.sga").symlink_to("mask.png")
    Path("hard").hardlink_to("a.png")
    Path("model.safetensors").write_bytes(b"weights")
    Path("list.sga").write_text("list.png")
    before = {name: Path(name).read_bytes() for name in names(".")}
    result = run(*line.split(" "), "--device", "cpu")
    assert result.exit_code == 2, result.output
    assert "would overwrite" in result.stderr
    assert {name: Path(name).read_bytes() for name in names(".")} == before


@pytest.mark.parametrize("blocked", ["out/sub", "out/a.sga/x"])
def test_an_output_without_a_place_is_told_before_any_work(run: Run, photos: Path, blocked: str) -> None:
    """Guards against an hour of refinement for a file that cannot be created."""
    Path(blocked).parent.mkdir(parents=True)
    Path(blocked).write_bytes(b"mine")
    result = run("encode", "photos", "--out-dir", "out", "--device", "cpu")
    assert result.exit_code == 2
    assert "folder" in result.stderr
    assert names("out") == [str(Path(blocked).relative_to("out"))]


@pytest.mark.parametrize("name", ["new/", "sub/new/"])
def test_the_name_of_a_folder_is_no_output(run: Run, photos: Path, name: str) -> None:
    """Guards against a file, without a suffix, in place of the folder that was meant."""
    result = run("encode", "photos/a.png", name, "--device", "cpu")
    assert result.exit_code == 2
    assert f"--out-dir {name}" in result.stderr
    assert not Path(name).exists()


def test_a_folder_that_cannot_be_read_is_told(run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against files that are left out without a word."""
    original = os.scandir

    def refusing(path: str) -> Iterator[os.DirEntry[str]]:
        if os.path.basename(path) == "sub":
            raise PermissionError(13, "Permission denied", path)
        return original(path)

    monkeypatch.setattr(os, "scandir", refusing)
    result = run("encode", "photos", "--out-dir", "out", "--device", "cpu")
    assert result.exit_code == 2
    assert "photos/sub' cannot be read: Permission denied" in result.stderr


def test_a_link_to_nothing_in_a_folder_is_a_failure(run: Run, photos: Path) -> None:
    """The others are encoded."""
    (photos / "d.png").symlink_to("missing.png")
    result = run("encode", "photos", "--out-dir", "out", "--device", "cpu")
    assert result.exit_code == 1
    assert "No such file" in result.stderr
    assert names("out") == ["a.sga", "b.sga", "sub/c.sga"]


@pytest.mark.parametrize("separator", [b"\n", b"\r\n", b"\0"])
def test_files_from_a_list(run: Run, photos: Path, separator: bytes) -> None:
    """Names are separated by line ends or by NUL characters."""
    (photos / "b.png").rename(photos / "b c.png")
    data = separator.join([b"photos/a.png", b"photos/b c.png", b""])
    Path("list").write_bytes(data)
    assert run("encode", "--files-from", "list", "--out-dir", "one").exit_code == 0
    assert run("encode", "photos/sub/c.png", "--files-from", "-", "--out-dir", "two", data=data).exit_code == 0
    assert names("one") == ["a.sga", "b c.sga"]
    assert names("two") == ["a.sga", "b c.sga", "c.sga"]
    assert run("encode", "--files-from", "list").exit_code == 2
    assert run("encode", "-", "--files-from", "-", data=data).exit_code == 2


def test_names_that_are_no_text(photos: Path) -> None:
    """Guards against a run that fails at a file name that is not valid text."""
    os.rename(photos / "a.png", os.fsencode(photos) + b"/\xe9\n.png")
    line = [*FAKE, "encode", "photos", "--out-dir", "out", "--device", "cpu"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = subprocess.run(line, capture_output=True, cwd=photos.parent, env=environment, check=False)
    assert done.returncode == 0
    assert done.stderr == b""
    assert len(done.stdout.splitlines()) == 3
    assert b"\xe9\n.sga" in os.listdir(os.fsencode(photos.parent / "out"))


# ----------------------------------------------------------------------------------------------------- batch


@pytest.mark.parametrize("jobs", [1, 2])
def test_one_bad_file_does_not_stop_the_rest(run: Run, photos: Path, jobs: int) -> None:
    """An input that fails is reported, and the others are coded."""
    picture(photos / "b.png", first=fake_codec.BAD_RED)
    line = ["encode", "photos/b.png", "photos/notes.txt", "photos/a.png", "photos/sub/c.png"]
    line += ["--out-dir", "out", "--json", "--device", "cpu", "--jobs", str(jobs)]
    if jobs == 1:
        result = run(*line)
        code, stdout, stderr = result.exit_code, result.stdout, result.stderr
    else:
        done = subprocess.run([*FAKE, *line], capture_output=True, text=True, cwd=photos.parent, check=False)
        code, stdout, stderr = done.returncode, done.stdout, done.stderr
    assert code == 1
    assert len(stderr.splitlines()) == 2
    reports = [json.loads(text) for text in stdout.splitlines()]
    failed = {Path(report["input"]).name for report in reports if "error" in report}
    assert (len(reports), failed) == (4, {"b.png", "notes.txt"})
    assert names(photos.parent / "out") == ["a.sga", "c.sga"]


def test_exit_code_of_a_batch(run: Run, photos: Path) -> None:
    """The exit code is that of the failures if all are of one kind, else 1."""
    run("encode", "photos", "--out-dir", "out", "--device", "cpu")
    Path("out/a.sga").write_bytes(b"damaged")
    assert run("decode", "out", "--out-dir", "back").exit_code == 3
    assert names("back") == ["b.png", "sub/c.png"]
    assert run("decode", "out", "absent.sga", "--out-dir", "back").exit_code == 1


def test_images_of_one_shape_share_a_batch_on_cuda(run: Run, photos: Path) -> None:
    """Guards against a GPU that refines small images one by one."""
    for i in range(6):
        picture(photos / f"d{i}.png", size=(20 + i, 12))
    for name in ("d2.png", "d4.png"):
        Image.new("L", (20, 12), 128).save(photos / name)
    picture(photos / "large.png", size=(65, 12))
    run("encode", "photos", "--out-dir", "out", "--device", "cuda")
    assert sorted(count for _, count, *_ in fake_codec.CALLS) == [1, 2, 3, 4]  # large, grey, colour
    assert len(names("out")) == 10


def test_small_images_share_a_batch_on_a_cpu(run: Run, photos: Path) -> None:
    """Small images are refined together, large ones and unrefined ones one by one."""
    for name in ("large1.png", "large2.png"):
        picture(photos / name, size=(500, 300))
    for options, counts in (((), [1, 1, 3]), (("--method", "none"), [1] * 5), (("--time-limit", "9"), [1] * 5)):
        fake_codec.CALLS.clear()
        run("encode", "photos", "--out-dir", "out", "--device", "cpu", *options)
        assert sorted(count for _, count, *_ in fake_codec.CALLS) == counts


def test_a_bad_image_does_not_take_its_batch_along(run: Run, photos: Path) -> None:
    """An image that fails is taken out of its batch, and the others are coded one by one."""
    picture(photos / "b.png", first=fake_codec.BAD_RED)
    assert run("encode", "photos", "--out-dir", "out", "--device", "cuda").exit_code == 1
    assert names("out") == ["a.sga", "sub/c.sga"]


class Partial(io.RawIOBase):
    """A stream that takes three bytes at a time, and every other time none, as one that does not block may do."""

    def __init__(self) -> None:
        self.taken = b""
        self.calls = 0

    def write(self, data: bytes) -> int | None:  # type: ignore[override]
        self.calls += 1
        if self.calls % 2:
            return None
        self.taken += bytes(data[:3])
        return min(3, len(data))


def test_a_stream_that_takes_a_part_gets_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a truncated file, and exit code 0, with PYTHONUNBUFFERED or a pipe that does not block."""
    waits: list[object] = []
    monkeypatch.setattr(streams.select, "select", lambda *given: waits.append(given))
    stream = Partial()
    streams.write_all(stream, b"0123456789")
    assert stream.taken == b"0123456789"
    assert len(waits) == 4


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_pipe_that_does_not_block_gets_all(photos: Path, unbuffered: str) -> None:
    """The same with a real pipe, which holds less than the output."""
    Image.effect_noise((300, 300), 90).save(photos / "large.png")
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    line = [*FAKE, "encode", "photos/large.png", "-", "--device", "cpu"]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(
        line, stdout=write_end, stderr=subprocess.PIPE, cwd=photos.parent, env=environment
    ) as started:
        os.close(write_end)
        time.sleep(2)  # it is full by now
        with os.fdopen(read_end, "rb") as pipe:
            data = pipe.read()
        assert started.wait(60) == 0
    assert len(data) > 2**16
    assert bitstream.read(data).width == 300


@posix
def test_standard_output_by_name(photos: Path) -> None:
    """Guards against an output that fails at the end as /dev/stdout is a pipe, and messages between its bytes."""
    line = [*FAKE, "encode", "photos/a.png", "/dev/stdout", "--device", "cpu"]
    done = subprocess.run(line, capture_output=True, cwd=photos.parent, check=False)
    assert done.returncode == 0
    assert bitstream.read(done.stdout).width == 20
    assert b"20" in done.stderr
    read_end, write_end = os.pipe()
    storage.write_bytes(f"/dev/fd/{write_end}", b"data")
    assert os.read(read_end, 10) == b"data"
    os.close(read_end)
    os.close(write_end)


@posix
def test_input_that_does_not_block(photos: Path) -> None:
    """Guards against taking "nothing yet" for the end of standard input."""
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    line = [*FAKE, "encode", "-", "out.sga", "--device", "cpu"]
    with subprocess.Popen(line, stdin=read_end, stderr=subprocess.PIPE, cwd=photos.parent) as started:
        data = (photos / "a.png").read_bytes()
        for piece in (data[:50], data[50:]):
            time.sleep(0.7)
            os.write(write_end, piece)
        os.close(write_end)
        assert started.wait(60) == 0
    os.close(read_end)
    assert bitstream.read((photos.parent / "out.sga").read_bytes()).width == 20


def test_a_killed_worker_does_not_hang_the_run(photos: Path) -> None:
    """Guards against waiting for ever for a worker that was killed, and against giving up the files of the others."""
    picture(photos / "b.png", first=fake_codec.DEADLY_RED)
    for name in "defgh":
        picture(photos / f"{name}.png")
    line = [*FAKE, "encode", "photos", "--out-dir", "out", "--device", "cpu", "--jobs", "2"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=photos.parent, timeout=60, check=False)
    assert done.returncode == 1
    assert names(str(photos.parent / "out")) == ["a.sga", "d.sga", "e.sga", "f.sga", "g.sga", "h.sga", "sub/c.sga"]
    assert done.stderr.count("died") == 1
    assert "a worker process died" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_overwrite_keeps_what_is_there(run: Run, photos: Path) -> None:
    """--no-overwrite skips what exists, without counting it as a failure."""
    Path("out").mkdir()
    Path("out/a.sga").write_bytes(b"mine")
    result = run("encode", "photos", "--out-dir", "out", "--no-overwrite", "--device", "cpu")
    assert result.exit_code == 0
    assert "skipped" in result.stderr
    assert Path("out/a.sga").read_bytes() == b"mine"
    assert sum(count for _, count, *_ in fake_codec.CALLS) == 2
    result = run("decode", "out/b.sga", "photos/a.png", "--no-overwrite", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["skipped"] is True
    assert run("encode", "photos", "--out-dir", "out", "--device", "cpu").exit_code == 0
    assert Path("out/a.sga").read_bytes() != b"mine"


# ----------------------------------------------------------------------------------------------- whole files


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against losing the old file when the disk is full."""
    target = tmp_path / "out.sga"
    target.write_bytes(b"old")

    def full(source: object, destination: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            storage.write_bytes(str(target), b"new")
    assert names(tmp_path) == ["out.sga"]
    assert target.read_bytes() == b"old"
    storage.write_bytes(str(target), b"new")
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["out.sga"]


@posix
def test_devices_and_links_stay_what_they_are(tmp_path: Path) -> None:
    """Guards against replacing /dev/null, or a link, by a regular file."""
    storage.write_bytes("/dev/null", b"new")
    assert not Path("/dev/null").is_file()
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    storage.write_bytes(str(tmp_path / "link"), b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    os.umask(mask := os.umask(0o027))
    storage.write_bytes(str(tmp_path / "fresh"), b"")
    assert (tmp_path / "fresh").stat().st_mode & 0o777 == 0o666 & ~mask


@posix
@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing(photos: Path, jobs: int, number: int, code: int) -> None:
    """Guards against half files after an interruption, and against workers that go on."""
    process = _started(photos, jobs)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # a terminal sends Ctrl-C to every process
    else:
        os.kill(process.pid, number)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == code
    assert "Traceback" not in stderr
    assert not Path("out").exists()
    _wait_until(lambda: not _session_lives(process.pid))


@posix
def test_workers_end_with_a_killed_run(photos: Path) -> None:
    """Guards against workers that keep their memory for ever when the main process is killed outright."""
    process = _started(photos, jobs=2)
    process.kill()
    try:
        _wait_until(lambda: not _session_lives(process.pid), seconds=10)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=10)
    assert not Path("out").exists()


@posix
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_killed_batch_is_resumed(photos: Path, jobs: str) -> None:
    """After kill -9 every .sga that is present is whole, and the same command with --no-overwrite makes the others."""
    for i in range(5):
        picture(photos / f"{i}.png")
    out = photos.parent / "out"
    line = [*FAKE, "encode", "photos", "--out-dir", "out", "--device", "cpu", "--jobs", jobs, "--no-overwrite"]
    line += ["--time-limit", "9"]  # one by one
    slow = {**os.environ, "FAKE_STEPS": "2"}
    process = subprocess.Popen(line, cwd=photos.parent, env=slow, stdout=subprocess.DEVNULL, start_new_session=True)
    _wait_until(lambda: out.is_dir() and len(names(out)) > 1)
    process.kill()
    process.wait()
    _wait_until(lambda: not _session_lives(process.pid))
    done = [name for name in names(out) if name.endswith(".sga")]
    assert 0 < len(done) < 8
    for name in done:
        assert bitstream.read((out / name).read_bytes()).width == 20
    again = subprocess.run([*line, "--json"], cwd=photos.parent, capture_output=True, check=True)
    assert sum(json.loads(text).get("skipped", False) for text in again.stdout.splitlines()) == len(done)
    assert len([name for name in names(out) if name.endswith(".sga")]) == 8


def _started(photos: Path, jobs: int) -> subprocess.Popen[str]:
    """A run that has begun to encode, which takes half a minute an image."""
    process = subprocess.Popen(
        [*FAKE, "encode", "photos", "--out-dir", "out", "--device", "cpu", "--jobs", str(jobs)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=photos.parent,
        env={**os.environ, "FAKE_STEPS": "300", "FAKE_READY": str(photos.parent / "ready")},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    _wait_until((photos.parent / "ready").exists)
    return process


def _wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _session_lives(group: int) -> bool:
    """Whether a process of the group runs. One that has ended and waits for its parent (a zombie) does not."""
    listing = subprocess.run(["ps", "-A", "-o", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listing.splitlines()]
    return any(int(row[0]) == group and not row[1].startswith("Z") for row in rows)


# ----------------------------------------------------------------------------------------------------- pipes


def test_through_a_pipe_and_back(photos: Path) -> None:
    """Standard input and output work as pipes."""
    data = (photos / "a.png").read_bytes()
    line = [*FAKE, "encode", "-", "-", "--device", "cpu"]
    encoded = subprocess.run(line, input=data, capture_output=True, check=True)
    assert bitstream.read(encoded.stdout).width == 20
    decoded = subprocess.run([*FAKE, "decode", "-"], input=encoded.stdout, capture_output=True, check=True)
    assert decoded.stdout.startswith(b"\x89PNG")


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs /dev/zero, a device that never ends")
@pytest.mark.parametrize("line", [["decode", "-", "out"], ["info", "-"]])
def test_a_pipe_that_never_ends(run: Run, photos: Path, line: list[str]) -> None:
    """Guards against waiting, and filling the memory, for ever."""
    assert run("encode", "photos/a.png", "photos/a.sga", "--device", "cpu").exit_code == 0
    pipe = ["sh", "-c", 'cat a.sga /dev/zero | "$@"', "sh", *FAKE, *line]
    done = subprocess.run(pipe, cwd=photos, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith("sgacodec: standard input: more than ")
    assert done.stderr.count("\n") == 1
    assert not (photos / "out").exists()


@posix
def test_a_folder_gives_regular_files_only(run: Run, photos: Path) -> None:
    """Guards against waiting for ever for a named pipe."""
    os.mkfifo(photos / "pipe.png")
    assert run("encode", "photos", "--out-dir", "out", "--device", "cpu").exit_code == 0
    assert names("out") == ["a.sga", "b.sga", "sub/c.sga"]


@posix
def test_nobody_listens(run: Run, photos: Path) -> None:
    """Guards against a traceback when the reader of a pipe ends first, as in `sgacodec info *.sga | head -1`."""
    assert run("encode", "photos/a.png", "photos/a.sga", "--device", "cpu").exit_code == 0
    for line in (["info", *["a.sga"] * 2000], ["decode", "a.sga", "-", "-q"]):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run([*FAKE, *line], cwd=photos, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
        os.close(write)
        assert done.returncode == 1
        assert done.stderr == ""


@posix
@pytest.mark.parametrize("full", [False, True])
def test_a_batch_goes_on_without_standard_output(run: Run, photos: Path, full: bool) -> None:
    """`sgacodec encode photos --out-dir out | head -1` encodes all; a full disk of the log is reported once."""
    if full and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full, a device that is always full")
    read, write = os.pipe()
    os.close(read)
    line = ["encode", "photos", "photos/notes.txt", "--out-dir", "out", "--device", "cpu"]
    for options in ([], ["--json"], ["--json", "--no-overwrite"]):
        with open("/dev/full", "wb") if full else open(write, "wb", closefd=False) as stdout:
            done = subprocess.run(
                [*FAKE, *line, *options],
                cwd=photos.parent,
                stdout=stdout,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        assert done.returncode == 1, done.stderr  # of notes.txt
        problems = [text for text in done.stderr.splitlines() if "notes.txt" not in text]
        assert problems == ["sgacodec: standard output: No space left on device"] * full
        assert names("out") == ["a.sga", "b.sga", "sub/c.sga"]
    os.close(write)


def test_a_broken_pipe_of_one_output_is_its_failure(run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a batch that ends in silence when a named pipe, or a store's connection, breaks."""
    whole = batch.write_bytes

    def write(destination: str, data: bytes) -> None:
        if destination.endswith("b.sga"):
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE), destination)
        whole(destination, data)

    monkeypatch.setattr(batch, "write_bytes", write)
    result = run("encode", "photos", "--out-dir", "out", "--device", "cpu")
    assert result.exit_code == 1
    assert result.stderr == f"sgacodec: {os.path.join('out', 'b.sga')}: Broken pipe\n"
    assert names("out") == ["a.sga", "sub/c.sga"]


def test_what_several_processes_are_given(run: Run, photos: Path) -> None:
    """--model auto needs no file; a path is made absolute; a missing device is wrong usage, before work starts."""
    assert batch.found_model("auto") == "auto"
    assert batch.found_model(None) is None
    assert batch.found_model("lite") == "lite"
    Path("own.safetensors").write_bytes(b"")
    assert batch.found_model("own.safetensors") == str(Path("own.safetensors").absolute())
    result = run("encode", "photos", "--out-dir", "out", "--jobs", "2", "--device", "cuda:99")
    assert result.exit_code == 2
    assert "no such device" in result.stderr
    assert not Path("out").exists()


@posix
def test_devices_and_links_in_folders_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against /dev/null, or a link to a writable place, being refused to anybody but root."""
    locked = tmp_path / "locked"
    locked.mkdir()
    (locked / "link.sga").symlink_to(tmp_path / "a.sga")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in (locked, Path("/dev")))
    files._check_place("/dev/null")
    files._check_place(str(locked / "link.sga"))
    with pytest.raises(click.UsageError, match="cannot create files"):
        files._check_place(str(locked / "a.sga"))


@posix
@pytest.mark.parametrize(
    ("closed", "line", "code", "said"),
    [
        ((0, 1, 2), ["decode", "a.sga", "new.png"], 0, ""),
        ((1,), ["decode", "a.sga", "-"], 1, "standard output is closed"),
        ((0,), ["decode", "-", "new.png"], 1, "standard input: the stream is closed"),
    ],
)
def test_closed_streams(run: Run, photos: Path, closed: tuple[int, ...], line: list[str], code: int, said: str) -> None:
    """Work is done without the streams that it does not need; a missing one that it needs is one clear line."""
    assert run("encode", "photos/a.png", "photos/a.sga", "--device", "cpu").exit_code == 0
    redirections = " ".join(f"{number}>&-" for number in closed)
    command = ["sh", "-c", f'"$@" {redirections}', "sh", *FAKE, *line]
    done = subprocess.run(command, cwd=photos, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr == (f"sgacodec: {said}\n" if said else "")
    assert (photos / "new.png").exists() == (code == 0)


def test_what_cannot_be_told_stops_no_work(run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing or full standard error loses messages, and nothing else."""
    (photos / "b.png").write_bytes(b"no image")
    full = open("/dev/full", "w") if os.path.exists("/dev/full") else None  # noqa: SIM115
    for stream in (None, full):
        for line, code in ((["encode", "photos", "--out-dir", "out", "--device", "cpu"], 1), (["wrong"], 2)):
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stdout", None)
                patch.setattr(sys, "stderr", stream)
                assert main(line, standalone_mode=False) == code
        assert names("out") == ["a.sga", "sub/c.sga"]
        shutil.rmtree("out")


@pytest.mark.parametrize("line", [["encode", "a.png", "-"], ["info", "-"], ["encode", "--files-from", "-"]])
def test_no_standard_streams_at_all(run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch, line: list[str]) -> None:
    """Guards against "internal error" where a stream is missing."""
    said = io.StringIO()
    for name, stream in (("stdin", None), ("stdout", None), ("stderr", said)):
        monkeypatch.setattr(sys, name, stream)
    assert main(line, standalone_mode=False) == (2 if "--files-from" in line else 1)
    assert "is closed" in said.getvalue()
    assert "internal" not in said.getvalue()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a device that is always full")
@pytest.mark.parametrize(
    "line", [["encode", "a.png", "-"], ["encode", "a.png", "/dev/full"], ["info", "a.sga"], ["--help"]]
)
def test_a_full_disk_is_one_clear_line(run: Run, photos: Path, line: list[str]) -> None:
    """The message names the full disk, not the image."""
    if line[0] == "info":
        assert run("encode", "photos/a.png", "photos/a.sga", "--device", "cpu").exit_code == 0
    device = [] if line[0] != "encode" else ["--device", "cpu"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*FAKE, *line, *device], cwd=photos, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr


@posix
@pytest.mark.parametrize("quiet", [False, True])
def test_progress_is_for_terminals_only(run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch, quiet: bool) -> None:
    """The bar is shown on a terminal only, and not with --quiet."""
    import pty

    monkeypatch.setenv("FAKE_STEPS", "3")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    line = ["encode", "photos/a.png", "a.sga", "--device", "cpu", *(["-q"] if quiet else [])]
    parent, child = pty.openpty()
    with open(child, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(sys, "stderr", terminal)
        main(line, standalone_mode=False)
    shown = _all_of(parent)
    assert ("0.500 bpp 30.00 dB" in shown) == (not quiet)
    assert ("a.png → a.sga" in shown) == (not quiet)
    assert run(*line).stderr == ""


def test_the_time_remaining_is_known_before_a_file_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a batch whose duration is unknown until its first images, refined together, are done."""
    monkeypatch.setattr(output, "is_terminal", lambda stream: True)
    out = output.Output()
    with output.progress(out, "encode", 10):
        assert out.bar is not None
        files, refinement = out.bar.tasks
        for step in range(3):
            output.step(out, Progress(step=step, steps=20, bpp=0.5, psnr=30.0, images=8))
        assert (files.completed, refinement.completed) == (0.8, 2)
        assert files.time_remaining is not None
        assert refinement.time_remaining is not None
        output.step(out, Progress(step=20, steps=20, bpp=0.5, psnr=30.0, images=8))
        output.file_done(out)
        assert files.completed == 8  # files that are done and not yet written have been counted
        for _ in range(8):
            output.file_done(out)
        assert files.completed == 9


def test_a_slow_file_does_not_hold_back_the_others() -> None:
    """Guards against finished files that a batch of several processes writes only behind a slower one."""
    tasks = [Task(str(number), str(number)) for number in range(6)]
    begun = time.monotonic()
    seen = []
    for outcome in processes.in_processes(_slow_first, [[task] for task in tasks], 2, output.Output()):
        seen.append((outcome.task, time.monotonic() - begun))
    assert seen[-1][0] == tasks[0]
    assert seen[-2][1] < seen[-1][1] - 2


def _slow_first(tasks: list[Task]) -> Iterator[batch.Outcome]:
    """Work of a worker: the first task takes a few seconds."""
    for task in tasks:
        time.sleep(4 if task.source == "0" else 0)
        yield batch.Outcome(task)


def test_the_time_remaining_is_known_before_a_worker_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against --jobs with a duration that is unknown until a worker has finished its first files."""
    monkeypatch.setattr(output, "is_terminal", lambda stream: True)
    seen = tmp_path / "seen"
    shown: list[float] = []

    def completed(out: output.Output, files: float) -> None:
        shown.append(files)
        if files == 0.5:  # both workers have done a quarter
            seen.touch()

    monkeypatch.setattr(output, "completed", completed)
    out = output.Output()
    tasks = [Task(str(seen), str(number)) for number in range(3)]
    with output.progress(out, "encode", 3):
        found = [*processes.in_processes(_wait_after_a_quarter, [tasks[:1], tasks[1:]], 2, out)]
    assert sorted(outcome.task.destination for outcome in found) == ["0", "1", "2"]
    assert 0.5 in shown
    assert max(shown) <= 3


def _wait_after_a_quarter(tasks: list[Task]) -> Iterator[batch.Outcome]:
    """Work of a worker, which does a quarter of its first task before the file `source` exists."""
    for task in tasks:
        processes.step(Progress(step=1, steps=4, bpp=0.5, psnr=30.0))
        limit = time.monotonic() + 60
        while not os.path.exists(task.source) and time.monotonic() < limit:
            time.sleep(0.02)
        yield batch.Outcome(task)


def _all_of(terminal: int) -> str:
    """What was written to a pseudo-terminal whose other end is closed."""
    text = b""
    with os.fdopen(terminal, "rb", buffering=0) as stream, contextlib.suppress(OSError):  # Linux: EIO at the end
        while chunk := stream.read(4096):
            text += chunk
    return text.decode()
