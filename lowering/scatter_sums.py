"""Large sums over ranks -> a scatter and a gather, and what reads each token by itself is done in between.

    before    s = all_reduce(x);  h = r + s;  n = norm(h)                        on every rank, for all tokens
    after     y = all_to_all(x as [P, tokens / P, ...], 0, 0)                    each rank's part of the sum, sent
              s_i = sum(y, 0);  h_i = r_i + s_i;  n_i = norm(h_i)                for a rank's tokens, in one kernel
              n = all_gather(n_i)

A sum adds in float32, in the order of the ranks, in the kernel that does what follows.  The residual r stays split from
one sum to the next, so what is sent is what the sums sent: Megatron's sequence parallelism (Korthikanti et al., 2022,
https://arxiv.org/abs/2205.05198), found in the graph.  It is done for an axis where no more has to be gathered than was
summed, and where there is something to do in between; and to values of which it is known that all ranks of the axis
have the same.  In the split placement only, where ranks store into each other's memory: there a sum is these two steps
anyway, and NCCL takes longer for both than for one (13.0 ms for Llama on 4 H200 where whole sums take 12.5;
benchmarks/results/2026-11-22-llama-scattered-h200-x4.md).
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from torchtrt_md.graph.functional import eliminate_dead
from torchtrt_md.graph.rewrite import ALONE, cast, emit, view
from torchtrt_md.lowering.leading_dim import parts_first
from torchtrt_md.lowering.merge_products import JOINS, SOURCE
from torchtrt_md.lowering.ops import bound_args, is_collective
from torchtrt_md.lowering.passes import PassContext
from torchtrt_md.mesh import axes_of
from torchtrt_md.program import Source, Value, Weight, value_of

aten, md = torch.ops.aten, torch.ops.torchtrt_md
LARGE = 4 << 20  # bytes of a sum: below it, to begin two collectives costs more than the tokens
_FEWEST = 2  # ops for each sum, as an addition and a norm are several
_OF_ROWS = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default)
_MAKE_ALIKE = (md.all_reduce.default, md.all_gather.default, md.broadcast.default)
_NORMS = (aten.native_layer_norm.default, aten._fused_rms_norm.default)
_SUMMED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # not whole numbers, which are exact
_CASTS = (aten._to_copy.default, aten.clone.default)


def run(graph: GraphModule, context: PassContext) -> int:
    if context.placement != "split" or not context.stores:
        return 0
    count = 0
    for axis, size in context.mesh.axes.items():
        rewritten = _Scattered(graph, axis, size).rewritten() if axis in context.alike and size > 1 else 0
        if rewritten:
            eliminate_dead(graph.graph)  # what is not read any more would count along the next axis
        count += rewritten
    return count


def has_sums(graph: GraphModule, alike: Collection[str]) -> bool:
    """Is there a sum that could be scattered?"""
    return any(_large_sums(graph, axis) for axis in alike)


def _large_sums(graph: GraphModule, axis: str) -> list[Node]:
    found = []
    for node in graph.graph.find_nodes(op="call_function", target=md.all_reduce.default):
        args, value = bound_args(node), value_of(node)
        summed = args["axis"] == axis and args["op"] in ("sum", "avg") and value.dtype in _SUMMED
        if summed and value.ndim > 1 and value.nbytes >= LARGE:
            found.append(node)
    return found


class _Scattered:
    """What of a graph is done for a rank's tokens along one axis."""

    def __init__(self, graph: GraphModule, axis: str, size: int) -> None:
        self.graph, self.axis, self.size = graph, axis, size
        sums = [n for n in _large_sums(graph, axis) if _tokens(n)[1] % size == 0]
        # The dim that is split, and its extent: those of most.
        self.dim, self.extent = Counter(map(_tokens, sums)).most_common(1)[0][0] if sums else (0, 0)
        self.sums = {n for n in sums if _tokens(n) == (self.dim, self.extent)}
        self.different = _different(graph, axis) if sums else set()
        self.rows = self._rows()  # the sums, and what is computed of them for each token by itself
        self.read = {n: readers for n in self.rows if (readers := self._readers(n))}
        self.own: dict[tuple[Node, int], Node] = {}  # a value and the dim of its tokens -> this rank's part

    def rewritten(self) -> int:
        """The number of sums that were scattered."""
        gathered = [value_of(n) for n in self.read if _is_tensor(n)]
        alike = len(gathered) == len(self.read) and all(x.is_floating_point() for x in gathered)
        summed = sum(value_of(n).nbytes for n in self.sums)
        worth = len(self.rows) - len(self.sums) >= _FEWEST * len(self.sums)
        if not alike or not worth or sum(x.nbytes for x in gathered) > summed:
            return 0
        for node in [n for n in self.graph.graph.nodes if n in self.rows]:
            part = self.own[node, self.dim] = self._part(node)
            if node in self.read:
                whole = emit(node, md.all_gather.default, part, self.dim, self.axis, self.size)
                whole.meta[ALONE] = True
                for reader in self.read[node]:
                    reader.replace_input_with(node, whole)
        return len(self.sums)

    def _rows(self) -> set[Node]:
        found = set(self.sums)
        for node in self.graph.graph.nodes:
            of = [x for x in node.all_input_nodes if x in found]
            if node not in found and of and self._is_of_rows(node, of):
                found.add(node)
        return found

    def _is_of_rows(self, node: Node, of: Sequence[Node]) -> bool:
        """Is each token's result that of the same token of these operands, and the same on all ranks?"""
        if node in self.different:
            return False
        if node.target is operator.getitem:
            return bool(node.args[1] == 0)
        result = node.meta.get("val")
        made = result[0] if node.target in _NORMS and isinstance(result, (tuple, list)) else result
        if not isinstance(made, Tensor) or not isinstance(node.target, torch._ops.OpOverload):
            return False
        if made.ndim < self.dim + 2 or made.shape[self.dim] != self.extent or math.prod(made.shape[: self.dim]) != 1:
            return False
        # Broadcast, the tokens of an operand of fewer dims would be another dim's.
        if any(not _is_tensor(x) or value_of(x).ndim != made.ndim for x in of):
            return False
        if node.target in _NORMS:
            args = bound_args(node)
            normalized = len(args["normalized_shape"])
            return of == [node.args[0]] and made.ndim - normalized > self.dim
        if node.target in _OF_ROWS:
            args = bound_args(node)
            return list(args["dim"]) in ([-1], [made.ndim - 1]) and args["keepdim"] is True
        tags = node.target.tags
        return torch.Tag.nondeterministic_seeded not in tags and (torch.Tag.pointwise in tags or node.target in _CASTS)

    def _readers(self, node: Node) -> list[Node]:
        """What reads all tokens of a value of rows."""
        used = [user for user in node.users if user.users or user.op == "output"]
        return [user for user in used if user not in self.rows or user in self.sums]

    def _part(self, node: Node) -> Node:
        """A value of rows, for this rank's tokens."""
        if node in self.sums:
            return self._sum(node)
        if node.target is operator.getitem:
            of = self.own[node.all_input_nodes[0], self.dim]
            with self.graph.graph.inserting_before(node):
                part = self.graph.graph.call_function(operator.getitem, (of, node.args[1]))
            part.meta = {**node.meta, "val": of.meta["val"][node.args[1]]}
            return part
        assert isinstance(node.target, torch._ops.OpOverload)
        result = node.meta["val"]
        ndim = (result if isinstance(result, Tensor) else result[0]).ndim
        operands: Any = map_arg((node.args, node.kwargs), lambda x: self._operand(node, x, ndim))
        return emit(node, node.target, *operands[0], **operands[1])

    def _sum(self, node: Node) -> Node:
        """The sum of a rank's tokens, of what all ranks have of them."""
        args, shape = bound_args(node), list(value_of(node).shape)
        parts = parts_first(node, args["x"], self.dim, self.size)
        sent = emit(node, md.all_to_all.default, parts, 0, 0, self.axis, self.size)
        sent.meta[ALONE] = True
        dtype = value_of(node).dtype
        wide = torch.promote_types(dtype, torch.float32)
        # Casts of their own: TensorRT sums in the dtype of what it is given, whatever the sum says.
        total = emit(node, aten.sum.dim_IntList, cast(node, sent, wide), [0])
        if args["op"] == "avg":
            total = emit(node, aten.mul.Tensor, total, 1 / self.size)
        total = cast(node, total, dtype)
        shape[self.dim] //= self.size
        return view(node, total, shape)

    def _operand(self, node: Node, x: Node, ndim: int) -> Node:
        """An operand for this rank's tokens; what is the same for all tokens, as it is."""
        shape = value_of(x).shape if x not in self.rows else None
        there = self.dim if shape is None else self.dim - (ndim - len(shape))
        if shape is not None and (there < 0 or shape[there] != self.extent):
            return x
        if (x, there) not in self.own:
            self.own[x, there] = emit(node, md.shard.default, x, there, self.axis, self.size)
        return self.own[x, there]


def _different(graph: GraphModule, axis: str) -> set[Node]:
    """The values that may be others on each rank of an axis, as far as is known."""
    found: set[Node] = set()
    placeholders = {node.name: node for node in graph.graph.find_nodes(op="placeholder")}
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            joined = [placeholders.get(name) for name in node.meta.get(JOINS, (node.name,))]
            differs = any(part is None or _is_of_a_rank(part.meta.get(SOURCE), axis) for part in joined)
        elif (is_collective(node) or node.target is md.shard.default) and axis in axes_of(bound_args(node)["axis"]):
            differs = node.target not in _MAKE_ALIKE
        else:
            random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
            differs = random or not found.isdisjoint(node.all_input_nodes)
        if differs:
            found.add(node)
    return found


def _is_of_a_rank(source: Source | None, axis: str) -> bool:
    """May what a placeholder stands for be another on each rank of an axis, as a coordinate is?"""
    if not isinstance(source, (Weight, Value)):
        return True
    shardings: Sequence[Any] = source.shardings if isinstance(source, Weight) else source.sharding
    return any(axis in axes_of(sharding.axis) for sharding in shardings)


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _tokens(node: Node) -> tuple[int, int]:
    """The dim of a sum that can be split without a copy, and its extent: behind dims of size 1, before the last."""
    shape = value_of(node).shape
    dim = next((d for d, n in enumerate(shape[:-1]) if n > 1), len(shape) - 2)
    return dim, shape[dim]
