"""Heads repeated by hand become grouped-query attention."""

from __future__ import annotations

from collections.abc import Callable

import graphs
import pytest
import torch
from torch import Tensor

from torchtrt_md.lowering import repeat_kv
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.mesh import Mesh
from torchtrt_md.program import value_of

MESH = Mesh(cp=2)
md = torch.ops.torchtrt_md


def expanded(x: Tensor, n: int) -> Tensor:
    """As transformers does it."""
    batch, heads, tokens, width = x.shape
    return x[:, :, None, :, :].expand(batch, heads, n, tokens, width).reshape(batch, heads * n, tokens, width)


REPEATS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "expand": expanded,
    "repeat_interleave": lambda x, n: x.repeat_interleave(n, 1),
    "repeat_interleave from the last": lambda x, n: x.repeat_interleave(n, -3),
    "unsqueeze from the last": lambda x, n: x.unsqueeze(-3).expand(-1, -1, n, -1, -1).flatten(1, 2),
}


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, enable_gqa: bool = False) -> Tensor:
    attended: Tensor = md.attention(q, k, v, mask, mask is None, 0.3, enable_gqa)
    return attended


def inputs(heads: int = 6, k_heads: int = 2, v_heads: int = 2, batch: int = 2) -> list[list[Tensor]]:
    return [
        graphs.per_rank(MESH, batch, heads, 5, 4),
        graphs.per_rank(MESH, batch, k_heads, 5, 4, seed=1),
        graphs.per_rank(MESH, batch, v_heads, 5, 3, seed=2),
    ]


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("form", REPEATS)
def test_forms(form: str, kv_heads: int) -> None:
    repeat, n = REPEATS[form], 6 // kv_heads
    xs = inputs(k_heads=kv_heads, v_heads=kv_heads)
    graph = graphs.trace(lambda q, k, v: attend(q, repeat(k, n), repeat(v, n)), *(x[0] for x in xs))
    assert graphs.check(repeat_kv.run, graph, MESH, *xs, exact=False) == 1
    assert graphs.ops(graph) == ["torchtrt_md.attention"]
    (node,) = (n for n in graph.graph.nodes if n.op == "call_function")
    args = bound_args(node)
    assert (args["enable_gqa"], args["is_causal"], args["scale"]) == (True, True, 0.3)
    assert [value_of(args[name]).shape[1] for name in ("q", "k", "v")] == [6, kv_heads, kv_heads]


def test_a_mask_for_each_head_is_kept() -> None:
    xs = [*inputs(), graphs.per_rank(MESH, 2, 6, 5, 5, seed=3)]
    graph = graphs.trace(lambda q, k, v, m: attend(q, expanded(k, 3), expanded(v, 3), m), *(x[0] for x in xs))
    assert graphs.check(repeat_kv.run, graph, MESH, *xs, exact=False) == 1


def test_grouped_already_and_repeated() -> None:
    xs = inputs(heads=12)
    graph = graphs.trace(
        lambda q, k, v: attend(q, expanded(k, 3), expanded(v, 3), enable_gqa=True), *(x[0] for x in xs)
    )
    assert graphs.check(repeat_kv.run, graph, MESH, *xs, exact=False) == 1


@pytest.mark.parametrize("heads", [1, 2])
def test_queries_that_are_broadcast_over_repeated_keys_are_not_grouped(heads: int) -> None:
    xs = inputs(heads=1, k_heads=heads, v_heads=heads)
    graph = graphs.trace(lambda q, k, v: attend(q, expanded(k, 2), expanded(v, 2)), *(x[0] for x in xs))
    assert graphs.check(repeat_kv.run, graph, MESH, *xs) == 0


def other_repeats(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """3 times k of 2 heads, twice v of 3."""
    return attend(q, expanded(k, 3), expanded(torch.cat([v, v[:, :1]], 1), 2))


def only_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, expanded(k, 3), torch.cat([v, v, v], 1))


def whole_set_repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Head 0 of q would meet the right one, head 1 another."""
    return attend(q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1))


def whole_set_expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def tile(x: Tensor) -> Tensor:
        return x[:, None].expand(-1, 3, -1, -1, -1).flatten(1, 2)

    return attend(q, tile(k), tile(v))


def whole_set_expanded_as_often_as_it_has_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def tile(x: Tensor) -> Tensor:
        return x[:, None].expand(-1, 2, -1, -1, -1).flatten(1, 2)

    return attend(q[:, :4], tile(k), tile(v))


def sizes_regrouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The repeats are merged with another dim than the heads."""

    def merge(x: Tensor) -> Tensor:
        return x.unsqueeze(2).expand(-1, -1, 3, -1, -1).reshape(x.shape[0], 6, *x.shape[2:]).flip(1)

    return attend(q, merge(k), merge(v))


def tokens_repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def repeat(x: Tensor) -> Tensor:
        return x.unsqueeze(2).expand(-1, -1, 3, -1, -1).flatten(2, 3)

    return attend(q[:, :2], repeat(k), repeat(v))


def batch_expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def expand(x: Tensor) -> Tensor:
        return x[:1].unsqueeze(2).expand(2, 2, 3, *x.shape[2:]).reshape(2, 6, *x.shape[2:])

    return attend(q, expand(k), expand(v))


@pytest.mark.parametrize(
    "forward",
    [
        other_repeats,
        only_keys,
        whole_set_repeated,
        whole_set_expanded,
        whole_set_expanded_as_often_as_it_has_heads,
        sizes_regrouped,
        tokens_repeated,
        batch_expanded,
    ],
)
def test_other_repeats_stay(forward: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    xs = inputs()
    graph = graphs.trace(forward, *(x[0] for x in xs))
    before = graphs.ops(graph)
    assert graphs.check(repeat_kv.run, graph, MESH, *xs) == 0
    assert graphs.ops(graph) == before


def test_repeated_heads_with_other_users_stay_for_them() -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        repeated = expanded(k, 3)
        return [attend(q, repeated, expanded(v, 3)), repeated * 2]

    xs = inputs()
    graph = graphs.trace(forward, *(x[0] for x in xs))
    assert graphs.check(repeat_kv.run, graph, MESH, *xs, exact=False) == 1
    assert "aten.expand" in graphs.ops(graph)
