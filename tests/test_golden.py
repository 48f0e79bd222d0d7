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


CASES = ("colour", "grey-alpha")


def golden_picture(case: str, photograph: np.ndarray) -> tuple[Picture, Settings]:
    crop = photograph[130:200, 230:350]
    if case == "colour":
        return Picture(crop, exif=b"II*\0\x08\0\0\0\0\0"), Settings(lmbda=0.045, method="none")
    alpha = np.tile(np.arange(90, dtype=np.uint8), (33, 1))
    return Picture(np.repeat(crop[:33, :90, :1], 3, axis=2), grey=True, alpha=alpha), Settings(
        lmbda=0.0016, method="none"
    )


@pytest.mark.parametrize("case", CASES)
def test_golden_files(case: str, small: Codec, photograph: np.ndarray, regenerate: bool) -> None:
    """Files of format version 1 decode to the same integers in every later version."""
    path, record = GOLDEN / f"{case}.sga", GOLDEN / f"{case}.json"
    if regenerate:
        path.write_bytes(encode(small, *golden_picture(case, photograph)).data)
    decoded = small.decode(path.read_bytes())
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


def test_golden_file_with_four_threads(small: Codec) -> None:
    """Guards against integers that depend on the number of threads."""
    data = (GOLDEN / "colour.sga").read_bytes()
    expected = json.loads((GOLDEN / "colour.json").read_text("utf-8"))["integers"]
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert small.decode(data).report["integers"] == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.cuda
def test_files_travel_between_devices(photograph: np.ndarray, tiny_path: Path) -> None:
    """Files encoded on CUDA decode on a CPU to the same integers, and the other way round."""
    on_cpu, on_cuda = Codec("lite", device="cpu"), Codec("lite", device="cuda")
    assert on_cuda.levels.for_encoding(0.0075).exact.device.type == "cuda"
    for lmbda in (0.0016, 0.0075, 0.045):
        for one, other in ((on_cpu, on_cuda), (on_cuda, on_cpu)):
            data = encode(one, Picture(photograph), Settings(lmbda=lmbda, method="none")).data
            a, b = one.decode(data), other.decode(data)
            assert a.report["integers"] == b.report["integers"]
            assert np.abs(a.picture.pixels.astype(int) - b.picture.pixels).max() <= 1
    golden = Codec(str(tiny_path), device="cuda").decode((GOLDEN / "colour.sga").read_bytes())
    assert golden.report["integers"] == json.loads((GOLDEN / "colour.json").read_text("utf-8"))["integers"]
