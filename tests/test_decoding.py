"""Which decoder decodes what."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import GOLDEN

from sgacodec import decoding
from sgacodec.api import Codec
from sgacodec.decoder.decode import PictureDecoder
from sgacodec.decoding import MANY, open_decoder, shared_decoder


def test_the_cpu_does_without_torch(tiny_path: Path) -> None:
    for device in ("cpu", "cpu:0"):
        assert isinstance(open_decoder(str(tiny_path), device, 1000), PictureDecoder)


@pytest.mark.parametrize(("files", "kind"), [(1, PictureDecoder), (MANY, Codec)])
def test_a_gpu_is_for_many_files(files: int, kind: type, tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a single file that waits for torch and CUDA, and against a batch that leaves the GPU idle."""
    monkeypatch.setattr(decoding, "_cuda_is_likely", lambda: True)
    assert isinstance(open_decoder(str(tiny_path), "auto", files), kind)
    monkeypatch.setattr(decoding, "_cuda_is_likely", lambda: False)
    assert isinstance(open_decoder(str(tiny_path), "auto", files), PictureDecoder)


def test_hidden_gpus_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert decoding._cuda_is_likely()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not decoding._cuda_is_likely()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(decoding.importlib.util, "find_spec", lambda name: None)
    assert not decoding._cuda_is_likely()  # torch is not installed


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
