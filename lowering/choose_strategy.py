"""The strategy of each ``context_attention``: what was chosen for its shapes, or the axis's, or by what is sent.

    before    y = context_attention(q, k, v, ..., "auto", axis, P)
    after     y = context_attention(q, k, v, ..., "ulysses", axis, P)

What ``PassContext.exchanges`` has for an attention's :func:`attention_key` goes before the axis's strategy.  ``auto``
is the strategy that sends the fewest bytes among those that are possible.  Sent by each rank, where q, k, v and the
result y of one rank count their bytes:

    ulysses         (q + k + v + y) (P - 1) / P      with as many heads as P divides
    allgather_kv    (k + v) (P - 1)

Of equal ones it is ulysses, where causal attention needs no mask.  A ring sends what allgather_kv does, and never
has all keys and values at once.  It goes in the place of allgather_kv where attention runs in PyTorch (``split``), is
not causal, so that no order has to change, and ``k + v`` is at least ``RING_BYTES``: then a step's attention is long
enough to hide what is sent meanwhile.  With a mask it does not: the kernels that return a log-sum-exp take none.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchtrt_md.lowering.layout import kv_repeats
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.lowering.passes import PassContext
from torchtrt_md.program import dtype_name, value_of

md = torch.ops.torchtrt_md

RING_BYTES = 16 * 2**20


def run(graph: GraphModule, context: PassContext) -> int:
    count = 0
    for node in graph.graph.find_nodes(op="call_function", target=md.context_attention.default):
        args = bound_args(node)
        chosen = context.exchanges.get(attention_key(node))
        strategy = chosen.strategy if chosen else args["strategy"]
        if strategy == "auto":
            strategy = _fewest_bytes(node, args, context.placement)
        if strategy != args["strategy"]:
            node.args = tuple({**args, "strategy": strategy}.values())
            node.kwargs = {}
            count += 1
    return count


def attention_key(node: Node) -> str:
    """What tells one ``context_attention`` from another to whom the choice of an exchange matters.

    ``"q[1,24,1152,128] k[1,24,1152,128] v[1,24,1152,128] bfloat16 causal=False cp=4"``: the shapes of one rank's
    part, the dtype, and the size of the axis; then the shape and dtype of a mask, and lengths that P does not divide.
    """
    args = bound_args(node)
    shapes = (f"{name}[{','.join(map(str, value_of(args[name]).shape))}]" for name in ("q", "k", "v"))
    dtype = dtype_name(value_of(args["q"]).dtype)
    key = f"{' '.join(shapes)} {dtype} causal={args['is_causal']} {args['axis']}={args['size']}"
    if args["mask"] is not None:
        mask = value_of(args["mask"])
        key += f" mask[{','.join(map(str, mask.shape))}] {dtype_name(mask.dtype)}"
    return key + (f" lengths={','.join(map(str, args['lengths']))}" if args["lengths"] else "")


def _fewest_bytes(node: Node, args: dict[str, Any], placement: str) -> str:
    size = args["size"]
    q, k, v, y = (value_of(x).nbytes for x in (args["q"], args["k"], args["v"], node))
    heads, kv_heads = (value_of(args[name]).shape[1] for name in ("q", "k"))
    repeats = kv_repeats(heads, kv_heads, size)
    sent_kv_heads = size * math.ceil(repeats * kv_heads / size)
    sent_heads = heads // (repeats * kv_heads) * sent_kv_heads
    if (q + y) * sent_heads / heads + (k + v) * sent_kv_heads / kv_heads <= (k + v) * size:
        return "ulysses"
    hidden = k + v >= RING_BYTES and not args["is_causal"] and args["mask"] is None
    return "ring" if placement == "split" and hidden else "allgather_kv"
