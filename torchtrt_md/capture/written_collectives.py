"""Collectives that write into a tensor they are given, which no graph without in-place ops can keep.

``torch.distributed.all_reduce(x)`` and its kin do, and so do the in-place and ``out`` forms of functional collectives.
Left in, the first would be lost where nothing reads their result: they return none.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from torchtrt_md.errors import CollectiveError
from torchtrt_md.graph.source import source_line


def refuse_written(graph: GraphModule) -> None:
    """Look through a graph as it was recorded, before dead code is removed.

    Raises:
        CollectiveError: with the user's line.
    """
    for node in graph.graph.nodes:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload):
            continue
        functional = target.namespace == "_c10d_functional" and not target._schema.is_mutable
        if target.namespace in ("c10d", "_c10d_functional") and not functional:
            raise CollectiveError(
                f"the model calls {target}, which {_does(target)}",
                fix="call a functional collective, which returns its result: torch.distributed._functional_collectives"
                " has all_reduce, all_gather_tensor, reduce_scatter_tensor, all_to_all_single and broadcast",
                at=source_line(node),
            )


def _does(target: torch._ops.OpOverload) -> str:
    if target._schema.name in ("c10d::send", "c10d::recv_", "c10d::barrier", "c10d::monitored_barrier_"):
        return "is between single ranks, or moves nothing: a graph of equal ranks has no place for it"
    return "writes its result into a tensor that it is given"
