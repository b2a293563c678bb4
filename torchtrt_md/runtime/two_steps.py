"""A sum over several ranks in two steps, where ranks store into each other's memory.

    all_reduce(x)  ->  all_gather(reduce_scatter(x))        of x as one row, where it is large and its ranks are many

In one step every rank sends all of its operand to every other, P - 1 times its size; in two steps 2 (P - 1) / P times.
It is how a ring sums, too (Patarasuk and Yuan, 2009), but here each part goes straight to where it is added up.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from torchtrt_md.graph.rewrite import ALONE, emit, substitute, view
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.program import value_of
from torchtrt_md.runtime.push import adds_up, goes_at_once

md = torch.ops.torchtrt_md
_ALIGNED = 16  # bytes; a rank's part begins where a wide load can


def sum_in_two(graph: GraphModule) -> int:
    """Rewrite the graph of a part in place; the number of sums that are two steps now."""
    count = 0
    for node in graph.graph.find_nodes(op="call_function", target=md.all_reduce.default):
        args, x = bound_args(node), value_of(node)
        size = args["size"]
        if not adds_up(args["op"], x) or goes_at_once(x, size) or x.nbytes % (size * _ALIGNED):
            continue
        row = view(node, args["x"], [x.numel()])
        part = emit(node, md.reduce_scatter.default, row, args["op"], 0, args["axis"], size)
        whole = emit(node, md.all_gather.default, part, 0, args["axis"], size)
        whole.meta[ALONE] = True
        # A view, of what is in one piece: a reshape might copy, and so would wait for the gather.
        substitute(node, emit(node, torch.ops.aten.view.default, whole, list(x.shape)))
        count += 1
    if count:
        graph.recompile()
    return count
