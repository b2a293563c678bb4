"""The two steps that every pass is made of: insert a node with its shape, and replace one by another."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from torchtrt_md.graph.results import fake_result
from torchtrt_md.program import value_of

ALONE = "alone"  # in a collective's meta: nothing runs beside it


def emit(before: Node, target: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Node:
    """Insert ``target(*args, **kwargs)`` in front of ``before``: with its shape and ``before``'s source line."""
    graph = before.graph
    with graph.inserting_before(before):
        node = graph.call_function(target, args, kwargs)
    known = [a for a in (*node.all_input_nodes, before) if "val" in a.meta]
    mode = value_of(known[0]).fake_mode  # type: ignore[attr-defined]
    node.meta["val"] = fake_result(mode, target, *map_arg((args, kwargs), lambda n: n.meta["val"]))
    for key in ("stack_trace", "sharding", ALONE):
        if key in before.meta:
            node.meta[key] = before.meta[key]
    return node


def substitute(old: Node, new: Node) -> None:
    """Let every user of ``old`` use ``new``, and remove ``old``."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def view(before: Node, x: Node, shape: list[int]) -> Node:
    """Reshape ``x``; no node where it has that shape already."""
    if list(value_of(x).shape) == shape:
        return x
    return emit(before, torch.ops.aten.reshape.default, x, shape)


def permute(before: Node, x: Node, dims: list[int]) -> Node:
    """Permute ``x``; no node where the order stays."""
    return x if dims == sorted(dims) else emit(before, torch.ops.aten.permute.default, x, dims)


def cast(before: Node, x: Node, dtype: torch.dtype) -> Node:
    """``x`` in this dtype; no node where it has it."""
    return x if value_of(x).dtype == dtype else emit(before, torch.ops.aten._to_copy.default, x, dtype=dtype)
