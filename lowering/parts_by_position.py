"""Parts of a sequence that are computed on apart, and joined again -> chosen by position.

    before    y = cat([x[:, :n] * a, x[:, n:]], 1)                       # x [B, S, D], as keys with a history
    after     y = where(arange(S)[:, None] < n, x * a, x)

A rank's part of a split sequence may end on either side of n, and one graph serves all ranks.  What is done to a part
is done to each position by itself, so it can be done to all of them.  On dims but the last, which is the width, and in
programs that split a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from torchtrt_md.graph.rewrite import emit, substitute
from torchtrt_md.lowering.ops import bound_args, is_sequence_mark
from torchtrt_md.lowering.passes import PassContext
from torchtrt_md.program import value_of

aten = torch.ops.aten


class _Part(NamedTuple):
    """``start:stop`` of a value."""

    value: Node
    start: int
    stop: int


def run(graph: GraphModule, context: PassContext) -> int:
    """Number of joins that became choices."""
    if not any(map(is_sequence_mark, graph.graph.nodes)):
        return 0
    parts, count = _Parts(), 0
    for node in graph.graph.find_nodes(op="call_function", target=aten.cat.default):
        args, ndim = bound_args(node), value_of(node).ndim
        dim = args["dim"] % ndim
        if dim == ndim - 1:
            continue
        found = [parts.of(x, dim) for x in args["tensors"]]
        known = [part for part in found if part is not None]
        if len(known) == len(found) and _is_worth_it(args["tensors"], known, dim):
            substitute(node, parts.chosen(node, args["tensors"], known, dim))
            count += 1
    return count


class _Parts:
    """Which values of a graph are parts of others, and what was made of it once for all joins."""

    def __init__(self) -> None:
        self.found: dict[tuple[Node, int], _Part | None] = {}
        self.before: dict[tuple[object, ...], Node] = {}  # which positions are in front of one

    def of(self, node: Node, dim: int) -> _Part | None:
        """What it is a part of, if all that was done to it keeps the positions of ``dim`` apart."""
        for x in _operands_first(node, lambda x: self._candidates(x, dim), lambda x: (x, dim) in self.found):
            self.found[x, dim] = self._part(x, dim)
        return self.found[node, dim]

    def _candidates(self, node: Node, dim: int) -> list[Node]:
        """The operands of a pointwise op that may have the positions of ``dim``; none where it is no such op."""
        if not isinstance(node.target, OpOverload) or torch.Tag.pointwise not in node.target.tags:
            return []
        if torch.Tag.nondeterministic_seeded in node.target.tags or not isinstance(node.meta["val"], Tensor):
            return []
        shape = value_of(node).shape
        if dim >= len(shape):  # it has fewer dims than what it is used beside, and so is no part
            return []
        have = [x for x in node.all_input_nodes if len(value_of(x).shape) >= len(shape) - dim]
        return [x for x in have if shape[dim] == 1 or value_of(x).shape[dim - len(shape)] != 1]

    def _along(self, node: Node, dim: int) -> list[Node]:
        """Those that do.  Of a single position, an operand that is no part is one value for all."""
        ndim, along = value_of(node).ndim, self._candidates(node, dim)
        if value_of(node).shape[dim : dim + 1] == (1,):
            along = [x for x in along if self.found[x, dim] is not None]
        return along if all(value_of(x).ndim == ndim for x in along) else []

    def _part(self, node: Node, dim: int) -> _Part | None:
        if node.target is not aten.slice.Tensor:
            parts = {self.found[x, dim] for x in self._along(node, dim)}
            return parts.pop() if len(parts) == 1 else None
        args = bound_args(node)
        whole: Node = args["self"]
        shape = value_of(whole).shape
        if args["dim"] % len(shape) != dim or args["step"] != 1:
            return None
        start, stop, _ = slice(args["start"], args["end"]).indices(shape[dim])
        return _Part(whole, start, stop)

    def chosen(self, node: Node, tensors: Sequence[Node], parts: Sequence[_Part], dim: int) -> Node:
        """What stands in the place of a join."""
        whole = value_of(parts[0].value)
        result, *rest = [self._done(node, x, dim) for x in reversed(tensors)]
        for made, part in zip(rest, reversed(parts[:-1]), strict=True):
            key = (whole.shape[dim], whole.ndim - dim, whole.device, part.stop)
            if key not in self.before:
                at = emit(node, aten.arange.default, whole.shape[dim], device=whole.device)
                at = emit(node, aten.view.default, at, [-1, *[1] * (whole.ndim - 1 - dim)])
                self.before[key] = emit(node, aten.lt.Scalar, at, part.stop)
            result = emit(node, aten.where.self, self.before[key], made, result)
        return result

    def _done(self, before: Node, node: Node, dim: int) -> Node:
        """What was done to a part, done to all."""
        made: dict[Node, Node] = {}
        for x in _operands_first(node, lambda x: self._along(x, dim), made.__contains__):
            part = self.found[x, dim]
            assert part is not None, f"{x} is no part"
            made[x] = part.value if x.target is aten.slice.Tensor else _again(before, x, made)
        return made[node]


def _operands_first(
    node: Node, operands: Callable[[Node], list[Node]], is_done: Callable[[Node], bool]
) -> Iterator[Node]:
    """What a value is made of and then the value, each once; a long chain of ops is no deep recursion."""
    pending = [node]
    while pending:
        last = pending[-1]
        missing = [x for x in operands(last) if not is_done(x)]
        if missing:
            pending += missing
            continue
        pending.pop()
        if not is_done(last):
            yield last


def _is_worth_it(tensors: Sequence[Node], parts: Sequence[_Part], dim: int) -> bool:
    """Are they all of one value, in order, with something done to some?"""
    ends = [0, *(part.stop for part in parts)]
    in_order = [part.start for part in parts] == ends[:-1] and ends[-1] == value_of(parts[0].value).shape[dim]
    one = len({part.value for part in parts}) == len({value_of(x).dtype for x in tensors}) == 1
    return one and in_order and len(parts) > 1 and any(x.target is not aten.slice.Tensor for x in tensors)


def _again(before: Node, node: Node, made: Mapping[Node, Node]) -> Node:
    """The same op on what was made of its operands."""
    args: Any = map_arg((node.args, node.kwargs), partial(_replaced, made))
    return emit(before, node.target, *args[0], **args[1])  # type: ignore[arg-type]


def _replaced(by: Mapping[Node, Node], x: Node) -> Node:
    return by.get(x, x)
