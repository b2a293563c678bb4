"""Operands of ``cat`` that hold nothing are left out.

    before    y = cat([empty, x], d)        # empty of shape [0], whatever the dims of x
    after     y = x

A key/value cache starts as such a tensor.  PyTorch allows it in ``cat`` for history's sake; TensorRT does not.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from torchtrt_md.lowering.passes import PassContext
from torchtrt_md.program import value_of


def run(graph: GraphModule, context: PassContext) -> int:
    count = 0
    for node in list(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)):
        parts = [p for p in node.args[0] if isinstance(p, Node)]
        full = [p for p in parts if value_of(p).numel()]
        # An empty operand may still decide the dtype; then it stays.
        if len(full) == len(parts) or not full or {value_of(p).dtype for p in full} != {value_of(node).dtype}:
            continue
        count += 1
        if len(full) == 1:
            node.replace_all_uses_with(full[0])
            graph.graph.erase_node(node)
        else:
            node.args = (full, *node.args[1:])
    return count
