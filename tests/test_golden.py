"""Files of format version 1 decode to the same integers in every version, on every device."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from PIL import Image

from sgacodec import api
from sgacodec.api import Codec, Settings
from sgacodec.picture import Picture

PLAIN = Settings(method="none")


def encode(codec: Codec, picture: Picture, settings: Settings = PLAIN) -> api.Encoded:
    return codec.encode([picture], settings)[0]


CASES = ("colour", "grey-alpha", "context", "refined")


def golden_picture(case: str, photograph: np.ndarray) -> tuple[Picture, Settings]:
    crop = photograph[130:200, 230:350]
    if case == "colour":
        return Picture(crop, exif=b"II*\0\x08\0\0\0\0\0"), Settings(lmbda=0.045, method="none")
    if case == "context":
        return Picture(crop), PLAIN
    if case == "refined":
        return Picture(crop[:, :70]), Settings(lmbda=0.045, method="ssl", steps=20)
    alpha = np.tile(np.arange(90, dtype=np.uint8), (33, 1))
    return Picture(np.repeat(crop[:33, :90, :1], 3, axis=2), grey=True, alpha=alpha), Settings(
        lmbda=0.0016, method="none"
    )


@pytest.mark.parametrize("case", CASES)
def test_golden_files(
    case: str, request: pytest.FixtureRequest, context_path: Path, photograph: np.ndarray, regenerate: bool
) -> None:
    """Files of format version 1 decode to the same integers in every later version."""
    path, record = GOLDEN / f"{case}.sga", GOLDEN / f"{case}.json"
    plain = case in ("colour", "grey-alpha")
    codec: Codec = request.getfixturevalue("small") if plain else Codec(str(context_path), device="cpu")
    if regenerate:
        path.write_bytes(encode(codec, *golden_picture(case, photograph)).data)
    decoded = codec.decode(path.read_bytes())
    picture = decoded.picture
    exact = {
        "integers": decoded.report["integers"],
        "alpha": None if picture.alpha is None else hashlib.sha256(picture.alpha.tobytes()).hexdigest(),
        "exif": None if picture.exif is None else picture.exif.hex(),
        "grey": picture.grey,
    }
    if regenerate:
        record.write_text(json.dumps(exact, indent=1) + "\n", encoding="utf-8")
        Image.fromarray(picture.pixels).save(GOLDEN / f"{case}.png", optimize=True)
    assert exact == json.loads(record.read_text("utf-8"))
    with Image.open(GOLDEN / f"{case}.png") as shown:  # the pixels may differ by 1 between machines
        assert np.abs(np.array(shown).astype(int) - picture.pixels).max() <= 1


def recorded_integers(case: str) -> str:
    return json.loads((GOLDEN / f"{case}.json").read_text("utf-8"))["integers"]


@pytest.mark.parametrize("case", ["colour", "context"])
def test_golden_file_with_four_threads(case: str, tiny_path: Path, context_path: Path) -> None:
    """Guards against integers that depend on the number of threads."""
    codec = Codec(str(tiny_path if case == "colour" else context_path), device="cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert codec.decode((GOLDEN / f"{case}.sga").read_bytes()).report["integers"] == recorded_integers(case)
    finally:
        torch.set_num_threads(before)


@pytest.mark.cuda
def test_files_travel_between_devices(photograph: np.ndarray, tiny_path: Path, context_path: Path) -> None:
    """Files encoded on CUDA decode on a CPU to the same integers, and the other way round."""
    on_cpu, on_cuda = Codec("lite", device="cpu"), Codec("lite", device="cuda")
    assert on_cuda.levels.for_encoding(Settings(lmbda=0.0075)).exact.device.type == "cuda"
    for lmbda in (0.0016, 0.0075, 0.045):
        for one, other in ((on_cpu, on_cuda), (on_cuda, on_cpu)):
            data = encode(one, Picture(photograph), Settings(lmbda=lmbda, method="none")).data
            a, b = one.decode(data), other.decode(data)
            assert a.report["integers"] == b.report["integers"]
            assert np.abs(a.picture.pixels.astype(int) - b.picture.pixels).max() <= 1
    for case, path in (("colour", tiny_path), ("context", context_path), ("refined", context_path)):
        golden = Codec(str(path), device="cuda").decode((GOLDEN / f"{case}.sga").read_bytes())
        assert golden.report["integers"] == recorded_integers(case)
