"""Results of a Dynamo graph that are views: of an input, or of another result.

Where Dynamo ends a graph within a function, the code behind it may write into such a view, and what it is a view of
must change.  A program's results are memory of their own, so they are not taken for these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from torchtrt_md.capture.dynamo_private import memory_of
from torchtrt_md.program import placeholders


@dataclass(frozen=True)
class View:
    """How a result lies in the memory of an input or of another result.

    Attributes:
        of_input: and not of a result.
        index: of that.
        offset: between their first elements.
    """

    of_input: bool
    index: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, inputs: Sequence[Any], results: Sequence[Any]) -> Tensor:
        """The result of a call."""
        base = (inputs if self.of_input else results)[self.index]
        return torch.as_strided(base, self.size, self.stride, base.storage_offset() + self.offset)


def views(gm: GraphModule, values: Sequence[int]) -> Mapping[int, View]:
    """Index of a result -> what it is a view of, by the example values of Dynamo's graph.

    Args:
        values: indices of the inputs that are tensors, and no weights.
    """
    nodes = placeholders(gm)
    inputs = {nodes[index]: index for index in values if _is_plain(nodes[index].meta.get("example_value"))}
    memories = {memory_of(node.meta["example_value"]) for node in inputs}
    results: dict[int, tuple[int, Tensor]] = {}
    found: dict[int, View] = {}
    (output,) = gm.graph.find_nodes(op="output")
    for index, leaf in enumerate(output.args[0]):
        value = leaf.meta.get("example_value") if isinstance(leaf, torch.fx.Node) else None
        if not _is_plain(value):
            continue
        memory = memory_of(value)
        of_input = memory in memories
        if of_input:
            looked_at = _looked_at(leaf, memory, inputs)
            if looked_at is None:
                continue
            base = inputs[looked_at], looked_at.meta["example_value"]
        else:
            base = results.setdefault(memory, (index, value))
        if base[1] is value and not of_input:
            continue
        if _is_within(value, base[1], of_input):
            offset = int(value.storage_offset() - base[1].storage_offset())
            size, stride = tuple(map(int, value.shape)), tuple(map(int, value.stride()))
            found[index] = View(of_input, base[0], size, stride, offset)
    return found


def _looked_at(leaf: Node, memory: int, inputs: Mapping[Node, int]) -> Node | None:
    """The input that a result looks at, by the ops between the two: several inputs of the example may share memory.

    None where they do not say.
    """
    pending, seen, found = [leaf], {leaf}, set()
    while pending:
        node = pending.pop()
        if node in inputs:
            found.add(node)
            continue
        for operand in node.all_input_nodes:
            leaves = pytree.tree_leaves(operand.meta.get("example_value"))
            if operand not in seen and any(_is_plain(x) and memory_of(x) == memory for x in leaves):
                seen.add(operand)
                pending.append(operand)
    return found.pop() if len(found) == 1 else None


def _is_plain(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and not isinstance(value, DTensor) and value.layout == torch.strided


def _is_within(view: Tensor, base: Tensor, of_input: bool) -> bool:
    """Can it be told by strides alone?  A result is contiguous, whatever the example of it is."""
    kinds = (view.dtype, view.is_conj(), view.is_neg()) == (base.dtype, base.is_conj(), base.is_neg())
    last = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
    first = view.storage_offset() - base.storage_offset()
    return kinds and (of_input or bool(base.is_contiguous() and first >= 0 and first + last < base.numel()))
