"""Context attention by gathering keys and values.

    before    y = context_attention(q, k, v, ..., "allgather_kv", axis, P)     # q, k, v hold S/P tokens
    after     kv = all_gather(cat(k, v, 0), 2)                                 # [2B, Hkv, S, D], one collective
              y = attention(q, kv[:B], kv[B:], ...)

Causal attention gets the rows of the mask that this rank's queries have: row i of rank r is r S/P + i.
Sent by each rank, of N tokens and width d = H D in b bytes, with f = Hkv / H: 2 f N d b (P - 1) / P.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.lowering.passes import PassContext
from torchtrt_md.lowering.rewrite import emit, substitute
from torchtrt_md.program import value_of

aten, md = torch.ops.aten, torch.ops.torchtrt_md


def run(graph: GraphModule, context: PassContext) -> int:
    count = 0
    for node in list(graph.graph.find_nodes(op="call_function", target=md.context_attention.default)):
        args = bound_args(node)
        if args["strategy"] == "allgather_kv":
            substitute(node, _expand(node, **args))
            count += 1
    return count


def _expand(
    node: Node,
    q: Node,
    k: Node,
    v: Node,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    strategy: str,
    axis: str,
    size: int,
) -> Node:
    if value_of(k).shape == value_of(v).shape:
        batch = value_of(k).shape[0]
        packed = emit(node, aten.cat.default, [k, v], 0)
        whole = emit(node, md.all_gather.default, packed, 2, axis, size)
        k = emit(node, aten.slice.Tensor, whole, 0, 0, batch)
        v = emit(node, aten.slice.Tensor, whole, 0, batch, 2 * batch)
    else:  # values of another width do not fit one tensor
        k, v = (emit(node, md.all_gather.default, x, 2, axis, size) for x in (k, v))
    mask = _causal_rows(node, q, k, axis, size) if is_causal else None
    return emit(node, md.attention.default, q, k, v, mask, False, scale, enable_gqa)


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
