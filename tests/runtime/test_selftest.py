"""Self-tests, as far as they need no GPU: what goes in, and the verdict."""

from __future__ import annotations

import msgspec
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchtrt_md.errors import LaunchError
from torchtrt_md.runtime.selftest import BOUNDS, attended, judge, operands, ring_operands
from torchtrt_md.segment import Segment
from torchtrt_md.selftest import OPS, RING, expected, operand, self_test
from torchtrt_md.verification.compare import relative_error

DTYPES = [torch.bfloat16, torch.float16]
PLAIN = [op for op in OPS if op != RING]


@pytest.mark.parametrize("op", PLAIN)
def test_the_verdict_on_a_collective(op: str) -> None:
    test = self_test(op, "tp", 4)
    for rank in range(4):
        right = expected(op, 4, rank)
        assert operands(test, rank)[0].equal(operand(4, rank))
        if right is None:
            assert judge(test, torch.full((4, 8), torch.nan), rank) is None
            continue
        assert judge(test, right.clone(), rank) is None
        for wrong in (torch.full_like(right, torch.nan), torch.zeros_like(right), right + 1):
            assert judge(test, wrong, rank) is not None


def test_an_ignored_communicator_is_named_with_both_values() -> None:
    test = self_test("all_reduce", "tp", 2)
    error = judge(test, operand(2, 1), 1)  # as if there was one rank
    assert isinstance(error, LaunchError)
    assert "computes all_reduce wrong on these GPUs: over the 2 ranks of axis 'tp', element 1" in error.problem
    assert 'placement="split"' in error.fix
    one_off = expected("all_reduce", 2, 1)
    assert one_off is not None
    one_off[1, 3] += 1
    told = judge(test, one_off, 1)
    assert told is not None
    assert "element 11 on the rank at 1 is 39 and must be 38" in told.problem


def ring(dtype: torch.dtype, size: int, tokens: int) -> Segment:
    """A self-test of less work than the one that is built."""
    test = self_test(RING, "cp", size, dtype)
    sizes = {"q": (1, 8, tokens, 64), "k": (1, 4, tokens, 64), "v": (1, 4, tokens, 64)}
    inputs = tuple(msgspec.structs.replace(b, shape=sizes[b.name]) for b in test.inputs)
    return msgspec.structs.replace(test, inputs=inputs)


def parts(test: Segment) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The queries of the first rank, and the keys and values of all."""
    found = [operands(test, rank) for rank in range(test.collectives[0].ranks)]
    return found[0][0], [k for _, k, _ in found], [v for _, _, v in found]


def in_dtype(q: Tensor, k: list[Tensor], v: list[Tensor]) -> Tensor:
    return F.scaled_dot_product_attention(q, torch.cat(k, 2), torch.cat(v, 2), enable_gqa=True)


@pytest.mark.parametrize(("size", "tokens"), [(2, 64), (4, 64), (8, 64), (2, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_verdict_on_a_ring(dtype: torch.dtype, size: int, tokens: int) -> None:
    test = ring(dtype, size, tokens)
    q, k, v = parts(test)
    reference = attended(q, torch.cat(k, 2), torch.cat(v, 2))

    def refused(result: Tensor) -> bool:
        return judge(test, result, 0) is not None

    right = in_dtype(q, k, v)
    assert not refused(right)
    assert not refused(reference.to(dtype))
    assert not refused(in_dtype(q, k[::-1], v[::-1])), "a ring begins anywhere"
    assert refused(in_dtype(q, k[:1], v[:1])), "the local keys alone"
    assert refused(in_dtype(q, k[-1:], v[-1:])), "those received last alone"
    assert refused(in_dtype(q, k[:-1], v[:-1])), "all but one rank's"
    assert refused(in_dtype(q, k, [*v[1:], v[0]])), "values of another rank"
    assert refused(torch.full_like(right, torch.nan)), "nothing written"
    assert refused(torch.zeros_like(right))
    assert refused(in_dtype((q.double() * 1.1).to(dtype), k, v)), "another scale"
    assert judge(test, right, 1) is not None, "the result of another rank"


def test_the_bounds_leave_room_for_rounding_and_none_for_a_missing_rank() -> None:
    for dtype in DTYPES:
        q, k, v = parts(ring(dtype, 8, 64))
        reference = attended(q, torch.cat(k, 2), torch.cat(v, 2))
        assert 2 * relative_error(in_dtype(q, k, v), reference) < BOUNDS[dtype]
        assert relative_error(in_dtype(q, k[:-1], v[:-1]), reference) > 10 * BOUNDS[dtype]


def test_the_refusal_of_a_ring_names_error_bound_and_way_out() -> None:
    test = ring(torch.bfloat16, 2, 64)
    q, k, v = parts(test)
    error = judge(test, in_dtype(q, k[:1], v[:1]), 0)
    assert isinstance(error, LaunchError)
    assert "over the 2 ranks of axis 'cp' its relative error is" in error.problem
    assert "at most 0.02 is rounding" in error.problem
    assert 'placement="split"' in error.fix


def test_each_rank_has_operands_of_its_own() -> None:
    shape = (1, 2, 4, 8)
    first, second = (ring_operands(shape, shape, torch.float32, rank) for rank in range(2))
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, ring_operands(shape, shape, torch.float32, 0), strict=True))
