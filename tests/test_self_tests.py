"""What self-tests are, and what each rank must get: known beforehand, and as the collectives themselves have it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from rank_processes import Ranks
from torch import Tensor

from torchtrt_md.lowering.schedule import collective
from torchtrt_md.segment import Segment
from torchtrt_md.selftest import OPS, RING, ROOT, expected, operand, self_test, self_tests

PLAIN = [op for op in OPS if op != RING]


def over_gloo(rank: int, op: str) -> Tensor:
    """What PyTorch's own collective makes of the operands of the two ranks."""
    x, size = operand(2, rank), 2
    everything = [torch.empty_like(x) for _ in range(size)]
    run: dict[str, Callable[[], Tensor]] = {
        "all_reduce": lambda: (dist.all_reduce(x), x)[1],
        "broadcast": lambda: (dist.broadcast(x, ROOT), x)[1],
        "reduce_scatter": lambda: (dist.all_reduce(x), x.chunk(size)[rank])[1],
        "all_gather": lambda: (dist.all_gather(everything, x), torch.cat(everything))[1],
        "all_to_all": lambda: (
            dist.all_to_all_single(y := torch.empty_like(x), x),
            y,
        )[1],
    }
    return run[op]()


@pytest.mark.parametrize("op", PLAIN)
def test_what_a_rank_must_get_is_what_the_collective_gives(op: str, ranks: Ranks) -> None:
    for rank, outcome in enumerate(ranks(over_gloo, op)):
        assert not outcome.error, outcome.message
        assert torch.equal(outcome.value, expected(op, 2, rank))


def faults(op: str, ranks: int, rank: int, right: Tensor) -> dict[str, Tensor]:
    """What an engine may give that does not communicate, or does with others."""
    x = operand(ranks, rank)
    others = [expected(op, ranks, r) for r in range(ranks) if r != rank]
    found = {
        "nothing written": torch.full_like(right, torch.nan),
        "zeros": torch.zeros_like(right),
        "its own operand": x.repeat(ranks, 1)[: right.shape[0]],
        "the order of ranks reversed": right.flip(0),
        "half of the ranks": (right / 2).round(),
    }
    if op in ("all_to_all", "reduce_scatter"):
        found |= {f"that of rank {i}": other for i, other in enumerate(others)}
    if op == "reduce_scatter":  # one row
        del found["the order of ranks reversed"]
    if op == "broadcast" and rank == ROOT:  # the root gets its own
        del found["its own operand"]
    return found


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("op", PLAIN)
def test_what_is_not_communication_is_something_else(op: str, ranks: int) -> None:
    for rank in range(ranks):
        right = expected(op, ranks, rank)
        assert tuple(right.shape) == self_test(op, "cp", ranks).outputs[0].shape
        assert right.dtype == torch.float32
        for fault, wrong in faults(op, ranks, rank, right).items():
            assert not torch.equal(wrong, right), f"{fault} on rank {rank}"


@pytest.mark.parametrize("ranks", [2, 7, 64])
def test_sums_are_exact_in_float32_in_any_order(ranks: int) -> None:
    parts = [operand(ranks, r) for r in range(ranks)]
    whole = expected("all_reduce", ranks, 0)
    assert torch.equal(whole.double(), torch.stack(parts).double().sum(0))
    assert 4096 * float(max(part.max() for part in parts)) < 2**24


def segment(*collectives: tuple[str, str, torch.dtype], runs: str = "engine") -> Segment:
    made = tuple(collective(op, axis, 4, dtype, 64) for op, axis, dtype in collectives)
    return Segment(runs, "", "cp", (), (), made)  # type: ignore[arg-type]


def test_there_is_one_for_each_axis_and_op_of_engines() -> None:
    half, bf16 = torch.float16, torch.bfloat16
    tests = self_tests(
        [
            segment(("all_to_all", "cp", bf16), ("all_to_all", "cp", half), ("all_gather", "cp", bf16)),
            segment(("all_reduce", "tp", bf16), ("all_reduce", "cp", bf16), (RING, "cp", bf16), (RING, "cp", half)),
            segment(("broadcast", "cp", bf16), runs="eager"),
        ]
    )
    assert [t.name.removeprefix("the self-test of ") for t in tests] == [
        "all_gather in float32 on axis 'cp'",
        "all_reduce in float32 on axis 'cp'",
        "all_to_all in float32 on axis 'cp'",
        "ring_attention in bfloat16 on axis 'cp'",
        "ring_attention in float16 on axis 'cp'",
        "all_reduce in float32 on axis 'tp'",
    ]
    assert self_tests([segment()]) == []


def test_the_operands_are_those_of_the_documentation() -> None:
    x = operand(4, 3)
    assert x.shape == (4, 8)
    assert [int(v) for v in x.flatten()] == [(8 * 4 * 3 + i) % 251 for i in range(32)]
