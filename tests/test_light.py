"""Decoding and its command line in an environment without torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from compressai.models import MeanScaleHyperprior
from conftest import GOLDEN, ROOT
from PIL import Image

HIDDEN = ("torch", "compressai", "rich", "matplotlib", "bjontegaard", "pytorch_msssim")
# A program that runs the command line, or code, as if some packages were not installed.
LAUNCHER = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
HIDDEN = sys.argv.pop(1).split(",")
sys.meta_path.insert(0, Refuse())
if sys.argv[1] == "-c":
    exec(sys.argv[2])
else:
    sys.argv[0] = "sgacodec"
    runpy.run_module("sgacodec", run_name="__main__")
"""


def light(*args: str, code: int = 0, hidden: tuple[str, ...] = HIDDEN) -> subprocess.CompletedProcess[str]:
    """Run the command line, or code after "-c", without some packages; it must end with the exit code."""
    command = [sys.executable, "-c", LAUNCHER, ",".join(hidden), *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_decoding_needs_no_torch(tmp_path: Path, context_path: Path) -> None:
    """Guards against a receiver that cannot open a file; all its commands in one run each."""
    names = [str(GOLDEN / f"{case}.sga") for case in ("context", "refined")]
    light("decode", *names, "--out-dir", str(tmp_path), "--model", str(context_path), "--json", "--strip")
    for case in ("context", "refined"):
        with Image.open(tmp_path / f"{case}.png") as im, Image.open(GOLDEN / f"{case}.png") as golden:
            assert im.size == golden.size
    assert "120×70" in light("info", names[0]).stdout
    assert "lite" in light("models", "list").stdout
    code = f"import sgacodec; print(sgacodec.decode({names[0]!r}, model={str(context_path)!r}).pixels.shape)"
    assert light("-c", code).stdout == "(70, 120, 3)\n"


def test_what_needs_torch_says_what_to_install(tmp_path: Path) -> None:
    """Guards against a traceback, or no hint, where a light installation is asked to encode."""
    picture = str(GOLDEN / "context.png")
    hint = "sgacodec: this needs torch, which is not installed here: pip install sgacodec\n"
    assert light("encode", picture, str(tmp_path / "x.sga"), code=1).stderr == hint
    assert light("models", "verify", code=1).stderr == hint
    said = light("eval", picture, "--out", str(tmp_path / "study"), code=1).stderr
    assert re.fullmatch(r"sgacodec: this needs \w+, which is not installed here: pip install sgacodec\n", said)
    names = [str(GOLDEN / "context.sga"), str(tmp_path / "x.png")]
    assert light("decode", *names, "--device", "cuda", code=1).stderr == hint
    code = "import sgacodec\ntry: sgacodec.encode\nexcept ImportError as error: print(error)"
    assert light("-c", code).stdout == "sgacodec.encode needs torch, which is not installed: pip install sgacodec\n"


def test_networks_of_compressai_say_what_to_install(tmp_path: Path, context_path: Path) -> None:
    """Guards against a traceback, or "damaged", where compressai, which is optional, is not installed."""
    picture, model = str(GOLDEN / "context.png"), str(context_path)
    hint = "this needs compressai, which is not installed here: pip install 'sgacodec[compressai]'\n"
    checkpoint = tmp_path / "mean.pth.tar"
    torch.save(MeanScaleHyperprior(8, 12).state_dict(), checkpoint)
    for command in (
        ("encode", picture, str(tmp_path / "x.sga"), "--model", model),
        ("models", "import", str(checkpoint), "--name", "mean"),
        ("train", str(GOLDEN), "--init", model, "--out", str(tmp_path / "x.safetensors"), "--steps", "1"),
    ):
        assert light(*command, code=1, hidden=("compressai",)).stderr.endswith(hint)


def test_urls_need_no_torch(tmp_path: Path, context_path: Path) -> None:
    """A receiver reads and writes remote stores if it has fsspec; without it, a line says so."""
    source = GOLDEN / "context.sga"
    code = f"""
import fsspec
from sgacodec.cli import main
fsspec.filesystem("memory").pipe_file("/in/context.sga", open({str(source)!r}, "rb").read())
main(["decode", "memory://in", "--out-dir", "memory://out", "--model", {str(context_path)!r}], standalone_mode=False)
main(["info", "memory://in/context.sga"], standalone_mode=False)
print(fsspec.filesystem("memory").cat_file("/out/context.png")[:4])
"""
    said = light("-c", code).stdout
    assert "120×70" in said
    assert "PNG" in said
    missing = (*HIDDEN, "fsspec")
    for name in ("s3://bucket/a.sga", "memory://a.sga"):
        said = light("decode", name, str(tmp_path / "a.png"), code=1, hidden=missing).stderr
        assert said == f"sgacodec: {name}: URLs need fsspec: pip install fsspec\n"
    local = ["decode", f"file://{source}", str(tmp_path / "a.png"), "--model", str(context_path)]
    light(*local, hidden=missing)
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize("options", [("--method", "none"), ("--steps", "3")])
def test_encoding_with_lite_imports_what_it_needs(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Guards against seconds of imports: of compressai, and of sympy, which torch's compiler imports."""
    picture, coded = str(GOLDEN / "context.png"), str(tmp_path / "x.sga")
    hidden = (*HIDDEN[1:], "sympy")
    light("encode", picture, coded, *options, "--model", "lite", "--device", "cpu", hidden=hidden)
    assert Path(coded).read_bytes().startswith(b"SGA")


def test_requirements_of_a_receiver() -> None:
    """The light list is a part of the whole one, with the same versions."""
    listed = (ROOT / "requirements-decode.txt").read_text().splitlines()
    light_ones = {line for line in listed if line and not line.startswith("#")}
    project = re.search(
        r"^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE
    )
    assert project is not None
    assert light_ones < set(re.findall(r'"(.*?)"', project[1]))


@pytest.mark.skipif("SGACODEC_TEST_INSTALL" not in os.environ, reason="downloads packages: SGACODEC_TEST_INSTALL=1")
def test_a_fresh_light_environment(tmp_path: Path) -> None:
    """The commands of the README install a receiver of less than 150 MB, which decodes with the built-in model."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    before = _size(tmp_path / "venv")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", str(ROOT / "requirements-decode.txt")], check=True)
    subprocess.run([*pip, "--no-deps", str(ROOT)], check=True)
    assert _size(tmp_path / "venv") - before < 150e6
    from sgacodec.api import Codec, Settings
    from sgacodec.image import read_image

    picture = read_image(GOLDEN / "colour.png")
    data = Codec("lite", device="cpu").encode([picture], Settings(method="none"))[0].data
    (tmp_path / "x.sga").write_bytes(data)
    command = [python, "-m", "sgacodec"]
    subprocess.run([*command, "decode", "x.sga", "x.png"], check=True, cwd=tmp_path)
    with Image.open(tmp_path / "x.png") as im:
        assert im.size == picture.pixels.shape[1::-1]
    assert (
        b"colour" in subprocess.run([*command, "info", "x.sga"], check=True, cwd=tmp_path, capture_output=True).stdout
    )
    refused = subprocess.run([*command, "encode", "x.png", "y.sga"], cwd=tmp_path, capture_output=True, text=True)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
