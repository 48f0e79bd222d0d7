"""`--engine ray` on a cluster of two workers on this machine. The codec is that of fake_codec, also in the workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fake_codec
import pytest
import test_cli
import test_cli_batch
from test_cli import Run, picture
from test_cli_batch import FAKE, names

from sgacodec import bitstream

run = test_cli.run
photos = test_cli_batch.photos
ray = pytest.importorskip("ray", reason="needs Ray: pip install 'sgacodec[ray]'")


def worker_environment(folder: Path) -> dict[str, str]:
    """Environment in which Ray's workers start with the fake codec."""
    (folder / "sitecustomize.py").write_text(
        "import sys\n\nif 'default_worker.py' in ' '.join(sys.orig_argv):\n    import fake_codec\n\n"
        "    fake_codec.stand_in()\n"
    )
    path = os.pathsep.join([str(folder), str(Path(fake_codec.__file__).parent), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0", "FAKE_DEAD": str(folder / "dead")}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Connect this process to a new cluster, which `--engine ray` then uses."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in worker_environment(tmp_path_factory.mktemp("start")).items():
            patch.setenv(name, value)
        ray.init(
            address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
        )
        yield
        ray.shutdown()


def test_a_batch_on_two_workers(cluster: None, run: Run, photos: Path) -> None:
    """Workers write the files; bad inputs are reported with the exit code; --no-overwrite resumes; decode works."""
    picture(photos / "bad.png", first=fake_codec.BAD_RED)
    line = ["encode", "photos", "photos/notes.txt", "--out-dir", "out", "--engine", "ray", "--json"]
    result = run(*line, "--device", "cpu")
    assert result.exit_code == 1
    reports = {Path(report["input"]).name: report for report in map(json.loads, result.stdout.splitlines())}
    assert reports["bad.png"]["error"] == f"{photos}/bad.png: this picture cannot be encoded"
    assert reports["notes.txt"]["error"] == f"{photos}/notes.txt: not an image of a known format"
    assert result.stderr.count("\n") == 2
    assert reports["a.png"]["bytes"] == Path("out/a.sga").stat().st_size
    assert names("out") == ["a.sga", "b.sga", "sub/c.sga"]
    assert fake_codec.OPENED == []  # nothing was done here

    Path("out/a.sga").unlink()
    Path("out/b.sga").write_bytes(b"mine")
    result = run("encode", "photos/a.png", f"file://{photos}/b.png", *line[3:], "--no-overwrite", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert bitstream.read(Path("out/a.sga").read_bytes()).width == 20
    assert Path("out/b.sga").read_bytes() == b"mine"

    result = run("decode", "out", "--out-dir", "back", "--engine", "ray", "--jobs", "2", "--device", "cpu")
    assert result.exit_code == 3  # b.sga
    assert names("back") == ["a.png", "sub/c.png"]


def test_a_lost_worker_is_replaced(cluster: None, run: Run, photos: Path) -> None:
    """A task whose worker dies is started again; one whose workers always die fails, and the others are done."""
    picture(photos / "once.png", first=fake_codec.DEADLY_ONCE_RED)
    result = run("encode", "photos", "--out-dir", "out", "--engine", "ray", "--device", "cpu")
    assert result.exit_code == 0, result.output
    picture(photos / "always.png", first=fake_codec.DEADLY_RED)
    result = run("encode", "photos", "--out-dir", "out", "--engine", "ray", "--device", "cpu")
    assert result.exit_code == 1
    assert result.stderr == f"sgacodec: {photos}/always.png: its worker was lost 4 times (out of memory?)\n"
    assert names("out") == ["a.sga", "b.sga", "once.sga", "sub/c.sga"]


def test_relative_names(cluster: None, run: Run, photos: Path) -> None:
    """A mask and a model are found by workers, whose working folder is another one."""
    picture(photos.parent / "mask.png")
    line = ["encode", "photos/a.png", "--out-dir", "out", "--engine", "ray", "--device", "cpu", "--roi", "mask.png"]
    result = run(*line)
    assert result.exit_code == 0, result.output


def test_a_cluster_of_this_machine_without_a_gpu(cluster: None, run: Run, photos: Path) -> None:
    """Guards against waiting for ever."""
    line = ["encode", "photos", "--out-dir", "out", "--engine", "ray", "--address", "local", "--device", "cuda"]
    result = run(*line)
    assert result.exit_code == 2
    assert "no GPU" in result.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("encode - out.sga --engine ray", "cannot use standard input"),
        ("decode a.sga b.png --engine ray --device cuda:1", "assigns the GPUs itself"),
        ("decode a.sga b.png --address auto", "--address has no meaning without --engine ray"),
    ],
)
def test_wrong_usage(run: Run, line: str, said: str) -> None:
    """Options that have no meaning together are refused."""
    result = run(*line.split(" "), data=b"")
    assert result.exit_code == 2
    assert said in result.stderr


def test_without_ray(run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what to install."""
    monkeypatch.setitem(sys.modules, "ray", None)
    result = run("encode", "photos", "--out-dir", "out", "--engine", "ray")
    assert result.exit_code == 2
    assert "pip install 'sgacodec[ray]'" in result.stderr


@pytest.mark.slow  # starts two clusters
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_batch_is_resumed(photos: Path, tmp_path: Path, number: int) -> None:
    """After kill -9, SIGTERM and Ctrl-C every .sga that is present is whole, and --no-overwrite makes the others."""
    for i in range(9):
        picture(photos / f"{i}.png")
    (tmp_path / "start").mkdir()
    environment = {**os.environ, **worker_environment(tmp_path / "start")}
    line = [*FAKE, "encode", "photos", "--out-dir", "out", "--device", "cpu", "--no-overwrite"]
    line += ["--engine", "ray", "--address", "local", "--jobs", "2"]
    process = subprocess.Popen(
        line,
        cwd=tmp_path,
        env={**environment, "FAKE_STEPS": "3"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    out = tmp_path / "out"
    test_cli_batch._wait_until(lambda: out.is_dir() and len(names(out)) > 1)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert stderr == ("sgacodec: interrupted\n" if number == signal.SIGINT else "")
    test_cli_batch._wait_until(lambda: not _workers_live(process.pid))
    done = names(out)
    if number == signal.SIGKILL:
        done = [name for name in done if name.endswith(".sga")]
    assert 0 < len(done) < 12
    for name in done:
        assert bitstream.read((out / name).read_bytes()).width == 20
    again = subprocess.run([*line, "--json"], cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert sum(json.loads(text).get("skipped", False) for text in again.stdout.splitlines()) == len(done)
    assert len([name for name in names(out) if name.endswith(".sga")]) == 12


def _workers_live(session: int) -> bool:
    """Whether workers of the cluster run; agents of Ray, which are no concern of ours, end half a minute later."""
    listing = subprocess.run(["ps", "-A", "-o", "sid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in listing.splitlines()]
    return any(
        int(sid) == session and not stat.startswith("Z") and "ray::" in args and "Agent" not in args
        for sid, stat, args in rows
    )
