"""Converters of the collective IR for Torch-TensorRT's registry.

They take the place of its own collective converters, which know the group of all ranks only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.fx import Node

import torchtrt_md.lowering.ops  # noqa: F401  defines torch.ops.torchtrt_md
from torchtrt_md.build import held_numbers, layers, pairs, probes, quantized_products, quantizers
from torchtrt_md.build.flavour import PORTABLE, flavour
from torchtrt_md.build.torch_trt import load
from torchtrt_md.errors import BuildError, TargetError
from torchtrt_md.graph.source import source_line

md = torch.ops.torchtrt_md
# Torch-TensorRT's settings have no target like ours, and a converter gets nothing else.
_target: ContextVar[str] = ContextVar("target", default=PORTABLE)


@contextmanager
def converting_for(target: str) -> Iterator[None]:
    """Convert for this target; without it for a portable one, which has no ring attention."""
    token = _target.set(target)
    try:
        yield
    finally:
        _target.reset(token)


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
        values = dict(zip(names, args, strict=False))  # what is sent may be left out
        x, size = _operand(ctx, values["x"], f"{name}_operand"), values["size"]
        dims = [values[d] for d in ("dim", "split_dim", "concat_dim") if d in values]
        assert not any(dims), f"{name} acts on dims {dims}; lowering moves collectives to dim 0"
        assert not values.get("exchange_dtype"), (
            f"{name} sends {values['exchange_dtype']}; lowering has that between engines only"
        )
        dtype, root = x.dtype.name, values.get("src", layers.NO_ROOT)
        if dtype == "INT64" and op in layers.MOVES and not probes.moves(op, dtype):
            return _in_words(ctx, x, op, size, root, name)
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
            root=root,
        )

    return convert


def _in_words(ctx: Any, x: Any, op: str, size: int, root: int, name: str) -> Any:
    """Integers of 64 bits are sent as two of 32, side by side in one collective."""
    constants = (torch.tensor([[value]]) for value in (layers.WORD, layers.WORD // 2))
    word, half = (_operand(ctx, c, f"{name}_{what}") for c, what in zip(constants, ("word", "half"), strict=True))
    return layers.add_in_words(flavour(), ctx.net, x, op, size, root, word, half)


def _reaches_attention(node: Node) -> bool:
    """Does an attention depend on this node?  TensorRT fuses what leads up to one."""
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if user.target in (md.attention.default, md.context_attention.default):
                return True
            if user not in seen:
                seen.add(user)
                pending.append(user)
    return False


def _attention(ctx: Any, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    q, k, v, mask, is_causal, scale, _ = args  # heads are grouped wherever their numbers differ
    q, k, v = _queries_keys_values(ctx, (q, k, v), name)
    if mask is not None:
        mask = _operand(ctx, mask, f"{name}_mask")
        rank = len(mask.shape)
        if rank < 4:  # the layer takes masks of four dims
            mask = layers.viewed(ctx.net, mask, (*(1,) * (4 - rank), *mask.shape))
    scales = _scales(ctx, q, scale, name)
    with _at(ctx.current_node, name):
        return layers.add_attention(flavour(), ctx.net, q, k, v, mask, is_causal, scales)


def _context_attention(ctx: Any, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    q, k, v, is_causal, scale, _, strategy, _, size, *hides = args
    assert strategy == "ring", f"{name} is by {strategy}; lowering rewrites all strategies but ring"
    assert not any(x is not None for x in hides), f"{name} hides keys; lowering refuses such a ring in an engine"
    with _at(ctx.current_node, name):
        flavour().check_ring(_target.get())
        q, k, v = _queries_keys_values(ctx, (q, k, v), name)
        _check_ring_operands(q, k, v, is_causal)
        return layers.add_attention(flavour(), ctx.net, q, k, v, None, False, _scales(ctx, q, scale, name), ranks=size)


def _check_ring_operands(q: Any, k: Any, v: Any, is_causal: bool) -> None:
    """Refuse what TensorRT's attention over several ranks is not documented for."""
    split = 'use placement="split", where PyTorch does the ring'
    dtype = q.dtype.name
    if dtype not in ("HALF", "BF16"):
        raise BuildError(f"ring attention inside an engine is for float16 and bfloat16, not {dtype}", fix=split)
    if is_causal:
        raise BuildError(
            "ring attention inside an engine cannot be causal: TensorRT's causal mask knows nothing of ranks",
            fix=split,
        )
    (batch, _, _, width), kv = tuple(q.shape), tuple(k.shape)
    if kv != tuple(v.shape) or (kv[0], kv[3]) != (batch, width):
        raise BuildError(
            f"ring attention inside an engine takes keys and values of one shape, of the queries' batch and width, not"
            f" q {tuple(q.shape)}, k {kv} and v {tuple(v.shape)}",
            fix=split,
        )


def _queries_keys_values(ctx: Any, operands: tuple[Any, Any, Any], name: str) -> tuple[Any, Any, Any]:
    q, k, v = (_operand(ctx, x, f"{name}_{role}") for x, role in zip(operands, "qkv", strict=True))
    return q, k, v


def _scales(ctx: Any, q: Any, scale: float | None, name: str) -> Any:
    """The scale as a constant, in q's dtype where it is exact there."""
    factor = layers.default_scale(q.shape[-1]) if scale is None else scale
    # Rounded to 16 bits a scale would be off by up to 2 ** -9 of itself, everywhere alike: another temperature.
    factors = torch.full((1, 1, 1, 1), factor, dtype=_TORCH_DTYPES[q.dtype.name])
    if factors.item() != factor:
        factors = torch.full((1, 1, 1, 1), factor, dtype=torch.float32)
    return _operand(ctx, factors, f"{name}_scale")


@contextmanager
def _at(node: Node, name: str) -> Iterator[None]:
    """Name the node and the user's line in errors of what knows only shapes and targets."""
    try:
        yield
    except BuildError as error:
        kind = TargetError if isinstance(error, TargetError) else BuildError
        raise kind(f"{name}: {error.problem}", fix=error.fix, at=source_line(node)) from error


_TORCH_DTYPES = {"BF16": torch.bfloat16, "HALF": torch.float16, "FLOAT": torch.float32}
_CONVERTERS: dict[Any, Callable[..., Any]] = {
    **{getattr(md, op).default: _collective(op) for op in layers.OPERATIONS},
    md.attention.default: _attention,
    md.context_attention.default: _context_attention,
    md.fake_quantize.default: quantizers.convert,
    md.eight_bits.default: quantized_products.convert,
    md.scale_of_eight_bits.default: quantized_products.convert_scale,
    md.held_numbers.default: held_numbers.convert,
    md.rotate_every_two.default: pairs.convert,
}
