"""Products of one operand become one, where nothing waits for one of them alone."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from torch import nn

import torchtrt_md as md
from torchtrt_md.lowering import attention_keys
from torchtrt_md.lowering.passes import Exchange
from torchtrt_md.place import place
from torchtrt_md.program import ShardedProgram, Weight

PLAN = {"": {"x": md.Split(1)}, "out": md.Gather(1)}


def lowered(call: Any, mesh: md.Mesh, parallel: Any, **options: Any) -> ShardedProgram:
    program = md.lower(md.capture(*call, mesh=mesh, parallel=parallel), placement="split", **options)
    report = md.verify(program, *call)
    assert report.structure_error < 1e-11
    return program


def joined(program: ShardedProgram) -> list[str]:
    return [s.name for s in program.sources.values() if isinstance(s, Weight) and s.parts]


@pytest.mark.parametrize("ranks", [1, 2])
def test_queries_keys_and_values_are_one_product(ranks: int) -> None:
    program = lowered(models.flux(torch.float32), md.Mesh(cp=ranks), md.ContextParallel("cp", "ulysses"))
    names = joined(program)
    assert program.counts["merge_products"] == len(names) // 2 * 3  # a weight and a bias of three layers each
    assert all(name.count("+") == 2 and "_q" in name for name in names)
    assert not any("proj_mlp" in name for name in names), "it can run beside the exchange back"


def test_tensor_parallel_parts_are_joined_as_the_rank_holds_them() -> None:
    program = lowered(models.llama(torch.float32), md.Mesh(tp=2), md.TensorParallel("tp"))
    assert any("q_proj.weight+" in name for name in joined(program))  # of unequal sizes, by grouped queries
    source = next(s for s in program.sources.values() if isinstance(s, Weight) and "q_proj.weight+" in s.name)
    for rank in range(2):
        local = program.weights.local(source, program.mesh, rank)
        parts = [program.weights.local(part, program.mesh, rank) for part in source.parts]
        assert torch.equal(local, torch.cat(parts))
        assert local.shape[0] * 2 == source.shape[0]


def test_values_that_are_exchanged_first_stay_alone() -> None:
    call = models.flux(torch.float32)
    parallel = md.ContextParallel("cp", "ulysses")
    captured = md.capture(*call, mesh=md.Mesh(cp=2), parallel=parallel)
    first = {key: Exchange("ulysses", values_first=True) for key in attention_keys(captured)}
    names = joined(lowered(call, md.Mesh(cp=2), parallel, exchanges=first))
    assert names
    assert all(name.count("+") == 1 and "_v" not in name for name in names)


def test_an_engine_keeps_its_products() -> None:
    call = models.flux(torch.float32)
    program = md.lower(md.capture(*call, mesh=md.Mesh(cp=2), parallel=md.ContextParallel("cp", "ulysses")))
    assert program.counts["merge_products"] == 0
    assert not joined(program)


class Tied(nn.Module):
    """One weight in two products, and a product without a bias beside one with."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 4)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.a(x), self.b(x), self.c(x)], -1)


def test_shared_weights_are_left_alone() -> None:
    program = lowered((Tied().eval(), (torch.randn(2, 8),), {}), md.Mesh(cp=1), ())
    assert not joined(program)


class Given(nn.Module):
    """Products with matrices that are passed in each call."""

    def forward(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, a.t()) + torch.mm(x, b.t())


def test_what_the_user_passes_is_no_weight() -> None:
    call: Any = (Given(), (torch.randn(4, 8), torch.randn(8, 8), torch.randn(8, 8)), {})
    assert lowered(call, md.Mesh(cp=1), ()).counts["merge_products"] == 0


class Pair(nn.Module):
    """Two products of one operand, seen through views that slices of one product do not allow, or returned."""

    def __init__(self, returned: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.returned = returned
        self.register_buffer("scale", torch.randn(24))

    def forward(self, x: torch.Tensor) -> Any:
        a, b = self.a(x), self.b(x)
        if self.returned:
            return a, *b.unbind(0)
        return a.flatten(1) * self.scale + b.flatten(1) * torch.tensor(2.0)


def test_a_view_that_a_slice_does_not_allow_is_a_copy() -> None:
    program = lowered((Pair(returned=False).eval(), (torch.randn(2, 3, 8),), {}), md.Mesh(cp=1), ())
    assert program.counts["merge_products"] == 2


def test_what_a_part_returns_is_contiguous() -> None:
    x = torch.randn(2, 3, 8)
    program = lowered((Pair(returned=True).eval(), (x,), {}), md.Mesh(cp=1), ())
    assert program.counts["merge_products"] == 2
    (part,) = place(program, "split", compute="inductor").parts[0]
    assert part.graph is not None
    given = {s.name: s for s in program.sources.values() if isinstance(s, Weight)}
    operands = [
        x if b.weight is None else program.weights.local(given[b.weight], program.mesh, 0) for b in part.segment.inputs
    ]
    assert all(t.is_contiguous() for t in part.graph(*operands))


class BiasOfOne(nn.Module):
    """A bias that is broadcast beside one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.bias = nn.Parameter(torch.randn(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.a(x), self.b(x)], -1)


def test_a_bias_that_is_broadcast_is_left_alone() -> None:
    program = lowered((BiasOfOne().eval(), (torch.randn(2, 8),), {}), md.Mesh(cp=1), ())
    assert program.counts["merge_products"] == 0
