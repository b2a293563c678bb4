"""A collective right behind its inverse goes; anything less stays."""

from __future__ import annotations

from collections.abc import Callable

import graphs
import pytest
import torch
from torch import Tensor

from torchtrt_md.lowering import cancel_inverse
from torchtrt_md.mesh import Mesh

MESH = Mesh(cp=2, tp=2)
md = torch.ops.torchtrt_md


def exchange(x: Tensor, split: int, concat: int, axis: str = "cp") -> Tensor:
    exchanged: Tensor = md.all_to_all(x, split, concat, axis, 2)
    return exchanged


def gather(x: Tensor, dim: int, axis: str = "cp") -> Tensor:
    gathered: Tensor = md.all_gather(x, dim, axis, 2)
    return gathered


def shard(x: Tensor, dim: int, axis: str = "cp") -> Tensor:
    mine: Tensor = md.shard(x, dim, axis, 2)
    return mine


@pytest.mark.parametrize(("split", "concat"), [(0, 0), (0, 1), (1, 0), (1, 2), (2, 1), (2, 2), (1, 1)])
@pytest.mark.parametrize("axis", MESH.names)
def test_there_and_back(split: int, concat: int, axis: str) -> None:
    xs = graphs.per_rank(MESH, 2, 4, 6)
    graph = graphs.trace(lambda x: exchange(exchange(x * 2, split, concat, axis), concat, split, axis) + 1, xs[0])
    assert graphs.check(cancel_inverse.run, graph, MESH, xs) == 1
    assert graphs.ops(graph) == ["aten.mul", "aten.add"]


def test_there_and_back_twice() -> None:
    xs = graphs.per_rank(MESH, 2, 4)

    def forward(x: Tensor) -> Tensor:
        return exchange(exchange(exchange(exchange(exchange(x, 0, 1), 1, 0), 0, 1), 1, 0), 0, 1)

    graph = graphs.trace(forward, xs[0])
    assert graphs.check(cancel_inverse.run, graph, MESH, xs) == 2
    assert graphs.collectives(graph) == [("all_to_all", 0, 1, "cp", 2)]


@pytest.mark.parametrize("dim", [0, 1])
def test_the_part_of_what_was_gathered(dim: int) -> None:
    xs = graphs.per_rank(MESH, 3, 5)
    graph = graphs.trace(lambda x: shard(gather(x, dim), dim) + 1, xs[0])
    assert graphs.check(cancel_inverse.run, graph, MESH, xs) == 1
    assert graphs.ops(graph) == ["aten.add"]


@pytest.mark.parametrize("dim", [0, 1])
def test_parts_gathered_again(dim: int) -> None:
    x = graphs.per_rank(MESH, 4, 6)[0]
    graph = graphs.trace(lambda x: gather(shard(x, dim), dim) + 1, x)
    assert graphs.check(cancel_inverse.run, graph, MESH, x) == 1
    assert graphs.ops(graph) == ["aten.add"]


def test_the_first_stays_for_others() -> None:
    xs = graphs.per_rank(MESH, 2, 4)

    def forward(x: Tensor) -> list[Tensor]:
        gathered = gather(x, 0)
        return [shard(gathered, 0), gathered * 2]

    graph = graphs.trace(forward, xs[0])
    assert graphs.check(cancel_inverse.run, graph, MESH, xs) == 1
    assert graphs.ops(graph) == ["torchtrt_md.all_gather", "aten.mul"]


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: exchange(exchange(x, 0, 1), 0, 1),  # the same again
        lambda x: exchange(exchange(x, 0, 1), 1, 1),
        lambda x: exchange(exchange(x, 0, 1), 1, 0, "tp"),
        lambda x: exchange(exchange(x, 0, 1) + 1, 1, 0),
        lambda x: exchange(exchange(x, 0, 1).view(4, 4).T.contiguous(), 1, 0),
        lambda x: shard(gather(x, 0), 1),
        lambda x: shard(gather(x, 0), 0, "tp"),
        lambda x: shard(gather(x, 0) * 2, 0),
        lambda x: gather(shard(x, 0), 1),
        lambda x: gather(shard(x, 0), 0, "tp"),
        lambda x: gather(gather(x, 0), 0),
        lambda x: shard(shard(x, 0), 0),
        lambda x: shard(exchange(x, 0, 1), 1),
        lambda x: md.all_gather(md.reduce_scatter(x, "sum", 0, "cp", 2), 0, "cp", 2),
    ],
)
def test_what_is_not_the_inverse_stays(forward: Callable[[Tensor], Tensor]) -> None:
    xs = graphs.per_rank(MESH, 4, 4)
    graph = graphs.trace(forward, xs[0])
    before = graphs.ops(graph)
    assert graphs.check(cancel_inverse.run, graph, MESH, xs) == 0
    assert graphs.ops(graph) == before
