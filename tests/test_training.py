"""Training: exact resume, the objective, export, errors, and `sgacodec train`."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from torch import Tensor

from sgacodec.api import Codec, Settings
from sgacodec.cli import main
from sgacodec.hyperprior import code_rounded, fold
from sgacodec.models.catalogue import read_info
from sgacodec.models.file import read_model, write_model
from sgacodec.models.verify import verify
from sgacodec.networks import architecture as networks
from sgacodec.networks.architecture import Architecture, Context
from sgacodec.picture import Picture
from sgacodec.training import checkpoint, loop, refined
from sgacodec.training import export as training_export
from sgacodec.training.cached import CachedLatents
from sgacodec.training.checkpoint import State, load_checkpoint, save_checkpoint, start
from sgacodec.training.crops import Crops, cut, cut_batch
from sgacodec.training.data import DataError, read_photographs, split
from sgacodec.training.export import export_checkpoint
from sgacodec.training.initial import initial_model
from sgacodec.training.initial_weights import read_initial
from sgacodec.training.loop import draw_anchors, progress, step, train
from sgacodec.training.objective import forward, forward_decoder, lambdas, losses
from sgacodec.training.optimizer import (
    _SOAP,
    _split_kernels,
    build_optimizers,
    load_moments,
    set_learning_rate,
    soap_class,
)
from sgacodec.training.recipe import Recipe, TrainingError, standard_recipe
from sgacodec.training.refined import RefinedPool, refine_latents
from sgacodec.training.stages import Source, source_of, stage_losses

CPU = torch.device("cpu")
PLAIN = Architecture("lite", N=8, M=24, scale="exp", width=12, hidden=4, inner=8)
TINY = replace(
    PLAIN,
    deep_width=8,
    deep_blocks=1,
    body_width=8,
    body_blocks=1,
    context=Context((8, 16), past=8, near=8, hidden=8),
)
TINY_MSHYPER = Architecture("mshyper", N=8, M=16, scale="linear")
INITIAL_CROPS = (24, 128)
RECIPE = Recipe("tiny", steps=40, batch=2, crop=64, warmup=5, optimizer="soap")


def photograph(seed: int, height: int = 160, width: int = 192) -> Tensor:
    """Smooth noise with the spectrum of a photograph, (3, H, W) uint8."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(1, 3, height, width)
    for scale, contrast in ((48, 0.5), (16, 0.25), (4, 0.1), (1, 0.03)):
        size = (height // scale + 1, width // scale + 1)
        noise = torch.rand(1, 3, *size, generator=generator) - 0.5
        x += contrast * torch.nn.functional.interpolate(noise, size=(height, width), mode="bilinear")
    return ((x[0] + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small architectures, initialized on few crops."""
    monkeypatch.setitem(networks.ARCHITECTURES, "tiny", TINY)
    monkeypatch.setitem(networks.ARCHITECTURES, "tiny-mshyper", TINY_MSHYPER)
    monkeypatch.setattr(checkpoint, "_INITIAL_CROPS", INITIAL_CROPS)


@pytest.fixture(scope="module")
def crops() -> Crops:
    return Crops([photograph(i) for i in range(2)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, crops: Crops) -> State:
    """A run of 40 steps without interruption."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(networks.ARCHITECTURES, "tiny", TINY)
        patch.setattr(checkpoint, "_INITIAL_CROPS", INITIAL_CROPS)
        return train(start(RECIPE, crops, CPU), crops, CPU, tmp_path_factory.mktemp("run") / "straight.ckpt")


def _tensors(record: Any) -> list[Tensor]:
    """All numbers of nested lists and dictionaries."""
    if isinstance(record, dict):
        record = list(record.values())
    if isinstance(record, (list, tuple)):
        return [tensor for value in record for tensor in _tensors(value)]
    return [torch.as_tensor(record)] if isinstance(record, (Tensor, float, int)) else []


def same(a: State, b: State) -> bool:
    """Whether two states are bit-identical."""
    ours, theirs = (
        [*s.model.state_dict().values(), *s.ema.state_dict().values(), s.data.get_state(), s.noise.get_state()]
        for s in (a, b)
    )
    for values, state in ((ours, a), (theirs, b)):
        for optimizer in state.optimizers.values():
            record = optimizer.state_dict()
            values += _tensors([record["state"], *(group.get("step") for group in record["param_groups"])])
    pairs = list(zip(ours, theirs, strict=True))
    return a.step == b.step and a.crops == b.crops and all(torch.equal(x, y) for x, y in pairs)


# ------------------------------------------------------------------------------------------------------ resume


def test_interrupted_run_resumes_exactly(tmp_path: Path, crops: Crops, trained: State) -> None:
    """An interrupted run gives the same weights as an uninterrupted one."""
    begun = start(RECIPE, crops, CPU)
    train(begun, crops, CPU, tmp_path / "a.ckpt", tick=lambda s: s.step < 20)
    assert begun.step == 20
    resumed = load_checkpoint(tmp_path / "a.ckpt", CPU)
    assert not same(resumed, trained)
    assert same(train(resumed, crops, CPU, tmp_path / "a.ckpt"), trained)


def test_new_process_resumes_exactly(tmp_path: Path, crops: Crops, trained: State) -> None:
    """Resuming in a new process is exact, too."""
    begun = start(RECIPE, crops, CPU)
    train(begun, crops, CPU, tmp_path / "a.ckpt", tick=lambda s: s.step < 37)
    program = f"""
        import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_training import CPU, TINY, Crops, Path, load_checkpoint, networks, photograph, torch, train
        torch.set_num_threads({torch.get_num_threads()})
        networks.ARCHITECTURES["tiny"] = TINY
        crops = Crops([photograph(i) for i in range(2)])
        path = Path({str(tmp_path / "a.ckpt")!r})
        train(load_checkpoint(path, CPU), crops, CPU, path)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)
    assert same(load_checkpoint(tmp_path / "a.ckpt", CPU), trained)


def test_the_schedule_can_be_extended(tmp_path: Path, crops: Crops) -> None:
    """A finished run can be continued with more steps."""
    state = start(replace(RECIPE, steps=10), crops, CPU)
    train(state, crops, CPU, tmp_path / "a.ckpt")
    assert progress(state) == 1
    low = state.optimizers["soap"].param_groups[0]["lr"]
    longer = load_checkpoint(tmp_path / "a.ckpt", CPU, steps=20)
    assert progress(longer) == 0.5
    step(longer, crops, CPU)
    assert longer.optimizers["soap"].param_groups[0]["lr"] > 2 * low
    assert progress(load_checkpoint(tmp_path / "a.ckpt", CPU, steps=None, minutes=1000.0)) < 0.01


def test_checkpoints_of_the_first_trainer_load(tmp_path: Path, crops: Crops) -> None:
    """Checkpoints without the newer fields are still read."""
    state = start(replace(RECIPE, optimizer="adam"), crops, CPU)
    step(state, crops, CPU)
    save_checkpoint(state, tmp_path / "a.ckpt")
    record = torch.load(tmp_path / "a.ckpt", weights_only=True)
    del record["crops"]
    for key in ("final_crop", "final_from", "compile", "optimizer", "stage", "new", "new_factor"):
        del record["recipe"][key]
    record["optimizer"] = record.pop("optimizers")["adam"]
    for group in record["optimizer"]["param_groups"]:
        group.update(foreach=True, fused=None)
    torch.save(record, tmp_path / "old.ckpt")
    old = load_checkpoint(tmp_path / "old.ckpt", CPU)
    assert same(old, state)
    assert old.optimizers["adam"].param_groups[0]["fused"]


# ------------------------------------------------------------------------------------------------------ stages


@torch.no_grad()
def test_dead_zone(crops: Crops, trained: State) -> None:
    """Guards against an option without effect: a dead zone saves bits."""
    batch, anchor = crops.sample(6, 64, torch.Generator().manual_seed(2)), torch.arange(6)
    plain, zoned = (
        stage_losses(
            replace(
                trained, noise=torch.Generator().manual_seed(1), recipe=replace(trained.recipe, dead_zone=dead_zone)
            ),
            batch,
            anchor,
        )[0]
        for dead_zone in (False, True)
    )
    assert zoned.bpp.mean() < plain.bpp.mean()


@pytest.mark.parametrize(("stage", "unrefined"), [("joint", 0.5), ("prior", 0.5), ("decoder", 0.5), ("decoder", 0.0)])
def test_stages(stage: str, unrefined: float, tmp_path: Path, crops: Crops, trained: State) -> None:
    """A stage lowers its loss, leaves the rest of the model as it is, and resumes exactly."""
    path = tmp_path / "a.ckpt"
    save_checkpoint(trained, path)
    initial = read_initial(path)
    recipe = replace(RECIPE, stage=stage, steps=30, batch=4, lr=3e-3, warmup=1, refine_steps=3, unrefined=unrefined)

    def begin() -> tuple[State, Source]:
        begun = start(recipe, Crops([]), CPU, initial)
        return begun, source_of(begun, crops.images, CPU)

    @torch.no_grad()
    def loss(state: State) -> float:
        changed = replace(state, noise=torch.Generator().manual_seed(1))
        batch, anchor = source.sample(6, 64, torch.Generator().manual_seed(2)), torch.arange(6)
        return float(stage_losses(changed, batch, anchor)[0].loss)

    state, source = begin()
    before = loss(state)
    train(state, source, CPU, path)
    assert loss(state) < 0.99 * before

    moved = {name for name, value in initial.tensors.items() if not torch.equal(value, state.model.state_dict()[name])}
    parameters = {name for name, _ in state.model.named_parameters()}
    frozen = {"joint": (), "prior": ("g_a", "g_s", "log_gain_y", "log_gain_d")}
    kept = frozen.get(stage, ("log_gain_y", "log_gain_z") if unrefined else ("log_gain_y", "log_gain_z", "g_a", "h_a"))
    assert moved & parameters == {name for name in parameters if not name.startswith(kept)}

    second, source = begin()
    train(second, source, CPU, path, tick=lambda s: s.step < 17)
    resumed = load_checkpoint(path, CPU)
    assert (resumed.step, resumed.recipe.stage) == (17, stage)
    resumed = train(resumed, source_of(resumed, crops.images, CPU), CPU, path)
    assert resumed.step == 30
    if stage != "decoder":  # the pool of refined crops is not in the checkpoint
        assert same(resumed, state)


def test_latents_are_cached_at_two_scales(trained: State) -> None:
    """Windows of the cache are latents of the photograph; photographs smaller than a window are left out."""
    image = photograph(3, 128, 208)
    state = replace(trained, recipe=replace(RECIPE, stage="prior"))
    source = source_of(state, [image, photograph(4, 63, 300)], CPU)
    assert isinstance(source, CachedLatents)
    assert [tuple(v.shape) for v in source.latents] == [(8, 13, TINY.M), (4, 8, TINY.M)]
    with torch.no_grad():
        expected = trained.model.g_a(image[None].float() / 255)[0]
    window = source.sample(1, 64, torch.Generator().manual_seed(0))[0]
    assert window.shape == (TINY.M, 4, 4)
    places = [expected[:, y : y + 4, x : x + 4] for y in range(5) for x in range(10)]
    assert min(float((place - window).abs().max()) for place in places) < 1e-2
    with pytest.raises(TrainingError, match="no photograph has 64 pixels"):
        source_of(state, [photograph(4, 63, 300)], CPU)


def test_refinement_in_the_loop_lowers_the_loss(trained: State, crops: Crops) -> None:
    """The decoder is trained on latents whose true loss is lower than that of the encoder's."""
    model = trained.ema
    x, anchor = crops.sample(4, 64, torch.Generator().manual_seed(4)), torch.tensor([0, 2, 4, 5])
    lmbda = lambdas(model, anchor)

    def loss(steps: int) -> float:
        sent = refine_latents(model, x, anchor, lmbda, steps, torch.Generator().manual_seed(0))
        return float(forward_decoder(model, x, anchor, lmbda, sent).loss.detach())

    with torch.no_grad():
        assert loss(0) == pytest.approx(float(losses(model, x, anchor, lmbda, None, None)[0]), rel=1e-5)
    assert loss(12) < 0.98 * loss(0)


@pytest.mark.parametrize("part", ["h_s.", "g_s.", "context."])
def test_gradient_of_the_decoder_on_refined_latents(trained: State, crops: Crops, part: str) -> None:
    """The gradient is the slope of the loss at constant symbols: μ moves ŷ, and does not change the bits."""
    model = copy.deepcopy(trained.ema).requires_grad_(True)
    x, anchor = crops.sample(4, 64, torch.Generator().manual_seed(4)), torch.tensor([0, 2, 4, 5])
    lmbda = lambdas(model, anchor)
    sent = refine_latents(trained.ema, x, anchor, lmbda, 8, torch.Generator().manual_seed(0))
    forward_decoder(model, x, anchor, lmbda, sent).loss.backward()
    parameters = [p for name, p in model.named_parameters() if name.startswith(part)]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    length = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    assert length > 0
    losses_beside = []
    with torch.no_grad():
        for distance in (1e-3, -2e-3):
            for p, g in zip(parameters, gradients, strict=True):
                p += distance / length * g
            losses_beside.append(float(forward_decoder(model, x, anchor, lmbda, sent).loss))
    slope = (losses_beside[0] - losses_beside[1]) / 2e-3
    assert slope == pytest.approx(float(length), rel=0.05)


def test_pool_of_refined_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a pool that grows without end, and against crops beside latents of another one."""
    monkeypatch.setattr(refined, "POOL", 5)
    pool = RefinedPool()
    for number in range(4):
        at = torch.arange(2 * number, 2 * number + 2)
        v = at.float()[:, None, None, None].expand(2, 3, 4, 4)
        pool.add(v, at % 6, (v + 100, v + 200))
    x, anchor, (y, z) = pool.draw(64, seed=1)
    numbers = x[:, 0, 0, 0]
    assert set(numbers.tolist()) == {3, 4, 5, 6, 7}
    assert torch.equal(anchor.float(), numbers % 6)
    assert torch.equal(y, x + 100)
    assert torch.equal(z, x + 200)
    assert torch.equal(pool.draw(64, seed=1)[0], x)


# -------------------------------------------------------------------------------------------------- objective


@pytest.mark.parametrize("name", ["tiny", "tiny-mshyper"])
def test_training_lowers_the_loss(name: str, crops: Crops, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss falls, from a reasonable initial value."""
    monkeypatch.setattr(checkpoint, "_INITIAL_CROPS", (96, 256))
    recipe = replace(RECIPE, architecture=name, batch=4, warmup=1, lr=1e-3 if name == "tiny" else 3e-3, transforms=1.0)
    state = start(recipe, crops, CPU)
    x, anchor = crops.sample(12, 128, torch.Generator().manual_seed(9)), torch.arange(12) % 6

    @torch.no_grad()
    def loss() -> float:
        return float(forward(state.model, x, anchor, torch.Generator().manual_seed(1)).loss)

    before = loss()
    assert before < 60  # reasonable initial rate and distortion
    for _ in range(40):
        step(state, crops, CPU)
    assert loss() < 0.93 * before


def test_the_start_of_mshyper_has_the_wanted_scale(crops: Crops) -> None:
    """Guards against initial rates of thousands of bits per pixel, or of none."""
    x = crops.sample(8, 128, torch.Generator().manual_seed(2))
    model = initial_model(TINY_MSHYPER, x)
    with torch.no_grad():
        y = model.g_a(x) * model.gains(0.0075)[0][None, :, None, None]
    assert float(y.std()) == pytest.approx(2, rel=1e-3)
    assert y.mean(dim=(0, 2, 3)).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lite", {"batch": 8, "lr": 1e-3, "lr_end": 2e-5, "transforms": 0.3, "warmup": 600, "ema": 0.9995}),
        ("mshyper-128", {"batch": 32, "lr": 2e-4, "lr_end": 2e-6, "transforms": 1.0, "warmup": 1000, "ema": 0.9999}),
        ("mshyper-192", {"crop": 256, "final_crop": 384, "final_from": 0.85, "clip": 1.0}),
    ],
)
def test_standard_recipes_are_those_of_the_documentation(name: str, expected: dict[str, Any]) -> None:
    """The table in docs/models.md lists these values."""
    recipe = standard_recipe(name, seed=7)
    assert {key: getattr(recipe, key) for key in expected} == expected
    assert (recipe.architecture, recipe.seed) == (name, 7)
    with pytest.raises(TrainingError, match="unknown architecture"):
        standard_recipe("huge")


@pytest.mark.parametrize(("decay", "age"), [(0.9999, 0.2), (0.95, 0.019)])
def test_the_mean_age_of_the_averaged_weights(crops: Crops, decay: float, age: float) -> None:
    """It is a fifth of the steps at first, later decay / (1 − decay) steps; `age` is relative to the run."""
    state, steps = start(replace(RECIPE, ema=decay), crops, CPU), 1000
    followed = "log_gain_y"
    for now in range(1, steps + 1):
        state.step = now
        state.model.get_parameter(followed).data.fill_(now / steps)
        loop._update_ema(state)
    found = state.ema.get_parameter(followed)
    torch.testing.assert_close(found, torch.full_like(found, 1 - age), rtol=0, atol=0.004)


@pytest.mark.parametrize("batch", [1, 4, 6, 8, 32])
def test_a_batch_has_all_anchors_equally_often(batch: int) -> None:
    """Guards against batches with too many crops of one λ, and against an anchor that is preferred in the long run."""
    generator = torch.Generator().manual_seed(3)
    counts = torch.stack([torch.bincount(draw_anchors(batch, generator), minlength=6) for _ in range(600)])
    assert counts.max() - counts.min() <= 1
    assert (counts.float().mean(0) - batch / 6).abs().max() < 0.1


def test_learning_rate_schedule(crops: Crops) -> None:
    """Linear warm-up, cosine decay to lr_end, and lower rates for the transforms and for what is not new."""
    recipe = replace(RECIPE, steps=100, warmup=5, rest=0.4, new=("context", "g_a.deep"))
    state = start(recipe, crops, CPU)
    for number, done, expected in ((0, 0.0, 2e-4), (4, 0.0, 1e-3), (50, 0.5, (1e-3 + 2e-5) / 2), (100, 1.0, 2e-5)):
        set_learning_rate(state.optimizers, state.recipe, number, done)
        rates = {
            (optimizer, id(parameter)): group["lr"] / expected
            for optimizer, current in state.optimizers.items()
            for group in current.param_groups
            for parameter in group["params"]
        }
        model: Any = state.model
        for parameters, optimizer, factor in (
            (model.g_a.linear.parameters(), "adam", 0.3),
            (model.g_s.blocks.parameters(), "adam", 0.3),
            (model.g_a.residual.parameters(), "soap", 0.3),
            ([*model.g_s.filter.parameters(), *model.g_s.pixels.parameters()], "soap", 0.3),
            (model.g_a.deep.parameters(), "soap", 1.0),
            (model.context.parameters(), "soap", 1.0),
            (model.g_s.body.parameters(), "soap", 0.4),
            (model.h_s.parameters(), "soap", 0.4),
            ([model.log_gain_y, *model.density.parameters()], "soap", 0.4),
        ):
            assert all(rates[optimizer, id(p)] == pytest.approx(factor) for p in parameters)
    assert len(rates) == len(list(state.model.parameters()))


@pytest.mark.parametrize(
    ("shape", "merged"),
    [
        ((48, 192, 5, 5), [48, 192, 25]),
        ((24, 40, 1, 1), [24, 40]),
        ((64, 8, 5, 5), [64, 8, 5, 5]),
        ((30, 4, 3, 3), [30, 4, 3, 3]),
    ],
)
def test_soap_merges_the_taps_of_kernels_only(shape: tuple[int, ...], merged: list[int]) -> None:
    """Guards against preconditioners of output and input channels together, with which training is slower."""
    kernel = torch.nn.Parameter(torch.zeros(shape))
    kernel.grad = torch.randn(shape)
    groups = _split_kernels({"params": [kernel], "factor": 1.0})
    soap = soap_class()([group for group in groups if group["params"]], **_SOAP)
    soap.step()
    assert [len(basis) for basis in soap.state[kernel]["Q"]] == merged


def test_the_package_of_an_optimizer_is_missed_before_the_photographs_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against minutes of reading in vain."""
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    read: list[object] = []
    monkeypatch.setattr("sgacodec.training.data.read_photographs", lambda *given: read.append(given))
    result = CliRunner().invoke(
        main, ["train", str(tmp_path), "--out", str(tmp_path / "m.safetensors"), "--steps", "1"]
    )
    assert result.exit_code == 1
    assert "pip install 'sgacodec[train]'" in result.output
    assert not read


def test_soap_without_its_package_is_an_error(crops: Crops, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says what to install."""
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(TrainingError, match=r"pip install 'sgacodec\[train\]'"):
        start(RECIPE, crops, CPU)


def test_larger_crops_near_the_end(crops: Crops) -> None:
    """The last stage of the recipe halves the batch and enlarges the crops."""
    state = start(replace(RECIPE, steps=10, batch=4, final_crop=128), crops, CPU)
    state.step = 8
    assert len(step(state, crops, CPU)[1]) == 4
    assert len(step(state, crops, CPU)[1]) == 2


def test_batched_crops_equal_single_crops() -> None:
    """Batched cropping gives the same crops as cropping one at a time."""
    images = [photograph(1), photograph(2, 400, 300), photograph(3, 60, 500)]
    crops = Crops(images, "cpu")
    windows = crops._draw(24, 128, torch.Generator().manual_seed(5))
    assert {w.side > 128 for w in windows} == {True, False}
    assert {w.turn for w in windows} == {*range(8)}
    batched = Crops(images, "meta")  # packs the images, as every device but the CPU does
    assert batched.packed is not None
    flat = torch.cat([i.permute(1, 2, 0).reshape(-1, 3) for i in images])
    packed = replace(batched.packed, pixels=flat)
    sizes = [images[w.image].shape[1:] for w in windows]
    rows = [
        [packed.offsets[w.image], *size, w.top, w.left, w.side, w.turn] for w, size in zip(windows, sizes, strict=True)
    ]
    expected = torch.cat([cut(images[w.image], w, 128) for w in windows])
    torch.testing.assert_close(cut_batch(packed, torch.tensor(rows), 128), expected, atol=2e-6, rtol=0)


# ------------------------------------------------------------------------------------------------------- export


def test_exported_model_is_valid_and_its_ladder_rises(tmp_path: Path, trained: State) -> None:
    """The exported model is valid, and rate and PSNR rise with λ."""
    photographs = [photograph(i) for i in range(3)]
    before = {k: v.clone() for k, v in trained.ema.state_dict().items()}
    model = export_checkpoint(trained, "tiny", photographs, {"licence": "MIT"})
    assert all(torch.equal(v, before[k]) for k, v in trained.ema.state_dict().items())
    write_model(model, tmp_path / "tiny.safetensors")
    assert verify(tmp_path / "tiny.safetensors") == []
    assert read_model(tmp_path / "tiny.safetensors").id == model.id

    codec = Codec(str(tmp_path / "tiny.safetensors"), "cpu")
    picture = Picture(photographs[0].permute(1, 2, 0).contiguous().numpy())
    curve = []
    for lmbda in model.lambdas[::9]:
        (encoded,) = codec.encode([picture], Settings(lmbda=lmbda, method="none"))
        curve.append((encoded.report["bytes"], encoded.report["psnr"]))
    assert curve == sorted(curve)
    assert len({size for size, _ in curve}) == len(curve)
    assert sorted(psnr for _, psnr in curve) == [psnr for _, psnr in curve]
    assert model.lambdas[0] == pytest.approx(0.0016)
    assert model.lambdas[-1] == pytest.approx(0.045)


def test_gains_are_interpolated_in_the_logarithm(trained: State) -> None:
    """Gains between two anchors are geometric means."""
    model = trained.model
    low, high = (torch.exp(model.log_gain_y[i]) for i in (1, 2))
    torch.testing.assert_close(model.gains(0.0032)[0], low)
    torch.testing.assert_close(model.gains(0.0075)[0], high)
    torch.testing.assert_close(model.gains(math.sqrt(0.0032 * 0.0075))[0], (low * high).sqrt())
    torch.testing.assert_close(model.gains(1.0)[0], torch.exp(model.log_gain_y[-1]))


# ------------------------------------------------------------------------------------------------------ errors


def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, crops: Crops, trained: State, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards against losing the previous checkpoint, and against ending the run."""
    path = tmp_path / "a.ckpt"
    save_checkpoint(trained, path)
    content = path.read_bytes()

    def full(record: Any, stream: Any) -> None:
        stream.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(TrainingError, match=r"a\.ckpt.*No space left on device.*intact"):
        save_checkpoint(trained, path)
    assert os.listdir(tmp_path) == ["a.ckpt"]
    state = start(replace(RECIPE, steps=3), crops, CPU)
    with caplog.at_level(logging.WARNING), pytest.raises(TrainingError, match="No space left"):
        train(state, crops, CPU, path, save_every=0)
    assert state.step == 3  # training continued
    assert "No space left" in caplog.text
    assert path.read_bytes() == content


def test_diverged_weights_do_not_replace_a_good_checkpoint(tmp_path: Path, crops: Crops) -> None:
    """Guards against a diverged run overwriting its last good checkpoint."""
    state = start(RECIPE, crops, CPU)
    with torch.no_grad():
        state.model.log_gain_y.fill_(math.nan)
    for tick in (None, lambda _: False):  # the second is an interruption
        with pytest.raises(TrainingError, match="not a number"):
            train(state, crops, CPU, tmp_path / "a.ckpt", save_every=0, tick=tick)
        assert not (tmp_path / "a.ckpt").exists()


def test_a_last_update_that_diverges_leaves_the_checkpoint(tmp_path: Path, crops: Crops) -> None:
    """Guards against NaN weights over the last good checkpoint where only the gradients of the last step overflowed."""
    state = start(RECIPE, crops, CPU)
    path = tmp_path / "a.ckpt"
    path.write_bytes(b"good")

    def overflow(state: State) -> bool:
        with torch.no_grad():
            next(state.model.parameters()).fill_(math.nan)
        return False

    with pytest.raises(TrainingError, match="not a number"):
        train(state, crops, CPU, path, tick=overflow)
    assert path.read_bytes() == b"good"


def test_averages_get_the_layout_of_their_weights(tmp_path: Path, trained: State, crops: Crops) -> None:
    """Guards against a run that is resumed on another type of device with permuted averages of Adam."""
    optimizers = build_optimizers(trained.model, trained.recipe)
    records = {name: copy.deepcopy(optimizer.state_dict()) for name, optimizer in trained.optimizers.items()}
    for record in records.values():
        for averages in record["state"].values():
            for key, value in averages.items():
                if isinstance(value, Tensor) and value.dim() == 4:
                    averages[key] = value.contiguous(memory_format=torch.channels_last)  # as on a GPU
    load_moments(optimizers, records)
    for name, optimizer in optimizers.items():
        for parameter, averages in optimizer.state.items():
            expected = trained.optimizers[name].state[parameter]
            for key, value in averages.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    assert value.stride() == parameter.stride()
                    assert torch.equal(value, expected[key])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"ema": {"y_unit": 3}}, "not weights that can be trained further"),
        ({"ema": {"y_unit": torch.full((TINY.M,), math.nan)}}, "not a finite number"),
        ({"ema": {"y_unit": torch.ones(TINY.M, dtype=torch.int64)}}, "not a finite number"),
        ({"recipe": {"architecture": "tiny", "stage": "prior"}}, "not weights that can be trained further"),
        ({"history": 3}, "not a checkpoint"),
    ],
)
def test_crafted_initial_weights_are_refused(
    changed: dict[str, Any], said: str, tmp_path: Path, trained: State
) -> None:
    """Guards against an internal error, and against weights from which nothing can be learned."""
    path = tmp_path / "a.ckpt"
    save_checkpoint(trained, path)
    record = torch.load(path, weights_only=True)
    torch.save({**record, **changed}, path)
    with pytest.raises(TrainingError, match=said) as caught:
        read_initial(path)
    assert "\n" not in str(caught.value)


def test_a_foreign_checkpoint_is_refused(tmp_path: Path, trained: State) -> None:
    """Errors are one line and name the file."""
    path = tmp_path / "a.ckpt"
    save_checkpoint(trained, path)
    record = torch.load(path, weights_only=True)
    record["model"]["h_s.0.weight"] = torch.zeros(3, 3, 5, 5)
    torch.save(record, tmp_path / "shape.ckpt")
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    torch.save({"model": 1}, tmp_path / "other.ckpt")
    for name in ("shape.ckpt", "text.ckpt", "other.ckpt", "absent.ckpt"):
        with pytest.raises(TrainingError, match=name) as caught:
            load_checkpoint(tmp_path / name, CPU)
        assert "\n" not in str(caught.value)
    with pytest.raises(TrainingError, match="of architecture tiny"):
        load_checkpoint(path, CPU, architecture="lite")


def test_bad_pictures_are_skipped_and_none_is_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Damaged files are skipped with a warning; no photograph at all is an error."""
    (tmp_path / "sub").mkdir()
    with pytest.raises(DataError, match="no photograph"):
        read_photographs([tmp_path])
    with pytest.raises(DataError, match="no such file"):
        read_photographs([tmp_path / "absent"])
    for i in range(3):
        Image.fromarray(photograph(i).permute(1, 2, 0).numpy()).save(tmp_path / "sub" / f"{i}.jpg")
    whole = (tmp_path / "sub" / "0.jpg").read_bytes()
    (tmp_path / "sub" / "0.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "sub" / "empty.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert [p.name for p in read_photographs([tmp_path])] == ["sub/1.jpg", "sub/2.jpg"]
    assert "0.jpg" in caplog.text
    assert "empty.png" in caplog.text


def test_photographs_are_read_as_for_encoding(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against 16-bit samples that are clipped to white, and against types and names that are not read."""
    grey = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(photograph(0).permute(1, 2, 0).numpy()).save(tmp_path / "a.ppm")
    (tmp_path / "a.ppm").rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.ppm"))
    (tmp_path / "dangling.png").symlink_to("nowhere")
    with caplog.at_level(logging.WARNING):
        found = read_photographs([tmp_path])
    assert [p.name for p in found] == ["caf\udce9.ppm", "grey.png"]
    assert abs(found[1].pixels.float().mean() - 127.5) < 1
    assert "skipped dangling.png: No such file" in caplog.text
    training, held_out = split(found)
    assert len(training) + len(held_out) == 2


def test_a_truncated_archive_is_an_error(tmp_path: Path) -> None:
    """Guards against an internal error, and against training on a part of the photographs."""
    for kind in ("gz", "xz", "bz2"):
        path = tmp_path / f"photos.tar.{kind}"
        with tarfile.open(path, f"w:{kind}") as tar:
            for i in range(3):
                Image.fromarray(photograph(i).permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
                tar.add(tmp_path / f"{i}.png", f"{i}.png")
        assert len(read_photographs([path])) == 3
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) * 2 // 3])
        with pytest.raises(DataError, match=r"photos\.tar"):
            read_photographs([path])


def test_links_to_nothing_in_a_tar(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against an internal error; a link to a photograph of the tar is read."""
    Image.fromarray(photograph(0).permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(tmp_path / "a.png", "a.png")
        for name, target in (("b.png", "a.png"), ("c.png", "absent.png"), ("d.txt", "absent.txt")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.LNKTYPE, target
            tar.addfile(link)
    with caplog.at_level(logging.WARNING):
        assert [p.name for p in read_photographs([tmp_path / "photos.tar"])] == ["a.png", "b.png"]
    assert "skipped c.png: a link to what is not in the tar" in caplog.text
    assert "d.txt" not in caplog.text


def test_a_file_without_end_is_not_read_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against a sparse file that takes all memory, and with it the run."""
    Image.fromarray(photograph(0).permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    with (tmp_path / "b.png").open("wb") as file:
        file.truncate(2**40)
    with caplog.at_level(logging.WARNING):
        assert [p.name for p in read_photographs([tmp_path])] == ["a.png"]
    assert "skipped b.png" in caplog.text


def test_split_of_a_photograph_is_stable() -> None:
    """Guards against validation photographs becoming training photographs of another run."""
    from sgacodec.training.data import Photograph

    many = [Photograph(f"{i}.jpg", torch.zeros(3, 1, 1)) for i in range(2000)]
    training, validation = split(many)
    assert 25 < len(validation) < 80
    assert len(training) + len(validation) == 2000
    assert {p.name for p in split(many[:500])[1]} <= {p.name for p in validation}
    assert split(validation[:1])[0] == validation[:1]  # the training set is never empty


# ------------------------------------------------------------------------------------------------ command line


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three photographs and a damaged file; exported models have four levels."""
    monkeypatch.setattr(training_export, "LEVELS", 4)
    data = tmp_path / "photos"
    data.mkdir()
    for i in range(3):
        Image.fromarray(photograph(i).permute(1, 2, 0).numpy()).save(data / f"{i}.png")
    (data / "bad.jpg").write_bytes(b"\xff\xd8 not really")
    return data


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["train", *map(str, args)], catch_exceptions=False)


def test_the_command_trains_resumes_and_exports(tmp_path: Path, folder: Path) -> None:
    """Training, resuming and exporting by the command line."""
    out = tmp_path / "mine.safetensors"
    common = ("--architecture", "tiny", "--batch", 2, "--crop", 64, "--device", "cpu")
    first = run(folder, "--out", out, "--steps", 3, "--validation", folder, "--licence", "CC0-1.0", *common)
    assert first.exit_code == 0, first.output
    assert "skipped bad.jpg" in first.stderr
    assert "validation" in first.stderr
    metadata = read_info(out).metadata
    assert metadata["name"] == "mine"
    assert metadata["licence"] == "CC0-1.0"
    assert metadata["training"]["steps"] == 3
    assert metadata["training"]["crops"] == 6
    assert metadata["training"]["data"] == ["photos"]
    assert verify(out) == []
    lines = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 3
    assert len(lines[0]["loss"]) == 6
    assert len(lines[1]["validation"]) == 6

    assert "exists" in run(folder, "--out", out, "--steps", 3, *common).stderr
    changed = ("--lr-end", 0.002, "--ema", 0.5)
    again = run(folder, "--out", out, "--steps", 5, "--resume", tmp_path / "mine.ckpt", "-q", *changed)
    assert (again.exit_code, again.output) == (0, "")
    record = read_info(out).metadata["training"]
    assert (record["steps"], record["recipe"]["lr_end"], record["recipe"]["ema"]) == (5, 0.002, 0.5)
    model_id = read_info(out).id
    other = tmp_path / "other.safetensors"
    assert run(folder, "--out", other, "--export-only", tmp_path / "mine.ckpt").exit_code == 0
    assert read_info(other).id == model_id
    assert not (tmp_path / "other.ckpt").exists()


def test_a_resumed_run_keeps_what_it_was_given(tmp_path: Path, folder: Path) -> None:
    """Name and licence are those of the first run; other photographs are noticed; no other checkpoint is replaced."""
    common = ("--architecture", "tiny", "--batch", 2, "--crop", 64, "--device", "cpu", "--steps", 1)
    out, checkpoint = tmp_path / "a.safetensors", tmp_path / "a.ckpt"
    assert run(folder, "--out", out, "--licence", "CC0-1.0", "--name", "nice", *common).exit_code == 0
    again = run(folder, "--out", out, "--resume", checkpoint, "--steps", 2)
    assert (again.exit_code, "other photographs" in again.stderr) == (0, False)
    assert [read_info(out).metadata[key] for key in ("name", "licence")] == ["nice", "CC0-1.0"]
    (folder / "2.png").unlink()
    assert "other photographs" in run(folder, "--out", out, "--resume", checkpoint, "--steps", 3).stderr

    other = tmp_path / "b.safetensors"
    assert run(folder, "--out", other, *common).exit_code == 0
    content = (tmp_path / "b.ckpt").read_bytes()
    refused = run(folder, "--out", other, "--resume", checkpoint, "--steps", 4)
    assert (refused.exit_code, "checkpoint of another run" in refused.stderr) == (2, True)
    assert (tmp_path / "b.ckpt").read_bytes() == content


def test_nothing_that_is_read_is_overwritten(
    tmp_path: Path, folder: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a log in a photograph or checkpoint, and a model in place of the one it started from."""
    monkeypatch.setenv("SGACODEC_MODELS", str(tmp_path))
    model, checkpoint = tmp_path / "a.safetensors", tmp_path / "c.ckpt"
    shutil.copy(tiny_path, model)
    checkpoint.write_bytes(b"")
    for arguments, message in (
        (("--out", model, "--init", model), "would overwrite"),
        (("--out", model, "--init", read_info(model).name), "would overwrite"),
        (("--out", tmp_path / "b.safetensors", "--resume", checkpoint, "--log", checkpoint), "would overwrite"),
        (("--out", tmp_path / "b.safetensors", "--log", folder / "0.png"), "would overwrite"),
        (("--out", tmp_path / "b.safetensors", "--log", tmp_path / "absent" / "log"), "no such folder"),
    ):
        result = run(folder, *arguments, "--steps", 1)
        assert (result.exit_code, message in result.stderr) == (2, True)


def test_run_starts_from_the_weights_of_a_model(tmp_path: Path, folder: Path) -> None:
    """Without a checkpoint, training can start from the weights of a model."""
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    common = ("--batch", 2, "--crop", 64, "--device", "cpu", "-q")
    assert run(folder, "--out", first, "--steps", 30, "--architecture", "tiny", *common).exit_code == 0
    begun = run(folder, "--out", second, "--steps", 0, "--init", first, *common)
    assert begun.exit_code == 0, begun.output
    before, after = read_model(first).gained, read_model(second).gained
    for key, value in before.state_dict().items():
        assert torch.allclose(value, after.state_dict()[key], rtol=1e-4, atol=1e-5), key
    record = read_info(second).metadata["training"]
    assert record["steps"] == 0
    assert (record["recipe"]["architecture"], record["recipe"]["init"]) == ("tiny", read_info(first).id)
    assert record["recipe"]["lr"] == pytest.approx(3e-4)
    assert [(r["steps"], r["recipe"]["steps"]) for r in record["history"]] == [(30, 30)]


def test_run_starts_from_a_checkpoint(tmp_path: Path, trained: State) -> None:
    """The averaged weights of a checkpoint are taken unchanged, and the run is recorded."""
    path = tmp_path / "first.ckpt"
    save_checkpoint(trained, path)
    initial = read_initial(path)
    assert (initial.architecture, initial.source, initial.new) == ("tiny", "first.ckpt, step 40", ())
    begun = start(replace(RECIPE, init=initial.source), Crops([]), CPU, initial)
    for key, value in trained.ema.state_dict().items():
        assert torch.equal(value, begun.model.state_dict()[key]), key
        assert torch.equal(value, begun.ema.state_dict()[key]), key
    save_checkpoint(begun, path)
    assert [r["steps"] for r in load_checkpoint(path, CPU).history] == [40]
    assert [r["steps"] for r in read_initial(path).history] == [40, 0]


def test_weights_of_an_older_architecture_are_carried_over(tmp_path: Path, folder: Path) -> None:
    """Branches and context that a model lacks start at zero, are named, and learn faster than the rest."""
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    common = ("--batch", 2, "--crop", 64, "--device", "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(networks.ARCHITECTURES, "plain", PLAIN)
        assert run(folder, "--out", first, "--steps", 2, "--architecture", "plain", *common).exit_code == 0
    begun = run(folder, "--out", second, "--steps", 2, "--init", first, *common)
    assert begun.exit_code == 0, begun.output
    assert f"{read_info(first).id}; new: g_a.deep, g_s.body, context" in " ".join(begun.stderr.split())
    recipe = read_info(second).metadata["training"]["recipe"]
    assert recipe["new"] == ["g_a.deep", "g_s.body", "context"]
    assert [recipe[key] for key in ("architecture", "lr", "rest")] == ["tiny", 1e-3, 0.4]


@pytest.mark.parametrize("source", ["older checkpoint", "lite"])
def test_new_modules_do_not_change_the_output(source: str, tmp_path: Path, crops: Crops, lite_path: Path) -> None:
    """Before training, the result is exactly that of the weights that the run started from."""
    path = lite_path
    if source == "lite":
        before = read_model(path).gained
    else:
        path = tmp_path / "a.ckpt"
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(networks.ARCHITECTURES, "tiny", PLAIN)
            older = start(RECIPE, crops, CPU)
            train(older, crops, CPU, path, tick=lambda s: s.step < 3)
        before = older.ema
        assert read_initial(path).new == ("g_a.deep", "g_s.body", "context")
    initial = read_initial(path)
    after = start(Recipe(initial.architecture), Crops([]), CPU, initial).model
    old, new = fold(before, 0.02), fold(after, 0.02)
    x = crops.sample(2, 128, torch.Generator().manual_seed(3))
    with torch.no_grad():
        y = old.networks.g_a(x)
        z_hat = torch.round(old.networks.h_a(y))
        assert torch.equal(new.networks.g_a(x), y)
        assert torch.equal(torch.round(new.networks.h_a(y)), z_hat)
        (v, sigma, y_hat), (new_v, new_sigma, new_y_hat) = (code_rounded(model, y, z_hat) for model in (old, new))
        assert v.unique().numel() > 3
        assert torch.equal(new_y_hat, y_hat)  # the order of the symbols may differ
        assert torch.equal(new_v.sort().values, v.sort().values)
        assert torch.equal(new_sigma.sort().values, sigma.sort().values)
        assert torch.equal(new.networks.g_s(y_hat), old.networks.g_s(y_hat))


def test_ctrl_c_saves_a_checkpoint(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C writes a checkpoint and names the option to continue."""

    def interrupted(state: State, *args: Any) -> Any:
        result = step(state, *args)
        if state.step == 2:
            signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(loop, "step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    out = tmp_path / "mine.safetensors"
    result = run(folder, "--out", out, "--steps", 9, "--architecture", "tiny", "--batch", 2, "--crop", 64)
    assert result.exit_code == 130
    assert f"--resume {tmp_path / 'mine.ckpt'}" in result.stderr
    assert load_checkpoint(tmp_path / "mine.ckpt", CPU).step == 2
    assert not out.exists()
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--steps", "3", "--minutes", "1"], 2, "give either --steps or --minutes"),
        ([], 2, "give the length"),
        (["--steps", "3", "--crop", "100"], 2, "not a multiple of 64"),
        (["--steps", "3", "--device", "cuda:99"], 2, "no such device"),
        (["--resume", "a.ckpt", "--optimizer", "adam"], 2, "keeps its optimizer"),
        (["--resume", "a.ckpt", "--stage", "prior"], 2, "keeps its stage"),
        (["--steps", "3", "--stage", "prior"], 2, "--stage prior needs --init"),
        (["--steps", "3", "--refine-steps", "9"], 2, "--refine-steps is for --stage decoder"),
        (["--steps", "3", "--unrefined", "1"], 2, "--unrefined is for --stage decoder"),
        (["--resume", "a.ckpt", "--unrefined", "1"], 2, "keeps its unrefined"),
        (["--resume", "a.ckpt", "--dead-zone"], 2, "keeps its dead-zone"),
        (["--steps", "3", "--init", "lite", "--stage", "prior", "--dead-zone"], 2, "--dead-zone needs unrefined crops"),
        (
            ["--steps", "3", "--init", "lite", "--stage", "decoder", "--unrefined", "0", "--dead-zone"],
            2,
            "--dead-zone needs unrefined crops",
        ),
        (["--steps", "3", "--architecture", "huge"], 1, "unknown architecture 'huge'"),
        (["--steps", "3", "--resume", "absent.ckpt"], 1, "absent.ckpt: No such file"),
        (["--steps", "3", "--validation", "absent"], 1, "absent: no such file"),
        (["--export-only", "a.ckpt", "--steps", "3"], 2, "does not train"),
    ],
)
def test_usage_errors_are_one_line(options: list[str], code: int, message: str, tmp_path: Path, folder: Path) -> None:
    """Guards against tracebacks, and against usage errors that are found late."""
    result = run(folder, "--out", tmp_path / "mine.safetensors", *options)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "mine.ckpt").exists()
