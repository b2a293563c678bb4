"""Rotary embeddings of interleaved pairs, in the form that TensorRT fuses best.

    before    a, b = x.view(..., D / 2, 2).unbind(-1)            after    y = x @ turn
              y = stack([-b, a], -1).view(..., D)                         # turn [D, D]: 0, 1 and -1

TensorRT-RTX moves the elements of pairs in kernels of their own.  A product with a constant that has one element in
each column moves them as exactly, next to the products around it: three blocks of FLUX take 0.956 of the time on an
H200 (benchmarks/results/2026-11-22-rotary-h200.md).  In 16 bits only, which TensorRT multiplies as they are.  Where x
holds an infinity, the product makes NaN of the others in its row, too; attention would make NaN of it next.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from torchtrt_md.graph.rewrite import emit, substitute
from torchtrt_md.program import value_of

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_WIDEST = 256  # of a head; a product of that many columns takes as long as reading x does


def turn_by_product(graph: GraphModule) -> int:
    """Rewrite the graph in place; the number of values whose pairs are turned by a product now."""
    count = 0
    for node in list(graph.graph.find_nodes(op="call_function", target=aten.stack.default)):
        x = _turned(node)
        flat = next(iter(node.users)) if len(node.users) == 1 else None
        if x is None or flat is None or flat.target not in _VIEWS or value_of(flat).shape != value_of(x).shape:
            continue
        turn = _constant(graph, x, flat)
        rows = emit(flat, aten.reshape.default, x, [-1, value_of(x).shape[-1]])
        product = emit(flat, aten.mm.default, rows, turn)
        substitute(flat, emit(flat, aten.reshape.default, product, list(value_of(x).shape)))
        count += 1
    if count:
        graph.graph.eliminate_dead_code()
        graph.recompile()
    return count


def _turned(stack: Node) -> Node | None:
    """What this stack turns the pairs of; None where it is another one."""
    parts, *dim = stack.args
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or dim not in ([-1], [value_of(stack).ndim - 1]):
        return None
    negative, first = parts
    if not isinstance(negative, Node) or not isinstance(first, Node) or negative.target is not aten.neg.default:
        return None
    second = negative.all_input_nodes[0]
    unbound = first.all_input_nodes[0] if first.target is operator.getitem else None
    if unbound is None or unbound.target is not aten.unbind.int:
        return None
    if first.args != (unbound, 0) or second.target is not operator.getitem or second.args != (unbound, 1):
        return None
    pairs, *dim = unbound.args
    assert isinstance(pairs, Node)
    if dim not in ([-1], [value_of(pairs).ndim - 1]) or pairs.target not in _VIEWS:
        return None
    x = pairs.all_input_nodes[0]
    shape = list(value_of(x).shape)
    sixteen = value_of(x).dtype in (torch.bfloat16, torch.float16)
    whole = list(value_of(pairs).shape) == [*shape[:-1], shape[-1] // 2, 2]
    return x if whole and sixteen and shape[-1] <= _WIDEST else None


def _constant(graph: GraphModule, x: Node, before: Node) -> Node:
    """``turn``, of x's width and dtype."""
    value = value_of(x)
    width = value.shape[-1]
    name = f"turn_{width}_{value.dtype}".replace("torch.", "")
    if not hasattr(graph, name):
        graph.register_buffer(name, turning(width, value.dtype, value.device))
    with graph.graph.inserting_before(before):
        node = graph.graph.get_attr(name)
    with value.fake_mode:  # type: ignore[attr-defined]
        node.meta["val"] = torch.empty(width, width, dtype=value.dtype, device=value.device)
    return node


def turning(width: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """[width, width]: behind ``x @``, it makes pairs (a, b) of x's last dim (-b, a)."""
    turn, even = torch.zeros(width, width, dtype=dtype, device=device), torch.arange(0, width, 2)
    turn[even + 1, even], turn[even, even + 1] = -1, 1
    return turn
