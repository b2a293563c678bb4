"""The collective schedule: what a rank's graph communicates, in order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from torchtrt_md.lowering.ops import bound_args, is_collective
from torchtrt_md.program import value_of


@dataclass(frozen=True)
class ScheduledCollective:
    """One collective of one rank.

    ``elements`` is the number of elements of the rank's operand, or of keys and values of a ``ring_attention`` that
    is one op; ``bytes_sent`` what a rank sends to others by the ring or pairwise algorithm, the most of any rank.
    """

    op: str
    axis: str
    size: int
    dtype: torch.dtype
    elements: int

    @property
    def bytes_sent(self) -> int:
        operand = self.elements * self.dtype.itemsize
        others = self.size - 1
        return {
            "all_reduce": 2 * operand * others // self.size,
            "all_gather": operand * others,
            "reduce_scatter": operand * others // self.size,
            "all_to_all": operand * others // self.size,
            "scatter": operand * others // self.size,
            "broadcast": operand,
            "reduce": operand,
            "gather": operand,
            "permute_tensor": operand,
            "ring_attention": operand * others,
        }[self.op]


def schedule(graph: GraphModule) -> list[ScheduledCollective]:
    """The collectives of a lowered graph, in the order of execution."""
    found = []
    for node in graph.graph.nodes:
        if is_collective(node):
            args = bound_args(node)
            operand = value_of(args["x"])
            op = str(node.target._schema.name).split("::")[1]
            found.append(ScheduledCollective(op, args["axis"], args["size"], operand.dtype, operand.numel()))
        elif node.target is torch.ops.torchtrt_md.context_attention.default:  # lowered, it is a ring in the engine
            args = bound_args(node)
            k, v = value_of(args["k"]), value_of(args["v"])
            elements = k.numel() + v.numel()
            found.append(ScheduledCollective("ring_attention", args["axis"], args["size"], k.dtype, elements))
    return found
