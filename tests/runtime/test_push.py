"""Collectives without NCCL: what is copied where, and when memory that others write may be used again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from rank_processes import Ranks
from torch import Tensor
from torch.fx import Graph, Node

from torchtrt_md.launch import Launch
from torchtrt_md.lowering.float8_rows import rounded
from torchtrt_md.runtime import rows
from torchtrt_md.runtime.bring_up import _agree_where_to_store
from torchtrt_md.runtime.memory import MemoryLayout, lay_out
from torchtrt_md.runtime.push import Push, push_of
from torchtrt_md.runtime.steps import Slot, Step
from torchtrt_md.segment import Wire

md = torch.ops.torchtrt_md
RANKS = 4


def node_of(op: str, *args: Any, like: Tensor | None = None) -> Node:
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(8, 3) if like is None else like
    return graph.call_function(getattr(md, op).default, (x, *args))


def run_all(op: str, args: tuple[Any, ...], operands: list[Tensor], shape: list[int]) -> list[Tensor]:
    """All ranks' results, each rank having copied its part."""
    results = [torch.full(shape, float("nan")) for _ in range(RANKS)]
    for me, operand in enumerate(operands):
        push = push_of(node_of(op, *args), me)
        assert push is not None
        for to, source in push.copies(operand, results):
            assert to.nbytes == source.nbytes
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


@pytest.mark.parametrize(
    ("name", "args", "arrive"),
    [("all_to_all", (0, 0), RANKS), ("all_gather", (0,), RANKS), ("permute_tensor", (1,), 1)],
)
def test_rows_in_float8_land_beside_the_result(name: str, args: tuple[int, ...], arrive: int) -> None:
    operands = [torch.randn(8, 3, 5) for _ in range(RANKS)]
    nodes = [node_of(name, *args, "cp", RANKS, "float8", like=operands[0]) for _ in operands]
    pushes = [push_of(node, me) for me, node in enumerate(nodes)]
    assert all(push is not None and push.packed is not None and push.packed[0] == arrive for push in pushes)
    landings = [torch.zeros(push.packed, dtype=torch.uint8) for push in pushes]  # type: ignore[union-attr, arg-type]
    for push, operand in zip(pushes, operands, strict=True):
        rows.pack(push.copies(operand, landings))  # type: ignore[union-attr]
    shape = [32 if name == "all_gather" else 8, 3, 5]
    plain = run_all(name, (*args, "cp", RANKS), [rounded(x) for x in operands], shape)
    for landed, right in zip(landings, plain, strict=True):
        out = torch.empty(shape)
        rows.unpack(landed, out)
        assert torch.equal(out, right)


@pytest.mark.parametrize("op", ["sum", "avg"])
@pytest.mark.parametrize("name", ["all_reduce", "reduce_scatter"])
def test_parts_of_a_sum_land_beside_each_other(name: str, op: str) -> None:
    operands = [torch.randn(8, 3) for _ in range(RANKS)]
    whole = name == "all_reduce"
    args = (op, "cp", RANKS) if whole else (op, 0, "cp", RANKS)
    push = push_of(node_of(name, *args), 0)
    assert push is not None
    landed = run_all(name, args, operands, [RANKS, 8 if whole else 2, 3])
    for rank, parts in enumerate(landed):
        assert push.sums == len(parts) == RANKS
        total = torch.stack(operands).sum(0)
        total = total if whole else total.chunk(RANKS)[rank]
        torch.testing.assert_close(parts.sum(0) * push.scale, total / (RANKS if op == "avg" else 1))


def test_what_else_computes_is_left_to_nccl() -> None:
    for op in ("max", "min", "product"):
        assert push_of(node_of("all_reduce", op, "cp", RANKS), 0) is None
        assert push_of(node_of("reduce_scatter", op, 0, "cp", RANKS), 0) is None
    for dtype in (torch.float64, torch.int64, torch.bool, torch.complex64):
        like = torch.empty(8, 3, dtype=dtype)
        assert push_of(node_of("all_reduce", "sum", "cp", RANKS, like=like), 0) is None
        assert push_of(node_of("reduce_scatter", "sum", 0, "cp", RANKS, like=like), 0) is None


def test_of_many_ranks_only_little_goes_from_everyone_to_everyone() -> None:
    large = torch.empty(1 << 20, dtype=torch.bfloat16)
    assert push_of(node_of("all_reduce", "sum", "cp", 4, like=large), 0) is None
    assert push_of(node_of("all_reduce", "sum", "cp", 4, like=large[: 1 << 19]), 0) is not None
    assert push_of(node_of("all_reduce", "sum", "cp", 2, like=large), 0) is not None
    assert push_of(node_of("reduce_scatter", "sum", 0, "cp", 4, like=large), 0) is not None


def compute(name: str, *reads: str) -> Step:
    return Step(name, reads, lambda values: None, slots=(Slot(name, (64,), torch.float32),))


def exchange(name: str, read: str, sums: int = 0, packed: tuple[int, int] | None = None) -> Step:
    return Step(
        name,
        (read,),
        lambda values: None,
        slots=(Slot(name, (64,), torch.float32),),
        communicates=True,
        push=Push(lambda x, results: [], sums, packed=packed),
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


def check_writers_find_memory_free(steps: list[Step], made: MemoryLayout) -> None:
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
    made = lay_out(steps, [f"x{count - 1}"], push=True)
    assert len(made.shared_of) == 2 * count
    check_writers_find_memory_free(steps, made)


def test_memory_is_used_again() -> None:
    made = lay_out(layers(20), ["x19"], push=True)
    assert made.shared["cp"] <= 5 * 64 * 4


def test_a_single_exchange_is_left_to_nccl() -> None:
    steps = [compute("a", "input:x"), exchange("b", "a"), compute("c", "b")]
    assert lay_out(steps, ["c"], push=True).shared_of == {}


def test_results_that_are_returned_are_left_to_nccl() -> None:
    steps = [*layers(2), exchange("last", "x1")]
    assert "last" not in lay_out(steps, ["last"], push=True).shared_of


@pytest.mark.parametrize("how", [{"sums": 2}, {"packed": (2, 256)}], ids=str)
def test_what_a_result_is_computed_of_is_read_behind_its_own_barrier(how: dict[str, Any]) -> None:
    """So the exchange right behind it writes elsewhere, and the one behind that where it was."""
    steps: list[Step] = [compute("a", "input:x")]
    for i in range(4):
        steps += [exchange(f"c{i}", "a", **how)]
    made = lay_out([*steps, compute("b", *(f"c{i}" for i in range(4)))], ["b"], push=True)
    at = [made.shared_of["landed", f"c{i}"][1] for i in range(4)]
    assert at == [0, 512, 1024, 512]


def test_a_sum_that_is_returned_lands_in_shared_memory_all_the_same() -> None:
    steps = [compute("a", "input:x"), exchange("b", "a", sums=2), exchange("c", "a", sums=2)]
    made = lay_out(steps, ["b", "c"], push=True)
    assert set(made.shared_of) == {("landed", "b"), ("landed", "c")}


def test_an_axis_on_which_nothing_is_sent_has_no_memory() -> None:
    empty = [replace(exchange(f"c{i}", "a"), slots=(Slot(f"c{i}", (0,), torch.float32),)) for i in range(3)]
    made = lay_out([compute("a", "input:x"), *empty, compute("b", "c0", "c1", "c2")], ["b"], push=True)
    assert (made.shared, made.shared_of) == ({}, {})


def agreed(rank: int, differ: bool) -> bool:
    """Rank 1 reads the result of an early exchange once more at the end."""
    steps = layers(3)
    if rank and differ:
        steps.append(compute("late", "there0"))
    layout = lay_out(steps, [Wire("output", "x2")], push=True)
    return _agree_where_to_store(Launch.join(30.0, cpu=True), steps, layout)


def test_ranks_that_plan_otherwise_leave_it_to_nccl(ranks: Ranks) -> None:
    """Each stores at offsets of its own plan, so where plans differ it would store where the others read else."""
    plans = [lay_out([*layers(3), *more], ["x2"], push=True) for more in ([], [compute("late", "there0")])]
    assert plans[0].shared_of != plans[1].shared_of
    for differ in (False, True):
        assert [outcome.value for outcome in ranks(agreed, differ)] == [not differ] * 2
