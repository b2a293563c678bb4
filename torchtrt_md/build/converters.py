"""Converters of the collective IR for Torch-TensorRT's registry.

They take the place of its own collective converters, which know the group of all ranks only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

import torchtrt_md.lowering.ops  # noqa: F401  defines torch.ops.torchtrt_md
from torchtrt_md.build import layers, probes
from torchtrt_md.build.flavour import flavour
from torchtrt_md.build.torch_trt import load
from torchtrt_md.errors import BuildError
from torchtrt_md.source import source_line

md = torch.ops.torchtrt_md


@functools.cache
def register() -> None:
    """Register the converters, once in a process."""
    names = load()
    for op, convert in _CONVERTERS.items():
        names.converter(op, supports_dynamic_shapes=True, priority=names.ConverterPriority.HIGH)(convert)


def _operand(ctx: Any, value: Any, name: str) -> Any:
    return load().get_trt_tensor(ctx, value, name)


def _collective(op: str) -> Callable[..., Any]:
    overload = getattr(md, op).default
    names = [argument.name for argument in overload._schema.arguments]

    def convert(ctx: Any, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
        values = dict(zip(names, args, strict=True))
        x, size = _operand(ctx, values["x"], f"{name}_operand"), values["size"]
        dims = [values[d] for d in ("dim", "split_dim", "concat_dim") if d in values]
        assert not any(dims), f"{name} acts on dims {dims}; lowering moves collectives to dim 0"
        dtype = x.dtype.name
        if op == "all_to_all" and not probes.exchanges(dtype):
            raise BuildError(
                f"{flavour().name} {flavour().version} has no ALL_TO_ALL in {dtype}",
                fix="use another dtype, strategy='allgather_kv', or another version",
            )
        if op == "all_gather" and _reaches_attention(ctx.current_node) and not probes.gathers_beside_attention(dtype):
            return layers.add_all_gather_by_exchange(flavour(), ctx.net, x, size)
        return layers.add_collective(
            flavour(),
            ctx.net,
            x,
            op,
            size,
            reduce_op=values.get("op"),
            root=next((values[root] for root in ("src", "dst") if root in values), layers.NO_ROOT),
        )

    return convert


def _reaches_attention(node: Node) -> bool:
    """Does an attention depend on this node?  TensorRT fuses what leads up to one."""
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if user.target is md.attention.default:
                return True
            if user not in seen:
                seen.add(user)
                pending.append(user)
    return False


def _attention(ctx: Any, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    q, k, v, mask, is_causal, scale, _ = args  # heads are grouped wherever their numbers differ
    q, k, v = (_operand(ctx, x, f"{name}_{role}") for x, role in ((q, "q"), (k, "k"), (v, "v")))
    factor = layers.default_scale(q.shape[-1]) if scale is None else scale
    # Rounded to 16 bits a scale would be off by up to 2 ** -9 of itself, everywhere alike: another temperature.
    factors = torch.full((1, 1, 1, 1), factor, dtype=_TORCH_DTYPES[q.dtype.name])
    if factors.item() != factor:
        factors = torch.full((1, 1, 1, 1), factor, dtype=torch.float32)
    if mask is not None:
        mask = _operand(ctx, mask, f"{name}_mask")
        rank = len(mask.shape)
        if rank < 4:  # the layer takes masks of four dims
            shuffle = ctx.net.add_shuffle(mask)
            shuffle.reshape_dims = (*(1,) * (4 - rank), *mask.shape)
            mask = shuffle.get_output(0)
    scales = _operand(ctx, factors, f"{name}_scale")
    try:
        return layers.add_attention(flavour(), ctx.net, q, k, v, mask, is_causal, scales)
    except BuildError as error:  # the layer knows the shapes, the node the user's line
        raise BuildError(f"{name}: {error.problem}", fix=error.fix, at=source_line(ctx.current_node)) from error


_TORCH_DTYPES = {"BF16": torch.bfloat16, "HALF": torch.float16, "FLOAT": torch.float32}
_CONVERTERS: dict[Any, Callable[..., Any]] = {
    **{getattr(md, op).default: _collective(op) for op in layers.OPERATIONS},
    md.attention.default: _attention,
}
