"""Quantizers as TensorRT's own layers: Q, which rounds to 8 bits, and DQ, with which it computes products in 8 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from torchtrt_md.build import layers
from torchtrt_md.build.flavour import flavour
from torchtrt_md.build.torch_trt import load
from torchtrt_md.errors import BuildError
from torchtrt_md.graph.source import source_line
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.lowering.quantize_math import FLOAT8, LARGEST_FLOAT8, NO_AMAX
from torchtrt_md.program import dtype_name, value_of

aten = torch.ops.aten
_INT8 = (8, 0)
LARGEST_INT8 = 127.0
_BEYOND = 2.0**100  # what is divided by it is rounded to zero


def why_not(node: Node) -> str:
    """Why TensorRT's layers would quantize otherwise than this node, or are not known to do the same; else ""."""
    args = bound_args(node)
    x, amax = value_of(args["x"]), value_of(args["amax"])
    if (args["num_bits"], args["exponent_bits"]) not in (_INT8, FLOAT8):
        return f"TensorRT's quantizing layers have no integers of {args['num_bits']} bits here"
    if args["narrow_range"]:
        return "TensorRT's integers of 8 bits begin at -128, and these at -127"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"TensorRT does not quantize {dtype_name(x.dtype)}"
    if sum(extent > 1 for extent in amax.shape) > 1:
        return f"TensorRT has scales of one dim only, and these are {list(amax.shape)}"
    if not _is_given(args["amax"]):
        return "its scale is found in each call, and TensorRT is known to take scales that are given"
    return ""


def _is_given(node: Node) -> bool:
    """Is it a weight, an input or a constant, seen in whatever shape and dtype?"""
    while node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        if not node.target.is_view and node.target is not aten._to_copy.default:
            return False
        (node,) = node.all_input_nodes
    return node.op in ("placeholder", "get_attr")


def convert(ctx: Any, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """
    Raises:
        BuildError: TensorRT's layers are not known to do the same.
    """
    reason = why_not(ctx.current_node)
    if reason:
        raise BuildError(
            f"{name}: {reason}",
            fix="use md.export or md.compile, which keep it in PyTorch, or compute='inductor'",
            at=source_line(ctx.current_node),
        )
    x, amax, num_bits, exponent_bits, _ = args
    float8 = (num_bits, exponent_bits) == FLOAT8
    held = isinstance(x, torch.Tensor) and isinstance(amax, torch.Tensor)
    if float8 and held:
        x = _within(x, amax)
    x = load().get_trt_tensor(ctx, x, f"{name}_operand")
    shape = tuple(amax.shape)
    long = [dim for dim, extent in enumerate(shape) if extent > 1]
    axis = long[0] + len(x.shape) - len(shape) if long else None
    scale = _scale(ctx, amax, [shape[dim] for dim in long], float8, name)
    if float8 and not held:
        x = _bounded(ctx, x, scale, axis, name)
    return layers.add_quantize_dequantize(flavour(), ctx.net, x, scale, axis, "FP8" if float8 else "INT8")


def _within(weight: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """A constant within its amax, as :func:`_bounded`; the tensor itself where it is."""
    held, wide = weight.detach(), amax.detach().to(weight.device, torch.float32)
    limit = torch.where(wide > NO_AMAX, wide, 1.0).to(held.dtype)
    return torch.clamp(held, -limit, limit) if bool((held.abs() > limit).any()) else weight


def _bounded(ctx: Any, x: Any, scale: Any, axis: int | None, name: str) -> Any:
    """x within what the scale makes the largest float8, as Q should make it.

    Q does so by itself where it was tried alone.  But of FLUX in float8 TensorRT-RTX 1.6.1 makes NaN on an H200, and
    not so (benchmarks/results/2026-11-23-model-optimizer-flux-h200.md).
    """
    largest = load().get_trt_tensor(ctx, torch.full([1] * len(scale.shape), LARGEST_FLOAT8), f"{name}_bound")
    return layers.add_bounds(flavour(), ctx.net, x, scale, largest, axis)


def _scale(ctx: Any, amax: Any, dims: list[int], float8: bool, name: str) -> Any:
    """What a number of 8 bits is multiplied with, float32 of these dims.  Where there is no amax, see quantize_math."""
    largest, otherwise = (LARGEST_FLOAT8, 1 / LARGEST_FLOAT8) if float8 else (LARGEST_INT8, _BEYOND)
    operand = load().get_trt_tensor
    if isinstance(amax, torch.Tensor):  # a constant is needed as one, so that a weight is held in 8 bits
        wide = amax.detach().cpu().to(torch.float32).reshape(dims)
        return operand(ctx, torch.where(wide > NO_AMAX, wide / largest, otherwise), f"{name}_scale")
    amax = wide_amax(ctx, amax, dims)
    numbers = {"largest": largest, "limit": NO_AMAX, "otherwise": otherwise}
    of = {n: operand(ctx, torch.full([1] * len(dims), value), f"{name}_{n}") for n, value in numbers.items()}
    return layers.add_ratio(flavour(), ctx.net, amax, of["largest"], amax, of["limit"], of["otherwise"])


def wide_amax(ctx: Any, amax: Any, shape: list[int]) -> Any:
    """An amax that is no constant, in float32 and of this shape."""
    if amax.dtype.name != "FLOAT":
        amax = ctx.net.add_cast(amax, flavour().trt.DataType.FLOAT).get_output(0)
    return amax if tuple(amax.shape) == tuple(shape) else layers.viewed(ctx.net, amax, tuple(shape))
