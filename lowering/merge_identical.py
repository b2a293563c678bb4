"""Identical collectives are done once.

    before    a = all_gather(x, 1, "cp", 4)        after    a = all_gather(x, 1, "cp", 4)
              b = all_gather(x, 1, "cp", 4)                 (every user of b uses a)

Operands are the same also where each was made of the same by the same moves, as keys and values are that two
attentions pack.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchtrt_md.graph.rewrite import substitute
from torchtrt_md.lowering.ops import bound_args, is_collective
from torchtrt_md.lowering.passes import PassContext

aten = torch.ops.aten
_MOVES = {
    aten.cat.default,
    aten.clone.default,
    aten.permute.default,
    aten.reshape.default,
    aten.slice.Tensor,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
}


def run(graph: GraphModule, context: PassContext) -> int:
    first: dict[tuple[object, ...], Node] = {}
    same: dict[Node, Node] = {}  # a move -> the first that makes the same
    count = 0
    for node in list(graph.graph.nodes):
        if node.target in _MOVES:
            same[node] = first.setdefault(_key(node, same), node)
        elif is_collective(node) or node.target is torch.ops.torchtrt_md.shard.default:
            earlier = first.setdefault(_key(node, same), node)
            if earlier is not node:
                substitute(node, earlier)
                count += 1
    return count


def _key(node: Node, same: dict[Node, Node]) -> tuple[object, ...]:
    def of(value: Any) -> object:
        if isinstance(value, (list, tuple)):
            return tuple(of(v) for v in value)
        return same.get(value, value) if isinstance(value, Node) else value

    return (node.target, *(of(value) for value in bound_args(node).values()))
