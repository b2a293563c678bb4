"""Writing one value where a mask is true -> ``where``.

    before    y = index_put(x, [mask], value)        # mask bool, over x's leading dims; value a scalar tensor
    after     y = where(mask[..., None], value, x)

DTensor writes a vocabulary-parallel embedding so; TensorRT has no scatter by a mask.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from torchtrt_md.graph.rewrite import emit, substitute, view
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.lowering.passes import PassContext
from torchtrt_md.program import value_of

aten = torch.ops.aten


def run(graph: GraphModule, context: PassContext) -> int:
    count = 0
    for node in list(graph.graph.find_nodes(op="call_function", target=aten.index_put.default)):
        args = bound_args(node)
        x, indices, value = args["self"], args["indices"], args["values"]
        if args["accumulate"] or len(indices) != 1 or not isinstance(indices[0], Node):
            continue
        mask = indices[0]
        if value_of(mask).dtype != torch.bool or value_of(value).numel() != 1:
            continue
        missing = value_of(x).dim() - value_of(mask).dim()
        wide = view(node, mask, [*value_of(mask).shape, *[1] * missing])
        substitute(node, emit(node, aten.where.self, wide, value, x))
        count += 1
    return count
