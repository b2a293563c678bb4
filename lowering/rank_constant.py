"""Coordinates as constants: the reverse of what ``rank_input`` saves, for whoever runs all ranks on the same inputs.

before    c = placeholder "coordinate_cp"         after, on rank 1 of 2    c = full([1], 1, int32)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import GraphModule

from torchtrt_md.graph.functional import copied
from torchtrt_md.program import Coordinate, ShardedProgram, placeholders, value_of


def with_constants(program: ShardedProgram) -> ShardedProgram:
    """A lowered program in which no rank reads its coordinates: each has a graph of its own that holds them."""
    axes = {name: source.axis for name, source in program.sources.items() if isinstance(source, Coordinate)}
    if not axes:
        return program

    def graph_of(rank: int) -> GraphModule:
        graph = copied(program.graphs[rank])
        first = next(node for node in graph.graph.nodes if node.op != "placeholder")
        for node in placeholders(graph):
            if node.target in axes:
                at = program.mesh.coordinate(rank, axes[node.target])
                device = value_of(node).device
                with graph.graph.inserting_before(first):
                    constant = graph.graph.call_function(
                        torch.ops.aten.full.default, ([1], at), {"dtype": torch.int32, "device": device}
                    )
                constant.meta["val"] = node.meta["val"]
                node.replace_all_uses_with(constant)
                graph.graph.erase_node(node)
        graph.recompile()
        return graph

    return replace(
        program,
        graphs=tuple(map(graph_of, range(program.mesh.size))),
        sources={name: source for name, source in program.sources.items() if name not in axes},
    )
