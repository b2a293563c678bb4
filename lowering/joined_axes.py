"""A sequence that is split over several axes is split, and gathered, along one after the other.

    before    y = shard(x, d, "ring+ulysses", R U)           # chunk r U + u of R U
              z = all_gather(x, 0, "ring+ulysses", R U)
    after     y = shard(shard(x, d, "ring", R), d, "ulysses", U)
              z = all_gather(all_gather(x, 0, "ulysses", U), 0, "ring", R)

Sent by each rank for a gather of b bytes of its own: b (U - 1) along the last axis and b U (R - 1) along the first,
as much as in one group of all of them.  Attention over such a sequence is left to :mod:`torchtrt_md.lowering.ulysses`.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from torchtrt_md.graph.rewrite import emit, substitute
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.lowering.passes import PassContext
from torchtrt_md.mesh import axes_of

md = torch.ops.torchtrt_md


def run(graph: GraphModule, context: PassContext) -> int:
    count = 0
    for node in list(graph.graph.nodes):
        if node.target not in (md.shard.default, md.all_gather.default):
            continue
        args = bound_args(node)
        x, dim, axes = args["x"], args["dim"], axes_of(args["axis"])
        if len(axes) > 1:
            for axis in axes if node.target is md.shard.default else reversed(axes):
                x = emit(node, node.target, x, dim, axis, context.mesh.axis_size(axis))
            substitute(node, x)
            count += 1
    return count
