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
