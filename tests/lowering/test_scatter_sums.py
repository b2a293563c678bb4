"""Sums are scattered where what follows reads each token by itself, and gathered behind that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import graphs
import models
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
import torch.nn.functional as F
from torch import Tensor, nn

import torchtrt_md as md
from torchtrt_md.capture.dynamo import capture_graph
from torchtrt_md.capture.torch_private import fake_ranks
from torchtrt_md.lowering import Lowering, scatter_sums
from torchtrt_md.lowering.passes import PassContext
from torchtrt_md.lowering.schedule import schedule
from torchtrt_md.mesh import Mesh

ir = torch.ops.torchtrt_md
WIDTH = 6


@pytest.fixture(autouse=True)
def all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scatter_sums, "LARGE", 1)


def run(graph: torch.fx.GraphModule, context: PassContext) -> int:
    return scatter_sums.run(
        graph, PassContext(context.mesh, {}, {}, "split", alike=frozenset(context.mesh.names), stores=True)
    )


def norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * torch.arange(1.0, 1 + x.shape[-1]).to(x.dtype)


def total(x: Tensor, size: int, op: str = "sum") -> Tensor:
    y: Tensor = ir.all_reduce(x, op, "cp", size)
    return y


def weight(columns: int = WIDTH) -> Tensor:
    return torch.linspace(-1, 1, WIDTH * columns, dtype=torch.float64).reshape(WIDTH, columns)


def same(x: Tensor, p: int) -> Tensor:
    """One rank's x, on all ranks."""
    y: Tensor = ir.broadcast(x, 0, "cp", p)
    return y


def layer(x: Tensor, h: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """What a product makes of a norm, and the residual."""
    h = h + total(x, p)
    return norm(h) @ weight(), h


def two_layers(x: Tensor, p: int) -> Tensor:
    y, h = layer(x @ weight(), same(x, p), p)
    y, h = layer(y, h, p)
    return norm(h + total(y, p)) @ weight(4)


def averages(x: Tensor, p: int) -> Tensor:
    return norm(same(x, p) + total(x, p, "avg")).relu() @ weight()


def layer_norm(x: Tensor, p: int) -> Tensor:
    return F.layer_norm(same(x, p) + total(x @ weight(), p), [WIDTH]).tanh() @ weight()


def with_a_table(x: Tensor, p: int) -> Tensor:
    """One entry for each token, and one for all."""
    table = torch.linspace(0, 1, x.shape[-2], dtype=x.dtype)[:, None]
    return (
        (total(x, p) * table + same(x, p)[..., :1, :]).relu() + table.unsqueeze(0).unsqueeze(0)[0]
    ).sigmoid() @ weight()


SCATTERED: dict[str, tuple[Callable[[Tensor, int], Tensor], int, int]] = {  # and how many sums, and gathers
    "two layers": (two_layers, 3, 3),
    "averages": (averages, 1, 1),
    "a layer norm": (layer_norm, 1, 1),
    "a table": (with_a_table, 1, 1),
}


@pytest.mark.parametrize("mesh", [Mesh(cp=2), Mesh(cp=3), Mesh(cp=2, tp=2)], ids=str)
@pytest.mark.parametrize("shape", [(12, WIDTH), (1, 12, WIDTH)], ids=str)
@pytest.mark.parametrize("name", SCATTERED)
def test_it_computes_what_it_did(name: str, shape: tuple[int, ...], mesh: Mesh) -> None:
    call, sums, gathers = SCATTERED[name]
    size = mesh.axis_size("cp")
    xs = graphs.per_rank(mesh, *shape, dtype=torch.float64)
    graph = graphs.trace(lambda x: call(x, size), xs[0])
    assert graphs.check(run, graph, mesh, xs, exact=False) == sums
    found = [c[0] for c in graphs.collectives(graph)]
    assert found.count("all_to_all") == sums
    assert found.count("all_gather") == gathers
    assert "all_reduce" not in found


def read_often(x: Tensor, p: int) -> list[Tensor]:
    h = same(x, p) + total(x, p)
    return [norm(h) @ weight(), h @ weight(), h.relu() @ weight()]


def of_a_rank(x: Tensor, p: int) -> Tensor:
    """As a norm over features of which a rank has some: the sum is the same on all ranks, and x is not."""
    return norm(x * torch.rsqrt(total(x, p)) + 1).relu() @ weight()


def nothing_between(x: Tensor, p: int) -> Tensor:
    return total(x, p) @ weight()


def across_tokens(x: Tensor, p: int) -> Tensor:
    h = total(x, p)
    return h.softmax(-2).relu().tanh() @ weight()


def of_all_tokens(x: Tensor, p: int) -> Tensor:
    return total(x, p).mean(-2, keepdim=True).relu().tanh() @ weight()


def not_kept(x: Tensor, p: int) -> Tensor:
    return total(x, p).mean(-1).relu().tanh()


def beside_more_dims(x: Tensor, p: int) -> Tensor:
    """Broadcast to one dim more, the tokens are another dim's, and of the same extent."""
    more = torch.ones(x.shape[0], *x.shape, dtype=x.dtype)
    return ((total(x, p) + more).relu().tanh() * 2).sum()


def compared(x: Tensor, p: int) -> Tensor:
    return (total(x, p).relu().tanh() > 0).nonzero_static(size=3)


STAY: list[Callable[[Tensor, int], Any]] = [
    read_often,
    of_a_rank,
    nothing_between,
    across_tokens,
    of_all_tokens,
    not_kept,
    beside_more_dims,
    compared,
]


@pytest.mark.parametrize("call", STAY, ids=lambda call: call.__name__)
def test_what_would_gather_more_or_reads_across_tokens_stays(call: Callable[[Tensor, int], Any]) -> None:
    xs = graphs.per_rank(Mesh(cp=2), 6, WIDTH, dtype=torch.float64)
    graph = graphs.trace(lambda x: call(x, 2), xs[0])
    assert graphs.check(run, graph, Mesh(cp=2), xs) == 0


def test_a_sum_of_what_is_scattered_is_given_all_of_it() -> None:
    def call(x: Tensor) -> Tensor:
        return norm(total(norm(same(x, 2) + total(x, 2)), 2) + same(x, 2)) @ weight()

    xs = graphs.per_rank(Mesh(cp=2), 6, WIDTH, dtype=torch.float64)
    graph = graphs.trace(call, xs[0])
    assert graphs.check(run, graph, Mesh(cp=2), xs, exact=False) == 2
    made = [c[0] for c in graphs.collectives(graph) if c[0] != "broadcast"]
    assert made == ["all_to_all", "all_gather"] * 2


def test_tokens_that_the_ranks_do_not_divide_stay() -> None:
    xs = graphs.per_rank(Mesh(cp=2), 5, WIDTH, dtype=torch.float64)
    graph = graphs.trace(lambda x: two_layers(x, 2), xs[0])
    assert graphs.check(run, graph, Mesh(cp=2), xs) == 0


def lowered(captured: Any, **how: Any) -> Any:
    return Lowering(captured).lower(**{"placement": "split", "stores": True, **how})


class Normed(nn.Module):
    """A layer with PyTorch's own norms around it, as ``kind`` says."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.first, self.last = kind(16), kind(16)
        self.up, self.down, self.out = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.gelu(self.up(self.first(x))))
        y: Tensor = self.out(self.last(x))
        return y


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_norms_of_pytorch(kind: Any) -> None:
    call = (Normed(kind).eval(), (torch.randn(1, 8, 16),))
    parallel = md.TensorParallel("tp", {"up": "colwise", "down": "rowwise"})
    program = lowered(md.capture(*call, mesh=Mesh(tp=2), parallel=parallel))
    assert program.counts["scatter_sums"] == 1
    assert md.verify(program, *call).structure_error < 1e-11


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_model_has_its_norms_done_by_tokens(ranks: int) -> None:
    call = models.llama(torch.float32)
    captured = md.capture(*call, mesh=Mesh(tp=ranks), parallel=md.TensorParallel("tp"))
    program = lowered(captured)
    assert md.verify(program, *call).structure_error < 1e-10
    assert {c.op for c in schedule(program.graphs[0])} == {"all_to_all", "all_gather"}
    assert program.counts["scatter_sums"] == 2 * 2 + 1, "two of each layer, and the embedding's"
    assert lowered(captured, placement="engine").counts["scatter_sums"] == 0, "an engine keeps its sums"
    assert lowered(captured, stores=False).counts["scatter_sums"] == 0, "and so does NCCL"


def test_whole_numbers_are_added_up_exactly() -> None:
    def call(x: Tensor) -> Tensor:
        return (total(x, 2) - 2**24).to(torch.float64).mul(0.5).add(1)

    xs = [torch.full((4, 4), 2**24 + 1), torch.full((4, 4), 2)]  # whose sum is none of float32's
    graph = graphs.trace(call, xs[0])
    assert graphs.check(run, graph, Mesh(cp=2), xs) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sum_is_of_float32_numbers(dtype: torch.dtype) -> None:
    """In TensorRT, too, where a sum is of the dtype of its operand."""
    x = torch.zeros(1, 12, WIDTH, dtype=dtype)
    graph = graphs.trace(lambda x: norm(same(x, 2) + total(x, 2)).tanh(), x)
    assert run(graph, PassContext(Mesh(cp=2), {}, {})) == 1
    (node,) = (n for n in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.sum.dim_IntList))
    assert node.all_input_nodes[0].meta["val"].dtype == node.meta["val"].dtype == torch.float32
    assert not node.kwargs


def test_small_sums_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    captured = md.capture(*models.llama(torch.float32), mesh=Mesh(tp=2), parallel=md.TensorParallel("tp"))
    assert lowered(captured).counts["scatter_sums"] == 0


def test_what_another_sum_left_behind_is_no_reason_to_scatter_one() -> None:
    """Of two axes; the operations between the sums are of the first."""

    def call(x: Tensor) -> Tensor:
        h = ir.broadcast(ir.broadcast(x, 0, "cp", 2), 0, "tp", 2)
        t, s = ir.all_reduce(h, "sum", "tp", 2), ir.all_reduce(h @ weight(), "sum", "cp", 2)
        y: Tensor = (s + t).relu().tanh() @ weight()
        return y

    mesh = Mesh(cp=2, tp=2)
    xs = graphs.per_rank(mesh, 8, WIDTH, dtype=torch.float64)
    graph = graphs.trace(call, xs[0])
    assert graphs.check(run, graph, mesh, xs, exact=False) == 1
    assert [c[0] for c in graphs.collectives(graph)].count("all_reduce") == 1


def test_a_part_along_two_axes_is_of_a_rank_of_each() -> None:
    def call(x: Tensor) -> Tensor:
        h = ir.broadcast(ir.broadcast(x, 0, "a", 2), 0, "b", 2)
        z = ir.shard(h, 0, "a+b", 4)
        y: Tensor = (z + ir.all_reduce(z, "sum", "b", 2)).tanh().relu()
        return y

    mesh = Mesh(a=2, b=2)
    xs = graphs.per_rank(mesh, 16, WIDTH, dtype=torch.float64)
    graph = graphs.trace(call, xs[0])
    assert scatter_sums.run(graph, PassContext(mesh, {}, {}, "split", alike=frozenset(mesh.names), stores=True)) == 0


class Gated(nn.Module):
    """It communicates by itself; nothing says that its weights are equal on all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.gate = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = (ir.all_reduce(x @ self.w, "sum", "tp", 2) * self.gate).relu().tanh()
        return y


def test_nothing_is_taken_for_equal_on_all_ranks_that_is_not_known_to_be() -> None:
    x = torch.randn(8, WIDTH)
    own = md.capture(Gated(), (x,), mesh=Mesh(tp=2))
    assert not own.alike
    assert lowered(own).counts["scatter_sums"] == 0
    plan = {"up": "colwise", "down": "rowwise"}
    both: list[Any] = [md.TensorParallel("tp", plan), md.DataParallel("dp")]
    dense = md.capture(Normed(nn.RMSNorm).eval(), (torch.randn(1, 8, 16),), mesh=Mesh(dp=2, tp=2), parallel=both)
    assert dense.alike == {"tp"}, "along dp each is given data of its own"
    assert lowered(dense).counts["scatter_sums"] == 1
    found = []

    def backend(gm: Any, examples: Any) -> Any:
        found.append(capture_graph(gm, examples))
        return gm.forward

    with fake_ranks(2):
        group: Any = dist.group.WORLD

        def less_the_mean(x: Tensor) -> Tensor:
            y: Tensor = (x - fc.all_reduce(x, "avg", group)).tanh().sigmoid()
            return y

        torch.compile(less_the_mean, backend=backend)(x)
    assert not found[0].alike, "each rank captures its own"
    assert lowered(found[0]).counts["scatter_sums"] == 0
