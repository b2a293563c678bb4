"""Say on which dim a gather or a reduce-scatter really is.

PyTorch's collectives act on dim 0, and its wrappers move other dims there and back with a split and a
cat, or, where the dims in front are of size 1, with a view.

    before    g = all_gather(x, 0)             after    y = all_gather(x, d)
              y = cat(split(g, len(x)), d)
    before    g = all_gather(x, 0)             after    y = all_gather(x, d)
              y = view(g, [1, P * s, ...])
    before    c = cat(split(x, s, d), 0)       after    y = reduce_scatter(x, op, d)
              y = reduce_scatter(c, op, 0)

A gather that is used in another way too stays: a second one would double what is sent.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchtrt_md.graph.functional import RESHAPES
from torchtrt_md.graph.rewrite import emit, substitute
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.lowering.passes import PassContext
from torchtrt_md.program import value_of

aten, md = torch.ops.aten, torch.ops.torchtrt_md


def run(graph: GraphModule, context: PassContext) -> int:
    count = 0
    for node in list(graph.graph.nodes):
        if node.target is md.all_gather.default and bound_args(node)["dim"] == 0:
            x, _, *along = bound_args(node).values()
            count += _gather_then_cat(node, x, *along) or _gather_then_view(node, x, *along)
        elif node.target is md.reduce_scatter.default and bound_args(node)["dim"] == 0:
            count += _cat_then_scatter(node, **bound_args(node))
    return count


def _gather_then_cat(gather: Node, x: Node, axis: str, size: int, exchange_dtype: str | None) -> int:
    split = _only_user(gather)
    cat = _cat_of_all_parts(split, size) if split else None
    if split is None or cat is None or bound_args(split)["dim"] != 0:
        return 0
    substitute(cat, emit(cat, md.all_gather.default, x, _dim(cat), axis, size, exchange_dtype))
    return 1


def _gather_then_view(gather: Node, x: Node, axis: str, size: int, exchange_dtype: str | None) -> int:
    shape = list(value_of(x).shape)
    user = _only_user(gather)
    if user is None or user.target not in RESHAPES:
        return 0
    for dim in range(1, len(shape)):
        whole = [*shape[:dim], shape[dim] * size, *shape[dim + 1 :]]
        if set(shape[:dim]) == {1} and list(value_of(user).shape) == whole:
            substitute(user, emit(user, md.all_gather.default, x, dim, axis, size, exchange_dtype))
            return 1
    return 0


def _cat_then_scatter(scatter: Node, x: Node, op: str, dim: int, axis: str, size: int) -> int:
    if x.target is not aten.cat.default or _dim(x) != 0:
        return 0
    first = bound_args(x)["tensors"][0]
    if first.target is not operator.getitem or _cat_of_all_parts(first.args[0], size) is not x:
        return 0
    split = bound_args(first.args[0])
    dim = split["dim"] % value_of(split["self"]).dim()
    substitute(scatter, emit(scatter, md.reduce_scatter.default, split["self"], op, dim, axis, size))
    return 1


def _only_user(node: Node) -> Node | None:
    users = [user for user in node.users if user.op == "call_function"]
    return users[0] if len(node.users) == len(users) == 1 else None


def _cat_of_all_parts(split: Node, size: int) -> Node | None:
    """The cat that joins all ``size`` equal parts of a split in order, if that is all that is done with them."""
    if split.target not in (aten.split.Tensor, aten.chunk.default) or len(split.meta["val"]) != size:
        return None
    if len({part.shape for part in split.meta["val"]}) != 1:
        return None
    parts: list[Any] = [user for user in split.users if user.target is operator.getitem]
    parts.sort(key=lambda part: part.args[1])
    cats = {user for part in parts for user in part.users}
    if len(parts) != size or len(cats) != 1:
        return None
    (cat,) = cats
    return cat if cat.target is aten.cat.default and list(bound_args(cat)["tensors"]) == parts else None


def _dim(cat: Node) -> int:
    return int(bound_args(cat)["dim"]) % value_of(cat).dim()
