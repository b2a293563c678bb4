"""The strategy of each ``context_attention``: what was chosen for its shapes, or the axis's, or by what is sent.

    before    y = context_attention(q, k, v, ..., "auto", axis, P)
    after     y = context_attention(q, k, v, ..., "ulysses", axis, P)

What ``PassContext.exchanges`` has for an attention's :func:`attention_key` takes precedence over the strategy of
the axis.  ``auto`` is the strategy that sends the fewest bytes among those that are possible.  Sent by each rank, where
q, k, v and the result y of one rank count their bytes:

    ulysses         (q + k + v + y) (P - 1) / P      with as many heads as P divides
    allgather_kv    (k + v) (P - 1)

Over several axes heads are exchanged along all but the first in any case, and the strategy is that of the first, over
which the fewest bytes are to be sent: P is its ranks, and q, k, v and y are what the other exchanges leave.

Of equal ones it is ulysses, where causal attention needs no mask.  A ring sends what allgather_kv does, and never
has all keys and values at once.  It goes in the place of allgather_kv where attention runs in PyTorch (``split``), is
not causal, so that no order has to change, and ``k + v`` is at least ``RING_BYTES``: then a step's attention is long
enough to hide what is sent meanwhile.  With a mask it does not: the kernels that return a log-sum-exp take none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchtrt_md.lowering.layout import exchanged_heads
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.lowering.passes import PassContext
from torchtrt_md.mesh import axes_of
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
            sizes = [context.mesh.axis_size(axis) for axis in axes_of(args["axis"])]
            strategy = _fewest_bytes(node, args, sizes, context.placement)
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


def _fewest_bytes(node: Node, args: dict[str, Any], sizes: Sequence[int], placement: str) -> str:
    first, *others = sizes
    qy = value_of(args["q"]).nbytes + value_of(node).nbytes
    kv = value_of(args["k"]).nbytes + value_of(args["v"]).nbytes
    heads, kv_heads = (value_of(args[name]).shape[1] for name in ("q", "k"))
    for size in reversed(others):
        sent_heads, sent_kv_heads = exchanged_heads(heads, kv_heads, size)
        qy, kv = qy * sent_heads // heads, kv * sent_kv_heads // kv_heads
        heads, kv_heads = sent_heads // size, sent_kv_heads // size
    sent_heads, sent_kv_heads = exchanged_heads(heads, kv_heads, first)
    if qy * sent_heads / heads + kv * sent_kv_heads / kv_heads <= kv * first:
        return "ulysses"
    hidden = kv >= RING_BYTES and not args["is_causal"] and args["mask"] is None
    return "ring" if placement == "split" and hidden else "allgather_kv"
