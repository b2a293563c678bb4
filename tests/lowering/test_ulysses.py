"""Attention over a split sequence by exchanging heads for sequence."""

from __future__ import annotations

from typing import Any

import graphs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from torchtrt_md.errors import ShardingError
from torchtrt_md.lowering import ulysses
from torchtrt_md.lowering.choose_strategy import attention_key
from torchtrt_md.lowering.ops import bound_args, is_collective
from torchtrt_md.lowering.passes import Exchange, PassContext, run_passes
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


def exchanged(graph: GraphModule, mesh: Mesh, how: Exchange, placement: str = "split") -> int:
    """Run the pass where this was chosen for every attention of the graph."""
    nodes = graph.graph.find_nodes(op="call_function", target=md.context_attention.default)
    context = PassContext(mesh, {}, {}, placement, {attention_key(node): how for node in nodes})
    return run_passes({"it": ulysses.run}, graph, context)["it"]


def events(graph: GraphModule) -> list[str]:
    """The exchanges, by the number of heads in one, and the attentions, in order."""
    found = []
    for node in graph.graph.nodes:
        if is_collective(node):
            found.append(f"exchange {value_of(node).shape[3]}")
        elif node.target is md.attention.default:
            found.append("attention")
    return found


@pytest.mark.parametrize(
    ("size", "heads", "kv_heads", "batch", "tokens"),
    [
        *[(2, 4, 4, 1, 3), (2, 4, 4, 2, 3), (2, 4, 2, 1, 3), (2, 4, 2, 2, 3), (3, 6, 3, 1, 1), (4, 8, 4, 3, 2)],
        *[(4, 4, 4, 1, 5), (4, 4, 4, 2, 5), (8, 16, 8, 1, 2)],
    ],
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_packed(size: int, heads: int, kv_heads: int, batch: int, tokens: int, is_causal: bool) -> None:
    mesh = Mesh(cp=size)
    q = graphs.per_rank(mesh, batch, heads, tokens, 4)
    k, v = (graphs.per_rank(mesh, batch, kv_heads, tokens, 4, seed=seed) for seed in (1, 2))
    graph = graph_of(q[0], k[0], v[0], size, is_causal)
    assert graphs.rewrite(ulysses.run, graph, mesh) == 1
    assert graphs.collectives(graph) == [("all_to_all", 0, 0, "cp", size)] * 2
    (attention,) = (n for n in graph.graph.nodes if n.target is md.attention.default)
    args = bound_args(attention)
    assert list(value_of(args["q"]).shape) == [batch, heads // size, tokens * size, 4]
    assert list(value_of(args["k"]).shape) == [batch, kv_heads // size, tokens * size, 4]
    assert (args["mask"], args["is_causal"]) == (None, is_causal)
    expected = graphs.attended(mesh, "cp", q, k, v, is_causal)
    graphs.assert_same(graphs.run_ranks(graph, mesh, q, k, v), expected, exact=False)


@pytest.mark.parametrize(
    ("width", "key_tokens", "key_batch", "heads"),
    [
        (3, 3, 2, [3, 1]),  # values of another width: q and k, v
        (4, 5, 2, [2, 2]),  # keys of another length: q, k and v
        (4, 3, 1, [2, 2]),  # one batch of keys for all queries
        (6, 1, 2, [2, 1, 1]),  # no two are alike
    ],
)
def test_what_does_not_fit_one_tensor_is_exchanged_apart(
    width: int, key_tokens: int, key_batch: int, heads: list[int]
) -> None:
    mesh = Mesh(cp=2)
    q = graphs.per_rank(mesh, 2, 4, 3, 4)
    k = graphs.per_rank(mesh, key_batch, 2, key_tokens, 4, seed=1)
    v = graphs.per_rank(mesh, key_batch, 2, key_tokens, width, seed=2)
    graph = graph_of(q[0], k[0], v[0], 2)
    assert graphs.rewrite(ulysses.run, graph, mesh) == 1
    assert events(graph) == [*(f"exchange {n}" for n in heads), "attention", "exchange 2"]
    expected = graphs.attended(mesh, "cp", q, k, v, is_causal=False)
    graphs.assert_same(graphs.run_ranks(graph, mesh, q, k, v), expected, exact=False)


@pytest.mark.parametrize(("size", "heads", "kv_heads"), [(2, 8, 8), (2, 16, 4), (4, 16, 8)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("width", [4, 3])
@pytest.mark.parametrize(("groups", "values_first"), [(1, True), (2, False), (2, True)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_more_exchanges(
    size: int, heads: int, kv_heads: int, batch: int, width: int, groups: int, values_first: bool, is_causal: bool
) -> None:
    mesh = Mesh(cp=size)
    q = graphs.per_rank(mesh, batch, heads, 3, 4)
    k = graphs.per_rank(mesh, batch, kv_heads, 3, 4, seed=1)
    v = graphs.per_rank(mesh, batch, kv_heads, 3, width, seed=2)
    graph = graph_of(q[0], k[0], v[0], size, is_causal)
    assert exchanged(graph, mesh, Exchange("ulysses", groups, values_first)) == 1
    assert set(graphs.collectives(graph)) == {("all_to_all", 0, 0, "cp", size)}
    expected = graphs.attended(mesh, "cp", q, k, v, is_causal)
    graphs.assert_same(graphs.run_ranks(graph, mesh, q, k, v), expected, exact=False)


def test_four_groups_of_one_head() -> None:
    mesh = Mesh(cp=2)
    q, k, v = (graphs.per_rank(mesh, 1, 8, 3, 4, seed=seed) for seed in range(3))
    graph = graph_of(q[0], k[0], v[0], 2)
    exchanged(graph, mesh, Exchange("ulysses", 4))
    assert events(graph) == ["exchange 3"] * 4 + ["attention", "exchange 1"] * 4
    expected = graphs.attended(mesh, "cp", q, k, v, is_causal=False)
    graphs.assert_same(graphs.run_ranks(graph, mesh, q, k, v), expected, exact=False)


@pytest.mark.parametrize("width", [4, 3])
def test_all_exchanges_there_come_first(width: int) -> None:
    """Of 8 heads and 4 key/value heads on 2 ranks, in 2 groups: 2 + 1 + 1 heads each; values of 3 apart."""
    mesh = Mesh(cp=2)
    q, k, v = torch.ones(1, 8, 3, 4), torch.ones(1, 4, 3, 4), torch.ones(1, 4, 3, width)
    graph = graph_of(q, k, v, 2)
    exchanged(graph, mesh, Exchange("ulysses", 2))
    there = ["exchange 4"] if width == 4 else ["exchange 3", "exchange 1"]
    assert events(graph) == [*there, *there, "attention", "exchange 2", "attention", "exchange 2"]
    first = next(n for n in graph.graph.nodes if is_collective(n))
    copies = [n for n in graph.graph.nodes if n.target in (torch.ops.aten.cat.default, torch.ops.aten.clone.default)]
    assert [n < first for n in copies] == [True] * len(there) + [False], "all groups are packed at once, and unpacked"


@pytest.mark.parametrize("groups", [1, 2])
def test_values_are_exchanged_as_soon_as_they_are_there(groups: int) -> None:
    mesh = Mesh(cp=2)
    x = graphs.per_rank(mesh, 1, 4, 3, 4)

    def forward(x: Tensor) -> Tensor:
        v = x + 1
        q, k = F.rms_norm(x, [4]) * 2, F.rms_norm(x * 3, [4])
        attended: Tensor = md.context_attention(q, k, v, False, None, False, "ulysses", "cp", 2)
        return attended

    graph = graphs.trace(forward, x[0])
    exchanged(graph, mesh, Exchange("ulysses", groups, values_first=True))
    there = [f"exchange {4 // groups}"] * groups
    back = ["attention", f"exchange {2 // groups}"] * groups
    assert events(graph) == ["exchange 2", *there, *back]
    before = graphs.ops(graph)[: graphs.ops(graph).index("torchtrt_md.all_to_all")]
    assert before == ["aten.add", "aten.view", "aten.permute", "aten.clone"], "nothing of queries and keys"
    q, k = ([F.rms_norm(t * f, [4]) * g for t in x] for f, g in ((1, 2), (3, 1)))
    expected = graphs.attended(mesh, "cp", q, k, [t + 1 for t in x], is_causal=False)
    graphs.assert_same(graphs.run_ranks(graph, mesh, x), expected, exact=False)


def test_in_an_engine_there_is_one_exchange_there_and_one_back() -> None:
    q = torch.ones(1, 8, 3, 4)
    graph = graph_of(q, q, q, 2)
    assert exchanged(graph, Mesh(cp=2), Exchange("ulysses", 2, values_first=True), placement="engine") == 1
    assert events(graph) == ["exchange 12", "attention", "exchange 4"]


def test_other_attentions_than_the_one_that_was_chosen_for() -> None:
    q = torch.ones(1, 8, 3, 4)
    graph = graph_of(q, q, q, 2)
    (node,) = graph.graph.find_nodes(op="call_function", target=md.context_attention.default)
    chosen = {attention_key(node).replace("cp=2", "cp=4"): Exchange("ulysses", 2)}
    run_passes({"it": ulysses.run}, graph, PassContext(Mesh(cp=2), {}, {}, "split", chosen))
    assert events(graph) == ["exchange 12", "attention", "exchange 4"]


class Memory(Interpreter):
    """Runs a graph on real tensors: what collectives and attention were given, and where it lies.

    Attention returns what PyTorch's kernels write: [B, S, h, D], seen as [B, h, S, D].
    """

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.sent: list[Tensor] = []
        self.received: list[Tensor] = []
        self.operands: list[Tensor] = []
        self.attended: list[Tensor] = []

    def run_node(self, n: Node) -> Any:
        if is_collective(n):
            x = self.fetch_args_kwargs_from_env(n)[0][0]
            self.sent.append(x)
            self.received.append(torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x))
            return self.received[-1]
        if n.target is md.attention.default:
            q, k, v, *_ = self.fetch_args_kwargs_from_env(n)[0]
            self.operands += [q, k, v]
            batch, heads, tokens, _ = q.shape
            self.attended.append(torch.zeros(batch, tokens, heads, v.shape[3]).transpose(1, 2))
            return self.attended[-1]
        return super().run_node(n)


def shares(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


HOW = [Exchange("ulysses"), Exchange("ulysses", 2), Exchange("ulysses", 1, True), Exchange("ulysses", 2, True)]


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("width", [4, 3])
def test_nothing_is_copied_between_exchanges_and_attention(how: Exchange, width: int) -> None:
    """For a batch of one: all operands of attention look at what came, and what it returns is sent as it is."""
    q, k, v = torch.randn(1, 8, 3, 4), torch.randn(1, 4, 3, 4), torch.randn(1, 4, 3, width)
    graph = graph_of(q, k, v, 2)
    exchanged(graph, Mesh(cp=2), how)
    memory = Memory(graph)
    memory.run(q, k, v)
    groups = how.head_groups
    there = len(memory.received) - groups
    assert len(memory.operands) == 3 * groups
    for operand in memory.operands:
        assert sum(shares(operand, x) for x in memory.received[:there]) == 1
        assert operand.stride(-1) == 1
    assert all(x.is_contiguous() for x in memory.sent), "no copy is needed to send it"
    for attended, sent in zip(memory.attended, memory.sent[there:], strict=True):
        assert attended.data_ptr() == sent.data_ptr()


def test_a_batch_of_two_is_copied_once_behind_the_exchange() -> None:
    q = torch.randn(2, 4, 3, 4)
    graph = graph_of(q, q, q, 2)
    exchanged(graph, Mesh(cp=2), Exchange("ulysses"))
    memory = Memory(graph)
    memory.run(q, q, q)
    assert all(shares(operand, memory.operands[0]) for operand in memory.operands)
    assert not shares(memory.operands[0], memory.received[0])
    assert shares(memory.attended[0], memory.sent[1])
    assert "aten.reshape" not in graphs.ops(graph), "nothing that may be a copy or not"


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("heads", [4, 8])
def test_what_follows_may_view_the_result_as_it_was_traced(how: Exchange, batch: int, heads: int) -> None:
    mesh = Mesh(cp=2)
    q = graphs.per_rank(mesh, batch, heads, 3, 4)

    def forward(q: Tensor) -> Tensor:
        attended: Tensor = md.context_attention(q, q, q, False, None, False, "ulysses", "cp", 2)
        return attended.view(batch, heads * 3, 4)

    graph = graphs.trace(forward, q[0])
    exchanged(graph, mesh, how)
    expected = [(x.reshape(batch, heads * 3, 4),) for (x,) in graphs.attended(mesh, "cp", q, q, q, is_causal=False)]
    graphs.assert_same(graphs.run_ranks(graph, mesh, q), expected, exact=False)


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
    ("heads", "kv_heads", "groups", "fix"),
    [(12, 12, 4, "divides 6"), (16, 4, 4, "divides 2"), (8, 8, 0, "divides 4"), (6, 6, 2, "divides 3")],
)
def test_groups_that_do_not_divide(heads: int, kv_heads: int, groups: int, fix: str) -> None:
    q, k = torch.randn(1, heads, 2, 4), torch.randn(1, kv_heads, 2, 4)
    message = (
        rf"the {heads // 2} heads and {kv_heads // 2} key/value heads of attention .* cannot be exchanged in {groups}"
    )
    with pytest.raises(ShardingError, match=message) as raised:
        exchanged(graph_of(q, k, k, 2), Mesh(cp=2), Exchange("ulysses", groups))
    assert raised.value.fix == f"use a number of head_groups that {fix}"
    assert raised.value.at.startswith(f"{__file__}:")


def test_another_strategy_is_left() -> None:
    q = torch.randn(1, 2, 2, 4)
    graph = graph_of(q, q, q, 2, strategy="allgather_kv")
    assert graphs.rewrite(ulysses.run, graph, Mesh(cp=2)) == 0
    assert graphs.ops(graph) == ["torchtrt_md.context_attention"]
