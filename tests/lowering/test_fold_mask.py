"""Masks that depend on no input: none, or causal; and those that must be kept."""

from __future__ import annotations

from collections.abc import Callable

import graphs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchtrt_md
from torchtrt_md.lowering import fold_mask
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.mesh import Mesh

MESH = Mesh(cp=2)
md = torch.ops.torchtrt_md
INF, LOWEST = float("-inf"), torch.finfo(torch.float64).min
TOKENS = 5


def attend(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool = False) -> Tensor:
    attended: Tensor = md.attention(q, k, k * 2, mask, is_causal, 0.3, False)
    return attended


def causal() -> Tensor:
    return torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()


def additive(hidden: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.full((TOKENS, TOKENS), hidden, dtype=dtype).triu(1)


FOLDED: dict[str, tuple[Callable[[], Tensor], bool]] = {
    "causal": (causal, True),
    "compared positions": (lambda: torch.arange(TOKENS) <= torch.arange(TOKENS).unsqueeze(1), True),
    "causal for each batch": (lambda: causal()[None, None].expand(2, 1, TOKENS, TOKENS), True),
    "causal for each head": (lambda: causal().expand(2, 3, TOKENS, TOKENS), True),
    "minus infinity": (lambda: additive(INF), True),
    "lowest number": (lambda: additive(LOWEST), True),
    "where": (lambda: torch.where(causal(), 0.0, INF).double(), True),
    "masked_fill": (lambda: torch.zeros(TOKENS, TOKENS).double().masked_fill(~causal(), LOWEST), True),
    "all": (lambda: torch.ones(TOKENS, TOKENS, dtype=torch.bool), False),
    "one for all": (lambda: torch.ones(1, 1, 1, 1, dtype=torch.bool), False),
    "all keys": (lambda: torch.ones(TOKENS, dtype=torch.bool).expand(2, 1, 1, TOKENS), False),
    "zeros": (lambda: torch.zeros(1, TOKENS).double(), False),
    "constant": (lambda: torch.tensor([[True] * TOKENS]), False),
}


@pytest.mark.parametrize("case", FOLDED)
def test_folded(case: str) -> None:
    mask, is_causal = FOLDED[case]

    def forward(q: Tensor, k: Tensor) -> Tensor:
        return attend(q, k, mask())

    qs, ks = graphs.per_rank(MESH, 2, 3, TOKENS, 4), graphs.per_rank(MESH, 2, 3, TOKENS, 4, seed=1)
    graph = graphs.trace(forward, qs[0], ks[0])
    dense = [(F.scaled_dot_product_attention(q, k, k * 2, mask(), scale=0.3),) for q, k in zip(qs, ks, strict=True)]
    assert graphs.check(fold_mask.run, graph, MESH, qs, ks, exact=False) == 1
    assert graphs.ops(graph) == ["aten.mul", "torchtrt_md.attention"], "what made the mask is gone"
    (node,) = (n for n in graph.graph.nodes if n.target is md.attention.default)
    args = bound_args(node)
    assert (args["mask"], args["is_causal"], args["scale"]) == (None, is_causal, 0.3)
    graphs.assert_same(graphs.run_ranks(graph, MESH, qs, ks), dense, exact=False)


def test_one_mask_for_several_attentions() -> None:
    def forward(q: Tensor, k: Tensor) -> Tensor:
        mask = causal()
        return attend(attend(q, k, mask), k, mask)

    qs, ks = graphs.per_rank(MESH, 1, 2, TOKENS, 4), graphs.per_rank(MESH, 1, 2, TOKENS, 4, seed=1)
    graph = graphs.trace(forward, qs[0], ks[0])
    assert graphs.check(fold_mask.run, graph, MESH, qs, ks, exact=False) == 2


def banded() -> Tensor:
    return causal() & torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(-2)


def causal_but_for_one() -> Tensor:
    mask = causal().expand(2, 3, TOKENS, TOKENS).clone()
    return torch.where(torch.arange(2)[:, None, None, None] == 1, True, mask)


def by_distance() -> Tensor:
    rows = torch.arange(TOKENS, dtype=torch.float64)
    return (rows - rows[:, None]) / 8


KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "of the input": lambda q: causal() & (q[0, 0, :, 0] > -100),
    "of the input's sum": lambda q: torch.arange(TOKENS)[None] < q.sum() + 1e6,
    "anti-causal": lambda q: causal().T,
    "sliding window": lambda q: banded(),
    "strictly causal, the first query free": lambda q: (
        causal() & ~torch.eye(TOKENS).bool() | (torch.arange(TOKENS) == 0)
    ),
    "not all hiding": lambda q: additive(-1e4),
    "not hiding in fp64": lambda q: additive(torch.finfo(torch.float32).min),
    "some hide": lambda q: torch.where(torch.eye(TOKENS).bool(), -1.0, additive(INF)),
    "bias": lambda q: by_distance(),
    "causal bias": lambda q: by_distance() + additive(INF),
    "other for one batch": lambda q: causal_but_for_one(),
    "padding": lambda q: torch.arange(TOKENS)[None] < TOKENS - 1,
    "padding for each query": lambda q: (torch.arange(TOKENS) < TOKENS - 1).expand(TOKENS, TOKENS),
}


@pytest.mark.parametrize("case", KEPT)
def test_kept(case: str) -> None:
    def forward(q: Tensor, k: Tensor) -> Tensor:
        return attend(q, k, KEPT[case](q))

    qs, ks = graphs.per_rank(MESH, 2, 3, TOKENS, 4), graphs.per_rank(MESH, 2, 3, TOKENS, 4, seed=1)
    graph = graphs.trace(forward, qs[0], ks[0])
    before = graphs.ops(graph)
    assert graphs.check(fold_mask.run, graph, MESH, qs, ks) == 0
    assert graphs.ops(graph) == before


@pytest.mark.parametrize(("queries", "keys"), [(3, TOKENS), (TOKENS, 3)])
def test_causal_of_other_lengths_is_kept(queries: int, keys: int) -> None:
    """The last query sees all keys, and the flag would count queries from the first key."""

    def forward(q: Tensor, k: Tensor) -> Tensor:
        return attend(q, k, torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries if keys > queries else 0))

    qs, ks = graphs.per_rank(MESH, 1, 2, queries, 4), graphs.per_rank(MESH, 1, 2, keys, 4, seed=1)
    graph = graphs.trace(forward, qs[0], ks[0])
    assert graphs.check(fold_mask.run, graph, MESH, qs, ks) == 0


def test_one_query_sees_all() -> None:
    def forward(q: Tensor, k: Tensor) -> Tensor:
        return attend(q, k, torch.ones(1, TOKENS, dtype=torch.bool))

    qs, ks = graphs.per_rank(MESH, 1, 2, 1, 4), graphs.per_rank(MESH, 1, 2, TOKENS, 4, seed=1)
    graph = graphs.trace(forward, qs[0], ks[0])
    assert graphs.check(fold_mask.run, graph, MESH, qs, ks, exact=False) == 1


def test_a_mask_that_ranks_have_parts_of_is_kept() -> None:
    """It depends on no input, and yet each rank has another: here the keys that the rank attends to."""

    def forward(q: Tensor, k: Tensor) -> Tensor:
        keys = torch.arange(2 * TOKENS)[None] < TOKENS + 2
        return attend(q, k, md.shard(keys, 1, "cp", 2))

    qs, ks = graphs.per_rank(MESH, 1, 2, TOKENS, 4), graphs.per_rank(MESH, 1, 2, TOKENS, 4, seed=1)
    graph = graphs.trace(forward, qs[0], ks[0])
    assert graphs.check(fold_mask.run, graph, MESH, qs, ks) == 0


def test_a_mask_that_is_communicated_is_kept() -> None:
    def forward(q: Tensor, k: Tensor) -> Tensor:
        return attend(q, k, md.all_reduce(torch.zeros(TOKENS, TOKENS).double(), "sum", "cp", 2))

    qs, ks = graphs.per_rank(MESH, 1, 2, TOKENS, 4), graphs.per_rank(MESH, 1, 2, TOKENS, 4, seed=1)
    graph = graphs.trace(forward, qs[0], ks[0])
    assert graphs.check(fold_mask.run, graph, MESH, qs, ks) == 0


def test_a_buffer_is_an_input() -> None:
    qs, ks = graphs.per_rank(MESH, 1, 2, TOKENS, 4), graphs.per_rank(MESH, 1, 2, TOKENS, 4, seed=1)
    graph = graphs.trace(attend, qs[0], ks[0], causal())
    assert graphs.check(fold_mask.run, graph, MESH, qs, ks, causal()) == 0


def test_without_a_mask_nothing_is_done() -> None:
    qs, ks = graphs.per_rank(MESH, 1, 2, TOKENS, 4), graphs.per_rank(MESH, 1, 2, TOKENS, 4, seed=1)
    graph = graphs.trace(lambda q, k: attend(attend(q, k, None), k, None, True), qs[0], ks[0])
    assert graphs.check(fold_mask.run, graph, MESH, qs, ks) == 0


class Windowed(nn.Module):
    """Attention to the last ``window`` tokens, its mask made while it is traced."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        i = torch.arange(x.shape[1])
        mask = (i[:, None] >= i) & (i[:, None] - i < self.window)
        q = x.view(*x.shape[:2], 2, -1).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, mask).transpose(1, 2).flatten(2)


def test_a_window_of_a_ranks_part_is_not_causal() -> None:
    """Of 8 tokens on 2 ranks: a window of 4 hides something, and one of 8 does not."""
    x = torch.randn(1, 8, 8)
    parallel = torchtrt_md.ContextParallel("cp", plan={"": {"x": torchtrt_md.Split(1)}})
    program = torchtrt_md.capture(Windowed(4), (x,), mesh=MESH, parallel=parallel)
    program = torchtrt_md.lower(program)
    assert program.counts["fold_mask"] == 0
    torchtrt_md.verify(program, Windowed(4), (x,))
    program = torchtrt_md.lower(torchtrt_md.capture(Windowed(8), (x,), mesh=MESH, parallel=parallel))
    assert program.counts["fold_mask"] == 1
    torchtrt_md.verify(program, Windowed(8), (x,))
