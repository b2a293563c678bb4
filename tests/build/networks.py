"""The TensorRT network of a program, as the builder gets it."""

from __future__ import annotations

from typing import Any

import msgspec
from torch import Tensor, nn
from torch.fx import GraphModule

import torchtrt_md as md
from torchtrt_md.build import builder, converters
from torchtrt_md.build.decompose import bind_weights, decompose
from torchtrt_md.build.program import named_as_the_program
from torchtrt_md.place import place
from torchtrt_md.program import ShardedProgram, Weight, placeholders
from torchtrt_md.segment import Segment


def network(program: ShardedProgram) -> tuple[Any, Segment, Any]:
    """Rank 0's network, its segment, and the interpreter that made it, which keeps the constants alive."""
    program = md.lower(program)
    converters.register()
    (part,) = place(program, "engine", ranks=[0]).parts[0]
    assert part.graph is not None
    held = {
        node.name: program.weights.local(source, program.mesh, 0)
        for node, old in zip(placeholders(part.graph), part.segment.inputs, strict=True)
        for source in program.sources.values()
        if isinstance(source, Weight) and source.name == old.weight
    }
    segment = named_as_the_program(part).segment
    segment = msgspec.structs.replace(segment, inputs=tuple(b for b in segment.inputs if b.weight is None))
    interpreter = builder._convert(bind_weights(decompose(part.graph), held), segment)
    return interpreter.ctx.net, segment, interpreter


def layers_of(net: Any, kind: str) -> list[Any]:
    """The network's layers of one type, by its name, in order."""
    return [layer for layer in (net.get_layer(i) for i in range(net.num_layers)) if layer.type.name == kind]


def lowered(model: nn.Module, *args: Tensor) -> ShardedProgram:
    """On one rank."""
    return md.lower(md.capture(model.eval(), args, mesh=md.Mesh(tp=1)))


def outputs(program: ShardedProgram, graph: GraphModule, x: Tensor) -> list[Tensor]:
    """What a graph with the placeholders of the program's gives of the program's weights, and of its one input."""

    def operand(name: str) -> Tensor:
        source = program.sources[name]
        return program.weights.local(source, program.mesh, 0) if isinstance(source, Weight) else x

    return list(graph(*(operand(node.name) for node in placeholders(program.graphs[0]))))
