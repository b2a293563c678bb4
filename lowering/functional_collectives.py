"""PyTorch's functional collectives -> the collective IR.

    before    a = _c10d_functional.all_reduce(x, "sum", "12")     after    a = torchtrt_md.all_reduce(x, "sum", "tp", 4)
              y = _c10d_functional.wait_tensor(a)                           y = a

The group's process-local name becomes the mesh axis.  Over a group of several axes it is done along one after the
other, in the order of the ranks in the group, of which the last axis varies fastest.  Autograd and coalesced forms, and
DTensor's ``shard_dim_alltoall``, are the same collectives under other names.  What is not in the table, and an
all-to-all with uneven parts, is refused.  Where the IR itself was called, its dims are counted from the first.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch.fx import GraphModule, Node

from torchtrt_md.errors import CollectiveError
from torchtrt_md.graph.rewrite import emit, substitute, view
from torchtrt_md.graph.source import source_line
from torchtrt_md.lowering.ops import COLLECTIVES, bound_args, check_reduction
from torchtrt_md.lowering.passes import PassContext
from torchtrt_md.mesh import axes_of
from torchtrt_md.program import value_of

md = torch.ops.torchtrt_md
_Axes: TypeAlias = list[tuple[str, int]]  # of the mesh, with how many ranks are along them
NAMESPACES = ("_c10d_functional", "_c10d_functional_autograd", "c10d_functional", "c10d", "_dtensor", "symm_mem")


def run(graph: GraphModule, context: PassContext) -> int:
    count = 0
    for node in list(graph.graph.nodes):
        if node.target in COLLECTIVES or node.target is md.shard.default:
            count += _count_dims_from_first(node)
            continue
        name = _name(node)
        if name is None:
            continue
        if name in ("wait_tensor", "_wrap_tensor_autograd"):
            substitute(node, node.args[0])
            continue
        many = name.endswith("_coalesced")
        name = name.removesuffix("_coalesced")
        if name not in _FORMS:
            raise CollectiveError(
                f"the collective {node.target} in node {node.name!r} is not in a form that is understood",
                fix=f"use its functional form: one of {', '.join(_FORMS)} of torch.distributed._functional_collectives",
                at=source_line(node),
            )
        axes = _axes(node, context)
        args = bound_args(node)
        if many:
            _substitute_list(node, [_FORMS[name](node, x, args, axes) for x in args["inputs"]])
        else:
            substitute(node, _FORMS[name](node, args["input"], args, axes))
        count += 1
    return count


def _count_dims_from_first(node: Node) -> int:
    args = bound_args(node)
    for name in ("dim", "split_dim", "concat_dim"):
        if name in args:
            args[name] %= value_of(args["x"]).dim()
    changed = node.args != tuple(args.values())
    node.args, node.kwargs = tuple(args.values()), {}
    return changed


def _name(node: Node) -> str | None:
    """The op's bare name, where it is one of PyTorch's collectives."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace not in NAMESPACES:
        return None
    return str(node.target._schema.name).split("::")[1]


def _axes(node: Node, context: PassContext) -> _Axes:
    args = bound_args(node)
    group: Any = args.get("group_name")
    group = getattr(group, "group_name", group)
    if group not in context.groups:
        raise CollectiveError(
            f"{node.target} in node {node.name!r} is over the group {group!r}, which is not an axis of {context.mesh}",
            fix="communicate over groups of the DeviceMesh: device_mesh.get_group(axis)",
            at=source_line(node),
        )
    axis = context.groups[group]
    size = context.mesh.joined_size(axis)
    if args.get("group_size", size) != size:
        raise CollectiveError(
            f"{node.target} in node {node.name!r} is over {args['group_size']} ranks, and axis {axis!r} of"
            f" {context.mesh} has {size}",
            fix="use the group's own size: group.size()",
            at=source_line(node),
        )
    return [(one, context.mesh.axis_size(one)) for one in axes_of(axis)]


def _substitute_list(node: Node, parts: list[Node]) -> None:
    for user in list(node.users):
        assert user.target is operator.getitem
        substitute(user, parts[user.args[1]])  # type: ignore[index]
    node.graph.erase_node(node)


def _reduce_op(node: Node, x: Node, args: dict[str, Any]) -> str:
    op = str(args["reduce_op"]).lower()
    try:
        check_reduction(op, value_of(x).dtype)
    except CollectiveError as error:
        problem = f"{node.target} in node {node.name!r} {error.problem}"
        raise CollectiveError(problem, fix=error.fix, at=source_line(node)) from None
    return op


def _all_reduce(node: Node, x: Node, args: dict[str, Any], axes: _Axes) -> Node:
    op = _reduce_op(node, x, args)
    for axis, size in axes:
        x = emit(node, md.all_reduce.default, x, op, axis, size)
    return x


def _all_gather(node: Node, x: Node, args: dict[str, Any], axes: _Axes) -> Node:
    for axis, size in reversed(axes):
        x = emit(node, md.all_gather.default, x, 0, axis, size)
    return x


def _reduce_scatter(node: Node, x: Node, args: dict[str, Any], axes: _Axes) -> Node:
    op = _reduce_op(node, x, args)
    for axis, size in axes:
        x = emit(node, md.reduce_scatter.default, x, op, 0, axis, size)
    return x


def _broadcast(node: Node, x: Node, args: dict[str, Any], axes: _Axes) -> Node:
    source = args["src"]
    for axis, size in reversed(axes):
        x = emit(node, md.broadcast.default, x, source % size, axis, size)
        source //= size
    return x


def _all_to_all_single(node: Node, x: Node, args: dict[str, Any], axes: _Axes) -> Node:
    sizes = [size for _, size in axes]
    shape, size = list(value_of(x).shape), math.prod(sizes)
    rows = shape[0]
    for parts in (args["output_split_sizes"], args["input_split_sizes"]):
        if rows % size or list(parts) not in ([], [rows // size] * size):
            told = f"parts of {list(parts)} rows" if parts else f"{rows} rows"
            raise CollectiveError(
                f"{node.target} in node {node.name!r} sends {told}: uneven, or not to all ranks",
                fix=f"give all {size} ranks an equal part of the {rows} rows",
                at=source_line(node),
            )
    if len(axes) == 1:
        ((axis, _),) = axes
        return emit(node, md.all_to_all.default, x, 0, 0, axis, size)
    x = view(node, x, [*sizes, rows // size, *shape[1:]])
    for dim, (axis, along) in enumerate(axes):
        x = emit(node, md.all_to_all.default, x, dim, dim, axis, along)
    return view(node, x, shape)


def _shard_dim_alltoall(node: Node, x: Node, args: dict[str, Any], axes: _Axes) -> Node:
    if len(axes) > 1:
        raise CollectiveError(
            f"{node.target} in node {node.name!r} is over the axes {', '.join(axis for axis, _ in axes)} at once",
            fix="redistribute over one axis of the DeviceMesh after the other",
            at=source_line(node),
        )
    ((axis, size),) = axes
    return emit(node, md.all_to_all.default, x, args["shard_dim"], args["gather_dim"], axis, size)


_FORMS: dict[str, Callable[[Node, Node, dict[str, Any], _Axes], Node]] = {
    "all_reduce": _all_reduce,
    "all_gather_into_tensor": _all_gather,
    "reduce_scatter_tensor": _reduce_scatter,
    "all_to_all_single": _all_to_all_single,
    "broadcast": _broadcast,
    "shard_dim_alltoall": _shard_dim_alltoall,
}
