"""The probes against the builds that they foretell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchtrt_md as md
from torchtrt_md.build import probes
from torchtrt_md.errors import BuildError

DTYPES = {"BF16": torch.bfloat16, "HALF": torch.float16, "FLOAT": torch.float32}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probe", [probes.exchanges, probes.gathers_beside_attention])
def test_probes_answer_once(probe: Callable[[str], bool], dtype: str) -> None:
    answer = probe(dtype)
    assert isinstance(answer, bool)
    misses = probe.cache_info().misses  # type: ignore[attr-defined]
    assert probe(dtype) is answer
    assert probe.cache_info().misses == misses  # type: ignore[attr-defined]


class Exchange(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.torchtrt_md.all_to_all(x, 0, 0, "tp", 2)
        return result


@pytest.mark.parametrize("dtype", DTYPES)
def test_exchanges_agrees_with_a_build(dtype: str, tmp_path: Path) -> None:
    program = md.capture(Exchange(), (torch.randn(4, 64).to(DTYPES[dtype]),), mesh=md.Mesh(tp=2))
    if probes.exchanges(dtype):
        assert len(md.build(program, tmp_path, ranks=[0])) == 1
    else:
        with pytest.raises(BuildError, match="no ALL_TO_ALL"):
            md.build(program, tmp_path, ranks=[0])


class GatherBesideAttention(nn.Module):
    def forward(self, q: Tensor, kv: Tensor) -> Tensor:
        part = torch.ops.torchtrt_md.all_gather(kv, 0, "tp", 2)[1:]
        return nn.functional.scaled_dot_product_attention(q, part, part, scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gathers_beside_attention_agrees_with_a_build(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = probes.gathers_beside_attention(dtype)
    monkeypatch.setattr(probes, "gathers_beside_attention", lambda dtype: True)  # build what was probed
    heads = torch.randn(1, 2, 16, 64).to(DTYPES[dtype])
    program = md.capture(GatherBesideAttention(), (heads, heads.clone()), mesh=md.Mesh(tp=2))
    try:
        built = len(md.build(program, tmp_path, ranks=[0])) == 1
    except BuildError:
        built = False
    assert built == answer
