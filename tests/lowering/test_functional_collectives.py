"""PyTorch's collectives become the IR's, whatever form they come in; or are refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import graphs
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchtrt_md.errors import CollectiveError
from torchtrt_md.lowering import functional_collectives
from torchtrt_md.mesh import Mesh

MESH = Mesh(cp=2, tp=3)
# torch 2.14 renamed what 2.11 has.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated. Please use.*single:FutureWarning")
functional = torch.ops._c10d_functional
md = torch.ops.torchtrt_md


@pytest.fixture(scope="module")
def launch() -> Iterator[DeviceMesh]:
    with graphs.fake_launch(MESH) as device_mesh:
        yield device_mesh


def lower(graph: torch.fx.GraphModule, launch: DeviceMesh) -> int:
    return graphs.rewrite(functional_collectives.run, graph, MESH, graphs.groups_of(launch))


def gathered(xs: list[Tensor], dim: int) -> list[Tensor]:
    return [torch.cat(xs, dim)] * len(xs)


def scattered(x: Tensor, dim: int, size: int) -> list[Tensor]:
    return list(x.tensor_split(size, dim))


def exchanged(xs: list[Tensor], split: int, concat: int) -> list[Tensor]:
    parts = [scattered(x, split, len(xs)) for x in xs]
    return [torch.cat([p[rank] for p in parts], concat) for rank in range(len(xs))]


def total(xs: list[Tensor]) -> Tensor:
    return torch.stack(xs).sum(0)


def everywhere(reduced: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    return lambda xs: [reduced(torch.stack(xs))] * len(xs)


# What a rank calls on x [6, 12], and what the group's ranks then have of their xs.
FORMS: dict[str, tuple[Callable[[Tensor, dist.ProcessGroup], Tensor], Callable[[list[Tensor]], list[Tensor]]]] = {
    "sum": (lambda x, g: funcol.all_reduce(x, "sum", g), everywhere(lambda xs: xs.sum(0))),
    "avg": (lambda x, g: funcol.all_reduce(x, "avg", g), everywhere(lambda xs: xs.sum(0) / len(xs))),
    "max": (lambda x, g: funcol.all_reduce(x, "max", g), everywhere(lambda xs: xs.amax(0))),
    "min": (lambda x, g: funcol.all_reduce(x, "MIN", g), everywhere(lambda xs: xs.amin(0))),
    "product": (lambda x, g: funcol.all_reduce(x, "product", g), everywhere(lambda xs: xs.prod(0))),
    "all_gather": (lambda x, g: funcol.all_gather_tensor(x, 0, g), lambda xs: gathered(xs, 0)),
    "all_gather on a dim": (lambda x, g: funcol.all_gather_tensor(x, -1, g), lambda xs: gathered(xs, 1)),
    "all_gather, autograd": (lambda x, g: funcol.all_gather_tensor_autograd(x, 1, g), lambda xs: gathered(xs, 1)),
    "reduce_scatter": (
        lambda x, g: funcol.reduce_scatter_tensor(x, "sum", 0, g),
        lambda xs: scattered(total(xs), 0, len(xs)),
    ),
    "reduce_scatter on a dim": (
        lambda x, g: funcol.reduce_scatter_tensor(x, "avg", 1, g),
        lambda xs: scattered(total(xs) / len(xs), 1, len(xs)),
    ),
    "reduce_scatter, autograd": (
        lambda x, g: funcol.reduce_scatter_tensor_autograd(x, "sum", 1, g),
        lambda xs: scattered(total(xs), 1, len(xs)),
    ),
    "all_to_all": (lambda x, g: funcol.all_to_all_single(x, None, None, g), lambda xs: exchanged(xs, 0, 0)),
    "all_to_all, sizes given": (
        lambda x, g: funcol.all_to_all_single(x, [6 // g.size()] * g.size(), [6 // g.size()] * g.size(), g),
        lambda xs: exchanged(xs, 0, 0),
    ),
    "all_to_all, autograd": (
        lambda x, g: funcol.all_to_all_single_autograd(x, None, None, g),
        lambda xs: exchanged(xs, 0, 0),
    ),
    "all_to_all, no sizes": (
        lambda x, g: functional.wait_tensor(functional.all_to_all_single(x, [], [], g.group_name)),
        lambda xs: exchanged(xs, 0, 0),
    ),
    "broadcast": (lambda x, g: funcol.broadcast(x, 1, g), lambda xs: [xs[1]] * len(xs)),
    "shard_dim_alltoall": (
        lambda x, g: torch.ops._dtensor.shard_dim_alltoall(x, 0, 1, g.group_name),  # gathers on 0, splits on 1
        lambda xs: exchanged(xs, 1, 0),
    ),
    "two in a row": (
        lambda x, g: funcol.all_gather_tensor(funcol.all_reduce(x * 2, "sum", g) + 1, 0, g),
        lambda xs: gathered([total(xs) * 2 + 1] * len(xs), 0),
    ),
}


@pytest.mark.parametrize("axis", MESH.names)
@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, axis: str, launch: DeviceMesh) -> None:
    call, expected = FORMS[form]
    xs = graphs.per_rank(MESH, 6, 12)
    graph = graphs.trace(lambda x: call(x, launch.get_group(axis)), xs[0])
    assert lower(graph, launch) == (2 if form == "two in a row" else 1)
    assert not [op for op in graphs.ops(graph) if "c10d" in op or "_dtensor" in op]
    assert all(c[-2:] == (axis, MESH.axis_size(axis)) for c in graphs.collectives(graph))
    of_group = {members: expected([xs[m] for m in members]) for members in MESH.groups(axis)}
    results = [(of_group[MESH.ranks(axis, r)][MESH.coordinate(r, axis)],) for r in range(MESH.size)]
    graphs.assert_same(graphs.run_ranks(graph, MESH, xs), results, exact=False)


LISTS: dict[str, tuple[Callable[..., list[Tensor]], Callable[[list[Tensor]], list[Tensor]]]] = {
    "all_reduce": (lambda xs, g: funcol.all_reduce_coalesced(xs, "sum", g), everywhere(lambda xs: xs.sum(0))),
    "all_gather": (lambda xs, g: funcol.all_gather_into_tensor_coalesced(xs, g), lambda xs: gathered(xs, 0)),
    "reduce_scatter": (
        lambda xs, g: funcol.reduce_scatter_tensor_coalesced(xs, "max", [0, 0], g),
        lambda xs: scattered(torch.stack(xs).amax(0), 0, len(xs)),
    ),
}


@pytest.mark.parametrize("form", LISTS)
def test_coalesced(form: str, launch: DeviceMesh) -> None:
    call, expected = LISTS[form]
    xs, ys = graphs.per_rank(MESH, 6, 4), graphs.per_rank(MESH, 3, 2, 2, seed=1)
    graph = graphs.trace(lambda x, y: call([x, y], launch.get_group("tp")), xs[0], ys[0])
    assert lower(graph, launch) == 1
    assert [c[0] for c in graphs.collectives(graph)] == [form, form]
    for rank, outputs in enumerate(graphs.run_ranks(graph, MESH, xs, ys)):
        for output, operands in zip(outputs, (xs, ys), strict=True):
            of_group = expected(graphs.group_of(MESH, "tp", rank, operands))
            torch.testing.assert_close(output, of_group[MESH.coordinate(rank, "tp")])


def test_a_coalesced_result_that_nobody_uses_is_not_communicated(launch: DeviceMesh) -> None:
    x = torch.randn(4)
    graph = graphs.trace(lambda x: funcol.all_reduce_coalesced([x, x + 1], "sum", launch.get_group("tp"))[1], x)
    lower(graph, launch)
    assert graphs.collectives(graph) == [("all_reduce", "sum", "tp", 3)]


def test_a_wait_alone_goes_too(launch: DeviceMesh) -> None:
    graph = graphs.trace(lambda x: functional.wait_tensor(x * 2) + 1, torch.ones(2))
    lower(graph, launch)
    assert graphs.ops(graph) == ["aten.mul", "aten.add"]


@pytest.mark.parametrize(
    ("call", "same"),
    [
        (lambda x: md.all_gather(x, -1, "tp", 3), ("all_gather", 2, "tp", 3)),
        (lambda x: md.all_to_all(x, 1, -2, "tp", 3), ("all_to_all", 1, 1, "tp", 3)),
        (lambda x: md.all_to_all(x, split_dim=-3, concat_dim=-1, axis="tp", size=3), ("all_to_all", 0, 2, "tp", 3)),
        (lambda x: md.reduce_scatter(x, "sum", -1, "tp", 3), ("reduce_scatter", "sum", 2, "tp", 3)),
    ],
)
def test_dims_of_the_ir_are_counted_from_the_first(
    call: Callable[[Tensor], Tensor], same: tuple[object, ...], launch: DeviceMesh
) -> None:
    """Later passes cut shapes at ``dim``."""
    xs = graphs.per_rank(MESH, 3, 6, 9)
    graph = graphs.trace(call, xs[0])
    before = graphs.run_ranks(graph, MESH, xs)
    lower(graph, launch)
    assert graphs.collectives(graph) == [same]
    (node,) = (n for n in graph.graph.nodes if n.op == "call_function")
    assert not node.kwargs
    assert node.meta["val"].shape == before[0][0].shape
    graphs.assert_same(graphs.run_ranks(graph, MESH, xs), before)


def all_gather_of_a_larger_group(x: Tensor, launch: DeviceMesh) -> Tensor:
    gathered: Tensor = functional.all_gather_into_tensor(x, 6, launch.get_group("tp").group_name)
    return gathered


def send(x: Tensor, launch: DeviceMesh) -> Tensor:
    dist.isend(x, 1, group=launch.get_group("tp"))
    return x


def receive(x: Tensor, launch: DeviceMesh) -> Tensor:
    dist.irecv(x, 1, group=launch.get_group("tp"))
    return x


def in_place(x: Tensor, launch: DeviceMesh) -> Tensor:
    dist.all_reduce(x, group=launch.get_group("tp"))
    return x


REFUSED: dict[str, tuple[Callable[[Tensor, DeviceMesh], Any], list[str]]] = {
    "uneven": (
        lambda x, m: funcol.all_to_all_single(x, [1, 2, 3], [1, 2, 3], m.get_group("tp")),
        ["parts of [1, 2, 3] rows", "all 3 ranks an equal part of the 6 rows"],
    ),
    "received unevenly": (
        lambda x, m: funcol.all_to_all_single(x, [1, 2, 3], [2, 2, 2], m.get_group("tp")),
        ["parts of [1, 2, 3] rows"],
    ),
    "to one rank": (
        lambda x, m: funcol.permute_tensor(x, [1, 2, 0], m.get_group("tp")),
        ["uneven, or not to all ranks"],
    ),
    "rows that do not divide": (
        lambda x, m: functional.all_to_all_single(x[:5], [], [], m.get_group("tp").group_name),
        ["5 rows", "all 3 ranks"],
    ),
    "whole launch": (
        lambda x, m: functional.all_reduce(x, "sum", dist.distributed_c10d._get_default_group().group_name),
        ["is not an axis of Mesh(cp=2, tp=3)", "device_mesh.get_group(axis)"],
    ),
    "reduction": (lambda x, m: funcol.all_reduce(x, "band", m.get_group("tp")), ["reduces by 'band'", "sum, avg"]),
    "average of integers": (
        lambda x, m: funcol.all_reduce(x.int(), "avg", m.get_group("tp")),
        ["averages torch.int32 values", "by sum and divide"],
    ),
    "reduction while scattering": (
        lambda x, m: funcol.reduce_scatter_tensor(x, "bor", 0, m.get_group("tp")),
        ["reduces by 'bor'"],
    ),
    "another number of ranks": (all_gather_of_a_larger_group, ["6 ranks", "'tp'", "3"]),
    "send": (send, ["c10d.send", "not in a form that is understood"]),
    "receive": (receive, ["c10d.recv_", "not in a form that is understood"]),
    "in place": (in_place, ["c10d.allreduce_", "functional form"]),
    "functional send": (
        lambda x, m: functional.isend(x, 1, 0, m.get_group("tp").group_name),
        ["_c10d_functional.isend", "not in a form that is understood"],
    ),
    "functional receive": (
        lambda x, m: functional.irecv(x, 1, 0, m.get_group("tp").group_name),
        ["_c10d_functional.irecv", "not in a form that is understood"],
    ),
    "functional in place": (
        lambda x, m: functional.all_reduce_(x.clone(), "sum", m.get_group("tp").group_name),
        ["_c10d_functional.all_reduce_", "functional form"],
    ),
    "list in place": (
        lambda x, m: functional.all_reduce_coalesced_([x.clone()], "sum", m.get_group("tp").group_name),
        ["_c10d_functional.all_reduce_coalesced_", "functional form"],
    ),
    "symmetric memory": (
        lambda x, m: torch.ops.symm_mem.one_shot_all_reduce(x, "sum", m.get_group("tp").group_name),
        ["symm_mem.one_shot_all_reduce", "functional form"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, launch: DeviceMesh) -> None:
    call, parts = REFUSED[case]

    def forward(x: Tensor) -> Any:
        return call(x, launch)

    graph = graphs.trace(forward, torch.randn(6, 4))
    with pytest.raises(CollectiveError) as raised:
        lower(graph, launch)
    for part in (*parts, f"at {__file__}:", "in node "):
        assert part in str(raised.value)


def test_the_users_line_is_named(launch: DeviceMesh) -> None:
    group = launch.get_group("tp")

    def forward(x: Tensor) -> Tensor:
        return torch.relu(funcol.all_reduce(x + 1, "band", group))  # this line

    with pytest.raises(CollectiveError, match=r'in forward: .*all_reduce\(x \+ 1, "band", group\)\)  # this line'):
        lower(graphs.trace(forward, torch.randn(2)), launch)
