"""Rotary embeddings of interleaved pairs, in the form that TensorRT-RTX runs fastest of those that compute the same.

    before    a, b = x.view(..., D / 2, 2).unbind(-1)            after    y = rotate_every_two(x)
              y = stack([-b, a], -1).view(..., D)

TensorRT-RTX moves the elements of pairs in kernels of their own.  In an engine it is a product: with a constant that
has one element, 1 or -1, in each column, so that it moves the elements as exactly, beside the products around it
(benchmarks/results/2026-11-22-rotary-h200.md).  In 16 bits only, which TensorRT multiplies as they are.  Where x holds
an infinity, the product makes NaN of all its row.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from torchtrt_md.build import layers
from torchtrt_md.build.flavour import flavour
from torchtrt_md.build.torch_trt import load
from torchtrt_md.graph.rewrite import emit, substitute
from torchtrt_md.program import value_of

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_WIDEST = 256  # of a head; a product of that many columns takes as long as reading x does


@torch.library.custom_op("torchtrt_md::rotate_every_two", mutates_args=())
def rotate_every_two(x: Tensor) -> Tensor:
    """[..., D] -> [..., D]: the pairs (a, b) of the last dim as (-b, a)."""
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([-b, a], -1).flatten(-2)


@rotate_every_two.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def rotation(width: int, dtype: torch.dtype) -> Tensor:
    """[width, width]: ``x @ rotation`` is ``rotate_every_two(x)``."""
    matrix, even = torch.zeros(width, width, dtype=dtype), torch.arange(0, width, 2)
    matrix[even + 1, even], matrix[even, even + 1] = -1, 1
    return matrix


def convert(ctx: Any, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """``rotate_every_two`` as TensorRT's layers."""
    operand = load().get_trt_tensor
    width, dtype = value_of(ctx.current_node).shape[-1], value_of(ctx.current_node).dtype
    x = operand(ctx, args[0], f"{name}_operand")
    return layers.add_product_of_rows(flavour(), ctx.net, x, operand(ctx, rotation(width, dtype), f"{name}_rotation"))


def find_pairs(graph: GraphModule) -> int:
    """Rewrite the graph in place; the number of values whose pairs are rotated by one op now."""
    count = 0
    for node in list(graph.graph.find_nodes(op="call_function", target=aten.stack.default)):
        x = _rotated(node)
        flat = next(iter(node.users)) if len(node.users) == 1 else None
        if x is not None and flat is not None and flat.target in _VIEWS and value_of(flat).shape == value_of(x).shape:
            substitute(flat, emit(flat, torch.ops.torchtrt_md.rotate_every_two.default, x))
            count += 1
    if count:
        graph.graph.eliminate_dead_code()
        graph.recompile()
    return count


def _rotated(stack: Node) -> Node | None:
    """What this stack rotates the pairs of; None where it is another one."""
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
