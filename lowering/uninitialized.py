"""Uninitialised memory -> zeros.

    before    y = empty_like(x)        after    y = full_like(x, 0)

Models write to every element of such a tensor later.  Until then its values would differ between runs and
ranks, and TensorRT has no such memory.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from torchtrt_md.lowering.passes import PassContext

aten = torch.ops.aten
FILLED = {
    aten.empty.memory_format: aten.full.default,
    aten.empty_like.default: aten.full_like.default,
    aten.new_empty.default: aten.new_full.default,
}
_KEYWORDS = ("dtype", "device")


def run(graph: GraphModule, context: PassContext) -> int:
    count = 0
    for node in graph.graph.nodes:
        if node.target in FILLED:
            node.target = FILLED[node.target]
            node.args = (*node.args, 0)
            # full() takes its dtype from the value where it is not told
            kept = {key: value for key, value in node.kwargs.items() if key in _KEYWORDS}
            node.kwargs = {**kept, "dtype": node.meta["val"].dtype}
            count += 1
    return count
