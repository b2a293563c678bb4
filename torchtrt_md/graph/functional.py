"""Graphs without in-place ops, which is what every pass and converter assumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten
# Ops that only rename a tensor; functionalization refuses some of them.
_RENAMES = {aten.alias.default, aten.detach.default, aten.lift_fresh.default}
# Ops that rename it where the shape stays.  DTensor does this to every weight, and Torch-TensorRT would copy each.
_VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}


def functional(graph: GraphModule, inputs: Sequence[Tensor]) -> GraphModule:
    """The same graph without in-place ops, as far as PyTorch can; ``inputs`` are fake tensors like its placeholders."""
    graph = _without_renames(graph)
    graph.graph.eliminate_dead_code()  # DTensor's shape propagation leaves some on its first run
    graph.recompile()
    if not any(mutates(node) for node in graph.graph.nodes):
        return graph

    def run(*flat: Tensor) -> Any:
        return Interpreter(graph).run(*flat)

    with torch.fx.traceback.preserve_node_meta():
        new = make_fx(
            torch.func.functionalize(run, remove="mutations"), tracing_mode="fake", _allow_non_fake_inputs=True
        )(*inputs)
    return _without_renames(new)


def copied(graph: GraphModule) -> GraphModule:
    """A copy of the nodes; tensors that the graph holds are shared."""
    new = torch.fx.Graph()
    output = new.graph_copy(graph.graph, val_map={})
    new.output(output)
    return GraphModule(graph, new)


def mutates(node: Node) -> bool:
    """Does this node write to one of its operands?"""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _without_renames(graph: GraphModule) -> GraphModule:
    for node in list(graph.graph.nodes):
        if node.target in _RENAMES or (node.target in _VIEWS and _shape(node) == _shape(node.args[0])):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


def _shape(node: Node) -> list[int]:
    return list(node.meta["val"].shape)
