"""The strategy of each attention over a split sequence."""

from __future__ import annotations

import graphs
import models
import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

import torchtrt_md
from torchtrt_md.lowering import allgather_kv, choose_strategy, lower, ring, ulysses
from torchtrt_md.lowering.choose_strategy import RING_BYTES, attention_key
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.lowering.passes import Exchange, PassContext, run_passes
from torchtrt_md.lowering.schedule import schedule
from torchtrt_md.mesh import Mesh
from torchtrt_md.parallel import Strategy

md = torch.ops.torchtrt_md
PLAN = {"": {"x": torchtrt_md.Split(1)}, "out": torchtrt_md.Gather(1)}


def graph_of(
    heads: int,
    kv_heads: int,
    size: int,
    *,
    strategy: str = "auto",
    is_causal: bool = False,
    tokens: int = 4,
    dtype: torch.dtype = torch.float32,
) -> GraphModule:
    q, kv = (torch.empty(1, n, tokens, 8, dtype=dtype, device="meta") for n in (heads, kv_heads))

    def forward(q: Tensor, kv: Tensor) -> Tensor:
        attended: Tensor = md.context_attention(q, kv, kv, is_causal, None, heads != kv_heads, strategy, "cp", size)
        return attended

    return graphs.trace(forward, q, kv)


def attention_of(graph: GraphModule) -> Node:
    (node,) = graph.graph.find_nodes(op="call_function", target=md.context_attention.default)
    assert isinstance(node, Node)
    return node


def choose(graph: GraphModule, placement: str = "engine", exchanges: dict[str, Exchange] | None = None) -> str:
    size = bound_args(attention_of(graph))["size"]
    context = PassContext(Mesh(cp=size), {}, {}, placement, exchanges or {})
    before = bound_args(attention_of(graph))["strategy"]
    count = run_passes({"it": choose_strategy.run}, graph, context)["it"]
    after = str(bound_args(attention_of(graph))["strategy"])
    assert count == (before != after)
    return after


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "expected"),
    [
        (8, 8, 2, "ulysses"),  # both send the same
        (8, 8, 4, "ulysses"),
        (8, 8, 3, "ulysses"),  # with one more head
        (6, 3, 3, "ulysses"),
        (8, 2, 4, "allgather_kv"),  # with each key/value head twice
        (8, 4, 2, "allgather_kv"),  # 2 + 1 halves against 2
        (16, 8, 8, "ulysses"),
        (32, 8, 4, "allgather_kv"),  # 2.5 quarters against 1/2
        (32, 8, 8, "ulysses"),
    ],
)
@pytest.mark.parametrize("placement", ["engine", "split"])
def test_the_fewest_bytes(placement: str, heads: int, kv_heads: int, size: int, expected: str) -> None:
    assert choose(graph_of(heads, kv_heads, size), placement) == expected


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (16, 8), (32, 8), (64, 8)])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_it_is_what_the_schedules_say(heads: int, kv_heads: int, size: int) -> None:
    """The choice sends no more than the other strategy, by the collectives that each one emits."""
    sent = {}
    for strategy, run in (("ulysses", ulysses.run), ("allgather_kv", allgather_kv.run)):
        graph = graph_of(heads, kv_heads, size, strategy=strategy)
        graphs.rewrite(run, graph, Mesh(cp=size))
        sent[strategy] = sum(c.bytes_sent for c in schedule(graph))
    assert sent[choose(graph_of(heads, kv_heads, size))] == min(sent.values())


def test_a_ring_where_keys_and_values_are_large() -> None:
    tokens = RING_BYTES // (2 * 2 * 8 * 4)  # of 2 heads of width 8 in float32, keys and values
    for count, expected in ((tokens - 1, "allgather_kv"), (tokens, "ring")):
        assert choose(graph_of(8, 2, 4, tokens=count), "split") == expected
        assert choose(graph_of(8, 2, 4, tokens=count), "engine") == "allgather_kv"
        assert choose(graph_of(8, 2, 4, tokens=count, is_causal=True), "split") == "allgather_kv"
        assert choose(graph_of(8, 8, 4, tokens=count), "split") == "ulysses"
    half = graph_of(8, 2, 4, tokens=tokens, dtype=torch.bfloat16)
    assert choose(half, "split") == "allgather_kv", "bytes, not elements"


@pytest.mark.parametrize("strategy", ["ulysses", "allgather_kv", "ring"])
def test_what_was_asked_for_stays(strategy: str) -> None:
    assert choose(graph_of(8, 8, 4, strategy=strategy), "split") == strategy


@pytest.mark.parametrize("strategy", ["ulysses", "auto"])
def test_what_was_chosen_for_these_shapes_goes_first(strategy: str) -> None:
    graph = graph_of(8, 8, 4, strategy=strategy)
    exchanges = {attention_key(attention_of(graph)): Exchange("ring")}
    assert choose(graph, "split", exchanges) == "ring"
    other = graph_of(8, 8, 4, strategy=strategy, tokens=6)
    assert choose(other, "split", exchanges) == "ulysses"


def test_the_key_says_shapes_dtype_order_and_axis() -> None:
    graph = graph_of(8, 2, 4, dtype=torch.bfloat16, is_causal=True)
    key = attention_key(attention_of(graph))
    assert key == "q[1,8,4,8] k[1,2,4,8] v[1,2,4,8] bfloat16 causal=True cp=4"
    choose(graph)
    assert attention_key(attention_of(graph)) == key, "whatever the strategy"


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [("auto", "ulysses"), ("ring", "ring"), ("allgather_kv", "allgather_kv"), ("ulysses", "ulysses")],
)
def test_the_axis_strategy_reaches_the_graph(strategy: Strategy, expected: str) -> None:
    model, args, kwargs = models.attention(heads=4, kv_heads=4)
    parallel = [torchtrt_md.ContextParallel("cp", strategy, PLAN)]
    program = torchtrt_md.capture(model, args, kwargs, mesh=Mesh(cp=4), parallel=parallel)
    assert program.strategies == {"cp": strategy}
    lowered = lower(program, placement="split")
    done = {name: lowered.counts[name] for name in ("ulysses", "allgather_kv", "ring")}
    assert done == {**dict.fromkeys(done, 0), expected: 1}
    assert lowered.counts["choose_strategy"] == (strategy == "auto")


def test_exchanges_reach_the_graph() -> None:
    model, args, kwargs = models.attention()
    parallel = [torchtrt_md.ContextParallel("cp", "ulysses", PLAN)]
    program = torchtrt_md.capture(model, args, kwargs, mesh=Mesh(cp=4), parallel=parallel)
    key = "q[2,4,4,8] k[2,4,4,8] v[2,4,4,8] float32 causal=False cp=4"
    lowered = lower(program, placement="split", exchanges={key: Exchange("ring")})
    assert lowered.counts["ring"] == 1


def test_a_ring_sends_what_a_gather_does() -> None:
    graph = graph_of(8, 2, 4, strategy="ring")
    run_passes({"it": ring.run}, graph, PassContext(Mesh(cp=4), {}, {}, "split"))
    other = graph_of(8, 2, 4, strategy="allgather_kv")
    graphs.rewrite(allgather_kv.run, other, Mesh(cp=4))
    assert sum(c.bytes_sent for c in schedule(graph)) == sum(c.bytes_sent for c in schedule(other))
