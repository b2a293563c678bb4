"""Put the parts of a placed program together again, as one graph that the simulator can run."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, GraphModule, Node

from torchtrt_md.place import PlacedProgram
from torchtrt_md.program import ShardedProgram, outputs_of, placeholders
from torchtrt_md.segment import Part, Wire


def joined(placed: PlacedProgram) -> ShardedProgram:
    """The program whose graphs are the parts in their order, wired by name."""
    program = placed.program
    graphs = {}
    for parts, ranks in placed.distinct():
        graphs[id(program.graphs[ranks[0]])] = _graph(program, program.graphs[ranks[0]], parts)
    return program.with_graphs(graphs)


def _graph(program: ShardedProgram, whole: GraphModule, parts: tuple[Part, ...]) -> GraphModule:
    graph, root = Graph(), {}
    wires: dict[Wire, Node] = {}
    for node in placeholders(whole):
        wire = Wire.of(program.sources[node.name])
        new = graph.placeholder(node.name)
        new.meta = dict(node.meta)
        wires[wire] = new
    for index, part in enumerate(parts):
        env: dict[Any, Node] = {}
        assert part.graph is not None
        for node in part.graph.graph.nodes:
            if node.op == "placeholder":
                env[node] = wires[part.segment.inputs[placeholders(part.graph).index(node)].source]
            elif node.op == "get_attr":
                root[f"p{index}_{node.target}"] = getattr(part.graph, str(node.target))
                env[node] = graph.get_attr(f"p{index}_{node.target}")
            elif node.op == "call_function":
                env[node] = graph.node_copy(node, env.__getitem__)
        for node, binding in zip(outputs_of(part.graph), part.segment.outputs, strict=True):
            assert binding.source not in wires, f"{binding.source} is written twice"
            wires[binding.source] = env[node]
    graph.output(tuple(wires[Wire("output", value.name)] for value in program.outputs))
    module = GraphModule(root, graph)
    module.graph.lint()
    return module
