"""What a part of a program cannot have in an engine, found before it is built."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torchtrt_md as md
from torchtrt_md.build.part import unconvertible


@pytest.mark.parametrize(("dtype", "kept"), [(torch.int64, True), (torch.int32, True), (torch.float32, False)])
def test_a_sort_of_integers(dtype: torch.dtype, kept: bool) -> None:
    """Its converter fails, and only where the outputs of the whole network are asked, so that no node is named."""

    class Order(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argsort()

    program = md.lower(md.capture(Order(), (torch.arange(6).to(dtype),), mesh=md.Mesh(tp=1)))
    found = unconvertible(program.graphs[0])
    assert [reason for reason in found.values() if "aten.sort" in reason] == list(found.values())
    assert bool(found) == kept
