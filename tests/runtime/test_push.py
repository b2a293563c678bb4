"""Exchanges by copy engines: what is copied where, and when memory that others write may be used again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, Node

from torchtrt_md.runtime.memory import MemoryPlan, plan_memory
from torchtrt_md.runtime.push import copies_of
from torchtrt_md.runtime.steps import Slot, Step

md = torch.ops.torchtrt_md
RANKS = 4


def node_of(op: str, *args: Any) -> Node:
    graph = Graph()
    x = graph.placeholder("x")
    return graph.call_function(getattr(md, op).default, (x, *args))


def run_all(op: str, args: tuple[Any, ...], operands: list[Tensor], shape: list[int]) -> list[Tensor]:
    """All ranks' results, each rank having copied its part."""
    results = [torch.full(shape, float("nan")) for _ in range(RANKS)]
    for me, operand in enumerate(operands):
        copies = copies_of(node_of(op, *args), me)
        assert copies is not None
        for to, source in copies(operand, results):
            to.copy_(source)
    return results


def test_all_to_all() -> None:
    operands = [torch.randn(8, 3) for _ in range(RANKS)]
    results = run_all("all_to_all", (0, 0, "cp", RANKS), operands, [8, 3])
    for rank, result in enumerate(results):
        assert torch.equal(result, torch.cat([x.chunk(RANKS)[rank] for x in operands]))


def test_all_gather() -> None:
    operands = [torch.randn(2, 3) for _ in range(RANKS)]
    for result in run_all("all_gather", (0, "cp", RANKS), operands, [8, 3]):
        assert torch.equal(result, torch.cat(operands))


@pytest.mark.parametrize("shift", [1, 3, -1])
def test_permute_tensor(shift: int) -> None:
    operands = [torch.randn(2, 3) for _ in range(RANKS)]
    for rank, result in enumerate(run_all("permute_tensor", (shift, "cp", RANKS), operands, [2, 3])):
        assert torch.equal(result, operands[(rank - shift) % RANKS])


def test_what_computes_is_left_to_nccl() -> None:
    assert copies_of(node_of("all_reduce", "sum", "cp", RANKS), 0) is None
    assert copies_of(node_of("reduce_scatter", "sum", 0, "cp", RANKS), 0) is None


def compute(name: str, *reads: str) -> Step:
    return Step(name, reads, lambda values: None, slots=(Slot(name, (64,), torch.float32),))


def exchange(name: str, read: str) -> Step:
    return Step(
        name,
        (read,),
        lambda values: None,
        slots=(Slot(name, (64,), torch.float32),),
        communicates=True,
        push=lambda x, results: [],
        axis="cp",
    )


def layers(count: int) -> list[Step]:
    """Exchange there, attention, exchange back, product; again and again."""
    steps, x = [], "input:x"
    for layer in range(count):
        steps += [
            compute(f"qkv{layer}", x),
            exchange(f"there{layer}", f"qkv{layer}"),
            compute(f"attended{layer}", f"there{layer}"),
            exchange(f"back{layer}", f"attended{layer}"),
            compute(f"x{layer}", f"back{layer}"),
        ]
        x = f"x{layer}"
    return steps


def check_writers_find_memory_free(steps: list[Step], made: MemoryPlan) -> None:
    """Other ranks write a result once they are behind the exchange before it; by then this rank must have read what
    was there, and so in the next call."""
    order = [i for i, step in enumerate(steps) if step.slots[0].name in made.shared_of]
    last_read = {
        steps[i].slots[0].name: max((j for j, s in enumerate(steps) if steps[i].slots[0].name in s.reads), default=i)
        for i in order
    }
    where = {name: offset for name, (_, offset) in made.shared_of.items()}
    size = 64 * 4
    twice = [(call, i) for call in range(2) for i in order]
    for number, (_, index) in enumerate(twice):
        if number == 0:
            continue
        before_call, before_index = twice[number - 1]
        known = before_call * len(steps) + made.moments[before_index].after  # this rank has done so much by then
        name = steps[index].slots[0].name
        for earlier_call, earlier in twice[:number]:
            other = steps[earlier].slots[0].name
            if abs(where[other] - where[name]) < size:
                assert earlier_call * len(steps) + last_read[other] <= known, (name, other)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_memory_is_written_only_when_it_was_read(count: int) -> None:
    steps = layers(count)
    made = plan_memory(steps, [f"x{count - 1}"], push=True)
    assert len(made.shared_of) == 2 * count
    check_writers_find_memory_free(steps, made)


def test_memory_is_used_again() -> None:
    made = plan_memory(layers(20), ["x19"], push=True)
    assert made.shared["cp"] <= 5 * 64 * 4


def test_a_single_exchange_is_left_to_nccl() -> None:
    steps = [compute("a", "input:x"), exchange("b", "a"), compute("c", "b")]
    assert plan_memory(steps, ["c"], push=True).shared_of == {}


def test_results_that_are_returned_are_left_to_nccl() -> None:
    steps = [*layers(2), exchange("last", "x1")]
    assert "last" not in plan_memory(steps, ["last"], push=True).shared_of
