"""Context attention by exchanging heads for sequence (DeepSpeed Ulysses, https://arxiv.org/abs/2309.14509).

    before    y = context_attention(q, k, v, ..., "ulysses", axis, P)      # q [B, H, S/P, D], k, v [B, Hkv, S/P, D]
    after     x = cat of q, k, v, each viewed [B, P, heads/P, S/P, D], on the third dim
              x = all_to_all(x, heads -> sequence)                         # [B, (H + 2 Hkv)/P, S, D]
              y = attention(q', k', v', ...)                               # q' [B, H/P, S, D], k', v' [B, Hkv/P, S, D]
              y = all_to_all(y, sequence -> heads)                         # [B, H, S/P, D]

One packed exchange there and one back.  Sent by each rank, of N tokens and width d = H D in b bytes, with
f = Hkv / H: (2 + 2f) (N d b / P) (P - 1) / P.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from torchtrt_md.errors import ShardingError
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.lowering.passes import PassContext
from torchtrt_md.lowering.rewrite import emit, substitute, view
from torchtrt_md.program import value_of
from torchtrt_md.source import source_line

aten, md = torch.ops.aten, torch.ops.torchtrt_md


def run(graph: GraphModule, context: PassContext) -> int:
    count = 0
    for node in list(graph.graph.find_nodes(op="call_function", target=md.context_attention.default)):
        args = bound_args(node)
        if args["strategy"] == "ulysses":
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
    _check_heads(node, q, k, axis, size)
    parts = [q, k, v]
    batch = value_of(q).shape[0]
    if len({(n, s, d) for n, _, s, d in (value_of(x).shape for x in parts)}) == 1:
        by_rank = [view(node, x, [batch, size, value_of(x).shape[1] // size, *value_of(x).shape[2:]]) for x in parts]
        packed = emit(node, aten.cat.default, by_rank, 2)
        flat = view(node, packed, [batch, _heads(packed), *value_of(packed).shape[3:]])
        exchanged = emit(node, md.all_to_all.default, flat, 1, 2, axis, size)
        q, k, v = _slices(node, exchanged, [value_of(x).shape[1] // size for x in parts])
    else:  # values of another width, or keys of another length or batch than queries, do not fit one tensor
        q, k, v = (emit(node, md.all_to_all.default, x, 1, 2, axis, size) for x in parts)
    local = emit(node, md.attention.default, q, k, v, None, is_causal, scale, enable_gqa)
    return emit(node, md.all_to_all.default, local, 2, 1, axis, size)


def _heads(packed: Node) -> int:
    _, ranks, heads, *_ = value_of(packed).shape
    return int(ranks * heads)


def _slices(node: Node, x: Node, heads: list[int]) -> list[Node]:
    slices, start = [], 0
    for count in heads:
        slices.append(emit(node, aten.slice.Tensor, x, 1, start, start + count))
        start += count
    return slices


def _check_heads(node: Node, q: Node, k: Node, axis: str, size: int) -> None:
    for what, x in (("heads", q), ("key/value heads", k)):
        heads = value_of(x).shape[1]
        if heads % size:
            raise ShardingError(
                f"ulysses exchanges heads, and the {heads} {what} of attention {node.name!r} do not divide by the"
                f" {size} ranks of axis {axis!r}: {heads % size} left over",
                fix=f'use strategy="allgather_kv", or an axis whose size divides {heads}',
                at=source_line(node),
            )
