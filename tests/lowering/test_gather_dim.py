"""Gathers and reduce-scatters on the dim that PyTorch hides with split, cat and view."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator

import graphs
import pytest
import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from torchtrt_md.lowering import functional_collectives, gather_dim
from torchtrt_md.mesh import Mesh

# torch 2.14 renamed what 2.11 has.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated. Please use.*single:FutureWarning")
MESH = Mesh(cp=2, tp=2)
TP = Mesh(tp=2)
md = torch.ops.torchtrt_md


@pytest.fixture(scope="module")
def launch() -> Iterator[DeviceMesh]:
    with graphs.fake_launch(MESH) as device_mesh:
        yield device_mesh


def redistribute(launch: DeviceMesh, axis: str, before: Placement, after: Placement) -> Callable[[Tensor], Tensor]:
    mesh = launch[axis]

    def call(x: Tensor) -> Tensor:
        placed: DTensor = DTensor.from_local(x, mesh, [before], run_check=False)
        return placed.redistribute(mesh, [after]).to_local()

    return call


def moved(graph: torch.fx.GraphModule) -> list[str]:
    """What is left, but for views to the same shape."""
    return [op for op in graphs.ops(graph) if op != "aten.view"]


@pytest.mark.parametrize("axis", MESH.names)
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((1, 3, 5), 1), ((1, 3, 5), 2), ((2, 3, 5), 1), ((2, 3, 5), 2), ((1, 5), 1), ((3, 1), 1), ((1, 1, 1, 3), 3)],
)
def test_gather_of_a_dtensor(shape: tuple[int, ...], dim: int, axis: str, launch: DeviceMesh) -> None:
    xs = graphs.per_rank(MESH, *shape)
    graph = graphs.trace(redistribute(launch, axis, Shard(dim), Replicate()), xs[0])
    graphs.rewrite(functional_collectives.run, graph, MESH, graphs.groups_of(launch))
    assert graphs.check(gather_dim.run, graph, MESH, xs) == 1
    assert graphs.collectives(graph) == [("all_gather", dim, axis, 2)]
    assert moved(graph) == ["torchtrt_md.all_gather"]
    expected = [(torch.cat(graphs.group_of(MESH, axis, r, xs), dim),) for r in range(MESH.size)]
    graphs.assert_same(graphs.run_ranks(graph, MESH, xs), expected)


@pytest.mark.parametrize("shape", [(4, 3), (1, 3, 5)])
def test_gather_on_dim_0_stays(shape: tuple[int, ...], launch: DeviceMesh) -> None:
    xs = graphs.per_rank(MESH, *shape)
    graph = graphs.trace(redistribute(launch, "tp", Shard(0), Replicate()), xs[0])
    graphs.rewrite(functional_collectives.run, graph, MESH, graphs.groups_of(launch))
    assert graphs.check(gather_dim.run, graph, MESH, xs) == 0
    assert graphs.collectives(graph) == [("all_gather", 0, "tp", 2)]


@pytest.mark.parametrize(
    ("shape", "dim"), [((1, 4, 3), 1), ((2, 4, 3), 1), ((2, 3, 4), 2), ((1, 3, 4, 5), 2), ((3, 2), 1)]
)
def test_reduce_scatter_of_a_dtensor(shape: tuple[int, ...], dim: int, launch: DeviceMesh) -> None:
    xs = graphs.per_rank(MESH, *shape)
    graph = graphs.trace(redistribute(launch, "tp", Partial(), Shard(dim)), xs[0])
    graphs.rewrite(functional_collectives.run, graph, MESH, graphs.groups_of(launch))
    assert graphs.check(gather_dim.run, graph, MESH, xs) == 1
    assert graphs.collectives(graph) == [("reduce_scatter", "sum", dim, "tp", 2)]
    assert moved(graph) == ["torchtrt_md.reduce_scatter"]
    sums = [sum(graphs.group_of(MESH, "tp", r, xs), torch.zeros(())) for r in range(MESH.size)]
    expected = [(s.chunk(2, dim)[MESH.coordinate(r, "tp")],) for r, s in enumerate(sums)]
    graphs.assert_same(graphs.run_ranks(graph, MESH, xs), expected)


def test_dims_counted_from_the_last(launch: DeviceMesh) -> None:
    group = launch.get_group("cp")

    def forward(x: Tensor) -> list[Tensor]:
        return [funcol.all_gather_tensor(x, -2, group), funcol.reduce_scatter_tensor(x, "max", -1, group)]

    xs = graphs.per_rank(MESH, 2, 3, 4)
    graph = graphs.trace(forward, xs[0])
    graphs.rewrite(functional_collectives.run, graph, MESH, graphs.groups_of(launch))
    assert graphs.check(gather_dim.run, graph, MESH, xs) == 2
    assert graphs.collectives(graph) == [("all_gather", 1, "cp", 2), ("reduce_scatter", "max", 2, "cp", 2)]


def test_from_shard_to_shard_needs_the_gather_only(launch: DeviceMesh) -> None:
    """On a CPU mesh DTensor gathers, and takes its part."""
    xs = graphs.per_rank(MESH, 1, 3, 4)
    graph = graphs.trace(redistribute(launch, "tp", Shard(1), Shard(2)), xs[0])
    graphs.rewrite(functional_collectives.run, graph, MESH, graphs.groups_of(launch))
    assert graphs.check(gather_dim.run, graph, MESH, xs) == 1
    assert graphs.collectives(graph) == [("all_gather", 1, "tp", 2)]


def split(x: Tensor, rows: int, dim: int = 0) -> list[Tensor]:
    return list(torch.ops.aten.split(x, rows, dim))


def all_gather(x: Tensor) -> Tensor:
    gathered: Tensor = md.all_gather(x, 0, "tp", 2)
    return gathered


def reduce_scatter(x: Tensor) -> Tensor:
    scattered: Tensor = md.reduce_scatter(x, "sum", 0, "tp", 2)
    return scattered


def other_order(x: Tensor) -> Tensor:
    first, second = split(all_gather(x), 2)
    return torch.cat([second, first], 1)


def one_part_twice(x: Tensor) -> Tensor:
    first, _ = split(all_gather(x), 2)
    return torch.cat([first, first], 1)


def more_in_the_cat(x: Tensor) -> Tensor:
    return torch.cat([*split(all_gather(x), 2), x], 1)


def part_used_elsewhere(x: Tensor) -> list[Tensor]:
    first, second = split(all_gather(x), 2)
    return [torch.cat([first, second], 1), first * 2]


def gather_used_elsewhere(x: Tensor) -> list[Tensor]:
    """A second gather would double what is sent."""
    gathered = all_gather(x)
    return [torch.cat(split(gathered, 2), 1), gathered * 2]


def split_on_another_dim(x: Tensor) -> Tensor:
    return torch.cat(split(all_gather(x), 2, 1), 0)


def split_on_the_dim_of_the_cat(x: Tensor) -> Tensor:
    return torch.cat(split(all_gather(x), 2, 1), 1)


def parts_of_a_rank(x: Tensor) -> Tensor:
    return torch.cat(split(all_gather(x), 1), 1)


def uneven_parts(x: Tensor) -> Tensor:
    return torch.cat(split(all_gather(x), 3), 0)


def stacked(x: Tensor) -> Tensor:
    return torch.cat([p.unsqueeze(0) for p in split(all_gather(x), 2)], 1)


def view_of_more_rows(x: Tensor) -> Tensor:
    return all_gather(x).view(1, 4, 4)


def view_of_several(x: Tensor) -> Tensor:
    return all_gather(x).view(2, 8)


def gather_viewed_twice(x: Tensor) -> list[Tensor]:
    gathered = all_gather(x[:1])
    return [gathered.view(1, 8), gathered + 1]


def scatter_of_other_things(x: Tensor) -> Tensor:
    return reduce_scatter(torch.cat([x, x]))


def scatter_of_parts_in_another_order(x: Tensor) -> Tensor:
    first, second = split(x, 2, 1)
    return reduce_scatter(torch.cat([second, first]))


def scatter_of_more_parts(x: Tensor) -> Tensor:
    return reduce_scatter(torch.cat(split(x, 1, 1)))


def scatter_of_parts_joined_elsewhere(x: Tensor) -> Tensor:
    return reduce_scatter(torch.cat(split(x, 2, 1), 1))


def scatter_of_part_and_other(x: Tensor) -> Tensor:
    first, _ = split(x, 2, 1)
    return reduce_scatter(torch.cat([first, first * 2]))


def test_parts_are_told_by_their_number_and_not_by_where_they_stand() -> None:
    xs = graphs.per_rank(TP, 2, 4)
    graph = graphs.trace(other_order, xs[0])
    first, second = graph.graph.find_nodes(op="call_function", target=operator.getitem)
    with graph.graph.inserting_after(second):
        later = graph.graph.node_copy(first)
    first.replace_all_uses_with(later)
    graph.graph.erase_node(first)
    assert graphs.check(gather_dim.run, graph, TP, xs) == 0


@pytest.mark.parametrize(
    "forward",
    [
        other_order,
        one_part_twice,
        more_in_the_cat,
        part_used_elsewhere,
        gather_used_elsewhere,
        split_on_another_dim,
        split_on_the_dim_of_the_cat,
        parts_of_a_rank,
        uneven_parts,
        stacked,
        view_of_more_rows,
        view_of_several,
        gather_viewed_twice,
        scatter_of_other_things,
        scatter_of_parts_in_another_order,
        scatter_of_more_parts,
        scatter_of_parts_joined_elsewhere,
        scatter_of_part_and_other,
    ],
)
def test_other_things_stay(forward: Callable[[Tensor], Tensor]) -> None:
    xs = graphs.per_rank(TP, 2, 4)
    graph = graphs.trace(forward, xs[0])
    before = graphs.ops(graph)
    assert graphs.check(gather_dim.run, graph, TP, xs) == 0
    assert graphs.ops(graph) == before
