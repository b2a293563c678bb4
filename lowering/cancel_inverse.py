"""A collective right behind its inverse: neither is needed.

    before    y = all_to_all(all_to_all(x, a, b), b, a)        after    y = x
    before    y = shard(all_gather(x, d), d)                   after    y = x
    before    y = all_gather(shard(x, d), d)                   after    y = x

The last holds because ``shard`` cuts replicated values only, which the sequence analysis has checked.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from torchtrt_md.graph.rewrite import substitute
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.lowering.passes import PassContext

md = torch.ops.torchtrt_md


def run(graph: GraphModule, context: PassContext) -> int:
    count = 0
    for node in list(graph.graph.nodes):
        original = _undone(node)
        if original is not None:
            substitute(node, original)
            count += 1
    return count


def _undone(node: Node) -> Node | None:
    """``x`` where node computes x back from something made of x."""
    inverse = {
        md.all_to_all.default: md.all_to_all.default,
        md.shard.default: md.all_gather.default,
        md.all_gather.default: md.shard.default,
    }.get(node.target)  # type: ignore[call-overload]
    if inverse is None:
        return None
    args = bound_args(node)
    inner = args["x"]
    if inner.target is not inverse:
        return None
    inner_args = bound_args(inner)
    if (inner_args["axis"], inner_args["size"]) != (args["axis"], args["size"]):
        return None
    if inverse is md.all_to_all.default:
        undone = (args["split_dim"], args["concat_dim"]) == (inner_args["concat_dim"], inner_args["split_dim"])
    else:
        undone = args["dim"] == inner_args["dim"]
    return inner_args["x"] if undone else None
