"""PyTorch's functional collectives -> the collective IR.

    before    a = _c10d_functional.all_reduce(x, "sum", "12")     after    a = torchtrt_md.all_reduce(x, "sum", "tp", 4)
              y = _c10d_functional.wait_tensor(a)                           y = a

The group's process-local name becomes the mesh axis.  Autograd and coalesced forms, and DTensor's
``shard_dim_alltoall``, are the same collectives under other names.  What is not in the table, and an
all-to-all with uneven parts, is refused.  Where the IR itself was called, its dims are counted from the first.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchtrt_md.errors import CollectiveError
from torchtrt_md.graph.rewrite import emit, substitute
from torchtrt_md.graph.source import source_line
from torchtrt_md.lowering.ops import COLLECTIVES, bound_args, check_reduction
from torchtrt_md.lowering.passes import PassContext
from torchtrt_md.program import value_of

md = torch.ops.torchtrt_md
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
        axis, size = _axis(node, context)
        args = bound_args(node)
        if many:
            _substitute_list(node, [_FORMS[name](node, x, args, axis, size) for x in args["inputs"]])
        else:
            substitute(node, _FORMS[name](node, args["input"], args, axis, size))
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


def _axis(node: Node, context: PassContext) -> tuple[str, int]:
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
    size = context.mesh.axis_size(axis)
    if args.get("group_size", size) != size:
        raise CollectiveError(
            f"{node.target} in node {node.name!r} is over {args['group_size']} ranks, and axis {axis!r} of"
            f" {context.mesh} has {size}",
            fix="use the group's own size: group.size()",
            at=source_line(node),
        )
    return axis, size


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


def _all_to_all_single(node: Node, x: Node, args: dict[str, Any], axis: str, size: int) -> Node:
    rows = value_of(x).shape[0]
    for sizes in (args["output_split_sizes"], args["input_split_sizes"]):
        if rows % size or list(sizes) not in ([], [rows // size] * size):
            parts = f"parts of {list(sizes)} rows" if sizes else f"{rows} rows"
            raise CollectiveError(
                f"{node.target} in node {node.name!r} sends {parts}: uneven, or not to all ranks",
                fix=f"give all {size} ranks an equal part of the {rows} rows",
                at=source_line(node),
            )
    return emit(node, md.all_to_all.default, x, 0, 0, axis, size)


def _shard_dim_alltoall(node: Node, x: Node, args: dict[str, Any], axis: str, size: int) -> Node:
    return emit(node, md.all_to_all.default, x, args["shard_dim"], args["gather_dim"], axis, size)


_FORMS: dict[str, Callable[[Node, Node, dict[str, Any], str, int], Node]] = {
    "all_reduce": lambda n, x, a, axis, size: emit(n, md.all_reduce.default, x, _reduce_op(n, x, a), axis, size),
    "all_gather_into_tensor": lambda n, x, a, axis, size: emit(n, md.all_gather.default, x, 0, axis, size),
    "reduce_scatter_tensor": lambda n, x, a, axis, size: emit(
        n, md.reduce_scatter.default, x, _reduce_op(n, x, a), 0, axis, size
    ),
    "all_to_all_single": _all_to_all_single,
    "broadcast": lambda n, x, a, axis, size: emit(n, md.broadcast.default, x, a["src"], axis, size),
    "shard_dim_alltoall": _shard_dim_alltoall,
}
