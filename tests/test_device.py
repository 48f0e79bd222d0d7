"""Where convolutions run in bfloat16."""

from __future__ import annotations

import pytest
import torch

from sgacodec.device import reduced_precision


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "fast"),
    [(True, True, True), (True, False, True), (False, True, True), (False, False, False), (None, None, False)],
)
def test_bfloat16_is_used_where_a_cpu_has_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, amx: bool | None, avx512_bf16: bool | None, fast: bool
) -> None:
    """Guards against float32 on CPUs with AVX512_BF16 but no AMX; None: a torch that cannot tell."""
    for name, supported in (("_is_amx_tile_supported", amx), ("_is_avx512_bf16_supported", avx512_bf16)):
        if supported is None:
            monkeypatch.delattr(torch.cpu, name, raising=False)
        else:
            monkeypatch.setattr(torch.cpu, name, lambda supported=supported: supported, raising=False)
    assert reduced_precision(torch.device("cpu")) is fast
    assert reduced_precision(torch.device("cuda"))
