"""Along an axis of one rank nothing is communicated.

    before    y = all_reduce(x, "sum", "tp", 1)        after    y = x

TensorRT does not accept a collective of one rank.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from torchtrt_md.graph.rewrite import substitute
from torchtrt_md.lowering.ops import bound_args, is_collective, is_sequence_mark
from torchtrt_md.lowering.passes import PassContext


def run(graph: GraphModule, context: PassContext) -> int:
    count = 0
    for node in list(graph.graph.nodes):
        if is_collective(node) or is_sequence_mark(node) or node.target is torch.ops.torchtrt_md.shard.default:
            args = bound_args(node)
            if args["size"] == 1:
                substitute(node, args["x"])
                count += 1
    return count
