"""Causal rings in the split placement: the sequence in an order in which all ranks have equal work.

    before    x = shard(x, d, axis, P)             # chunk r of P
              y = all_gather(y, d, axis, P)
    after     x = shard(cat of the 2P chunks 0, 2P-1, 1, 2P-2, ... of x, d, axis, P)       # chunks r and 2P-1-r of 2P
              y = all_gather(y, d, axis, P), its 2P chunks put back in order

In plain order the last rank would attend to P blocks and the first to one.  Between the two, the graph stays as it is:
all that the sequence analysis accepts does the same to every position, wherever it stands.  Three things do not, or
show the order, and are refused: a chunk border inside of what a view made one position (or a length that 2P does not
divide), a causal attention by another strategy, and an output that is left split.

Other collectives along the axis were refused by the analysis, or are its own: a gather of what each rank found in its
part, as its largest number, is of no sequence and stays as it is.  An attention that is not causal may have any
strategy: the order of its keys does not matter, and that of its queries is that of its result.

Over several axes the ring is along the first, and P its ranks: the ranks of the others hold the two chunks between
them, in order.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from torchtrt_md.errors import ShardingError
from torchtrt_md.graph.rewrite import emit, substitute
from torchtrt_md.graph.source import source_line
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.lowering.passes import PassContext
from torchtrt_md.lowering.sharding import Sharded
from torchtrt_md.mesh import axes_of
from torchtrt_md.program import outputs_of, value_of

aten, md = torch.ops.aten, torch.ops.torchtrt_md

_OTHERWISE = 'use strategy="ulysses" or "allgather_kv" for this axis'


def run(graph: GraphModule, context: PassContext) -> int:
    """Number of values that are put in the order, or back.

    Raises:
        ShardingError: the order of the model cannot be changed.
    """
    if context.placement != "split":
        return 0
    causal = [n for n in _nodes(graph, md.context_attention.default) if bound_args(n)["is_causal"]]
    rings = {args["axis"]: args["size"] for args in map(bound_args, causal) if args["strategy"] == "ring"}
    first = {axis: context.mesh.axis_size(axes_of(axis)[0]) for axis in rings}
    count = 0
    for axis, size in rings.items():
        for node in causal:
            _check_attention(node, axis)
        for node in _nodes(graph, md.context_attention.default):
            _check_order_unseen(node, axis)
        _check_order(graph, axis, size, first[axis])
        count += _reorder(graph, axis, first[axis])
    return count


def _nodes(graph: GraphModule, target: torch._ops.OpOverload) -> list[Node]:
    return list(graph.graph.find_nodes(op="call_function", target=target))


def _check_attention(node: Node, axis: str) -> None:
    args = bound_args(node)
    if args["axis"] != axis:
        return
    if args["strategy"] != "ring":
        raise ShardingError(
            f"causal attention {node.name!r} has the strategy {args['strategy']!r}, and other causal attentions over"
            f" axis {axis!r} are rings, for which the sequence is in another order",
            fix="give all causal attentions over one axis the same strategy",
            at=source_line(node),
        )
    if not all(_held(args[name], axis) for name in ("q", "k", "v")):
        raise ShardingError(
            f"it is not known how the operands of causal attention {node.name!r} are split over axis {axis!r}, so"
            " their order cannot be changed",
            fix="split the sequence by the plan of a ContextParallel",
            at=source_line(node),
        )


def _check_order_unseen(node: Node, axis: str) -> None:
    """A mask or a length is of positions, and these are elsewhere now."""
    args = bound_args(node)
    if args["axis"] == axis and (args["mask"] is not None or args["lengths"]):
        what = "a mask" if args["mask"] is not None else "a sequence that the ranks do not divide"
        raise ShardingError(
            f"attention {node.name!r} has {what}, and other attentions over axis {axis!r} are causal rings, for which"
            " the sequence is in another order",
            fix=_OTHERWISE,
            at=source_line(node),
        )


def _check_order(graph: GraphModule, axis: str, size: int, ring: int) -> None:
    """What a rank of the ring has, of all that is split, can be cut into two halves, and no output is split."""
    for node in graph.graph.nodes:
        for state in _held(node, axis):
            odd = next((p.held for p in state.parts(size) if p.held * size // ring % 2 and not p.is_whole), None)
            if odd is not None:
                raise ShardingError(
                    f"{node.name} has {odd} of {odd * size} positions on each rank of axis {axis!r}, and a causal ring"
                    f" gives each rank two of {2 * ring} equal chunks",
                    fix=f"pad the sequence to a multiple of {2 * size} positions, or {_OTHERWISE}",
                    at=source_line(node),
                )
    for number, node in enumerate(outputs_of(graph)):
        if any(_held(node, axis)):
            raise ShardingError(
                f"output {number} ({node.name} {list(value_of(node).shape)}) is left split over axis {axis!r}, on which"
                " causal ring attention has the sequence in another order",
                fix=f"gather it (md.Gather in the plan), or {_OTHERWISE}",
                at=source_line(node),
            )


def _held(node: Node, axis: str) -> list[Sharded]:
    """How the node's results are split over the axis, those that are."""
    states = node.meta.get("sharding", {})
    return [s[axis] for s in (states if isinstance(states, list) else [states]) if axis in s]


def _reorder(graph: GraphModule, axis: str, size: int) -> int:
    order = [chunk for rank in range(size) for chunk in (rank, 2 * size - 1 - rank)]
    back = sorted(range(2 * size), key=order.__getitem__)
    count = 0
    for node in _nodes(graph, md.shard.default):
        args = bound_args(node)
        if args["axis"] == axis and _held(node, axis):
            node.replace_input_with(args["x"], _chunks(node, args["x"], args["dim"], order))
            count += 1
    for node in _nodes(graph, md.all_gather.default):
        args = bound_args(node)
        if args["axis"] == axis and _held(args["x"], axis):
            gathered = emit(node, md.all_gather.default, *args.values())
            substitute(node, _chunks(node, gathered, args["dim"], back))
            count += 1
    return count


def _chunks(before: Node, x: Node, dim: int, order: list[int]) -> Node:
    """The equal chunks of a dim in another order."""
    extent = value_of(x).shape[dim] // len(order)
    chunks = [emit(before, aten.slice.Tensor, x, dim, i * extent, (i + 1) * extent) for i in order]
    ordered = emit(before, aten.cat.default, chunks, dim)
    for node in (*chunks, ordered):
        node.meta["sharding"] = x.meta["sharding"]  # along all axes as it was
    return ordered
