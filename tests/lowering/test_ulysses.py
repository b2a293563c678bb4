"""Attention over a split sequence by exchanging heads for sequence."""

from __future__ import annotations

import graphs
import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from torchtrt_md.errors import ShardingError
from torchtrt_md.lowering import ulysses
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.mesh import Mesh
from torchtrt_md.program import value_of

md = torch.ops.torchtrt_md


def graph_of(
    q: Tensor, k: Tensor, v: Tensor, size: int, is_causal: bool = False, strategy: str = "ulysses"
) -> GraphModule:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attended: Tensor = md.context_attention(
            q, k, v, is_causal, None, q.shape[1] != k.shape[1], strategy, "cp", size
        )
        return attended

    return graphs.trace(forward, q, k, v)


@pytest.mark.parametrize(
    ("size", "heads", "kv_heads", "batch", "tokens"),
    [(2, 4, 4, 1, 3), (2, 4, 2, 2, 3), (3, 6, 3, 1, 1), (4, 8, 4, 3, 2), (4, 4, 4, 1, 5), (8, 16, 8, 1, 2)],
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_packed(size: int, heads: int, kv_heads: int, batch: int, tokens: int, is_causal: bool) -> None:
    mesh = Mesh(cp=size)
    q = graphs.per_rank(mesh, batch, heads, tokens, 4)
    k, v = (graphs.per_rank(mesh, batch, kv_heads, tokens, 4, seed=seed) for seed in (1, 2))
    graph = graph_of(q[0], k[0], v[0], size, is_causal)
    assert graphs.rewrite(ulysses.run, graph, mesh) == 1
    assert graphs.collectives(graph) == [("all_to_all", 1, 2, "cp", size), ("all_to_all", 2, 1, "cp", size)]
    (attention,) = (n for n in graph.graph.nodes if n.target is md.attention.default)
    args = bound_args(attention)
    assert list(value_of(args["q"]).shape) == [batch, heads // size, tokens * size, 4]
    assert list(value_of(args["k"]).shape) == [batch, kv_heads // size, tokens * size, 4]
    assert (args["mask"], args["is_causal"]) == (None, is_causal)
    expected = graphs.attended(mesh, "cp", q, k, v, is_causal)
    graphs.assert_same(graphs.run_ranks(graph, mesh, q, k, v), expected, exact=False)


@pytest.mark.parametrize(("width", "key_tokens", "key_batch"), [(3, 3, 2), (4, 5, 2), (6, 1, 2), (4, 3, 1)], ids=str)
def test_what_does_not_fit_one_tensor_is_exchanged_apart(width: int, key_tokens: int, key_batch: int) -> None:
    """Values of another width than queries and keys, other lengths of keys, one batch of keys for all queries."""
    mesh = Mesh(cp=2)
    q = graphs.per_rank(mesh, 2, 4, 3, 4)
    k = graphs.per_rank(mesh, key_batch, 2, key_tokens, 4, seed=1)
    v = graphs.per_rank(mesh, key_batch, 2, key_tokens, width, seed=2)
    graph = graph_of(q[0], k[0], v[0], 2)
    assert graphs.rewrite(ulysses.run, graph, mesh) == 1
    assert [c[:3] for c in graphs.collectives(graph)] == [("all_to_all", 1, 2)] * 3 + [("all_to_all", 2, 1)]
    expected = graphs.attended(mesh, "cp", q, k, v, is_causal=False)
    graphs.assert_same(graphs.run_ranks(graph, mesh, q, k, v), expected, exact=False)


def test_scale_is_kept() -> None:
    mesh = Mesh(cp=2)
    q = graphs.per_rank(mesh, 1, 2, 3, 4)
    scaled = graphs.trace(lambda q: md.context_attention(q, q, q, True, 0.25, False, "ulysses", "cp", 2), q[0])
    graphs.rewrite(ulysses.run, scaled, mesh)
    twice = [t * 0.5 for t in q]  # 1/sqrt(4) is 0.5: half of it by half the queries
    expected = graphs.attended(mesh, "cp", twice, q, q, is_causal=True)
    graphs.assert_same(graphs.run_ranks(scaled, mesh, q), expected, exact=False)


def test_transposed_operands() -> None:
    """As models make them: [batch, tokens, heads, width] transposed."""
    mesh = Mesh(cp=2)
    x = graphs.per_rank(mesh, 2, 3, 4, 6)
    q = [t.transpose(1, 2) for t in x]
    graph = graphs.trace(
        lambda x: md.context_attention(*[x.transpose(1, 2)] * 3, False, None, False, "ulysses", "cp", 2), x[0]
    )
    assert graphs.rewrite(ulysses.run, graph, mesh) == 1
    expected = graphs.attended(mesh, "cp", q, q, q, is_causal=False)
    graphs.assert_same(graphs.run_ranks(graph, mesh, x), expected, exact=False)


@pytest.mark.parametrize("axes", [{"cp": 2, "tp": 2}, {"tp": 2, "cp": 2}, {"tp": 3, "cp": 2}])
@pytest.mark.parametrize("is_causal", [False, True])
def test_one_axis_of_two(axes: dict[str, int], is_causal: bool) -> None:
    mesh = Mesh(**axes)
    q, k, v = (graphs.per_rank(mesh, 1, 2, 3, 4, seed=seed) for seed in range(3))
    graph = graph_of(q[0], k[0], v[0], 2, is_causal)
    graphs.rewrite(ulysses.run, graph, mesh)
    expected = graphs.attended(mesh, "cp", q, k, v, is_causal)
    graphs.assert_same(graphs.run_ranks(graph, mesh, q, k, v), expected, exact=False)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "message"),
    [
        (6, 6, r"the 6 heads of attention .* do not divide by the 4 ranks of axis 'cp': 2 left over"),
        (8, 2, r"the 2 key/value heads of attention .* do not divide by the 4 ranks of axis 'cp': 2 left over"),
        (3, 1, r"the 3 heads of attention .*: 3 left over"),
    ],
)
def test_heads_that_do_not_divide(heads: int, kv_heads: int, message: str) -> None:
    q, k = torch.randn(1, heads, 2, 4), torch.randn(1, kv_heads, 2, 4)
    with pytest.raises(ShardingError, match=message) as raised:
        graphs.rewrite(ulysses.run, graph_of(q, k, k, 4), Mesh(cp=4))
    assert 'strategy="allgather_kv"' in raised.value.fix
    assert raised.value.at.startswith(f"{__file__}:")
    assert " in forward: " in raised.value.at


def test_another_strategy_is_left() -> None:
    q = torch.randn(1, 2, 2, 4)
    graph = graph_of(q, q, q, 2, strategy="allgather_kv")
    assert graphs.rewrite(ulysses.run, graph, Mesh(cp=2)) == 0
    assert graphs.ops(graph) == ["torchtrt_md.context_attention"]
