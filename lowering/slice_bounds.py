"""Ends of slices beyond the end of the dim -> the end of the dim.

    before    y = slice_scatter(x, v, 1, 0, 9223372036854775807)        after    y = slice_scatter(x, v, 1, 0, 16)

PyTorch writes an open end so; Torch-TensorRT counts up to it.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.lowering.passes import PassContext
from torchtrt_md.program import value_of

aten = torch.ops.aten


def run(graph: GraphModule, context: PassContext) -> int:
    count = 0
    for node in graph.graph.nodes:
        if node.target not in (aten.slice.Tensor, aten.slice_scatter.default):
            continue
        args = bound_args(node)
        size = value_of(args["self"]).shape[args["dim"]]
        if args["end"] is not None and args["end"] > size:
            node.args, node.kwargs = tuple({**args, "end": size}.values()), {}
            count += 1
    return count
