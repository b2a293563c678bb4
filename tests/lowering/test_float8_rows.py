"""Rows in float8: what arrives of what is sent, and where lowering sends it."""

from __future__ import annotations

from typing import Any

import graphs
import models
import pytest
import torch
from torch import Tensor

import torchtrt_md as md
from torchtrt_md.errors import CollectiveError, PlanError, ShardingError
from torchtrt_md.lowering import Lowering, allgather_kv, ring, ulysses
from torchtrt_md.lowering.choose_strategy import attention_key
from torchtrt_md.lowering.float8_rows import DTYPES, LARGEST_ERROR, packed, packed_bytes, rounded, unpacked
from torchtrt_md.lowering.ops import bound_args, is_collective
from torchtrt_md.lowering.passes import Exchange, PassContext, run_passes
from torchtrt_md.lowering.schedule import schedule
from torchtrt_md.mesh import Mesh
from torchtrt_md.parallel import Strategy

ops = torch.ops.torchtrt_md


def rows_of(dtype: torch.dtype) -> Tensor:
    """Of the scales that the dtype has, each number between a thousandth of its row's largest and that."""
    finfo = torch.finfo(dtype)
    exponents = torch.arange(-80, 127) if finfo.max > 1e30 else torch.arange(-10, 15)
    rows = torch.randn(len(exponents), 64, generator=torch.Generator().manual_seed(0)).clamp(-3.9, 3.9) / 4
    return (rows * 2.0 ** exponents.unsqueeze(1)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_number_is_off_by_one_rounding(dtype: torch.dtype) -> None:
    x = rows_of(dtype)
    error = (rounded(x).double() - x.double()).abs()
    largest = x.double().abs().amax(-1, keepdim=True)
    assert bool((error <= LARGEST_ERROR * x.double().abs() + 2.0**-17 * largest).all())
    assert float(error.norm() / x.double().norm()) > 2.0**-7  # it is float8, and nothing finer


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_rounded_stays(dtype: torch.dtype) -> None:
    """So a ring, which sends on what it got, does not round at each step: but where the largest was rounded up to the
    next power of two, and the least ones lie on a finer grid than that has."""
    once = rounded(rows_of(dtype))
    again = rounded(once)
    largest = once.double().abs().amax(-1, keepdim=True)
    assert bool(((again.double() - once.double()).abs() <= 2.0**-17 * largest).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ends_of_the_range(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    x = torch.tensor([[most, -most, 1.0], [0.0, 0.0, 0.0], [0.0, -0.0, most / 2], [2.0, -4.0, 0.0]]).to(dtype)
    found = rounded(x)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found[1:], x[1:], rtol=LARGEST_ERROR, atol=0.0)
    torch.testing.assert_close(found[0, :2].double(), x[0, :2].double(), rtol=LARGEST_ERROR, atol=0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_is_none_on_the_other_side(bad: float) -> None:
    x = torch.ones(3, 8)
    x[1, 5] = bad
    found = rounded(x)
    assert bool(found[1].isnan().all())
    assert torch.equal(found[::2], x[::2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_so_it_is_however_the_tensor_lies(dtype: torch.dtype) -> None:
    """The largest of strided floats may be a NaN with the sign set, whose bits are no exponent."""
    x = torch.randn(64, 128).to(dtype)
    x[32, 64] = float("nan")
    for seen in (x, x.t(), x.t().contiguous().t(), x[::2], x[:, ::2]):
        assert torch.equal(rounded(seen).isnan().all(-1), seen.isnan().any(-1))
        assert torch.equal(rounded(seen).nan_to_num(7.0), rounded(seen.contiguous()).nan_to_num(7.0))


@pytest.mark.parametrize("shape", [(4, 3, 5), (2, 16), (2, 1), (0, 4), (4, 0)])
def test_parts_begin_where_wide_loads_can(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    sent = packed(x, 2)
    assert sent.dtype == torch.uint8
    assert sent.shape == (2, packed_bytes(shape, 2))
    assert sent.shape[1] % 16 == 0
    assert torch.equal(unpacked(sent, shape, x.dtype), rounded(x))


def test_other_dtypes_and_other_ways_are_refused() -> None:
    wide = torch.zeros(4, 4, dtype=torch.float64, device="meta")
    x = wide.float()
    with pytest.raises(CollectiveError, match=r"sends torch\.float64 in float8"):
        ops.all_gather(wide, 0, "cp", 2, "float8")
    with pytest.raises(CollectiveError, match="sends 'float4'"):
        ops.permute_tensor(x, 1, "cp", 2, "float4")
    calls: dict[str, list[tuple[Any, ...]]] = {
        "all_to_all": [(x[0], 0, 0), (x, 1, 0), (x, 0, -1)],
        "all_gather": [(x, 1)],
        "permute_tensor": [(x[0], 1)],
    }
    for name, given in calls.items():
        for args in given:
            with pytest.raises(CollectiveError, match="in float8, split or joined on"):
                getattr(ops, name)(*args, "cp", 2, "float8")


PASSES = {"ulysses": ulysses.run, "allgather_kv": allgather_kv.run, "ring": ring.run}


@pytest.mark.parametrize(
    ("how", "sent"),
    [
        (Exchange("ulysses"), ["float8", None]),
        (Exchange("ulysses", 2, values_first=True), ["float8"] * 3 + [None, None]),
        (Exchange("allgather_kv"), ["float8"]),
        (Exchange("ring"), ["float8"]),
    ],
    ids=str,
)
def test_queries_keys_and_values_are_sent_so_and_results_are_not(how: Exchange, sent: list[str | None]) -> None:
    q, k, v = (
        [x / 10 for x in graphs.per_rank(Mesh(cp=2), 1, 4, 6, 16, dtype=torch.float32, seed=seed)] for seed in range(3)
    )

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attended: Tensor = ops.context_attention(q, k, v, False, None, False, how.strategy, "cp", 2)
        return attended

    graph = graphs.trace(forward, q[0], k[0], v[0])
    (node,) = graph.graph.find_nodes(op="call_function", target=ops.context_attention.default)
    context = PassContext(Mesh(cp=2), {}, {}, "split", {attention_key(node): how}, exchange_dtype="float8")
    run_passes({"it": PASSES[how.strategy]}, graph, context)
    collectives = [n for n in graph.graph.nodes if is_collective(n)]
    assert [bound_args(n)["exchange_dtype"] for n in collectives] == sent
    for collective, node in zip(schedule(graph), collectives, strict=True):
        operand = node.all_input_nodes[0].meta["val"]
        full = operand.nbytes // (2 if "all_to_all" in str(node.target) else 1)
        numbers = full // 4
        rows_sent = -(-(numbers + numbers // 16) // 16) * 16  # each 16 wide, with an exponent
        assert collective.bytes_sent == (rows_sent if bound_args(node)["exchange_dtype"] else full)
    found = graphs.run_ranks(graph, Mesh(cp=2), q, k, v)
    own, (q, k, v) = q, ([rounded(x) for x in of_ranks] for of_ranks in (q, k, v))
    expected = graphs.attended(Mesh(cp=2), "cp", q if how.strategy == "ulysses" else own, k, v, is_causal=False)
    for (mine,), (right,) in zip(found, expected, strict=True):
        error = float((mine - right).norm() / right.norm())
        assert error < (LARGEST_ERROR if how.strategy == "ring" else 1e-5), "a ring's first block is its own"


@pytest.mark.parametrize("strategy", ["ulysses", "allgather_kv", "ring"])
def test_over_several_axes(strategy: Strategy) -> None:
    """What is exchanged along the last axis is sent on along the first."""
    model, args, kwargs = models.attention()
    plan = {"": {"x": md.Split(1)}, "out": md.Gather(1)}
    parallel = md.ContextParallel(("ring", "ulysses"), strategy, plan)
    program = md.capture(model, args, kwargs, mesh=md.Mesh(ring=2, ulysses=2), parallel=parallel)
    lowered = Lowering(program).lower(placement="split", exchange_dtype="float8")
    sent = {
        (bound_args(n)["axis"], bound_args(n)["exchange_dtype"])
        for n in lowered.graphs[0].graph.nodes
        if is_collective(n)
    }
    assert {("ring", "float8"), ("ulysses", "float8"), ("ulysses", None)} <= sent
    report = md.verify(lowered, model, args, kwargs)
    assert report.structure_error < 1e-8
    assert 2 * report.dense_error < report.error


def test_a_program_that_exchanges_nothing_of_attention_is_refused() -> None:
    model = torch.nn.Linear(8, 8)
    plan = {"": {"input": md.Split(0)}}
    program = md.capture(model, (torch.randn(4, 8),), mesh=Mesh(cp=2), parallel=md.ContextParallel("cp", plan=plan))
    with pytest.raises(ShardingError, match="no attention exchanges"):
        Lowering(program).lower(placement="split", exchange_dtype="float8")


def test_of_one_rank_nothing_is_sent() -> None:
    model, args, _ = models.attention()
    plan = {"": {"x": md.Split(1)}, "out": md.Gather(1)}
    program = md.capture(model, args, mesh=Mesh(cp=1), parallel=md.ContextParallel("cp", plan=plan))
    lowered = Lowering(program).lower(placement="split", exchange_dtype="float8")
    assert not schedule(lowered.graphs[0])


def test_not_inside_an_engine() -> None:
    model, args, _ = models.attention()
    plan = {"": {"x": md.Split(1)}, "out": md.Gather(1)}
    program = md.capture(model, args, mesh=Mesh(cp=2), parallel=md.ContextParallel("cp", plan=plan))
    with pytest.raises(PlanError, match="exchanges in float8 are between engines"):
        Lowering(program).lower(placement="engine", exchange_dtype="float8")


def test_a_dtype_that_is_finer_is_refused_with_the_line() -> None:
    model, args, _ = models.attention(dtype=torch.float64)
    plan = {"": {"x": md.Split(1)}, "out": md.Gather(1)}
    program = md.capture(model, args, mesh=Mesh(cp=2), parallel=md.ContextParallel("cp", plan=plan))
    with pytest.raises(ShardingError, match=r"is in float64, .*") as caught:
        Lowering(program).lower(placement="split", exchange_dtype="float8")
    assert "models.py" in caught.value.at
