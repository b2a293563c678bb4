"""Collectives on any dim become the same on dim 0."""

from __future__ import annotations

from collections.abc import Callable

import graphs
import pytest
import torch
from torch import Tensor

from torchtrt_md.lowering import leading_dim
from torchtrt_md.mesh import Mesh

md = torch.ops.torchtrt_md
SHAPES = [(6, 6, 6), (1, 6, 12), (6, 1, 6), (12, 18), (6, 2, 6, 1)]

# What is called on dim a (and b) of x, over P ranks.
CALLS: dict[str, Callable[[Tensor, int, int, int], Tensor]] = {
    "all_gather": lambda x, a, b, size: md.all_gather(x, a, "cp", size),
    "reduce_scatter": lambda x, a, b, size: md.reduce_scatter(x, "sum", a, "cp", size),
    "all_to_all": lambda x, a, b, size: md.all_to_all(x, a, b, "cp", size),
}


@pytest.mark.parametrize("mesh", [Mesh(cp=2), Mesh(cp=3), Mesh(cp=2, tp=2)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_every_dim(name: str, shape: tuple[int, ...], mesh: Mesh) -> None:
    size, call = mesh.axis_size("cp"), CALLS[name]
    xs = graphs.per_rank(mesh, *shape, dtype=torch.int32)
    splits = name != "all_gather"
    dims = [
        (a, b)
        for a in range(len(shape))
        for b in (range(len(shape)) if name == "all_to_all" else [0])
        if shape[a] % size == 0 or not splits
    ]
    graph = graphs.trace(lambda x: [call(x, a, b, size) for a, b in dims], xs[0])
    moved = [a != 0 or (name == "all_to_all" and b != 0) for a, b in dims]
    assert graphs.check(leading_dim.run, graph, mesh, xs) == sum(moved)
    found = graphs.collectives(graph)
    arguments = {
        "all_gather": (0, "cp", size),
        "reduce_scatter": ("sum", 0, "cp", size),
        "all_to_all": (0, 0, "cp", size),
    }
    assert found == [(name, *arguments[name])] * len(dims)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: md.all_gather(x, 1, "cp", 2),
        lambda x: md.reduce_scatter(x, "sum", 1, "cp", 2),
        lambda x: md.all_to_all(x, 1, 1, "cp", 2),
    ],
)
def test_batch_of_one_is_reshaped_only(call: Callable[[Tensor], Tensor]) -> None:
    mesh = Mesh(cp=2)
    xs = graphs.per_rank(mesh, 1, 4, 6)
    graph = graphs.trace(call, xs[0])
    assert graphs.check(leading_dim.run, graph, mesh, xs) == 1
    assert "aten.clone" not in graphs.ops(graph)
    moves = [n for n in graph.graph.nodes if n.target is torch.ops.aten.permute.default]
    for node in moves:  # dims of size 1 may move: no element does
        assert node.meta["val"].is_contiguous()


def test_collectives_without_a_dim_stay() -> None:
    mesh = Mesh(cp=2)
    xs = graphs.per_rank(mesh, 3, 5)
    graph = graphs.trace(
        lambda x: md.all_reduce(md.broadcast(md.all_reduce(x, "max", "cp", 2), 1, "cp", 2), "avg", "cp", 2), xs[0]
    )
    before = graphs.ops(graph)
    assert graphs.check(leading_dim.run, graph, mesh, xs) == 0
    assert graphs.ops(graph) == before


def test_an_operand_that_is_not_contiguous() -> None:
    mesh = Mesh(cp=2)
    xs = graphs.per_rank(mesh, 4, 2, 6)
    graph = graphs.trace(
        lambda x: [md.all_to_all(x.permute(2, 0, 1), 1, 2, "cp", 2), md.all_gather(x.mT, 1, "cp", 2)], xs[0]
    )
    assert graphs.check(leading_dim.run, graph, mesh, xs) == 2
