"""Collectives along an axis of one rank go."""

from __future__ import annotations

import graphs
import torch
from torch import Tensor

from torchtrt_md.lowering import single_rank
from torchtrt_md.mesh import Mesh

md = torch.ops.torchtrt_md
MESH = Mesh(cp=1, tp=2)


def every_collective(x: Tensor) -> Tensor:
    x = md.all_reduce(x, "sum", "cp", 1)
    x = md.all_gather(x, 1, "cp", 1)
    x = md.reduce_scatter(x, "avg", 0, "cp", 1)
    x = md.all_to_all(x, 0, 1, "cp", 1)
    x = md.broadcast(x, 0, "cp", 1)
    shard: Tensor = md.shard(x, 1, "cp", 1)
    return shard


def test_nothing_is_communicated() -> None:
    xs = graphs.per_rank(MESH, 2, 3)
    graph = graphs.trace(lambda x: every_collective(x * 2) + 1, xs[0])
    assert graphs.check(single_rank.run, graph, MESH, xs) == 6
    assert graphs.ops(graph) == ["aten.mul", "aten.add"]


def test_a_result_that_is_returned() -> None:
    xs = graphs.per_rank(MESH, 2, 3)
    graph = graphs.trace(lambda x: [every_collective(x), x], xs[0])
    assert graphs.check(single_rank.run, graph, MESH, xs) == 6
    assert graphs.ops(graph) == []


def test_larger_axes_stay() -> None:
    def forward(x: Tensor) -> Tensor:
        gathered: Tensor = md.all_gather(md.shard(md.all_reduce(x, "sum", "cp", 1), 0, "tp", 2), 0, "tp", 2)
        return gathered

    xs = graphs.per_rank(MESH, 2, 3)
    graph = graphs.trace(forward, xs[0])
    assert graphs.check(single_rank.run, graph, MESH, xs) == 1
    assert graphs.ops(graph) == ["torchtrt_md.shard", "torchtrt_md.all_gather"]
