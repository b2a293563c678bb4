"""Writes of a model's forward that nobody would see: to tensors that its code holds, and into its arguments' lists.

A graph has what a tensor was, and a call makes nothing but results.  Functionalization would let such a write go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from torchtrt_md.errors import CaptureError
from torchtrt_md.graph.functional import base, mutates
from torchtrt_md.graph.source import source_line
from torchtrt_md.lowering.ops import bound_args, is_sequence_mark


def refuse_written_tensors(graph: GraphModule) -> None:
    """Look through a graph as it was recorded.

    Raises:
        CaptureError: an op writes to a tensor that is neither an input nor a weight, with the user's line.
    """
    for node in graph.graph.nodes:
        if not mutates(node) or not node.args or not isinstance(node.args[0], Node):
            continue
        if (held := base(node.args[0])).op == "get_attr":
            shape = list(getattr(graph, str(held.target)).shape)
            raise CaptureError(
                f"the model writes to a tensor {shape} that its code holds, and that is no result ({node.target})",
                fix="pass the tensor in and return the new value; what is made anew in each call, make in forward",
                at=source_line(node),
            )


def refuse_written_marks(graph: GraphModule) -> None:
    """Look through a graph as it was recorded, in which a value that is split or gathered is a copy of what it was.

    In the model the two are one tensor, so a write to one is seen in the other.

    Raises:
        CaptureError: an op writes to one of the two, and the other is read behind it or is the caller's, with the line.
    """
    nodes = list(graph.graph.nodes)
    if not any(map(mutates, nodes)):
        return
    last = {base(operand): at for at, node in enumerate(nodes) for operand in node.all_input_nodes}
    one: dict[Node, list[Node]] = {}  # value -> all that are one tensor with it, by marks so far
    for at, node in enumerate(nodes):
        if is_sequence_mark(node):
            (of,) = node.all_input_nodes
            same = one.setdefault(base(of), [base(of)])
            same.append(node)
            one[node] = same
        for written in _written(node):
            for other in one.get(base(written), []):
                if other is not base(written) and (other.op == "placeholder" or last.get(other, -1) > at):
                    raise CaptureError(
                        f"the model writes in place ({node.target}) to a value that the plan splits or gathers, and"
                        " what it was before that is read again, or is the caller's: on a rank they are two tensors",
                        fix="make a new tensor: x = x + y for x += y, or write to x.clone()",
                        at=source_line(node),
                    )


def _written(node: Node) -> list[Node]:
    """The operands that an op writes to."""
    if not mutates(node):
        return []
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    names = {a.name for a in schema if a.alias_info is not None and a.alias_info.is_write}
    operands = [value for name, value in bound_args(node).items() if name in names]
    return [x for x in pytree.tree_leaves(operands) if isinstance(x, Node)]


def refuse_filled(before: Sequence[Any], arguments: object) -> None:
    """Look at the arguments of a call behind it.

    Args:
        before: their leaves before it.
        arguments: the same nest.

    Raises:
        CaptureError: the model put a tensor into one of them.
    """
    known = {id(leaf) for leaf in before}
    if any(isinstance(leaf, Tensor) and id(leaf) not in known for leaf in pytree.tree_leaves(arguments)):
        raise CaptureError(
            "the model puts a tensor into a list or dict that it is given, and a call of what is compiled would not",
            fix="return the tensor",
        )
