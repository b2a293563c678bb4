"""A canonical text of a graph, and its digest: equal for graphs that compute the same, whatever nodes are called."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from torchtrt_md.errors import BuildError
from torchtrt_md.program import dtype_name


def graph_digest(graph: GraphModule) -> str:
    """Equal for graphs that compute the same, whatever their nodes are called."""
    return hashlib.sha256(graph_text(graph).encode()).hexdigest()


def graph_text(graph: GraphModule) -> str:
    """The graph in a form in which equal graphs are equal: a line for each node, numbered, with its dtypes and shapes.

    Raises:
        BuildError: an argument of a kind that graphs of aten ops do not have.
    """
    numbers = {node: f"%{index}" for index, node in enumerate(graph.graph.nodes)}
    return "\n".join(_line(graph, node, numbers) for node in numbers)


def _line(graph: GraphModule, node: Node, numbers: Mapping[Node, str]) -> str:
    text = functools.partial(_text, numbers=numbers, at=node)
    what = str(node.target) if node.op == "call_function" else node.op
    if node.op == "placeholder":
        arguments = ""
    elif node.op == "get_attr":
        assert isinstance(node.target, str)
        arguments = _constant(functools.reduce(getattr, node.target.split("."), graph), node)
    else:
        named = [f"{name}={text(value)}" for name, value in sorted(node.kwargs.items())]
        arguments = ", ".join([*map(text, node.args), *named])
    return f"{numbers[node]} = {what}({arguments}) -> {_value(node.meta.get('val'))}"


def _text(argument: Any, numbers: Mapping[Node, str], at: Node) -> str:
    text = functools.partial(_text, numbers=numbers, at=at)
    if isinstance(argument, Node):
        return numbers[argument]
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(map(text, argument))}]"
    if isinstance(argument, slice):
        return f"slice{text((argument.start, argument.stop, argument.step))}"
    if isinstance(argument, torch.device):
        return "device"  # whichever it was traced on, a part runs on the device of its rank
    if argument is None or isinstance(
        argument, (bool, int, float, complex, str, torch.dtype, torch.layout, torch.memory_format)
    ):
        return repr(argument)
    raise BuildError(
        f"node {at.name!r} has an argument of {type(argument).__name__}, which has no canonical form",
        fix="report this model",
    )


def _constant(value: Any, at: Node) -> str:
    if isinstance(value, Tensor):
        return fingerprint(value)
    if isinstance(value, GraphModule):
        return f"{{{graph_text(value)}}}"
    raise BuildError(f"node {at.name!r} reads a {type(value).__name__}, and not a tensor", fix="report this model")


def _value(value: Any) -> str:
    """The dtypes, shapes and strides of what a node gives; strides decide between some decompositions."""
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)}{list(value.shape)}{list(value.stride())}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    return repr(value) if isinstance(value, (bool, int, float)) else "-"


def fingerprint(tensor: Tensor) -> str:
    """The dtype, shape and the sha256 of the bytes of a tensor on any device."""
    with torch.no_grad():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        flat = torch.view_as_real(flat.resolve_conj()).reshape(-1) if flat.is_complex() else flat
        digest = hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()
    return f"{dtype_name(tensor.dtype)}{list(tensor.shape)}{digest}"
