"""What a rank communicates: in order, and in bytes."""

from __future__ import annotations

from typing import Any

import graphs
import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from torchtrt_md.lowering import allgather_kv, leading_dim, ring, ulysses
from torchtrt_md.lowering.passes import PassContext, run_passes
from torchtrt_md.lowering.schedule import collective, listed, schedule
from torchtrt_md.mesh import Mesh

md = torch.ops.torchtrt_md


def every_op(x: Tensor) -> list[Tensor]:
    """On x [4, 6]: the operand of each collective is x, in another dtype."""
    return [
        md.all_reduce(x, "sum", "tp", 2),
        md.all_gather(x.half(), 1, "tp", 2),
        md.reduce_scatter(x.double(), "avg", 0, "tp", 2),
        md.all_to_all(x.bfloat16(), 0, 1, "tp", 2),
        md.broadcast(x.long(), 0, "cp", 3),
        md.all_gather(x, 0, "cp", 3),
        md.all_reduce(x, "sum", "cp", 3),
        md.permute_tensor(x.half(), 1, "cp", 3),
    ]


def test_the_collectives_in_order() -> None:
    """24 elements; what is sent is what the ring and pairwise algorithms send, the most of any rank."""
    graph = graphs.trace(lambda x: every_op(x + 1), torch.ones(4, 6))
    found = schedule(graph)
    assert [(c.op, c.axis, c.ranks, c.dtype, c.elements, c.bytes_sent) for c in found] == [
        ("all_reduce", "tp", 2, torch.float32, 24, 2 * 24 * 4 // 2),  # half is reduced, half is gathered
        ("all_gather", "tp", 2, torch.float16, 24, 24 * 2),
        ("reduce_scatter", "tp", 2, torch.float64, 24, 12 * 8),
        ("all_to_all", "tp", 2, torch.bfloat16, 24, 12 * 2),
        ("broadcast", "cp", 3, torch.int64, 24, 24 * 8),
        ("all_gather", "cp", 3, torch.float32, 24, 2 * 24 * 4),
        ("all_reduce", "cp", 3, torch.float32, 24, 2 * 2 * 24 * 4 // 3),
        ("permute_tensor", "cp", 3, torch.float16, 24, 24 * 2),
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: md.all_reduce(x, "sum", "tp", 2), lambda x: md.all_reduce(x, "max", "tp", 2)),
        (lambda x: md.reduce_scatter(x, "sum", 0, "tp", 2), lambda x: md.reduce_scatter(x, "avg", 0, "tp", 2)),
        (lambda x: md.broadcast(x, 0, "tp", 2), lambda x: md.broadcast(x, 1, "tp", 2)),
        (lambda x: md.permute_tensor(x, 1, "tp", 4), lambda x: md.permute_tensor(x, 2, "tp", 4)),
    ],
    ids=["all_reduce", "reduce_scatter", "broadcast", "permute_tensor"],
)
def test_what_ranks_have_in_common_says_how_they_reduce(one: Any, other: Any) -> None:
    x = torch.ones(4, 6)
    graphs_of = [graphs.trace(function, x) for function in (one, other)]
    assert schedule(graphs_of[0]) == schedule(graphs_of[1])
    assert listed(graphs_of[0]) != listed(graphs_of[1])


def test_nothing_is_communicated() -> None:
    graph = graphs.trace(lambda x: md.attention(x, x, x, None, False, None, False), torch.ones(1, 1, 2, 4))
    assert schedule(graph) == []


def test_an_empty_operand_sends_nothing() -> None:
    assert collective("all_reduce", "tp", 4, torch.float32, 0).bytes_sent == 0


BATCH, TOKENS, WIDTH = 2, 48, 8


def attention_of(strategy: str, size: int, heads: int, kv_heads: int, dtype: torch.dtype) -> GraphModule:
    q, kv = (torch.ones(BATCH, n, TOKENS // size, WIDTH, dtype=dtype) for n in (heads, kv_heads))
    return graphs.trace(
        lambda q, kv: md.context_attention(q, kv, kv, False, None, heads != kv_heads, strategy, "cp", size), q, kv
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (16, 8), (32, 8)])
def test_the_formula_of_ulysses(size: int, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    """(2 + 2f) (N d b / P) (P - 1) / P, of N tokens of width d in b bytes; f = kv heads / heads."""
    graph = attention_of("ulysses", size, heads, kv_heads, dtype)
    graphs.rewrite(ulysses.run, graph, Mesh(cp=size))
    f = kv_heads / heads
    n, d, b = BATCH * TOKENS, heads * WIDTH, dtype.itemsize
    formula = (2 + 2 * f) * (n * d * b / size) * (size - 1) / size
    assert sum(c.bytes_sent for c in schedule(graph)) == formula
    graphs.rewrite(leading_dim.run, graph, Mesh(cp=size))
    assert sum(c.bytes_sent for c in schedule(graph)) == formula, "the same where TensorRT's act"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (8, 2), (8, 1)])
def test_the_formula_of_allgather_kv(size: int, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    """2 f N d b (P - 1) / P."""
    graph = attention_of("allgather_kv", size, heads, kv_heads, dtype)
    graphs.rewrite(allgather_kv.run, graph, Mesh(cp=size))
    f = kv_heads / heads
    n, d, b = BATCH * TOKENS, heads * WIDTH, dtype.itemsize
    formula = 2 * f * n * d * b * (size - 1) / size
    assert sum(c.bytes_sent for c in schedule(graph)) == pytest.approx(formula, rel=1e-12)
    graphs.rewrite(leading_dim.run, graph, Mesh(cp=size))
    assert sum(c.bytes_sent for c in schedule(graph)) == pytest.approx(formula, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (8, 2), (8, 1)])
def test_the_formula_of_a_ring(size: int, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    """2 f N d b (P - 1) / P, as one op of the engine or block by block."""
    graph = attention_of("ring", size, heads, kv_heads, dtype)
    f = kv_heads / heads
    n, d, b = BATCH * TOKENS, heads * WIDTH, dtype.itemsize
    formula = pytest.approx(2 * f * n * d * b * (size - 1) / size, rel=1e-12)
    (one,) = schedule(graph)
    elements = 2 * BATCH * kv_heads * TOKENS // size * WIDTH
    assert (one.op, one.axis, one.ranks, one.dtype, one.elements) == ("ring_attention", "cp", size, dtype, elements)
    assert one.bytes_sent == formula
    run_passes({"ring": ring.run}, graph, PassContext(Mesh(cp=size), {}, {}, "split"))
    blocks = schedule(graph)
    assert [c.op for c in blocks] == ["permute_tensor"] * (size - 1)
    assert sum(c.bytes_sent for c in blocks) == formula
