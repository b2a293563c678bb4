"""Identical collectives are done once.

before    a = all_gather(x, 1, "cp", 4)        after    a = all_gather(x, 1, "cp", 4)
          b = all_gather(x, 1, "cp", 4)                 (every user of b uses a)
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from torchtrt_md.lowering.ops import bound_args, is_collective
from torchtrt_md.lowering.passes import PassContext
from torchtrt_md.lowering.rewrite import substitute


def run(graph: GraphModule, context: PassContext) -> int:
    first: dict[tuple[object, ...], Node] = {}
    count = 0
    for node in list(graph.graph.nodes):
        if not is_collective(node) and node.target is not torch.ops.torchtrt_md.shard.default:
            continue
        key = (node.target, *bound_args(node).values())
        if key in first:
            substitute(node, first[key])
            count += 1
        else:
            first[key] = node
    return count
