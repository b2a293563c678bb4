"""Graphs as JSON: what Inductor compiles or PyTorch runs op by op when a bundle is loaded.

    graph_to_json     GraphModule -> bytes; equal graphs give equal bytes
    graph_from_json   bytes -> GraphModule that computes the same bits
    check_bindings    a graph, and the segment that runs it

The form is in :mod:`torchtrt_md.graph.schema`, reading in :mod:`torchtrt_md.graph.reader`, and what a graph may call in
:mod:`torchtrt_md.graph.allowed`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

import torchtrt_md.lowering.ops  # noqa: F401  registers torch.ops.torchtrt_md
from torchtrt_md.errors import BundleError
from torchtrt_md.graph.allowed import NAMESPACES, check_call, check_op, find_op
from torchtrt_md.graph.reader import graph_from_json
from torchtrt_md.graph.schema import (
    GETITEM,
    GRAPH_SCHEMA,
    INTEGERS,
    MAX_CONSTANT_BYTES,
    REBUILD,
    Argument,
    Constant,
    DeviceName,
    GraphFile,
    ListOf,
    NodeEntry,
    NodeName,
    Spec,
    SpecialFloat,
    TensorSpec,
    TorchName,
    TupleOf,
)
from torchtrt_md.graph.source import source_line
from torchtrt_md.lowering.schedule import schedule
from torchtrt_md.program import dtype_name, outputs_of, placeholders, value_of
from torchtrt_md.segment import Collective, Segment

__all__ = ["check_bindings", "graph_from_json", "graph_to_json"]


def graph_to_json(graph: GraphModule) -> bytes:
    """The graph as JSON; equal graphs give equal bytes.

    Args:
        graph: calls of ops of aten, prims and the collective IR, and of ``operator.getitem``, with static shapes.
            Tensors that it holds are written into the file; weights are better placeholders.

    Raises:
        BundleError: an op or argument that no graph of a bundle has, a value of a kind that has no place in the file,
            constants of more than 1 MiB in all, or a graph that could not be read again.
    """
    nodes = [_entry(node) for node in graph.graph.nodes]
    held: dict[str, Tensor] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            held[str(node.target)] = _held(graph, node)
    _check_size(held)
    constants = {target: _constant(tensor) for target, tensor in held.items()}
    data = msgspec.json.encode(GraphFile(GRAPH_SCHEMA, nodes, constants))
    try:
        graph_from_json(data)  # what could not be read is not written
    except BundleError as error:
        raise BundleError(
            f"the graph has no place in a bundle: {error.problem}", fix="report this model", at=error.at
        ) from error
    return data


def check_bindings(graph: GraphModule, segment: Segment, what: str = "the graph") -> None:
    """Refuse a graph that does not take, return and communicate what its segment says, in its order.

    Raises:
        BundleError: naming the binding or collective, and both values that disagree.
    """
    for kind, nodes, bindings in (
        ("takes", placeholders(graph), segment.inputs),
        ("returns", list(outputs_of(graph)), segment.outputs),
    ):
        if len(nodes) != len(bindings):
            raise BundleError(
                f"{what} {kind} {len(nodes)} tensors, and its segment has {len(bindings)}:"
                f" {[b.name for b in bindings]}",
                fix=REBUILD,
            )
        for node, binding in zip(nodes, bindings, strict=True):
            value = node.meta.get("val")
            if not isinstance(value, Tensor):
                raise BundleError(f"{what} {kind} {node.name!r}, whose shape it does not say", fix=REBUILD)
            if (value.dtype, tuple(value.shape)) != (binding.dtype, binding.shape):
                raise BundleError(
                    f"{what} {kind} {node.name!r} as {dtype_name(value.dtype)} {list(value.shape)}, and its segment"
                    f" binds {binding.name!r} ({binding.source}) as {dtype_name(binding.dtype)} {list(binding.shape)}",
                    fix=REBUILD,
                )
    found_in, listed = schedule(graph), list(segment.collectives)
    if found_in != listed:
        at = next(
            (i for i, (a, b) in enumerate(zip(found_in, listed, strict=False)) if a != b),
            min(len(found_in), len(listed)),
        )
        raise BundleError(
            f"collective {at} of {what} is {_collective(found_in, at)}, and of its segment {_collective(listed, at)}",
            fix=REBUILD,
        )


def _collective(collectives: Sequence[Collective], at: int) -> str:
    if at >= len(collectives):
        return "missing"
    c = collectives[at]
    return f"{c.op} of {c.elements} {dtype_name(c.dtype)} over {c.ranks} ranks of axis {c.axis!r}"


def _entry(node: Node) -> NodeEntry:
    at: str = node.meta.get("source_line") or source_line(node)
    try:
        return NodeEntry(
            op=_op(node),
            name=node.name,
            target=_target_name(node),
            args=[_argument(value) for value in node.args],
            kwargs={name: _argument(value) for name, value in node.kwargs.items()},
            value=_spec(node.meta.get("val")),
            source_line=at,
        )
    except BundleError as error:
        raise BundleError(f"node {node.name!r}: {error.problem}", fix=error.fix, at=at) from error


def _op(node: Node) -> Literal["placeholder", "get_attr", "call_function", "output"]:
    if node.op == "placeholder" and node.args:
        raise BundleError("a placeholder with a default", fix="trace the graph with tensors for all inputs")
    match node.op:
        case "placeholder" | "get_attr" | "call_function" | "output" as op:
            return op
    raise BundleError(f"a {node.op} node has no place in a bundle", fix="trace the graph with make_fx")


def _target_name(node: Node) -> str:
    target = node.target
    if node.op != "call_function":
        return str(target)
    if target is operator.getitem:
        return GETITEM
    name = str(target)
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in NAMESPACES:
        raise BundleError(
            f"calls {name}, which is no op of {', '.join(NAMESPACES)}", fix="lower the program before it is bundled"
        )
    if find_op(name) is not target:
        raise BundleError(f"calls {name}, which torch.ops does not have under that name", fix="use an op of torch.ops")
    check_op(target)
    check_call(node, value_of)
    return name


def _argument(value: Any) -> Argument:
    match value:
        case None | bool():
            return value
        case Node():
            return NodeName(value.name)
        case str():
            return str(value)
        case int():
            return _integer(value)
        case float():
            return float(value) if math.isfinite(value) else _special(value)
        case list():
            return ListOf([_argument(item) for item in value])
        case tuple():
            return TupleOf([_argument(item) for item in value])
        case torch.dtype() | torch.layout() | torch.memory_format():
            return TorchName(str(value).removeprefix("torch."))
        case torch.device():
            return DeviceName(str(value))
    raise BundleError(
        f"has the argument {value!r}, a {type(value).__name__}, which has no place in a bundle",
        fix="use tensors, numbers, strings, lists, tuples, dtypes, layouts, memory formats and devices",
    )


def _integer(value: int) -> int:
    if value not in INTEGERS:
        raise BundleError(f"has the argument {value}, which is beyond 64 bits", fix="use a 64-bit integer")
    return int(value)


def _special(value: float) -> SpecialFloat:
    return SpecialFloat("nan" if math.isnan(value) else "inf" if value > 0 else "-inf")


def _spec(value: Any) -> Spec:
    if isinstance(value, (tuple, list)):
        return [None if part is None else _tensor_spec(part) for part in value]
    return None if value is None else _tensor_spec(value)


def _tensor_spec(value: Any) -> TensorSpec:
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        raise BundleError(
            f"its value is a {type(value).__name__}, and a graph in a bundle has dense tensors", fix="leave that op out"
        )
    shape, strides = list(value.shape), list(value.stride())
    if not all(type(extent) is int for extent in (*shape, *strides)):
        raise BundleError(f"its shape {shape} is not static", fix="trace the graph with static shapes")
    return TensorSpec(dtype_name(value.dtype), shape, strides)


def _held(graph: GraphModule, node: Node) -> Tensor:
    value: object = graph
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
        raise BundleError(
            f"node {node.name!r} reads {node.target!r} of the graph, which is no tensor with values but a"
            f" {type(value).__name__}",
            fix="pass it as an input",
            at=source_line(node),
        )
    return value.detach()


def _check_size(held: Mapping[str, Tensor]) -> None:
    total = sum(tensor.nbytes for tensor in held.values())
    if total > MAX_CONSTANT_BYTES:
        largest = max(held, key=lambda target: held[target].nbytes)
        raise BundleError(
            f"the graph holds constants of {total} bytes, the largest of them {largest!r}"
            f" {list(held[largest].shape)} with {held[largest].nbytes}, and at most {MAX_CONSTANT_BYTES} are written"
            " into a graph",
            fix="pass them as weights: make them buffers of the model",
        )


def _constant(tensor: Tensor) -> Constant:
    flat = tensor.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return Constant(dtype_name(tensor.dtype), list(tensor.shape), flat.view(torch.uint8).numpy().tobytes())
