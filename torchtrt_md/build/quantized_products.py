"""Products of two quantized operands, in the form that TensorRT multiplies in 8 bits and fast.

    before    y = addmm(bias, fake_quantize(x, amax_x), t(fake_quantize(w, amax_w)))
    after     n = mm(eight_bits(x, amax_x, u), t(eight_bits(w, amax_w, v)))           # u, v: powers of two
              y = n * scale(amax_x, u) * t(scale(amax_w, v)) + bias                   # in float32, then y's dtype

TensorRT computes a product in 8 bits where the scales of its Q and DQ layers are constants.  Where weights are inputs
of the engine, their scales are, too.  So Q and DQ get a power of two, which loses nothing, and the scales come in front
and behind, as any other factor.  Scales of rows, too: in Q and DQ they make TensorRT-RTX take slower kernels.  Products
of one operand get a power of two each: if all had the same, TensorRT-RTX would join them to one, in a kernel of a third
of the speed (benchmarks/results/2026-11-23-quantized-products-h200.md).  A weight that is held in 8 bits,
``mul(_to_copy(w), scale)``, is such an operand, too, and has no Q.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from torchtrt_md.build import layers, quantizers
from torchtrt_md.build.flavour import flavour
from torchtrt_md.build.torch_trt import load
from torchtrt_md.graph.functional import RESHAPES
from torchtrt_md.graph.quantized import widens_held
from torchtrt_md.graph.rewrite import cast, emit, substitute, view
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.lowering.quantize_math import FLOAT8, LARGEST_FLOAT8, NO_AMAX, rounded, scale_of
from torchtrt_md.program import value_of

aten, md = torch.ops.aten, torch.ops.torchtrt_md
# What numbers of 8 bits are exact in, and a sum of their products is in range; float16 is not.
_DTYPES = (torch.bfloat16, torch.float32)
_UNIT = 0.25  # of the first operand


@torch.library.custom_op("torchtrt_md::eight_bits", mutates_args=())
def eight_bits(x: Tensor, amax: Tensor, num_bits: int, exponent_bits: int, unit: float) -> Tensor:
    """The numbers that ``fake_quantize`` rounds to, before it scales them back, times ``unit``; of x's dtype."""
    return (rounded(x, amax, num_bits, exponent_bits, False) * unit).to(x.dtype).contiguous()


@eight_bits.register_fake
def _(x: Tensor, amax: Tensor, num_bits: int, exponent_bits: int, unit: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("torchtrt_md::scale_of_eight_bits", mutates_args=())
def scale_of_eight_bits(amax: Tensor, num_bits: int, exponent_bits: int, unit: float) -> Tensor:
    """What ``eight_bits`` is multiplied with to be scaled back, float32 of amax's shape."""
    scale = scale_of(amax, num_bits, exponent_bits)
    return 1 / (torch.where(scale == 0, 1.0, scale) * unit)


@scale_of_eight_bits.register_fake
def _(amax: Tensor, num_bits: int, exponent_bits: int, unit: float) -> Tensor:
    return torch.empty_like(amax, dtype=torch.float32)


def put_scales_behind(graph: GraphModule) -> int:
    """Rewrite the graph in place; the number of products of quantized operands, whose scales are behind them now."""
    of_operand: Counter[Node] = Counter()
    made: dict[tuple[Node, float], tuple[Node, Node]] = {}
    products = [node for node in graph.graph.nodes if node.target in (aten.mm.default, aten.addmm.default)]
    count = 0
    for node in products:
        *bias, x, weight = node.args
        of_x, x_moves = _behind_moves(x)
        of_weight, weight_moves = _behind_moves(weight)
        factor = _of_columns(of_weight, weight_moves)
        if node.kwargs or factor is None or not _is_quantized(of_x) or value_of(node).dtype not in _DTYPES:
            continue
        if value_of(bound_args(of_x)["amax"]).numel() != 1:
            continue
        origin = _origin(of_x)
        of_operand[origin] += 1
        left, scale = _numbers(of_x, _UNIT, made)
        right, of_columns = _numbers(of_weight, _unit_of(of_operand[origin]), made)
        scale = emit(node, aten.mul.Tensor, view(node, scale, []), view(node, of_columns, factor))
        result = emit(node, aten.mm.default, _moved(node, left, x_moves), _moved(node, right, weight_moves))
        result = emit(node, aten.mul.Tensor, cast(node, result, torch.float32), scale)
        for addend in bias:
            result = emit(node, aten.add.Tensor, result, cast(node, addend, torch.float32))
        substitute(node, cast(node, result, value_of(node).dtype))
        count += 1
    if count:
        graph.graph.eliminate_dead_code()
        graph.recompile()
    return count


def _unit_of(product: int) -> float:
    """Of the weight of an operand's first product, second, ...: another one for any 64 in a row.

    They are near to 1: the model may have any number of products, and float32 has no 2^-150.
    """
    place = product % 64
    return 2.0 ** (-place if place <= 32 else place - 32)


def _behind_moves(operand: Node) -> tuple[Node, list[Node]]:
    """What a product's operand was before it was moved, and the moves."""
    moves: list[Node] = []
    while operand.target in (*RESHAPES, aten.t.default):
        moves.insert(0, operand)
        operand = operand.all_input_nodes[0]
    return operand, moves


def _is_quantized(operand: Node) -> bool:
    """Is it a quantizer's result, and do TensorRT's layers what that does?"""
    return operand.target is md.fake_quantize.default and not quantizers.why_not(operand)


def _held(operand: Node) -> tuple[Node, Node] | None:
    """What is held in 8 bits, made wide and scaled, and its scale."""
    if operand.target is aten.mul.Tensor and not operand.kwargs:
        for wide, scale in (operand.args, operand.args[::-1]):
            if not isinstance(wide, Node) or not isinstance(scale, Node) or not widens_held(wide):
                continue
            if value_of(wide).shape == value_of(operand).shape:
                return wide.all_input_nodes[0], scale
    return None


def _of_columns(of_weight: Node, moves: list[Node]) -> list[int] | None:
    """The shape in which the scales of a weight multiply a product's columns; None where they do not."""
    if _is_quantized(of_weight):
        scale = bound_args(of_weight)["amax"]
    elif held := _held(of_weight):
        _, scale = held
    else:
        return None
    x, scales = value_of(of_weight), value_of(scale)
    if scales.numel() == 1:
        return []
    rows = x.ndim == 2 and tuple(scales.shape) == (x.shape[0], 1)
    return [x.shape[0]] if rows and [m.target for m in moves] == [aten.t.default] else None


def _origin(quantizer: Node) -> Node:
    """What it rounds, as whatever shape."""
    x = quantizer.args[0]
    assert isinstance(x, Node)
    while x.target in RESHAPES:
        x = x.all_input_nodes[0]
    return x


def _numbers(quantizer: Node, unit: float, made: dict[tuple[Node, float], tuple[Node, Node]]) -> tuple[Node, Node]:
    """What it rounds, or what is held, in numbers of 8 bits, and their scale; once for all products that read them."""
    if (quantizer, unit) in made:
        return made[quantizer, unit]
    if held := _held(quantizer):
        x, scale = held
        numbers = emit(quantizer, md.held_numbers.default, x, unit, value_of(quantizer).dtype)
        scale = emit(quantizer, aten.mul.Tensor, cast(quantizer, scale, torch.float32), 1 / unit)
    else:
        x, amax, num_bits, exponent_bits, _ = bound_args(quantizer).values()
        numbers = emit(quantizer, md.eight_bits.default, x, amax, num_bits, exponent_bits, unit)
        scale = emit(quantizer, md.scale_of_eight_bits.default, amax, num_bits, exponent_bits, unit)
    made[quantizer, unit] = numbers, scale
    return made[quantizer, unit]


def _moved(before: Node, x: Node, moves: list[Node]) -> Node:
    for move in moves:
        x = emit(before, move.target, x, *move.args[1:])  # type: ignore[arg-type]
    return x


def convert(ctx: Any, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """``eight_bits`` as TensorRT's layers."""
    x, amax, num_bits, exponent_bits, unit = args
    operand = load().get_trt_tensor
    float8 = (num_bits, exponent_bits) == FLOAT8
    like = value_of(ctx.current_node)
    scale = operand(ctx, torch.tensor(unit), f"{name}_unit")
    if isinstance(x, Tensor) and isinstance(amax, Tensor):  # held as these numbers, in no more bits than it has
        scaled = operand(ctx, eight_bits(x.detach().cpu(), amax.detach().cpu(), *args[2:]), f"{name}_operand")
    else:
        dims = [*(1,) * (like.ndim - len(amax.shape)), *amax.shape]
        ahead = _ratio(ctx, amax, dims, float8, unit, name, back=False)
        scaled = layers.add_scaled(flavour(), ctx.net, operand(ctx, x, f"{name}_operand"), ahead)
        if float8:
            bound = operand(ctx, torch.tensor(LARGEST_FLOAT8), f"{name}_bound")
            scaled = layers.add_bounds(flavour(), ctx.net, scaled, scale, bound, None)
    kind, dtype = "FP8" if float8 else "INT8", "FLOAT" if like.dtype == torch.float32 else "BF16"
    return layers.add_quantize_dequantize(flavour(), ctx.net, scaled, scale, None, kind, dtype)


def convert_scale(ctx: Any, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """``scale_of_eight_bits`` as TensorRT's layers."""
    amax, num_bits, exponent_bits, unit = args
    return _ratio(ctx, amax, list(amax.shape), (num_bits, exponent_bits) == FLOAT8, unit, name, back=True)


def _ratio(ctx: Any, amax: Any, shape: list[int], float8: bool, unit: float, name: str, *, back: bool) -> Any:
    """What numbers of 8 bits are scaled with, there or back: float32 of this shape."""
    operand = load().get_trt_tensor
    if isinstance(amax, Tensor):
        amax = operand(ctx, amax.detach().cpu().to(torch.float32).reshape(shape), f"{name}_amax")
    else:
        amax = quantizers.wide_amax(ctx, amax, shape)
    largest = LARGEST_FLOAT8 if float8 else quantizers.LARGEST_INT8
    none = LARGEST_FLOAT8 if float8 else 0.0 if not back else 1.0  # as quantize_math has it where there is no amax
    numbers = {"largest": largest * unit, "limit": NO_AMAX, "otherwise": 1 / (none * unit) if back else none * unit}
    of = {n: operand(ctx, torch.full([1] * len(shape), value), f"{name}_{n}") for n, value in numbers.items()}
    above, below = (amax, of["largest"]) if back else (of["largest"], amax)
    return layers.add_ratio(flavour(), ctx.net, above, below, amax, of["limit"], of["otherwise"])
