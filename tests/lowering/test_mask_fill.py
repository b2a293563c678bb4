"""One value written by a mask becomes ``where``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import graphs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.fx import Interpreter

from torchtrt_md.capture.torch_private import coordinates
from torchtrt_md.lowering import functional_collectives, mask_fill
from torchtrt_md.mesh import Mesh
from torchtrt_md.verification.simulate import simulate

MESH = Mesh(tp=2)
ZERO = torch.zeros((), dtype=torch.float64)


def write(x: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    return torch.index_put(x, (mask,), value)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool])
def test_one_value(dims: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    xs = graphs.per_rank(MESH, 3, 1, 5, dtype=dtype)
    masks = graphs.per_rank(MESH, *(3, 1, 5)[:dims], dtype=torch.bool, seed=1)
    value = torch.full(shape, 7).to(dtype)
    graph = graphs.trace(write, xs[0], masks[0], value)
    assert graphs.check(mask_fill.run, graph, MESH, xs, masks, value) == 1
    assert set(graphs.ops(graph)) <= {"aten.where", "aten.reshape"}
    assert ("aten.reshape" in graphs.ops(graph)) == (dims < 3)
    assert (
        xs[0]
        .masked_fill(masks[0].reshape(*masks[0].shape, *[1] * (3 - dims)), 7)
        .equal(graphs.run_ranks(graph, MESH, xs, masks, value)[0][0])
    )


def test_the_embedding_of_a_split_vocabulary() -> None:
    """As DTensor traces it: ids of other ranks are masked, and their rows written to zero."""
    table = torch.randn(10, 4, dtype=torch.float64)
    ids = torch.tensor([[0, 9, 4], [5, 5, 1]])

    def forward(local: Tensor, ids: Tensor) -> Tensor:
        weight = DTensor.from_local(local, tp, [Shard(0)], run_check=False)
        indices = DTensor.from_local(ids, tp, [Replicate()], run_check=False)
        rows: Any = F.embedding(indices, weight)
        result: Tensor = rows.redistribute(tp, [Replicate()]).to_local()
        return result

    traced = []
    with graphs.fake_launch(MESH) as launch:
        tp = launch["tp"]
        for rank in range(2):
            with coordinates({"tp": rank}):
                in_place = graphs.trace(forward, table[:5], ids)
            without = torch.func.functionalize(Interpreter(in_place).run, remove="mutations")  # as capture does
            traced.append(graphs.trace(without, table[:5], ids))
        groups = graphs.groups_of(launch)
    for graph in traced:
        graphs.rewrite(functional_collectives.run, graph, MESH, groups)
        assert "aten.index_put" in graphs.ops(graph)
        assert graphs.rewrite(mask_fill.run, graph, MESH) == 2
        assert "aten.index_put" not in graphs.ops(graph)
        assert graphs.ops(graph).count("aten.where") == 2
    parts = list(table.chunk(2))
    for (result,) in simulate(graphs.program(traced, MESH, parts, ids), {}):
        torch.testing.assert_close(result, table[ids], rtol=0, atol=0)


def accumulated(x: Tensor, mask: Tensor) -> Tensor:
    return torch.index_put(x, (mask,), ZERO, accumulate=True)


def several_values(x: Tensor, mask: Tensor) -> Tensor:
    return torch.index_put(x, (mask,), x[0].new_ones(3))


def by_position(x: Tensor, mask: Tensor) -> Tensor:
    return torch.index_put(x, (torch.tensor([2, 0]),), ZERO)


def on_the_second_dim(x: Tensor, mask: Tensor) -> Tensor:
    return torch.ops.aten.index_put(x, [None, mask[0]], ZERO)  # type: ignore[no-any-return]


def by_mask_and_position(x: Tensor, mask: Tensor) -> Tensor:
    return torch.index_put(x, (mask[:, 0], torch.tensor([1])), ZERO)


@pytest.mark.parametrize("forward", [accumulated, several_values, by_position, on_the_second_dim, by_mask_and_position])
def test_other_writes_stay(forward: Callable[[Tensor, Tensor], Tensor]) -> None:
    xs = graphs.per_rank(MESH, 3, 3)
    mask = torch.tensor([[True, False, True], [False, False, False], [True, False, False]])
    graph = graphs.trace(forward, xs[0], mask)
    before = graphs.ops(graph)
    assert graphs.check(mask_fill.run, graph, MESH, xs, mask) == 0
    assert graphs.ops(graph) == before
    assert "aten.index_put" in before
