"""Weights that are held in 8 bits, in an engine: made wide by TensorRT's own layer for that.

    before    y = _to_copy(w, dtype)        after    y = held_numbers(w, 1.0, dtype)            # w: int8, float8

TensorRT casts no numbers of 8 bits: to it they are quantized, and have a scale.  A power of two loses nothing, and 1 is
the cast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from torchtrt_md.build import layers
from torchtrt_md.build.flavour import flavour, trt_dtype
from torchtrt_md.build.torch_trt import load
from torchtrt_md.graph.quantized import widens_held
from torchtrt_md.graph.rewrite import emit, substitute
from torchtrt_md.program import value_of

md = torch.ops.torchtrt_md


@torch.library.custom_op("torchtrt_md::held_numbers", mutates_args=())
def held_numbers(x: Tensor, unit: float, dtype: torch.dtype) -> Tensor:
    """int8 or float8 of any shape, times ``unit``, in a wide dtype."""
    return x.to(dtype) * unit


@held_numbers.register_fake
def _(x: Tensor, unit: float, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def dequantize_held(graph: GraphModule) -> int:
    """Rewrite the graph in place; the number of weights that are made wide."""
    found = [node for node in graph.graph.nodes if widens_held(node)]
    for node in found:
        substitute(node, emit(node, md.held_numbers.default, node.args[0], 1.0, node.kwargs["dtype"]))
    if found:
        graph.recompile()
    return len(found)


def convert(ctx: Any, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """``held_numbers`` as TensorRT's layers."""
    x, unit, dtype = args
    operand = load().get_trt_tensor
    scale, to = operand(ctx, torch.tensor(unit), f"{name}_unit"), trt_dtype(value_of(ctx.current_node).dtype)
    if not isinstance(x, Tensor):
        return layers.add_widened(flavour(), ctx.net, x, scale, to)
    wide = operand(ctx, held_numbers(x.detach().cpu(), unit, dtype), f"{name}_operand")  # Q of it is folded
    return layers.add_quantize_dequantize(flavour(), ctx.net, wide, scale, None, trt_dtype(x.dtype))
