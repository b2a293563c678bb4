"""Large gathers on inner dims: in pieces where a product makes them, copied to their places once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import graphs
import models
import pytest
import torch
from torch import Tensor

import torchtrt_md as md
from torchtrt_md.lowering import gather_in_pieces
from torchtrt_md.lowering.passes import PassContext
from torchtrt_md.lowering.schedule import schedule
from torchtrt_md.mesh import Mesh
from torchtrt_md.place import place

ir = torch.ops.torchtrt_md


@pytest.fixture(autouse=True)
def all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather_in_pieces, "LARGE", 1)


def run(graph: torch.fx.GraphModule, context: PassContext) -> int:
    return gather_in_pieces.run(graph, PassContext(context.mesh, {}, {}, "split", alike=frozenset(context.mesh.names)))


def weight(rows: int, columns: int) -> Tensor:
    return torch.arange(rows * columns, dtype=torch.int32).reshape(rows, columns)


# What is gathered of x [3, 2, 8], on which dim, and in how many pieces.
CALLS: dict[str, tuple[Callable[[Tensor, int], Tensor], int]] = {
    "a product": (lambda x, p: ir.all_gather(x.reshape(6, 8) @ weight(16, 8).t(), 1, "cp", p), 4),
    "with a bias": (
        lambda x, p: ir.all_gather(torch.addmm(weight(1, 16)[0], x.reshape(6, 8), weight(16, 8).t()), 1, "cp", p),
        4,
    ),
    "with one bias for all rows and columns": (
        lambda x, p: ir.all_gather(torch.addmm(weight(1, 1)[0], x.reshape(6, 8), weight(16, 8).t()), 1, "cp", p),
        1,
    ),
    "not transposed": (lambda x, p: ir.all_gather(x.reshape(6, 8) @ weight(8, 16), 1, "cp", p), 4),
    "in its shape": (
        lambda x, p: ir.all_gather((x.reshape(6, 8) @ weight(16, 8).t()).view(3, 2, 16), 2, "cp", p),
        4,
    ),
    "in another shape": (
        lambda x, p: ir.all_gather((x.reshape(6, 8) @ weight(16, 8).t()).view(3, 8, 4), 2, "cp", p),
        1,
    ),
    "on another dim": (
        lambda x, p: ir.all_gather((x.reshape(6, 8) @ weight(16, 8).t()).view(3, 2, 16), 1, "cp", p),
        1,
    ),
    "not in fours": (lambda x, p: ir.all_gather(x.reshape(6, 8) @ weight(10, 8).t(), 1, "cp", p), 1),
    "no product": (lambda x, p: ir.all_gather(x * 2, 2, "cp", p), 1),
}


@pytest.mark.parametrize("mesh", [Mesh(cp=2), Mesh(cp=3), Mesh(cp=2, tp=2)], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_it_is_what_the_gather_was(name: str, mesh: Mesh) -> None:
    call, pieces = CALLS[name]
    size = mesh.axis_size("cp")
    xs = graphs.per_rank(mesh, 3, 2, 8, dtype=torch.int32)
    graph = graphs.trace(lambda x: call(x, size), xs[0])
    assert graphs.check(run, graph, mesh, xs) == 1
    assert graphs.collectives(graph) == [("all_gather", 0, "cp", size)] * pieces


def test_what_is_read_elsewhere_too_is_computed_once() -> None:
    def both(x: Tensor) -> list[Tensor]:
        y = x @ weight(16, 8).t()
        return [ir.all_gather(y, 1, "cp", 2), y.sum(0)]

    xs = graphs.per_rank(Mesh(cp=2), 6, 8, dtype=torch.int32)
    graph = graphs.trace(both, xs[0])
    assert graphs.check(run, graph, Mesh(cp=2), xs) == 1
    assert len(graphs.collectives(graph)) == 1


@pytest.mark.parametrize("shape", [(1, 6), (1, 1, 6)])
def test_what_needs_no_copy_is_left(shape: tuple[int, ...]) -> None:
    xs = graphs.per_rank(Mesh(cp=2), *shape, dtype=torch.int32)
    graph = graphs.trace(lambda x: ir.all_gather(x, len(shape) - 1, "cp", 2), xs[0])
    assert graphs.check(run, graph, Mesh(cp=2), xs) == 0


def logits(ranks: int, **how: Any) -> Any:
    call = models.llama(torch.float32)
    program = md.lower(md.capture(*call, mesh=Mesh(tp=ranks), parallel=md.TensorParallel("tp")), **how)
    assert md.verify(program, *call).structure_error < 1e-11
    return program


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_logits_of_a_model_are_gathered_beside_their_product(ranks: int) -> None:
    program = logits(ranks, placement="split")
    assert [c.op for c in schedule(program.graphs[0])][-4:] == ["all_gather"] * 4
    parts = place(program, "split", compute="inductor").parts[0]
    assert [part.runs for part in parts[-9:]] == ["inductor", "eager"] * 4 + ["inductor"], "a product before each"


def test_small_ones_and_those_of_an_engine_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    assert logits(2).counts["gather_in_pieces"] == 0
    monkeypatch.undo()
    assert logits(2, placement="split").counts["gather_in_pieces"] == 0
