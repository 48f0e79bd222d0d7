"""Import of CompressAI's checkpoints: the imported model codes as the original does; other files are refused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressai.models import JointAutoregressiveHierarchicalPriors, MeanScaleHyperprior, ScaleHyperprior

from sgacodec import latents
from sgacodec.api import Codec, Settings
from sgacodec.decoder import decode
from sgacodec.models.cache import LevelCache
from sgacodec.models.catalogue import ModelError, find_model, read_info
from sgacodec.models.compressai_import import import_compressai, lambda_of_name
from sgacodec.models.file import read_model
from sgacodec.models.verify import verify
from sgacodec.picture import Picture
from sgacodec.pixels import to_pixels, to_tensor

N, M = 32, 48
HEIGHT, WIDTH = 192, 256


def _picture() -> np.ndarray:
    """Something like a photograph, (192, 256, 3) uint8."""
    noise = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(3))
    smooth = torch.nn.functional.interpolate(noise, size=(HEIGHT, WIDTH), mode="bicubic")
    rough = 0.05 * torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(4))
    return to_pixels((smooth + rough).clamp(0, 1))


@torch.no_grad()
def _sensible(kind: Callable[..., Any]) -> Any:
    """A CompressAI model with random weights whose latents span several units and whose pictures have contrast."""
    torch.manual_seed(0)
    model = kind(N, M).eval()
    x = to_tensor(_picture())
    model.g_a[-1].weight *= 8 / model.g_a(x).std()
    model.g_a[-1].bias.zero_()
    y = model.g_a(x)
    y -= y.mean(dim=(0, 2, 3), keepdim=True)
    model.g_a[-1].bias -= model.g_a(x).mean(dim=(0, 2, 3))
    magnitude = y.abs() if kind is ScaleHyperprior else y
    model.h_a[-1].weight *= 3 / model.h_a(magnitude).std()
    last = model.h_s[4]
    last.bias[:M] = y.square().mean(dim=(0, 2, 3)).sqrt()  # the scales
    last.weight *= 10
    model.g_s[-1].weight *= 0.2 / model.g_s(y).std()
    model.g_s[-1].bias.fill_(0.5)
    model.entropy_bottleneck.quantiles[:, 0, 1] += 0.3  # published medians are learnt, so not exact
    model.entropy_bottleneck._update_quantiles()
    model.entropy_bottleneck.quantiles[:, 0, 1] += 0.1
    model.update(force=True)
    return model


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SGACODEC_MODELS", str(tmp_path / "models"))
    return tmp_path


@pytest.mark.parametrize("kind", [MeanScaleHyperprior, ScaleHyperprior])
def test_it_codes_as_compressai_does(kind: Callable[..., Any], home: Path) -> None:
    """Guards against an imported model that differs from the original: its curve would not be the published one."""
    theirs = _sensible(kind)
    torch.save({"state_dict": theirs.state_dict()}, home / "some-4-0a1b2c3d.pth.tar")
    path = import_compressai(home / "some-4-0a1b2c3d.pth.tar", "mine")
    assert verify(path) == []
    assert find_model("mine") == path

    pixels = _picture()
    level = LevelCache("mine", torch.device("cpu")).for_encoding(Settings(lmbda=0.013))
    payload = latents.pack(level, *latents.analyse(level, pixels))
    found = latents.unpack(level, payload.z, payload.y, *pixels.shape[:2])
    ours = latents.render(level, found, *pixels.shape[:2]).astype(float) / 255
    with torch.no_grad():
        coded = theirs.compress(to_tensor(pixels))
        x_hat = theirs.decompress(coded["strings"], coded["shape"])["x_hat"]
    expected = to_pixels(x_hat).astype(float) / 255
    assert expected.std() > 0.1  # a flat picture would prove nothing
    assert np.abs(ours - expected).mean() < 1e-3
    spent = sum(len(strings[0]) for strings in coded["strings"])
    assert spent > 2000
    assert len(payload.y) + len(payload.z) == pytest.approx(spent, rel=0.01, abs=24)
    without_torch = decode.read_model(path).at(0)
    k_z, y = decode.unpack(without_torch, payload.z, payload.y, *pixels.shape[:2])
    assert decode.digest_of(k_z, y[0]) == payload.digest
    assert np.abs(decode.render(without_torch, y, *pixels.shape[:2]) - 255 * ours).max() < 1.5
    assert level.lmbda == 0.013
    assert read_model(path).lambdas == [0.013]


def test_it_can_be_refined(home: Path) -> None:
    """Refinement of an imported model never raises the loss."""
    torch.save(_sensible(ScaleHyperprior).state_dict(), home / "plain.pth")
    import_compressai(home / "plain.pth", "mine", 0.02)
    picture = Picture(_picture()[:64, :64])
    (encoded,) = Codec("mine", "cpu").encode([picture], Settings(lmbda=0.02, steps=20))
    assert encoded.report["rd_loss"] <= encoded.report["rd_loss_unrefined"]


def _old_names(state: dict[str, Any], style: str) -> dict[str, Any]:
    new = OrderedDict()
    for key, value in state.items():
        for today, old in (("matrices", "_matrix"), ("biases", "_bias"), ("factors", "_factor")):
            if style == "lists":
                old = f"_{today}."
            key = key.replace(f"entropy_bottleneck.{today}.", f"entropy_bottleneck.{old}")
        new[f"module.{key}" if style == "parallel" else key] = value
    return new


@pytest.mark.parametrize("style", ["numbered", "lists", "parallel"])
def test_old_names_give_the_same_model(style: str, home: Path) -> None:
    """The published files have the parameter names of older versions."""
    state = _sensible(MeanScaleHyperprior).state_dict()
    torch.save(state, home / "new.pth")
    torch.save({"epoch": 3, "state_dict": _old_names(state, style)}, home / "old.pth.tar")
    ids = {read_info(import_compressai(home / name, "mine")).id for name in ("new.pth", "old.pth.tar")}
    assert len(ids) == 1


class _Evil:
    def __reduce__(self) -> Any:
        return (Path("/nonexistent/evil").touch, ())


def test_foreign_files_are_refused_in_one_line(home: Path) -> None:
    """Guards against tracebacks, and against files that execute code."""
    foreign = {
        "text.pth": b"not a checkpoint",
        "empty.pth": b"",
        "dict.pth": {"a": torch.zeros(3)},
        "list.pth": [1, 2],
        "evil.pth": {"state_dict": _Evil()},
        "autoregressive.pth": JointAutoregressiveHierarchicalPriors(N, M).state_dict(),
    }
    state = MeanScaleHyperprior(N, M).state_dict()
    foreign["missing.pth"] = {k: v for k, v in state.items() if k != "h_a.2.weight"}
    foreign["shape.pth"] = {**state, "h_a.2.weight": torch.zeros(3, 3, 5, 5)}
    foreign["expanded.pth"] = {**state, "g_a.0.weight": torch.zeros(1).expand(2**48)}
    foreign["sparse.pth"] = {**state, "g_a.0.weight": torch.zeros(N, 3, 5, 5).to_sparse()}
    foreign["large.pth"] = {**state, "h_s.0.weight": torch.full_like(state["h_s.0.weight"], 1e30)}
    foreign["wide.pth"] = MeanScaleHyperprior(1025, 8).state_dict()
    foreign["nan.pth"] = {**state, "g_a.0.weight": torch.full_like(state["g_a.0.weight"], torch.nan)}
    for name, content in foreign.items():
        if isinstance(content, bytes):
            (home / name).write_bytes(content)
        else:
            torch.save(content, home / name)
        with pytest.raises(ModelError) as caught:
            import_compressai(home / name, "mine")
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="No such file"):
        import_compressai(home / "absent.pth", "mine")
    assert not (home / "models").exists()


@pytest.mark.parametrize(
    ("name", "lmbda"),
    [
        ("mbt2018-mean-3-5f51b5f1.pth.tar", 0.0067),
        ("bmshj2018-hyperprior-8-646fb0d1.pth.tar", 0.18),
        ("mbt2018-mean-ms-ssim-1-5bf9c0b6.pth.tar", 0.0018),
        ("mbt2018_q4.pth", 0.013),
        ("mbt2018-mean.pth", None),
        ("checkpoint_best_loss.pth.tar", None),
        ("run-2026.pth", None),
    ],
)
def test_the_quality_is_found_in_the_name(name: str, lmbda: float | None) -> None:
    """Guards against levels that are labelled with a wrong λ."""
    assert lambda_of_name(name) == lmbda
