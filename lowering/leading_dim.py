"""Collectives on other dims -> the same on dim 0, which is where TensorRT's collective layers act.

    before    y = all_gather(x, d)                after    y = all_gather(x, 0), the ranks' part of dim 0 moved to d
    before    y = reduce_scatter(x, op, d)        after    y = reduce_scatter(x with dim d in P parts, moved to 0)
    before    y = all_to_all(x, a, b)             after    x = P parts of dim a, moved to dim 0
                                                           y = all_to_all(x, 0, 0), dim 0 moved to dim b

Where the dims in front are of size 1, what is left of a move is a reshape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchtrt_md.graph.rewrite import emit, permute, substitute, view
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.lowering.passes import PassContext
from torchtrt_md.program import value_of

aten, md = torch.ops.aten, torch.ops.torchtrt_md


def run(graph: GraphModule, context: PassContext) -> int:
    count = 0
    for node in list(graph.graph.nodes):
        if node.target is md.all_gather.default:
            new = _gather(node, bound_args(node))
        elif node.target is md.reduce_scatter.default:
            new = _scatter(node, bound_args(node))
        elif node.target is md.all_to_all.default:
            new = _all_to_all(node, bound_args(node))
        else:
            continue
        if new is not None:
            substitute(node, new)
            count += 1
    return count


def _gather(node: Node, args: dict[str, Any]) -> Node | None:
    x, dim, size = args.pop("x"), args["dim"], args["size"]
    if dim == 0:
        return None
    args["dim"] = 0
    gathered = emit(node, node.target, x, *args.values())  # type: ignore[arg-type]
    by_rank = view(node, gathered, [size, *value_of(x).shape])
    whole = view(node, _move_first_to(node, by_rank, dim), list(value_of(node).shape))
    if value_of(whole).is_contiguous():
        return whole
    # Of one entry on each rank the move alone makes the shape, and what views a gather takes it to be in one piece.
    return emit(node, aten.clone.default, whole, memory_format=torch.contiguous_format)


def _scatter(node: Node, args: dict[str, Any]) -> Node | None:
    x, dim, size = args.pop("x"), args["dim"], args["size"]
    if dim == 0:
        return None
    args["dim"] = 0
    parts = parts_first(node, x, dim, size)
    scattered = emit(node, node.target, parts, *args.values())  # type: ignore[arg-type]
    return view(node, scattered, list(value_of(node).shape))


def _all_to_all(node: Node, args: dict[str, Any]) -> Node | None:
    x, split, concat, axis, size, *sent = args.values()
    if split == concat == 0:
        return None
    parts = parts_first(node, x, split, size)
    exchanged = emit(node, md.all_to_all.default, parts, 0, 0, axis, size, *sent)
    return view(node, _move_first_to(node, exchanged, concat), list(value_of(node).shape))


def parts_first(node: Node, x: Node, dim: int, size: int) -> Node:
    """[..., s, ...] -> [P, ..., s / P, ...]."""
    shape = list(value_of(x).shape)
    parts = view(node, x, [*shape[:dim], size, shape[dim] // size, *shape[dim + 1 :]])
    order = [dim, *(d for d in range(len(shape) + 1) if d != dim)]
    return permute(node, parts, order)


def _move_first_to(node: Node, x: Node, dim: int) -> Node:
    """[P, a, b, ...] -> [a, P, b, ...] for dim 1, and so on."""
    order = list(range(1, value_of(x).dim()))
    order.insert(dim, 0)
    return permute(node, x, order)
