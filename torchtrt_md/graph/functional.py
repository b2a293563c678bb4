"""Graphs without in-place ops, which is what every pass and converter assumes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from torchtrt_md.graph.private import lazy_module

aten = torch.ops.aten
# Ops that only rename a tensor; functionalization refuses some of them.
_RENAMES = {aten.alias.default, aten.detach.default, aten.lift_fresh.default}
# Ops that rename it where the shape stays.  DTensor does this to every weight, and Torch-TensorRT would copy each.
RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


def functional(graph: GraphModule, inputs: Sequence[Tensor]) -> GraphModule:
    """The same graph without in-place ops, as far as PyTorch can; ``inputs`` are fake tensors like its placeholders."""
    graph = _without_renames(graph)
    eliminate_dead(graph.graph)  # DTensor's shape propagation leaves some on its first run
    for node in graph.graph.nodes:
        _out_of_place(node)
    if not any(mutates(node) for node in graph.graph.nodes):
        graph.recompile()
        return graph

    def run(*flat: Tensor) -> Any:
        return _Lifting(graph).run(*flat)

    with torch.fx.traceback.preserve_node_meta():
        new = make_fx(
            torch.func.functionalize(run, remove="mutations"), tracing_mode="fake", _allow_non_fake_inputs=True
        )(*inputs)
    new = _without_renames(new)
    new.recompile()
    return new


class _Lifting(Interpreter):
    """Constants are values of the graph like all others: functionalization does not know of them by itself."""

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op == "get_attr" and any(user.target is not aten.lift_fresh_copy.default for user in n.users):
            return aten.lift_fresh.default(value)
        return value


def eliminate_dead(graph: Graph) -> None:
    """Remove what nobody uses, and check the graph.

    PyTorch is slow to tell whether an op has side effects, so only nodes without users are asked.
    """
    graph.eliminate_dead_code(is_impure_node=lambda node: bool(node.users) or node.is_impure())


def copied(graph: GraphModule) -> GraphModule:
    """A copy of the nodes; tensors that the graph holds are shared."""
    new = torch.fx.Graph()
    output = new.graph_copy(graph.graph, val_map={})
    new.output(output)
    return lazy_module(graph, new)


def mutates(node: Node) -> bool:
    """Does this node write to one of its operands?"""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _out_of_place(node: Node) -> None:
    """Let an elementwise op that writes to a value of no other use make a new one: PyTorch's RMS norm adds its eps so.

    What is left is for PyTorch's functionalization, which traces the whole graph once more.
    """
    if not mutates(node) or node.kwargs or not isinstance(node.args[0], Node):
        return
    written, schema = node.args[0], node.target._schema  # type: ignore[union-attr]
    packet = getattr(aten, schema.name.removeprefix("aten::").removesuffix("_"), None)
    new = getattr(packet, schema.overload_name or "default", None)
    if new is None or new._schema.is_mutable or torch.Tag.pointwise not in new.tags:
        return
    if not is_fresh(written) or set(written.users) != {node}:
        return
    was = node.meta["val"]
    with was.fake_mode:
        result = new(*map_arg(node.args, lambda n: n.meta["val"]))
    if (result.dtype, result.shape, result.stride()) == (was.dtype, was.shape, was.stride()):
        node.target = new


def is_fresh(node: Node) -> bool:
    """Has this value memory of its own, as its op declares?"""
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or op.namespace != "aten" or op is aten._unsafe_view.default:
        return False
    return not any(returned.alias_info for returned in op._schema.returns)


def base(node: Node) -> Node:
    """The value whose memory this one has, as far as ops declare it; itself where it is no view."""
    while _is_view(node) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _is_view(node: Node) -> bool:
    """Has this value the memory of its first operand, or is it one of several results?"""
    op = node.target
    if not isinstance(op, torch._ops.OpOverload):
        return op is operator.getitem
    first, returns = op._schema.arguments[:1], op._schema.returns[:1]
    aliases = bool(first and returns and first[0].alias_info is not None and returns[0].alias_info is not None)
    return aliases or op is aten._unsafe_view.default


def _without_renames(graph: GraphModule) -> GraphModule:
    for node in list(graph.graph.nodes):
        same_shape = node.target in RESHAPES and _shape(node) == _shape(node.args[0])
        same_dtype = node.target is aten.view.dtype and node.args[1] == node.args[0].meta["val"].dtype
        if node.target in _RENAMES or same_shape or same_dtype:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    return graph


def _shape(node: Node) -> list[int]:
    return list(node.meta["val"].shape)
