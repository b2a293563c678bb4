"""The TensorRT network of a program, as the builder gets it."""

from __future__ import annotations

from typing import Any

import torchtrt_md as md
from torchtrt_md.build import builder, converters
from torchtrt_md.build.decompose import bind_weights, decompose
from torchtrt_md.build.engine import Binding
from torchtrt_md.program import ShardedProgram, Weight


def network(program: ShardedProgram) -> tuple[Any, list[Binding], list[Binding], Any]:
    """Rank 0's network, its bindings, and the interpreter that made it, which keeps the constants alive."""
    program = md.lower(program)
    graph = program.graphs[0]
    converters.register()
    inputs, outputs = builder._bindings(program, graph)
    weights = {
        name: program.weights.local(s, program.mesh, 0) for name, s in program.sources.items() if isinstance(s, Weight)
    }
    interpreter = builder._convert(bind_weights(decompose(graph), weights), inputs, outputs)
    return interpreter.ctx.net, inputs, outputs, interpreter


def layers_of(net: Any, kind: str) -> list[Any]:
    """The network's layers of one type, by its name, in order."""
    return [layer for layer in (net.get_layer(i) for i in range(net.num_layers)) if layer.type.name == kind]
