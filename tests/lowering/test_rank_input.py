"""``shard`` becomes a row of its value, by an input that holds the rank's coordinate."""

from __future__ import annotations

import graphs
import pytest
import torch
from torch import Tensor

from torchtrt_md.lowering import rank_input
from torchtrt_md.mesh import Mesh
from torchtrt_md.program import placeholders, value_of
from torchtrt_md.verification.simulate import simulate

md = torch.ops.torchtrt_md


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_every_dim(dim: int, size: int, dtype: torch.dtype) -> None:
    mesh = Mesh(cp=size)
    x = graphs.per_rank(mesh, 6, 12, 6, dtype=dtype)[0]
    graph = graphs.trace(lambda x: md.shard(x, dim, "cp", size), x)
    assert graphs.rewrite(rank_input.run, graph, mesh) == 1
    assert set(graphs.ops(graph)) <= {"aten.reshape", "aten.index_select"}
    results = simulate(graphs.program(graph, mesh, x), {})
    graphs.assert_same(results, [(part,) for part in x.chunk(size, dim)])


def test_a_part_of_one_row() -> None:
    mesh = Mesh(cp=4)
    x = torch.arange(4)
    graph = graphs.trace(lambda x: md.shard(x, 0, "cp", 4), x)
    graphs.rewrite(rank_input.run, graph, mesh)
    assert [r.tolist() for (r,) in simulate(graphs.program(graph, mesh, x), {})] == [[0], [1], [2], [3]]


@pytest.mark.parametrize("axes", [{"cp": 2, "tp": 3}, {"tp": 3, "cp": 2}])
def test_two_axes(axes: dict[str, int]) -> None:
    """One input for each axis, behind those that were there, however many shards there are."""

    def forward(x: Tensor, y: Tensor) -> list[Tensor]:
        both = md.shard(md.shard(x, 0, "cp", 2), 1, "tp", 3)
        return [both, md.shard(y, 0, "tp", 3), md.shard(y, 0, "cp", 2)]

    mesh = Mesh(**axes)
    x, y = graphs.per_rank(mesh, 4, 3)[0], graphs.per_rank(mesh, 6, seed=1)[0]
    graph = graphs.trace(forward, x, y)
    assert graphs.rewrite(rank_input.run, graph, mesh) == 4
    inputs = placeholders(graph)
    assert [n.name for n in inputs[2:]] == ["coordinate_cp", "coordinate_tp"]
    assert [(value_of(n).dtype, list(value_of(n).shape)) for n in inputs[2:]] == [(torch.int32, [1])] * 2
    for rank, (both, by_tp, by_cp) in enumerate(simulate(graphs.program(graph, mesh, x, y), {})):
        cp, tp = mesh.coordinate(rank, "cp"), mesh.coordinate(rank, "tp")
        assert both.equal(x.chunk(2, 0)[cp].chunk(3, 1)[tp])
        assert by_tp.equal(y.chunk(3)[tp])
        assert by_cp.equal(y.chunk(2)[cp])


def test_a_value_that_each_rank_has_of_its_own() -> None:
    """It takes part ``i`` of what rank ``i`` has, not of rank 0's."""
    mesh = Mesh(cp=2)
    xs = graphs.per_rank(mesh, 4, 2)
    graph = graphs.trace(lambda x: md.shard(x.T, 1, "cp", 2), xs[0])
    graphs.rewrite(rank_input.run, graph, mesh)
    results = simulate(graphs.program(graph, mesh, xs), {})
    graphs.assert_same(results, [(x.T.chunk(2, 1)[i].contiguous(),) for i, x in enumerate(xs)])


def test_nothing_to_do() -> None:
    graph = graphs.trace(lambda x: x + 1, torch.ones(2))
    assert graphs.rewrite(rank_input.run, graph, Mesh(cp=2)) == 0
    assert len(placeholders(graph)) == 1
