"""Numbers of 8 bits in graphs: what TensorRT has layers of its own for."""

from __future__ import annotations

import torch
from torch.fx import Node

from torchtrt_md.program import value_of

aten = torch.ops.aten
# TensorRT takes these for quantized numbers, which none but its own layers may scale: others of an engine are refused,
# or treated as if they had a scale.  So what makes or takes them stays out of engines.
QUANTIZED = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
# But for what is held so and made wide, which is dequantizing by 1.
_HELD = (torch.int8, torch.float8_e4m3fn)
_WIDE = (torch.float32, torch.bfloat16, torch.float16)


def widens_held(node: Node) -> bool:
    """Does this node cast what its graph is given, such as a weight, from 8 bits to a wide floating dtype?"""
    if node.target is not aten._to_copy.default or set(node.kwargs) != {"dtype"}:
        return False
    (held,) = node.all_input_nodes
    if held.op != "placeholder" or not value_of(held).ndim:  # TensorRT's layer takes no tensor without dims
        return False
    return value_of(held).dtype in _HELD and node.kwargs["dtype"] in _WIDE
