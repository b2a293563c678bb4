"""Identical collectives are done once, and no others."""

from __future__ import annotations

from collections.abc import Callable

import graphs
import pytest
import torch
from torch import Tensor

from torchtrt_md.lowering import merge_identical
from torchtrt_md.mesh import Mesh

MESH = Mesh(cp=2, tp=2)
md = torch.ops.torchtrt_md

CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "all_reduce": lambda x: md.all_reduce(x, "sum", "tp", 2),
    "all_gather": lambda x: md.all_gather(x, 1, "tp", 2),
    "reduce_scatter": lambda x: md.reduce_scatter(x, "max", 1, "tp", 2),
    "all_to_all": lambda x: md.all_to_all(x, 0, 1, "tp", 2),
    "broadcast": lambda x: md.broadcast(x, 1, "tp", 2),
    "shard": lambda x: md.shard(x, 0, "tp", 2),
}


@pytest.mark.parametrize("name", CALLS)
def test_twice_the_same(name: str) -> None:
    call = CALLS[name]
    xs = graphs.per_rank(MESH, 2, 4)
    graph = graphs.trace(lambda x: call(x) * 2 + call(x), xs[0])
    assert graphs.check(merge_identical.run, graph, MESH, xs) == 1
    assert graphs.ops(graph).count(f"torchtrt_md.{name}") == 1


def test_a_chain_and_what_follows_it() -> None:
    """Once the first are merged, the second have the same operand."""

    def chain(x: Tensor) -> Tensor:
        reduced: Tensor = md.all_reduce(md.all_gather(x, 0, "cp", 2), "sum", "tp", 2)
        return reduced

    xs = graphs.per_rank(MESH, 2, 4)
    graph = graphs.trace(lambda x: [chain(x), chain(x) + 1, chain(x) + 2], xs[0])
    assert graphs.check(merge_identical.run, graph, MESH, xs) == 4
    assert [c[0] for c in graphs.collectives(graph)] == ["all_gather", "all_reduce"]


@pytest.mark.parametrize(
    "other",
    [
        lambda x: md.all_gather(x, 0, "cp", 2),
        lambda x: md.all_gather(x, 1, "tp", 2),
        lambda x: md.all_gather(x + 1, 0, "tp", 2),
        lambda x: torch.cat([md.all_reduce(x, "max", "tp", 2), md.all_reduce(x, "min", "tp", 2)]),
        lambda x: torch.cat([md.broadcast(x, 0, "tp", 2), md.broadcast(x, 1, "tp", 2)]),
        lambda x: torch.cat([md.all_to_all(x, 0, 1, "tp", 2), md.all_to_all(x, 0, 0, "tp", 2).view(1, 4)]),
        lambda x: torch.cat([md.shard(x, 0, "tp", 2), md.shard(x, 0, "cp", 2)]),
    ],
)
def test_others_stay(other: Callable[[Tensor], Tensor]) -> None:
    xs = graphs.per_rank(MESH, 2, 2)
    graph = graphs.trace(lambda x: [md.all_gather(x, 0, "tp", 2), other(x)], xs[0])
    before = graphs.ops(graph)
    assert graphs.check(merge_identical.run, graph, MESH, xs) == 0
    assert graphs.ops(graph) == before
