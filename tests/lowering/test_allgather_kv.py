"""Attention over a split sequence by gathering keys and values."""

from __future__ import annotations

from typing import Any

import graphs
import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from torchtrt_md.lowering import allgather_kv, merge_identical
from torchtrt_md.lowering.ops import is_collective
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
    [(2, 3, 3, 1, 3), (2, 4, 2, 2, 3), (3, 5, 1, 2, 1), (4, 6, 2, 1, 2), (4, 6, 2, 3, 2), (8, 3, 1, 1, 2)],
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_packed(size: int, heads: int, kv_heads: int, batch: int, tokens: int, is_causal: bool) -> None:
    mesh = Mesh(cp=size)
    q = graphs.per_rank(mesh, batch, heads, tokens, 4)
    k, v = (graphs.per_rank(mesh, batch, kv_heads, tokens, 4, seed=seed) for seed in (1, 2))
    graph = graph_of(q[0], k[0], v[0], size, is_causal)
    assert graphs.rewrite(allgather_kv.run, graph, mesh) == 1
    assert graphs.collectives(graph) == [("all_gather", 0, "cp", size)]
    assert ("torchtrt_md.shard" in graphs.ops(graph)) == is_causal
    expected = graphs.attended(mesh, "cp", q, k, v, is_causal)
    graphs.assert_same(graphs.run_ranks(graph, mesh, q, k, v), expected, exact=False)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_values_of_another_width_are_gathered_apart(is_causal: bool, batch: int) -> None:
    mesh = Mesh(cp=2)
    q, k = (graphs.per_rank(mesh, batch, 2, 3, 4, seed=seed) for seed in range(2))
    v = graphs.per_rank(mesh, batch, 2, 3, 5, seed=2)
    graph = graph_of(q[0], k[0], v[0], 2, is_causal)
    assert graphs.rewrite(allgather_kv.run, graph, mesh) == 1
    assert graphs.collectives(graph) == [("all_gather", 0, "cp", 2)] * 2
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


class Memory(Interpreter):
    """Runs a graph on real tensors, of which every rank has the same: what was gathered, and attention's k and v."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.sent: list[Tensor] = []
        self.received: list[Tensor] = []
        self.operands: list[Tensor] = []

    def run_node(self, n: Node) -> Any:
        args = self.fetch_args_kwargs_from_env(n)[0]
        if is_collective(n):
            self.sent.append(args[0])
            self.received.append(torch.cat([args[0]] * args[3]))
            return self.received[-1]
        if n.target is md.attention.default:
            self.operands = [args[1], args[2]]
        return super().run_node(n)


@pytest.mark.parametrize(("batch", "width", "views"), [(1, 4, True), (1, 5, True), (2, 4, False), (2, 5, False)])
def test_nothing_is_copied_behind_the_gather_of_a_batch_of_one(batch: int, width: int, views: bool) -> None:
    q, k, v = torch.randn(batch, 4, 3, 4), torch.randn(batch, 2, 3, 4), torch.randn(batch, 2, 3, width)
    graph = graph_of(q, k, v, 2)
    graphs.rewrite(allgather_kv.run, graph, Mesh(cp=2))
    memory = Memory(graph)
    memory.run(q, k, v)
    assert all(x.is_contiguous() for x in memory.sent), "no copy is needed to send it"
    for operand, whole in zip(memory.operands, (k, v), strict=True):
        torch.testing.assert_close(operand, torch.cat([whole, whole], 2), rtol=0, atol=0)
        storages = [x.untyped_storage().data_ptr() for x in memory.received]
        assert (operand.untyped_storage().data_ptr() in storages) == views
    assert "aten.reshape" not in graphs.ops(graph), "nothing that may be a copy or not"


@pytest.mark.parametrize("width", [4, 5])
def test_two_attentions_over_the_same_keys_gather_them_once(width: int) -> None:
    mesh = Mesh(cp=2)
    q, k = (graphs.per_rank(mesh, 1, 2, 3, 4, seed=seed) for seed in range(2))
    v = graphs.per_rank(mesh, 1, 2, 3, width, seed=2)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        rest = (False, None, False, "allgather_kv", "cp", 2)
        return [md.context_attention(x, k, v, *rest) for x in (q, q * 2)]

    graph = graphs.trace(forward, q[0], k[0], v[0])
    assert graphs.rewrite(allgather_kv.run, graph, mesh) == 2
    gathers = 1 if width == 4 else 2
    assert graphs.check(merge_identical.run, graph, mesh, q, k, v) == gathers
    assert graphs.collectives(graph) == [("all_gather", 0, "cp", 2)] * gathers


def test_other_keys_are_gathered_by_themselves() -> None:
    mesh = Mesh(cp=2)
    q, k, v = (graphs.per_rank(mesh, 1, 2, 3, 4, seed=seed) for seed in range(3))

    def forward(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        rest = (False, None, False, "allgather_kv", "cp", 2)
        return [md.context_attention(q, k, v, *rest), md.context_attention(q, v, k, *rest)]

    graph = graphs.trace(forward, q[0], k[0], v[0])
    graphs.rewrite(allgather_kv.run, graph, mesh)
    assert graphs.check(merge_identical.run, graph, mesh, q, k, v) == 0


def test_another_strategy_is_left() -> None:
    q = torch.randn(1, 2, 2, 4)
    graph = graph_of(q, q, q, 2, strategy="ulysses")
    assert graphs.rewrite(allgather_kv.run, graph, Mesh(cp=2)) == 0
    assert graphs.ops(graph) == ["torchtrt_md.context_attention"]
