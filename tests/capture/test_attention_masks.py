"""Attention as it is captured: batches and heads of one are made plain, and masks must fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchtrt_md as md
from torchtrt_md.errors import CaptureError
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.program import value_of

CP2 = md.Mesh(cp=2)
SPLIT: dict[str, Any] = {"": {name: md.Split(2) for name in "qkv"}}


class Attention(nn.Module):
    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.how = how

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **self.how)


def operands(*shapes: tuple[int, int]) -> tuple[Tensor, ...]:
    """Of each batch and heads one of 8 tokens."""
    return tuple(torch.randn(batch, heads, 8, 4) for batch, heads in shapes)


@pytest.mark.parametrize("strategy", ["ulysses", "allgather_kv"])
@pytest.mark.parametrize(
    ("shapes", "gqa", "heads"),
    [
        ([(1, 4), (1, 4), (1, 1)], False, [4, 4, 4]),
        ([(1, 1), (1, 4), (1, 4)], False, [4, 4, 4]),
        ([(2, 2), (1, 2), (1, 1)], False, [2, 2, 2]),
        ([(1, 4), (2, 2), (2, 2)], True, [4, 2, 2]),
    ],
)
def test_batches_and_heads_of_one(shapes: list[tuple[int, int]], gqa: bool, heads: list[int], strategy: Any) -> None:
    model, args = Attention(enable_gqa=gqa), operands(*shapes)
    program = md.capture(model, args, mesh=CP2, parallel=md.ContextParallel("cp", strategy, SPLIT))
    (node,) = program.graphs[0].graph.find_nodes(op="call_function", target=torch.ops.torchtrt_md.attention.default)
    assert [value_of(bound_args(node)[name]).shape[1] for name in ("q", "k", "v")] == heads
    assert len({value_of(bound_args(node)[name]).shape[0] for name in ("q", "k", "v")}) == 1
    md.verify(program, model, args)


@pytest.mark.parametrize("mask", [(1, 8, 8, 8), (4, 7), (2, 1, 8, 8), (1, 1, 1, 8, 8)])
def test_masks_that_do_not_fit(mask: tuple[int, ...]) -> None:
    model = Attention(attn_mask=torch.zeros(mask))
    with pytest.raises(CaptureError, match=r"an attention mask of .* over scores of \[1, 4, 8, 8\]") as caught:
        md.capture(model, operands((1, 4), (1, 4), (1, 4)), mesh=CP2)
    assert "in forward: return F.scaled_dot_product_attention" in caught.value.at


def test_a_mask_of_all_heads_beside_a_ranks_own() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.o = nn.Linear(32, 32), nn.Linear(32, 32)
            self.mask = nn.Parameter(torch.randn(1, 8, 6, 6))

        def forward(self, x: Tensor) -> Any:
            q = self.q(x).unflatten(-1, (-1, 4)).transpose(1, 2)
            return self.o(F.scaled_dot_product_attention(q, q, q, self.mask).transpose(1, 2).flatten(2))

    plan = md.TensorParallel("tp", {"q": "colwise", "o": "rowwise"})
    with pytest.raises(CaptureError, match=r"mask of \[1, 8, 6, 6\] over scores of \[1, 4, 6, 6\]") as caught:
        md.capture(Masked(), (torch.randn(1, 6, 32),), mesh=md.Mesh(tp=2), parallel=plan)
    assert "a rank's heads" in caught.value.fix
