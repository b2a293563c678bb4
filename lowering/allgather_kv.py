"""Context attention by gathering keys and values.

    before    y = context_attention(q, k, v, ..., "allgather_kv", axis, P)     # q, k, v hold S/P tokens
    after     x = cat of k, v, each seen as [B, S/P, Hkv, D], on heads
              x = all_gather(x, 0)                                             # [P B, S/P, 2 Hkv, D]
              k', v' = slices of x seen as [B, 2 Hkv, S, D]
              y = attention(q, k', v', ...)

With a batch of one nothing is copied between the gather and attention.  Keys and values of other widths, lengths or
batches do not fit one tensor, and are gathered apart.

Causal attention gets the rows of the mask that this rank's queries have: row i of rank r is r S/P + i.  Of a mask,
each rank takes its rows.  Keys behind the end of the sequence, where P does not divide it, are cut off once they are
gathered.
Sent by each rank, of N tokens and width d = H D in b bytes, with f = Hkv / H: 2 f N d b (P - 1) / P.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from torchtrt_md.graph.rewrite import emit, permute, substitute
from torchtrt_md.lowering.layout import joined, seen_keys, whole_sequence
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.lowering.passes import PassContext
from torchtrt_md.program import value_of

aten, md = torch.ops.aten, torch.ops.torchtrt_md


def run(graph: GraphModule, context: PassContext) -> int:
    count = 0
    for node in list(graph.graph.find_nodes(op="call_function", target=md.context_attention.default)):
        args = bound_args(node)
        if args["strategy"] == "allgather_kv":
            substitute(node, _expand(node, context.sent, **args))
            count += 1
    return count


def _expand(
    node: Node,
    sent: tuple[str, ...],
    q: Node,
    k: Node,
    v: Node,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    strategy: str,
    axis: str,
    size: int,
    mask: Node | None,
    lengths: list[int] | None,
) -> Node:
    if value_of(k).shape == value_of(v).shape:
        k, v = _gathered(node, [k, v], axis, size, *sent)
    else:
        (k,), (v,) = (_gathered(node, [x], axis, size, *sent) for x in (k, v))
    k, v = (seen_keys(node, x, lengths, size) for x in (k, v))
    if is_causal:
        mask = _causal_rows(node, q, k, axis, size)
    elif mask is not None and value_of(mask).shape[2] > 1:
        mask = emit(node, md.shard.default, mask, 2, axis, size)
    return emit(node, md.attention.default, q, k, v, mask, False, scale, enable_gqa)


def _gathered(node: Node, parts: list[Node], axis: str, size: int, *sent: str) -> list[Node]:
    """[B, h, S/P, D] each -> [B, h, S, D] each, by one gather."""
    by_token = [permute(node, x, [0, 2, 1, 3]) for x in parts]
    received = emit(node, md.all_gather.default, joined(node, by_token, 2), 0, axis, size, *sent)
    return whole_sequence(node, received, value_of(received).shape[0] // size, [value_of(x).shape[1] for x in parts])


def _causal_rows(node: Node, q: Node, k: Node, axis: str, size: int) -> Node:
    """This rank's rows of the causal mask, cut from the row numbers of the whole."""
    with node.graph.inserting_before(node):
        rows = node.graph.call_function(aten.arange.default, (value_of(q).shape[2] * size,))
        keys = node.graph.call_function(aten.arange.default, (value_of(k).shape[2],))
    with value_of(q).fake_mode:  # type: ignore[attr-defined]
        for numbers in (rows, keys):
            numbers.kwargs = {"device": value_of(q).device}
            numbers.meta["val"] = aten.arange.default(*numbers.args, **numbers.kwargs)
    mine = emit(node, md.shard.default, rows, 0, axis, size)
    return emit(node, aten.ge.Tensor, emit(node, aten.unsqueeze.default, mine, 1), keys)
