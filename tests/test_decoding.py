"""Which decoder decodes what."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GOLDEN

from sgacodec import bitstream, decoding
from sgacodec.api import Codec
from sgacodec.bitstream import SgaFile
from sgacodec.cli.decode import _pixels
from sgacodec.cli.files import Task
from sgacodec.decoder.decode import PictureDecoder
from sgacodec.decoding import MANY, open_decoder, shared_decoder


@pytest.mark.parametrize(("pixels", "kind"), [(0, PictureDecoder), (MANY - 1, PictureDecoder), (MANY, Codec)])
@pytest.mark.parametrize("device", ["auto", "cpu", "cpu:0"])
def test_torch_is_for_many_pixels(device: str, pixels: int, kind: type, tiny_path: Path) -> None:
    """Guards against a file that waits for torch, and against a batch that does not profit from it."""
    assert isinstance(open_decoder(str(tiny_path), device, pixels), kind)


def test_many_pixels_where_torch_is_missing(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding.importlib.util, "find_spec", lambda name: None)
    assert isinstance(open_decoder(str(tiny_path), "auto", MANY), PictureDecoder)


def test_devices_that_do_not_exist() -> None:
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match="no such device"):
            open_decoder(None, device)


def test_a_model_that_is_replaced_is_read_again(tiny_path: Path, context_path: Path, tmp_path: Path) -> None:
    """Guards against a long-lived process that decodes with the model it found under a name at first."""
    folder = tmp_path / "models"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGACODEC_MODELS", str(folder))
        shared_decoder.cache_clear()
        for stem, path in (("colour", tiny_path), ("context", context_path)):
            (folder / "m.safetensors").write_bytes(path.read_bytes())
            assert decoding.decode(GOLDEN / f"{stem}.sga").pixels.shape == (70, 120, 3)
    shared_decoder.cache_clear()


def test_threads_of_the_command_line() -> None:
    """BLAS has one thread in `decode` and its workers, which share the others; what the user sets stays."""
    program = """
import os, sys
os.environ.pop("OMP_NUM_THREADS", None), os.environ.pop("OPENBLAS_NUM_THREADS", None)
os.environ.update(dict(pair.split("=") for pair in sys.argv[1].split()))
from sgacodec.cli import batch
from sgacodec.decoder.threads import cores
assert "numpy" not in sys.modules
batch.divide_threads(int(sys.argv[2]))
print(os.environ["OPENBLAS_NUM_THREADS"], os.environ.get("OMP_NUM_THREADS"), max(1, cores() // 2))
"""

    def run(environment: str, jobs: int) -> list[str]:
        command = [sys.executable, "-c", program, environment, str(jobs)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    assert run("", 1)[:2] == ["1", "None"]
    blas, omp, share = run("", 2)
    assert (blas, omp) == ("1", share)
    assert run("OPENBLAS_NUM_THREADS=2 OMP_NUM_THREADS=5", 2)[:2] == ["2", "5"]


def test_pixels_are_counted_from_headers(tmp_path: Path) -> None:
    """Guards against waiting for torch for small files, and against reading a pipe or a missing file here."""
    large = bitstream.write(SgaFile(b"1234", 0, 4000, 3000, b"z", b"y"))
    small = bitstream.write(SgaFile(b"1234", 0, 60, 80, b"z", b"y"))
    names = {"large": large, "small": small, "other": b"\x89PNG" * 20, "empty": b""}
    for name, data in names.items():
        (tmp_path / name).write_bytes(data)
    os.mkfifo(tmp_path / "pipe")

    def pixels(jobs: int, *names: str) -> int:
        return _pixels([Task(name if name == "-" else str(tmp_path / name), "out.png") for name in names], jobs)

    assert pixels(1, "small", "large", "other", "empty", "pipe", "-", "missing", "large") == MANY
    assert pixels(1, "small", "large", "other", "empty", "pipe", "-", "missing", *["small"] * 100) == 0
    assert pixels(2, "large", "large") == 0
    assert pixels(2, *["large"] * 3) == MANY
