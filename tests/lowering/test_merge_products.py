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
from torchtrt_md.program import ShardedProgram, Weight

PLAN = {"": {"x": md.Split(1)}, "out": md.Gather(1)}


def lowered(call: Any, mesh: md.Mesh, parallel: Any, **options: Any) -> ShardedProgram:
    program = md.lower(md.capture(*call, mesh=mesh, parallel=parallel), placement="split", **options)
    report = md.verify(program, *call)
    assert report.structure_error < 1e-12
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
