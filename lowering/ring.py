"""Context attention by passing keys and values round (Ring Attention, https://arxiv.org/abs/2310.01889).

    before    y = context_attention(q, k, v, ..., "ring", axis, P)             # q, k, v hold S/P tokens
    after     kv0 = cat(k, v, 0)
              kv1 = permute_tensor(kv0, 1, axis, P)                            # P - 1 times, each before the attention
              out0, lse0 = ring_attention(q, kv0[:B], kv0[B:], coordinate, 0, ..., mask)     # to the block in hand
              kv2 = permute_tensor(kv1, 1, axis, P)
              out1, lse1 = ring_attention(q, kv1[:B], kv1[B:], coordinate, 1, ..., mask)
              ...
              w = softmax(stack(lse0, lse1, ...), 0)                           # [P, B, H, S/P] float32
              y = out0 w[0] + out1 w[1] + ...                                  # in float32, then in q's dtype

A block is sent on before it is attended to, so a runtime that starts collectives in the order of the graph has the
next one under way meanwhile.  The weight of a part of the keys is its exp(lse) over the sum of all: the softmax of
the log-sum-exps, which is safe for those of -inf, since not all blocks are empty.  All parts are merged at once and
behind the last attention: nothing stands between the attentions, and each is read once.  Until then the P parts of
the output are kept, in q's dtype: as much as one tensor of the whole sequence.

Causal attention is in zigzag order (:mod:`torchtrt_md.lowering.zigzag`), and its coordinate an input of the graph.  So
it is where there is a mask, of which each rank takes the rows of its queries and in each step the columns of the block;
and where P does not divide the sequence, so that the keys behind its end are left out of the block that has them.
Sent by each rank, of N tokens and width d = H D in b bytes, with f = Hkv / H: 2 f N d b (P - 1) / P.

In the engine placement the node stays: TensorRT's attention layer is itself a ring over the ranks of its axis.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from torchtrt_md.errors import ShardingError
from torchtrt_md.graph.rewrite import cast, emit, substitute
from torchtrt_md.graph.source import source_line
from torchtrt_md.lowering.layout import slices
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.lowering.passes import PassContext
from torchtrt_md.lowering.rank_input import coordinate_input
from torchtrt_md.program import value_of

aten, md = torch.ops.aten, torch.ops.torchtrt_md


def run(graph: GraphModule, context: PassContext) -> int:
    """Number of attentions that became rings.

    Raises:
        ShardingError: by a ring in the engine, causal attention, a mask, or a sequence that the ranks do not divide.
    """
    count = 0
    for node in list(graph.graph.find_nodes(op="call_function", target=md.context_attention.default)):
        args = bound_args(node)
        if args["strategy"] != "ring":
            continue
        if context.placement == "split":
            substitute(node, _expand(graph, node, context.sent, **args))
            count += 1
        elif args["mask"] is not None or args["lengths"]:
            what = "a mask" if args["mask"] is not None else "a sequence that its ranks do not divide"
            raise ShardingError(
                f"attention {node.name!r} has {what}, and a ring in the engine takes none",
                fix='use placement="split", or strategy="ulysses" or "allgather_kv"',
                at=source_line(node),
            )
        elif args["is_causal"]:
            raise ShardingError(
                f"attention {node.name!r} is causal, and what a causal ring in the engine attends to is not documented",
                fix='use placement="split", or strategy="ulysses"',
                at=source_line(node),
            )
    return count


def _expand(
    graph: GraphModule,
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
    if mask is not None and value_of(mask).shape[2] > 1:
        mask = emit(node, md.shard.default, mask, 2, axis, size)
    by_rank = is_causal or bool(lengths) or (mask is not None and value_of(mask).shape[3] > 1)
    coordinate = coordinate_input(graph, axis, q) if by_rank else None
    packed, batch = value_of(k).shape == value_of(v).shape, value_of(k).shape[0]
    blocks = [emit(node, aten.cat.default, [k, v], 0)] if packed else [k, v]  # other widths do not fit one tensor
    parts = []
    for step in range(size):
        k, v = slices(node, blocks[0], 0, [batch, batch]) if packed else blocks
        if step < size - 1:
            blocks = [emit(node, md.permute_tensor.default, x, 1, axis, size, *sent) for x in blocks]
        args = (q, k, v, coordinate, step, is_causal, scale, enable_gqa, size, mask, lengths)
        part = emit(node, md.ring_attention.default, *args)
        parts.append((_result(node, part, 0), _result(node, part, 1)))
    return _merged(node, parts, some_see_nothing=mask is not None)


def _result(before: Node, part: Node, index: int) -> Node:
    """The output or the log-sum-exp."""
    with before.graph.inserting_before(before):
        result = before.graph.call_function(operator.getitem, (part, index))
    result.meta = {**part.meta, "val": part.meta["val"][index]}
    return result


def _merged(node: Node, parts: list[tuple[Node, Node]], some_see_nothing: bool) -> Node:
    """The attention over all blocks, from outputs [B, H, S, D] and log-sum-exps [B, H, S] of each.

    The product of an output in 16 bits and a float32 weight is float32.
    """
    lses = emit(node, aten.stack.default, [lse for _, lse in parts])
    if some_see_nothing:  # their outputs are zeros, whatever they are weighed by; all -inf would be NaN
        lses = emit(node, aten.clamp.default, lses, torch.finfo(value_of(lses).dtype).min)
    weights = emit(node, aten.unsqueeze.default, emit(node, aten._softmax.default, lses, 0, False), -1)
    terms = [
        emit(node, aten.mul.Tensor, out, emit(node, aten.select.int, weights, 0, step))
        for step, (out, _) in enumerate(parts)
    ]
    total = terms[0]
    for term in terms[1:]:
        total = emit(node, aten.add.Tensor, total, term)
    return cast(node, total, value_of(node).dtype)
