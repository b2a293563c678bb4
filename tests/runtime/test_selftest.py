"""The self-test of ring attention, as far as it needs no GPU: its engine, its inputs, and its verdict."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rank_processes import Ranks
from torch import Tensor

from torchtrt_md.build import layers
from torchtrt_md.build.flavour import flavour
from torchtrt_md.errors import LaunchError, TargetError
from torchtrt_md.launch import Launch
from torchtrt_md.runtime import selftest
from torchtrt_md.runtime.selftest import BOUNDS, attended, check_ring, judge, ring_network, ring_operands, ring_plan
from torchtrt_md.verification.compare import relative_error

RTX = pytest.mark.skipif(flavour().name != "TensorRT-RTX", reason="TensorRT builds for the GPU that is there only")
DTYPES = [torch.bfloat16, torch.float16]


@RTX
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_engine_builds_without_a_gpu(dtype: torch.dtype) -> None:
    assert ring_plan((1, 8, 64, 128), (1, 2, 64, 128), dtype, 4, "sm120").nbytes > 0


def test_the_network_is_one_attention_over_the_ranks() -> None:
    f = flavour()
    builder = f.trt.Builder(f.trt.Logger(f.trt.Logger.ERROR))
    network, factor = ring_network(builder, (1, 8, 64, 128), (1, 2, 64, 128), torch.bfloat16, 4)
    elements = 2 * 2 * 64 * 128
    assert layers.communications(f, network) == [(layers.RING, 4, "BF16", elements, elements)]
    assert [network.get_input(i).name for i in range(network.num_inputs)] == ["q", "k", "v"]
    assert tuple(network.get_output(0).shape) == (1, 8, 64, 128)
    assert factor.item() == pytest.approx(128**-0.5)


@pytest.mark.parametrize("target", ["sm80", "portable"])
def test_no_engine_for_other_targets(target: str) -> None:
    with pytest.raises(TargetError, match="ring attention inside an engine cannot be built"):
        ring_plan((1, 2, 64, 64), (1, 2, 64, 64), torch.float16, 2, target)


def parts(size: int, dtype: torch.dtype, tokens: int = 64) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The queries of the first rank, and the keys and values of all."""
    operands = [ring_operands((1, 8, tokens, 64), (1, 4, tokens, 64), dtype, rank) for rank in range(size)]
    return operands[0][0], [k for _, k, _ in operands], [v for _, _, v in operands]


def in_dtype(q: Tensor, k: list[Tensor], v: list[Tensor]) -> Tensor:
    return F.scaled_dot_product_attention(q, torch.cat(k, 2), torch.cat(v, 2), enable_gqa=True)


@pytest.mark.parametrize(("size", "tokens"), [(2, 64), (4, 64), (8, 64), (2, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_verdict(dtype: torch.dtype, size: int, tokens: int) -> None:
    q, k, v = parts(size, dtype, tokens)
    reference = attended(q, torch.cat(k, 2), torch.cat(v, 2))

    def refused(result: Tensor) -> bool:
        return judge(result, reference, axis="cp", size=size) is not None

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


def test_the_bounds_leave_room_for_rounding_and_none_for_a_missing_rank() -> None:
    for dtype in DTYPES:
        q, k, v = parts(8, dtype)
        reference = attended(q, torch.cat(k, 2), torch.cat(v, 2))
        assert 2 * relative_error(in_dtype(q, k, v), reference) < BOUNDS[dtype]
        assert relative_error(in_dtype(q, k[:-1], v[:-1]), reference) > 10 * BOUNDS[dtype]


def test_the_refusal_names_error_bound_and_way_out() -> None:
    q, k, v = parts(2, torch.bfloat16)
    error = judge(in_dtype(q, k[:1], v[:1]), attended(q, torch.cat(k, 2), torch.cat(v, 2)), axis="cp", size=2)
    assert isinstance(error, LaunchError)
    assert "over the 2 ranks of axis 'cp' its relative error is" in error.problem
    assert "at most 0.02 is rounding" in error.problem
    assert 'placement="split"' in error.fix


def gathered(rank: int) -> bool:
    shape = (1, 2, 4, 8)
    _, k, _ = ring_operands(shape, shape, torch.float32, rank)
    group = dist.group.WORLD
    assert group is not None
    whole = selftest._gathered(k, 2, group)
    return torch.equal(whole, torch.cat([ring_operands(shape, shape, torch.float32, r)[1] for r in range(2)], 2))


def test_keys_are_gathered_in_the_order_of_the_ranks(ranks: Ranks) -> None:
    assert [outcome.value for outcome in ranks(gathered)] == [True, True]


def refused_on_one(rank: int) -> None:
    launch = Launch.join(60.0, cpu=True)
    group = dist.group.WORLD
    assert group is not None
    target = ["sm120", "sm80"][rank]
    check_ring("cp", 2, torch.float16, 64, 4, 4, 64, group=group, launch=launch, target=target)


@RTX
def test_what_one_rank_cannot_build_is_an_error_on_every_rank(ranks: Ranks) -> None:
    for outcome in ranks(refused_on_one):
        assert outcome.error == "TargetError"
        assert "rank 1: ring attention inside an engine cannot be built: target 'sm80'" in outcome.message
        assert 'placement="split"' in outcome.message
