"""The collective schedule: what a rank's graph communicates, in order."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from torchtrt_md.lowering.ops import bound_args, is_collective, packing_of
from torchtrt_md.program import value_of
from torchtrt_md.segment import Collective

_HOW = ("op", "src", "shift")  # arguments that ranks share; how a rank splits and joins is its own matter


def collective(op: str, axis: str, ranks: int, dtype: torch.dtype, elements: int) -> Collective:
    """A collective of ``elements`` of each rank's operand, with the bytes that a rank sends for it."""
    operand, others = elements * dtype.itemsize, ranks - 1
    sent = {
        "all_reduce": 2 * operand * others // ranks,
        "all_gather": operand * others,
        "reduce_scatter": operand * others // ranks,
        "all_to_all": operand * others // ranks,
        "broadcast": operand,
        "permute_tensor": operand,
        "ring_attention": operand * others,
    }[op]
    return Collective(op, axis, ranks, dtype, elements, sent)


def listed(graph: GraphModule) -> str:
    """What ranks must have in common, a line for each collective: its place in the schedule, and how it reduces."""
    nodes = [node for node in graph.graph.nodes if is_collective(node)]
    how = [{name: value for name, value in bound_args(node).items() if name in _HOW} for node in nodes]
    return "\n".join(map(str, [*schedule(graph), *how]))


def schedule(graph: GraphModule) -> list[Collective]:
    """The collectives of a lowered graph, in the order of execution; what is sent in float8 is bytes."""
    found = []
    for node in graph.graph.nodes:
        if is_collective(node):
            args = bound_args(node)
            operand = value_of(args["x"])
            op = str(node.target._schema.name).split("::")[1]
            dtype, elements = operand.dtype, operand.numel()
            packing = packing_of(node)
            if packing is not None:
                dtype, elements = torch.uint8, packing.parts * packing.bytes
            found.append(collective(op, args["axis"], args["size"], dtype, elements))
        elif node.target is torch.ops.torchtrt_md.context_attention.default:  # lowered, it is a ring in the engine
            args = bound_args(node)
            k, v = value_of(args["k"]), value_of(args["v"])
            elements = k.numel() + v.numel()
            found.append(collective("ring_attention", args["axis"], args["size"], k.dtype, elements))
    return found
