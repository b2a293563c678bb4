"""The last look: nothing is left that the build stage would have to guess at.  Rewrites nothing.

``context_attention`` may stay with the strategy ``ring`` in the engine placement, where the engine communicates.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from torchtrt_md.errors import CollectiveError
from torchtrt_md.graph.source import source_line
from torchtrt_md.lowering.functional_collectives import NAMESPACES
from torchtrt_md.lowering.ops import bound_args, is_collective
from torchtrt_md.lowering.passes import PassContext

md = torch.ops.torchtrt_md
_HIGH_LEVEL = (
    md.shard.default,
    md.split_sequence.default,
    md.gather_sequence.default,
    md.context_attention.default,
)


def run(graph: GraphModule, context: PassContext) -> int:
    for node in graph.graph.nodes:
        if is_collective(node) or _is_ring(node, context):
            args = bound_args(node)
            size = context.mesh.axes.get(args["axis"], "none")
            if size != args["size"]:
                raise CollectiveError(
                    f"{node.target} in node {node.name!r} is over {args['size']} ranks of axis {args['axis']!r},"
                    f" which has {size} in {context.mesh}",
                    fix="capture the model again for this mesh",
                    at=source_line(node),
                )
        elif isinstance(node.target, torch._ops.OpOverload) and (
            node.target.namespace in NAMESPACES or node.target in _HIGH_LEVEL
        ):
            raise CollectiveError(
                f"node {node.name!r} is still {node.target} after lowering",
                fix="report this graph; a pass should have rewritten it",
                at=source_line(node),
            )
    return 0


def _is_ring(node: Node, context: PassContext) -> bool:
    """Is it an attention that the engine does as a ring?"""
    if node.target is not md.context_attention.default:
        return False
    return context.placement == "engine" and bound_args(node)["strategy"] == "ring"
