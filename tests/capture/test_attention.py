"""Attention is kept whole, with operands of the shapes that the strategies take."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torchtrt_md as md
from torchtrt_md.errors import CaptureError

X = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))


class Heads(nn.Module):
    """Four heads of queries over some of keys and of values; ``batch`` of them, or one for all."""

    def __init__(self, keys: int, values: int, grouped: bool = False, batch: int | None = None) -> None:
        super().__init__()
        self.keys, self.values, self.grouped, self.batch = keys, values, grouped, batch

    def forward(self, x: Tensor) -> Tensor:
        q = x.view(2, -1, 4, 4).transpose(1, 2)
        k, v = q[: self.batch, : self.keys] * 2, q[: self.batch, : self.values] + 1
        return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=self.grouped)


@pytest.mark.parametrize("strategy", ["ulysses", "allgather_kv"])
@pytest.mark.parametrize(
    "model",
    [
        Heads(4, 1),
        Heads(1, 1),
        Heads(1, 4),
        Heads(2, 2, grouped=True),
        Heads(1, 1, grouped=True),  # fewer than the ranks
        Heads(4, 4, batch=1),
    ],
    ids=["one of values", "one of both", "one of keys", "grouped", "one group", "one batch of keys"],
)
def test_what_pytorch_broadcasts_is_computed(model: nn.Module, strategy: md.parallel.Strategy) -> None:
    parallel = md.ContextParallel("cp", strategy, plan={"": {"x": md.Split(1)}})
    program = md.lower(md.capture(model, (X,), mesh=md.Mesh(cp=2), parallel=parallel))
    assert md.verify(program, model, (X,)).error <= 1e-5


def test_values_of_a_batch_over_three_dims() -> None:
    class Single(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x[:1], x[:1])

    program = md.lower(md.capture(Single(), (X,), mesh=md.Mesh(cp=1)))
    assert md.verify(program, Single(), (X,)).error <= 1e-5


class Shapes(nn.Module):
    def __init__(self, keys: tuple[int, ...], values: tuple[int, ...]) -> None:
        super().__init__()
        self.k, self.v = torch.zeros(keys), torch.zeros(values)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x.view(2, -1, 4, 4).transpose(1, 2), self.k, self.v)


@pytest.mark.parametrize(
    ("keys", "values", "problem"),
    [
        ((2, 2, 8, 4), (2, 4, 8, 4), "4 heads of queries, 2 of keys and 4 of values"),
        ((2, 4, 8, 4), (2, 4, 7, 4), "8 keys for 7 values"),
        ((2, 4, 8, 5), (2, 4, 8, 4), "a head_dim of 4 for queries and 5 for keys"),
        ((3, 4, 8, 4), (3, 4, 8, 4), "batches of 2 and 3"),
        ((4, 8, 4), (4, 8, 4), r"queries of 4 dims: \[2, 4, 8, 4\], with keys \[4, 8, 4\]"),
    ],
)
def test_shapes_that_are_no_attention(keys: tuple[int, ...], values: tuple[int, ...], problem: str) -> None:
    with pytest.raises(CaptureError, match=problem) as caught:
        md.capture(Shapes(keys, values), (X,), mesh=md.Mesh(cp=1))
    assert "in forward: return nn.functional.scaled_dot_product_attention" in caught.value.at


def test_grouped_heads_of_values_that_are_not_those_of_keys() -> None:
    with pytest.raises(CaptureError, match="4 heads of queries, 2 of keys and 4 of values"):
        md.capture(Heads(2, 4, grouped=True), (X,), mesh=md.Mesh(cp=1))
