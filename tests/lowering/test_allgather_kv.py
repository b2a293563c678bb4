"""Attention over a split sequence by gathering keys and values."""

from __future__ import annotations

import graphs
import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from torchtrt_md.lowering import allgather_kv
from torchtrt_md.mesh import Mesh

md = torch.ops.torchtrt_md


def graph_of(
    q: Tensor, k: Tensor, v: Tensor, size: int, is_causal: bool = False, strategy: str = "allgather_kv"
) -> GraphModule:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attended: Tensor = md.context_attention(
            q, k, v, is_causal, None, q.shape[1] != k.shape[1], strategy, "cp", size
        )
        return attended

    return graphs.trace(forward, q, k, v)


@pytest.mark.parametrize(
    ("size", "heads", "kv_heads", "batch", "tokens"),
    [(2, 3, 3, 1, 3), (2, 4, 2, 2, 3), (3, 5, 1, 2, 1), (4, 6, 2, 3, 2), (8, 3, 1, 1, 2)],
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_packed(size: int, heads: int, kv_heads: int, batch: int, tokens: int, is_causal: bool) -> None:
    mesh = Mesh(cp=size)
    q = graphs.per_rank(mesh, batch, heads, tokens, 4)
    k, v = (graphs.per_rank(mesh, batch, kv_heads, tokens, 4, seed=seed) for seed in (1, 2))
    graph = graph_of(q[0], k[0], v[0], size, is_causal)
    assert graphs.rewrite(allgather_kv.run, graph, mesh) == 1
    assert graphs.collectives(graph) == [("all_gather", 2, "cp", size)]
    assert ("torchtrt_md.shard" in graphs.ops(graph)) == is_causal
    expected = graphs.attended(mesh, "cp", q, k, v, is_causal)
    graphs.assert_same(graphs.run_ranks(graph, mesh, q, k, v), expected, exact=False)


@pytest.mark.parametrize("is_causal", [False, True])
def test_values_of_another_width_are_gathered_apart(is_causal: bool) -> None:
    mesh = Mesh(cp=2)
    q, k = (graphs.per_rank(mesh, 2, 2, 3, 4, seed=seed) for seed in range(2))
    v = graphs.per_rank(mesh, 2, 2, 3, 5, seed=2)
    graph = graph_of(q[0], k[0], v[0], 2, is_causal)
    assert graphs.rewrite(allgather_kv.run, graph, mesh) == 1
    assert graphs.collectives(graph) == [("all_gather", 2, "cp", 2)] * 2
    expected = graphs.attended(mesh, "cp", q, k, v, is_causal)
    graphs.assert_same(graphs.run_ranks(graph, mesh, q, k, v), expected, exact=False)


@pytest.mark.parametrize(("key_tokens", "key_batch"), [(5, 2), (1, 2), (3, 1)])
def test_other_keys_than_queries(key_tokens: int, key_batch: int) -> None:
    mesh = Mesh(cp=2)
    q = graphs.per_rank(mesh, 2, 4, 3, 4)
    k, v = (graphs.per_rank(mesh, key_batch, 2, key_tokens, 4, seed=seed) for seed in (1, 2))
    graph = graph_of(q[0], k[0], v[0], 2)
    graphs.rewrite(allgather_kv.run, graph, mesh)
    expected = graphs.attended(mesh, "cp", q, k, v, is_causal=False)
    graphs.assert_same(graphs.run_ranks(graph, mesh, q, k, v), expected, exact=False)


@pytest.mark.parametrize("axes", [{"cp": 2, "tp": 2}, {"tp": 2, "cp": 2}, {"tp": 3, "cp": 2}])
@pytest.mark.parametrize("is_causal", [False, True])
def test_one_axis_of_two(axes: dict[str, int], is_causal: bool) -> None:
    mesh = Mesh(**axes)
    q, k, v = (graphs.per_rank(mesh, 1, 2, 3, 4, seed=seed) for seed in range(3))
    graph = graph_of(q[0], k[0], v[0], 2, is_causal)
    graphs.rewrite(allgather_kv.run, graph, mesh)
    expected = graphs.attended(mesh, "cp", q, k, v, is_causal)
    graphs.assert_same(graphs.run_ranks(graph, mesh, q, k, v), expected, exact=False)


def test_another_strategy_is_left() -> None:
    q = torch.randn(1, 2, 2, 4)
    graph = graph_of(q, q, q, 2, strategy="ulysses")
    assert graphs.rewrite(allgather_kv.run, graph, Mesh(cp=2)) == 0
    assert graphs.ops(graph) == ["torchtrt_md.context_attention"]
