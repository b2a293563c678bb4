"""``shard`` -> a row of the value, by an input that holds this rank's coordinate.

    before    y = shard(x, d, "cp", 4)        after    c = placeholder "coordinate_cp"         # int32 [1]
                                                       y = index_select(view(x, [..., 4, s / 4, ...]), d, c)

So the graph, and the engine made from it, is the same on every rank.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from torchtrt_md.graph.rewrite import emit, substitute, view
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.lowering.passes import PassContext
from torchtrt_md.program import placeholders, value_of

PREFIX = "coordinate_"


def run(graph: GraphModule, context: PassContext) -> int:
    shards = list(graph.graph.find_nodes(op="call_function", target=torch.ops.torchtrt_md.shard.default))
    for node in shards:
        args = bound_args(node)
        x, dim, size = args["x"], args["dim"], args["size"]
        shape = list(value_of(x).shape)
        coordinate = coordinate_input(graph, args["axis"], x)
        parts = view(node, x, [*shape[:dim], size, shape[dim] // size, *shape[dim + 1 :]])
        mine = emit(node, torch.ops.aten.index_select.default, parts, dim, coordinate)
        substitute(node, view(node, mine, list(value_of(node).shape)))
    return len(shards)


def coordinate_input(graph: GraphModule, axis: str, like: Node) -> Node:
    """The placeholder of this rank's coordinate along the axis, made where there is none; on the device of ``like``."""
    existing = placeholders(graph)
    for node in existing:
        if node.target == PREFIX + axis:
            return node
    with graph.graph.inserting_after(existing[-1]):
        node = graph.graph.placeholder(PREFIX + axis)
    fake = value_of(like)
    with fake.fake_mode:  # type: ignore[attr-defined]
        node.meta["val"] = torch.empty(1, dtype=torch.int32, device=fake.device)
    return node
