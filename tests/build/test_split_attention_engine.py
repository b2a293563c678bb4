"""Attention over a split sequence as models have it becomes an engine: a mask, whole text, odd lengths and heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchtrt_md as md

pytestmark = pytest.mark.usefixtures("own_cache")  # each test builds what it needs


class Joint(nn.Module):
    """Whole text beside a split image, 6 heads, and a mask of the keys or none."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 3 * 6 * 8)

    def forward(self, text: Tensor, image: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = torch.cat([text, md.split(image, 1, "cp")], 1)
        q, k, v = self.qkv(x).view(1, -1, 3, 6, 8).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, None if kept is None else kept[:, None, None] > 0)
        return y[:, :, : text.shape[1]], md.gather(y[:, :, text.shape[1] :], 2, "cp")


@pytest.mark.parametrize(("strategy", "masked"), [("ulysses", True), ("allgather_kv", False)])
def test_an_engine_has_it_all(strategy: Any, masked: bool, tmp_path: Path) -> None:
    model = Joint().to(torch.bfloat16).eval()
    inputs = [torch.randn(1, 5, 12), torch.randn(1, 13, 12), *([torch.randn(1, 18)] if masked else [])]
    args = tuple(x.to(torch.bfloat16) for x in inputs)
    parallel = md.ContextParallel("cp", strategy, plan={})
    program = md.lower(md.capture(model, args, mesh=md.Mesh(cp=4), parallel=parallel))
    engine, *_ = md.build(program, tmp_path, target="sm80", ranks=[0])
    # there and back, or the keys and values; then what comes of the text, and what is returned
    expected = {"ulysses": ["all_to_all"] * 2, "allgather_kv": ["all_gather"]}[strategy]
    assert [collective.op for collective in engine.segment.collectives] == [*expected, "all_gather", "all_gather"]
    assert engine.file.stat().st_size > 0
