"""Sequence analysis: what is done about each attention, and what of the IR is refused."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import split_functions as sf
import torch
import torch.nn.functional as F
from split_functions import gather, md, shard
from torch import Tensor

from torchtrt_md.errors import ShardingError
from torchtrt_md.lowering.sharding import Sharded
from torchtrt_md.mesh import Mesh

torch.manual_seed(0)
X, TEXT, LEARNED = torch.randn(2, 8, 8), torch.randn(2, 4, 8), torch.randn(2, 6, 8)
W = torch.randn(8, 8) / 8
Q, K, V = (torch.randn(2, 4, 8, 6) for _ in range(3))
SHORT = torch.randn(2, 4, 4, 6)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, gqa: bool = False
) -> Tensor:
    result: Tensor = md.attention(q, k, v, mask, causal, None, gqa)
    return result


def heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], 2, 4).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def parts(*dims: int | None) -> Callable[..., Any]:
    """A function that splits each of its arguments on a dim, or not."""
    return lambda *xs: [x if d is None else shard(x, d) for x, d in zip(xs, dims, strict=True)]


def refused(forward: Callable[..., object], *tensors: Tensor, message: str) -> None:
    graph = sf.trace(forward, *tensors)
    with pytest.raises(ShardingError, match=message) as caught:
        sf.analyze(graph)
    assert caught.value.fix


# Attention over the split sequence.


@pytest.mark.parametrize("causal", [False, True])
def test_split_queries_and_keys_become_context_attention(causal: bool) -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(shard(q, 2), shard(k, 2), shard(v, 2), causal=causal)

    graph = sf.trace(forward, Q, K, V)
    assert sf.analyze(graph, strategy="allgather_kv") == 1
    assert sf.targets(graph) == ["shard", "shard", "shard", "context_attention"]
    (node,) = sf.returned(graph)
    assert node.args[3:] == (causal, None, False, "allgather_kv", "cp", 2)
    assert node.meta["val"].shape == (2, 4, 4, 6)
    assert node.stack_trace
    assert sf.check_claims(graph, [Q, K, V], [attend(Q, K, V, causal=causal)]) == [Sharded(2, (4,))]


def test_grouped_queries_stay_grouped() -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(shard(q, 2), shard(k, 2), shard(v, 2), gqa=True)

    graph = sf.trace(forward, Q, K[:, :2], V[:, :2])
    assert sf.analyze(graph) == 1
    sf.check_claims(graph, [Q, K[:, :2], V[:, :2]], [attend(Q, K[:, :2], V[:, :2], gqa=True)])


def test_other_keys_than_queries() -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(shard(q, 2), shard(k, 2), shard(v, 2))

    graph = sf.trace(forward, SHORT, K, V)
    assert sf.analyze(graph) == 1
    assert sf.check_claims(graph, [SHORT, K, V], [attend(SHORT, K, V)]) == [Sharded(2, (2,))]


def flux_block(text: Tensor, image: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """A double-stream block, whose streams meet in attention, and a single-stream block over both."""
    q, k, v = (torch.cat([heads(F.linear(text, w)), heads(image @ m)], 2) for m in (w, w.t(), -w))
    joint = merged(attend(q, k, v))
    text_out, image_out = joint.split_with_sizes([text.shape[1], image.shape[1]], 1)
    text, image = text + text_out @ w, image + F.gelu(image_out)
    both = F.layer_norm(torch.cat([text, image], 1), (8,))
    both = both + merged(attend(heads(both @ w), heads(both), heads(both)))
    return both[:, : text.shape[1]], both[:, text.shape[1] :]


def test_text_and_image_tokens_in_one_attention() -> None:
    def forward(text: Tensor, image: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return flux_block(shard(text), shard(image), w)

    graph = sf.trace(forward, TEXT, X, W)
    assert sf.analyze(graph) == 2
    assert sf.targets(graph) == ["shard", "shard", "context_attention", "context_attention"]
    (joint, _) = graph.graph.find_nodes(op="call_function", target=md.context_attention.default)
    assert joint.meta["sharding"] == {"cp": Sharded(2, (2, 4))}
    claims = sf.check_claims(graph, [TEXT, X, W], flux_block(TEXT, X, W))
    assert claims == [Sharded(1, (2,)), Sharded(1, (4,))]


def test_a_batch_in_one_row_and_back() -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x.reshape(-1, 8), w).view(x.shape) + x

    graph = sf.trace(lambda x, w: model(shard(x), w), X, W)
    assert sf.analyze(graph) == 0
    assert sf.check_claims(graph, [X, W], [model(X, W)]) == [Sharded(1, (4,))]
    (product,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    assert product.meta["sharding"] == {"cp": Sharded(0, (4,), outer=2)}


@pytest.mark.parametrize("dim", [0, 1])
def test_batch_or_heads_that_are_split_stay_local(dim: int) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, causal=True)

    q, k, v = (x.repeat(2, 1, 1, 1) for x in (Q, K, V))
    graph = sf.trace(lambda *xs: model(*parts(dim, dim, dim)(*xs)), q, k, v)
    assert sf.analyze(graph) == 0
    assert sf.check_claims(graph, [q, k, v], [model(q, k, v)]) == [Sharded(dim, (2,))]


# Cross attention.


@pytest.mark.parametrize(
    "mask", [None, torch.randn(2, 1, 1, 8), torch.randn(1, 8), torch.randn(1, 8).expand(8, 8), torch.randn(2, 1, 8, 8)]
)
def test_split_queries_over_whole_keys_stay_local(mask: Tensor | None) -> None:
    masks = [] if mask is None else [mask]

    def forward(q: Tensor, k: Tensor, v: Tensor, *masks: Any) -> Tensor:
        return attend(shard(q, 2), k, v, *masks)

    graph = sf.trace(forward, Q, K, V, *masks)
    assert sf.analyze(graph) == 0
    assert sf.check_claims(graph, [Q, K, V, *masks], [attend(Q, K, V, mask)]) == [Sharded(2, (4,))]


def test_a_mask_that_is_split_with_the_queries() -> None:
    mask = torch.randn(8, 8)
    graph = sf.trace(lambda q, k, v, m: attend(shard(q, 2), k, v, shard(m, 0)), Q, K, V, mask)
    assert sf.analyze(graph) == 0
    sf.check_claims(graph, [Q, K, V, mask], [attend(Q, K, V, mask)])


def test_whole_queries_get_the_whole_keys() -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, shard(k, 2), shard(v, 2))

    graph = sf.trace(forward, SHORT, K, V)
    assert sf.analyze(graph) == 2
    assert sf.targets(graph) == ["shard", "shard", "all_gather", "all_gather", "attention"]
    for node in graph.graph.find_nodes(op="call_function", target=md.all_gather.default):
        assert node.args[1:] == (2, "cp", 2)
        assert node.meta["val"].shape == (2, 4, 8, 6)
        assert node.meta["sharding"] == {}
        assert node.stack_trace
    assert sf.check_claims(graph, [SHORT, K, V], [attend(SHORT, K, V)]) == [None]


def test_whole_queries_over_text_and_image_keys() -> None:
    def model(q: Tensor, text: Tensor, image: Tensor, mask: Tensor) -> Tensor:
        keys = torch.cat([heads(text), heads(image)], 2)
        return attend(heads(q), keys, keys)

    mask = torch.randn(1)
    graph = sf.trace(lambda q, t, x, m: model(q, shard(t), shard(x), m), LEARNED, TEXT, X, mask)
    assert sf.analyze(graph) == 1, "keys that are the values too are gathered once"
    assert sf.check_claims(graph, [LEARNED, TEXT, X, mask], [model(LEARNED, TEXT, X, mask)]) == [None]


@pytest.mark.parametrize("mask", [torch.randn(2, 1, 4, 1), torch.randn(4, 8), torch.randn(2, 4, 4, 8)])
def test_whole_queries_with_a_mask_for_the_whole_keys(mask: Tensor) -> None:
    graph = sf.trace(lambda q, k, v, m: attend(q, shard(k, 2), shard(v, 2), m), SHORT, K, V, mask)
    assert sf.analyze(graph) == 2
    sf.check_claims(graph, [SHORT, K, V, mask], [attend(SHORT, K, V, mask)])


# Attention that is refused.


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ((2, 2, None), "queries, keys and values that are split differently"),
        ((2, None, 2), "queries, keys and values that are split differently"),
        ((1, 2, 2), "queries, keys and values that are split differently"),
        ((None, 3, None), "reads across the sharded dim"),
        ((3, 3, 3), "reads across the sharded dim"),
    ],
)
def test_operands_that_do_not_fit(dims: tuple[int | None, ...], message: str) -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = parts(*dims)(q, k, v)
        return attend(q, k, v)

    refused(forward, Q, Q, Q, message=message)


def test_whole_queries_have_keys_in_the_order_of_the_whole() -> None:
    def gathered(q: Tensor, k: Tensor) -> Tensor:
        both = torch.cat([shard(k, 2), shard(k, 2)], 2)
        return attend(q, both, both, causal=True)

    graph = sf.trace(gathered, Q, K)
    assert sf.analyze(graph) == 1
    both = torch.cat([K, K], 2)
    assert sf.check_claims(graph, [Q, K], [attend(Q, both, both, causal=True)]) == [None]
    graph = sf.trace(lambda q, k, v: attend(q, shard(k, 2), v), Q, K, V)
    assert sf.analyze(graph) == 1, "values that are whole are not gathered"
    assert sf.check_claims(graph, [Q, K, V], [attend(Q, K, V)]) == [None]


@pytest.mark.parametrize("size", [(8, 8), (1, 8), (1, 1), (2, 4, 8, 8)])
def test_a_mask_over_a_split_sequence_is_whole(size: tuple[int, ...]) -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return attend(shard(q, 2), shard(k, 2), shard(v, 2), mask)

    mask = torch.randn(size)
    graph = sf.trace(forward, Q, K, V, mask)
    assert sf.analyze(graph) == 1
    assert sf.check_claims(graph, [Q, K, V, mask], [attend(Q, K, V, mask)]) == [Sharded(2, (4,))]


def test_a_mask_that_is_split_is_gathered_for_whole_queries() -> None:
    mask = torch.randn(4, 8)
    graph = sf.trace(lambda q, k, v, m: attend(q, shard(k, 2), shard(v, 2), shard(m)), SHORT, K, V, mask)
    assert sf.analyze(graph) == 3
    assert sf.check_claims(graph, [SHORT, K, V, mask], [attend(SHORT, K, V, mask)]) == [None]


def test_a_mask_that_is_split_by_heads_is_refused() -> None:
    refused(
        lambda q, m: attend(shard(q, 2), shard(q, 2), shard(q, 2), shard(m, 1)),
        *(Q, torch.randn(2, 4, 8, 8)),
        message="is split by batches or heads, unlike its queries",
    )


def test_layouts_that_are_not_of_attention() -> None:
    refused(lambda q: attend(*parts(1, 1, 1)(q, q, q)), Q[0], message=r"not \[batch, heads, sequence, head_dim\]")

    def repeated(x: Tensor) -> Tensor:
        keys = shard(x, 2).repeat_interleave(2, 2)
        return attend(keys, keys, keys)

    refused(repeated, Q, message="merged the sequence with other dims")
    refused(
        lambda q, k: attend(shard(q, 2).repeat_interleave(2, 2), shard(k, 2), shard(k, 2)),
        *(Q, K),
        message="queries of which a view merged",
    )
    refused(
        lambda q, k, v: attend(shard(q, 2), torch.cat([shard(k, 2)] * 2, 2), shard(v, 2)),
        *(Q, Q, torch.randn(2, 4, 16, 6)),
        message="keys and values that are split differently",
    )


# The collective IR.


def test_a_value_is_split_once_and_into_more_than_one() -> None:
    refused(lambda x: shard(shard(x)), X, message="is split over this axis already")
    refused(lambda x: shard(x[:, :1]), X, message="has 1 entries on dim 1, of which each of 2 ranks would get 1")
    graph = sf.trace(lambda x: shard(x, -2), X)
    sf.analyze(graph)
    assert sf.check_claims(graph, [X], [X]) == [Sharded(1, (4,))]


def test_gathering_a_part() -> None:
    graph = sf.trace(lambda x: (gather(shard(x) * 2), gather(shard(x, 2).flatten(0, 1), -1)), X)
    assert sf.analyze(graph) == 0
    assert sf.check_claims(graph, [X], [X * 2, X.flatten(0, 1)]) == [None, None]


def test_gathering_what_is_not_one_part() -> None:
    def joint(text: Tensor, image: Tensor) -> Tensor:
        return gather(torch.cat([shard(text), shard(image)], 1))

    graph = sf.trace(lambda t, x: (joint(t, x), gather(shard(x).flatten(0, 1), 0)), TEXT, X)
    assert sf.analyze(graph) == 0
    assert sf.check_claims(graph, [TEXT, X], [torch.cat([TEXT, X], 1), X.flatten(0, 1)]) == [None, None]
    refused(lambda x: gather(shard(x), 2), X, message="gathers dim 2 of a value that is split on dim 1")
    refused(lambda x: (shard(x), gather(x)), X, message="gathers a replicated value, which every rank has already")


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (md.all_reduce, ("sum",)),
        (md.all_gather, (1,)),
        (md.shard, (1,)),
        (md.reduce_scatter, ("sum", 2)),
        (md.all_to_all, (2, 1)),
        (md.broadcast, (0,)),
    ],
)
def test_other_collectives_along_the_axis(op: Callable[..., Tensor], args: tuple[object, ...]) -> None:
    name = str(op).split(".")[1]
    refused(lambda x: op(shard(x), *args, "cp", 2), X, message=f"is a {name} along the axis 'cp' of a sequence")
    if op is md.all_reduce:
        graph = sf.trace(lambda x: (shard(x), op(x, *args, "cp", 2)), X)
        sf.analyze(graph)
        assert sf.returned(graph)[1].meta["sharding"] == {}
    else:
        refused(lambda x: (shard(x), op(x, *args, "cp", 2)), X, message=f"is a {name} along .* of a replicated value")


@pytest.mark.parametrize(
    ("op", "apart", "across"),
    [
        (md.all_gather, (2,), (1,)),
        (md.reduce_scatter, ("sum", -1), ("sum", 1)),
        (md.all_to_all, (2, 0), (2, 1)),
        (md.shard, (2,), (1,)),
        (md.split_sequence, (2,), (1,)),
        (md.gather_sequence, (0,), (1,)),
        (md.all_reduce, ("sum",), None),
        (md.broadcast, (0,), None),
    ],
)
def test_collectives_along_another_axis(
    op: Callable[..., Tensor], apart: tuple[object, ...], across: tuple[object, ...] | None
) -> None:
    graph = sf.trace(lambda x: op(shard(x), *apart, "tp", 2), X)
    sf.analyze(graph)
    assert sf.returned(graph)[0].meta["sharding"] == {"cp": Sharded(1, (4,))}
    if across:
        on_it = f"is a {str(op).split('.')[1]} along axis 'tp' on the dim that is split"
        refused(lambda x: op(shard(x), *across, "tp", 2), X, message=on_it)


def test_two_axes_on_two_dims() -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(shard(shard(q, 2), 1, "hp"), shard(shard(k, 2), 1, "hp"), shard(shard(v, 2), 1, "hp"))

    graph = sf.trace(forward, Q, K, V)
    assert sf.analyze(graph, Mesh(cp=2, hp=2)) == 1
    assert sf.returned(graph)[0].meta["sharding"] == {"cp": Sharded(2, (4,)), "hp": Sharded(1, (2,))}

    def gathered(q: Tensor, k: Tensor) -> Tensor:
        part = shard(shard(k, 2), 1, "hp")
        return attend(shard(q, 1, "hp"), part, part)

    graph = sf.trace(gathered, SHORT, K)
    assert sf.analyze(graph, Mesh(hp=2, cp=2)) == 1
    (gather_node,) = graph.graph.find_nodes(op="call_function", target=md.all_gather.default)
    assert gather_node.meta["sharding"] == {"hp": Sharded(1, (2,))}


def test_context_attention_that_the_model_calls_itself() -> None:
    refused(
        lambda q, k: md.context_attention(shard(q, 2), k, k, False, None, False, "ulysses", "cp", 2),
        *(Q, K),
        message="wants queries, keys and values that are split on dim 2",
    )


# The whole graph.


def test_every_node_says_what_it_holds() -> None:
    graph = sf.trace(lambda x: torch.ops.aten.sort.default(shard(x))[0], X)
    sf.analyze(graph)
    held = {node.op if node.op != "call_function" else node.name: node.meta["sharding"] for node in graph.graph.nodes}
    part = {"cp": Sharded(1, (4,))}
    assert held == {
        "placeholder": {},
        "shard_default": part,
        "sort": [part, part],
        "getitem": part,
        "getitem_1": part,
        "output": {},
    }


@pytest.mark.parametrize("mesh", [Mesh(cp=1), Mesh(other=2)])
def test_nothing_is_split(mesh: Mesh) -> None:
    graph = sf.trace(lambda x: shard(x).mean(1), X)
    assert sf.analyze(graph, mesh) == 0
    assert all(node.meta["sharding"] == {} for node in graph.graph.nodes)


def test_outputs_are_the_whole_or_one_part() -> None:
    refused(
        lambda t, x: (t, torch.cat([shard(t), shard(x)], 1)),
        *(TEXT, X),
        message=r"output 1 \(cat, of the whole \[2, 12, 8\]\) is split .* on dim 1, which holds 2 concatenated parts",
    )
    refused(lambda x: shard(x).flatten(0, 1), X, message="output 0 .* merged the sequence with the 2 entries before")


def test_what_is_no_op_is_refused_by_name() -> None:
    graph = sf.trace(lambda x: shard(x), X)
    (node,) = sf.returned(graph)
    with graph.graph.inserting_after(node):
        method = graph.graph.call_method("mean", (node,))
    method.meta["val"] = node.meta["val"]
    with pytest.raises(ShardingError, match=r"mean \(mean\) is not known to keep positions apart"):
        sf.analyze(graph)


def test_the_error_names_this_file_and_line() -> None:
    def forward(x: Tensor) -> Tensor:
        x = shard(x)
        return x + x.mean(1, keepdim=True)

    with pytest.raises(ShardingError) as caught:
        sf.analyze(sf.trace(forward, X))
    assert Path(__file__).name in str(caught.value)
    assert "in forward: return x + x.mean(1, keepdim=True)" in str(caught.value)


# A file of its own, as a user's model is.
MODEL = """
import torch

def forward(x, positions):
    x = torch.ops.torchtrt_md.split_sequence(x, 1, "cp", 2)
    hidden = x * 2
    return {expression}
"""


@pytest.mark.parametrize(
    "expression",
    [
        "torch.cat([hidden, positions.expand(2, -1, -1)], 1)",
        "hidden.view(2, -1).cumsum(1)",
        "hidden.mean(1)",
        "torch.nn.functional.conv1d(hidden.mT, positions[:, :, None])",
        "hidden[:, 1:]",
        "hidden.flatten(0, 1)",
    ],
)
def test_the_error_points_at_the_users_line(expression: str, tmp_path: Path) -> None:
    file = tmp_path / "model.py"
    file.write_text(MODEL.format(expression=expression))
    spec = importlib.util.spec_from_file_location("user_model", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ShardingError) as caught:
        sf.analyze(sf.trace(module.forward, X, W))
    assert caught.value.at == f"{file}:7 in forward: return {expression}"
    assert caught.value.at in str(caught.value)
