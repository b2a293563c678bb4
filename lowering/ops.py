"""The collective IR: the few functional ops that every collective of a program is rewritten into.

``axis`` is the name of a mesh axis and ``size`` the number of ranks along it, so a graph says all that
its shapes depend on and holds no process group.  Semantics, for the ``size`` ranks of a group in order:

    all_reduce(x, op)                        every rank: x of all ranks, reduced
    all_gather(x, dim)                       every rank: x of all ranks, concatenated on dim
    reduce_scatter(x, op, dim)               rank i: chunk i, on dim, of x of all ranks, reduced
    all_to_all(x, split_dim, concat_dim)     rank i: chunk i, on split_dim, of every rank, concatenated on concat_dim
    broadcast(x, src)                        every rank: x of rank src of the group
    permute_tensor(x, shift)                 rank i: x of rank i - shift, counted round the group
    shard(x, dim)                            rank i: chunk i, on dim, of its own x; no communication
    split_sequence(x, dim)                   x, whole: from here on each rank shall have chunk i of dim only
    gather_sequence(x, dim)                  x, whole: from here on every rank shall have all of it again
    attention(q, k, v, ...)                  scaled_dot_product_attention as one node
    context_attention(q, k, v, ...)          the same, q, k and v each holding this rank's part of the sequence
    ring_attention(q, k, v, coordinate, step, ...)   attention over the block that a ring has in this step, and its
                                             log-sum-exp; no communication
    grouped_mm(x, weight, ends)              rows of x times a matrix each: rows up to ends[0] by weight[0], from there
                                             to ends[1] by weight[1], and so on; rows behind the last are undefined
    fake_quantize(x, amax, num_bits, ...)    x rounded to few bits, by a scale that amax gives, and as wide as before

``exchange_dtype`` is what ``all_gather``, ``all_to_all`` and ``permute_tensor`` send: None for x as it is, and
``"float8"`` for its rows in float8 (:mod:`torchtrt_md.lowering.float8_rows`): they then give what they would of x
rounded so.

Each has a shape rule and an eager rule over ``torch.distributed`` here, and one for all ranks at once in
:mod:`torchtrt_md.verification.simulate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchtrt_md.errors import CaptureError, CollectiveError, MeshError
from torchtrt_md.lowering.attention_math import ring_attention_block
from torchtrt_md.lowering.float8_rows import DTYPES, packed_bytes, rounded
from torchtrt_md.lowering.float8_rows import FLOAT8 as FLOAT8_ROWS
from torchtrt_md.lowering.quantize_math import FLOAT8 as FLOAT8
from torchtrt_md.lowering.quantize_math import fake_quantized
from torchtrt_md.mesh import axis_names

NAMESPACE = "torchtrt_md"
REDUCE_OPS = ("sum", "avg", "max", "min", "product")
_aten = torch.ops.aten
# What of a whole is the same of what it is of each part, and what finds it among those.
OF_PARTS: Mapping[Any, Any] = {
    **dict.fromkeys((_aten.amax.default, _aten.max.default), _aten.amax.default),
    **dict.fromkeys((_aten.amin.default, _aten.min.default), _aten.amin.default),
}

_c10d = torch.ops._c10d_functional
_device_mesh: ContextVar[DeviceMesh | None] = ContextVar("device_mesh", default=None)


@contextmanager
def use_device_mesh(device_mesh: DeviceMesh) -> Iterator[None]:
    """Let the eager rules communicate over the groups of this mesh."""
    token = _device_mesh.set(device_mesh)
    try:
        yield
    finally:
        _device_mesh.reset(token)


def _group(axis: str, size: int) -> dist.ProcessGroup:
    device_mesh = _device_mesh.get()
    if device_mesh is None:
        raise MeshError(
            f"a collective on axis {axis!r} was run with no mesh",
            fix="run the graph under torchtrt_md.lowering.ops.use_device_mesh(...)",
        )
    names = axis_names(device_mesh)  # also of a mesh whose dims have none
    if axis not in names:
        raise MeshError(
            f"the mesh has no axis {axis!r}; it has {', '.join(map(repr, names))}",
            fix="name one of these, or run the graph on the mesh that it was made for",
        )
    group = device_mesh.get_group(names.index(axis))
    if group.size() != size:
        raise MeshError(
            f"the graph was made for {size} ranks on axis {axis!r}, the mesh has {group.size()}",
            fix="capture again for this mesh",
        )
    return group


def _wait(pending: Tensor) -> Tensor:
    result: Tensor = _c10d.wait_tensor(pending)
    return result


def chunk_size(extent: int, size: int, what: str) -> int:
    """``extent / size``.

    Raises:
        CollectiveError: it is not a whole number.
    """
    if extent % size:
        raise CollectiveError(
            f"{what} of {extent} does not divide by {size} ranks: {extent % size} left over",
            fix=f"use a multiple of {size}: {extent - extent % size} or {extent + size - extent % size}",
        )
    return extent // size


def check_reduction(op: str, dtype: torch.dtype) -> None:
    """Refuse what backends do not agree on.

    Raises:
        CollectiveError: not one of ``REDUCE_OPS``, or an average of integers, which each backend rounds differently.
    """
    if op not in REDUCE_OPS:
        raise CollectiveError(f"reduces by {op!r}", fix=f"reduce by one of {', '.join(REDUCE_OPS)}")
    if op == "avg" and not dtype.is_floating_point:
        raise CollectiveError(f"averages {dtype} values", fix="reduce by sum and divide, or average floating values")


def check_exchange_dtype(exchange_dtype: str | None, x: Tensor, *dims: int) -> None:
    """Refuse what cannot be sent so.

    Args:
        dims: of the operand, which the collective splits, or joins on.

    Raises:
        CollectiveError: no such way, a dtype that it is not for, or an operand without rows that stay whole.
    """
    if exchange_dtype not in (None, FLOAT8_ROWS):
        raise CollectiveError(f"sends {exchange_dtype!r}", fix=f"send {FLOAT8_ROWS!r}, or what there is: None")
    if exchange_dtype and x.dtype not in DTYPES:
        raise CollectiveError(
            f"sends {x.dtype} in float8", fix="leave exchange_dtype out, or use a model in 16 or 32 bits"
        )
    if exchange_dtype and (x.dim() < 2 or any(dim % x.dim() == x.dim() - 1 for dim in dims)):
        raise CollectiveError(
            f"sends {list(x.shape)} in float8, split or joined on {list(dims)}",
            fix="send rows, along the last dim, that stay whole",
        )


def _sent(x: Tensor, exchange_dtype: str | None, *dims: int) -> Tensor:
    """The operand as the others get it."""
    check_exchange_dtype(exchange_dtype, x, *dims)
    return rounded(x) if exchange_dtype else x


def _resized(x: Tensor, **factors: Any) -> Tensor:
    shape = list(x.shape)
    for dim, extent in factors["dims"].items():
        shape[dim] = extent
    return x.new_empty(shape)


@torch.library.custom_op(f"{NAMESPACE}::all_reduce", mutates_args=())
def all_reduce(x: Tensor, op: str, axis: str, size: int) -> Tensor:
    """[...] of every rank -> [...], the same on all, of the same dtype.

    Raises:
        CollectiveError: an ``op`` that is none of ``REDUCE_OPS``, or ``avg`` of integers.
    """
    check_reduction(op, x.dtype)
    return _wait(_c10d.all_reduce(x.contiguous(), op, _group(axis, size).group_name))


@all_reduce.register_fake
def _(x: Tensor, op: str, axis: str, size: int) -> Tensor:
    check_reduction(op, x.dtype)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op(f"{NAMESPACE}::all_gather", mutates_args=())
def all_gather(x: Tensor, dim: int, axis: str, size: int, exchange_dtype: str | None = None) -> Tensor:
    """[.., n, ..] of every rank -> [.., n * size, ..], in the order of ranks on ``dim``; any dtype.

    Raises:
        CollectiveError: an operand that cannot be sent as ``exchange_dtype``.
    """
    x = _sent(x, exchange_dtype, dim)
    out = _wait(_c10d.all_gather_into_tensor(x.contiguous(), size, _group(axis, size).group_name))
    return torch.cat(out.chunk(size), dim) if dim else out


@all_gather.register_fake
def _(x: Tensor, dim: int, axis: str, size: int, exchange_dtype: str | None = None) -> Tensor:
    check_exchange_dtype(exchange_dtype, x, dim)
    return _resized(x, dims={dim: x.shape[dim] * size})


@torch.library.custom_op(f"{NAMESPACE}::reduce_scatter", mutates_args=())
def reduce_scatter(x: Tensor, op: str, dim: int, axis: str, size: int) -> Tensor:
    """[.., n, ..] of every rank -> [.., n / size, ..]: of the reduced tensor the rank's chunk on ``dim``.

    Raises:
        CollectiveError: as for ``all_reduce``; the ranks do not divide n.
    """
    check_reduction(op, x.dtype)
    by_rank = (torch.cat(x.chunk(size, dim)) if dim else x).contiguous()
    return _wait(_c10d.reduce_scatter_tensor(by_rank, op, size, _group(axis, size).group_name))


@reduce_scatter.register_fake
def _(x: Tensor, op: str, dim: int, axis: str, size: int) -> Tensor:
    check_reduction(op, x.dtype)
    return _resized(x, dims={dim: chunk_size(x.shape[dim], size, f"reduce_scatter on dim {dim}")})


@torch.library.custom_op(f"{NAMESPACE}::all_to_all", mutates_args=())
def all_to_all(
    x: Tensor, split_dim: int, concat_dim: int, axis: str, size: int, exchange_dtype: str | None = None
) -> Tensor:
    """[.., n, .., m, ..] -> [.., n / size, .., m * size, ..]: split on one dim, joined on another; any dtype.

    Raises:
        CollectiveError: the ranks do not divide n; an operand that cannot be sent as ``exchange_dtype``.
    """
    x = _sent(x, exchange_dtype, split_dim, concat_dim)
    by_rank = torch.stack(x.chunk(size, split_dim)).contiguous()  # channels_last operands stack to channels_last
    received = _wait(_c10d.all_to_all_single(by_rank, [1] * size, [1] * size, _group(axis, size).group_name))
    return torch.cat(received.unbind(), concat_dim)


@all_to_all.register_fake
def _(x: Tensor, split_dim: int, concat_dim: int, axis: str, size: int, exchange_dtype: str | None = None) -> Tensor:
    check_exchange_dtype(exchange_dtype, x, split_dim, concat_dim)
    chunk = chunk_size(x.shape[split_dim], size, f"all_to_all on dim {split_dim}")
    if split_dim % x.dim() == concat_dim % x.dim():
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return _resized(x, dims={split_dim: chunk, concat_dim: x.shape[concat_dim] * size})


@torch.library.custom_op(f"{NAMESPACE}::broadcast", mutates_args=())
def broadcast(x: Tensor, src: int, axis: str, size: int) -> Tensor:
    """[...] -> [...]: that of rank ``src`` of the axis; any dtype."""
    group = _group(axis, size)
    out = x.clone(memory_format=torch.contiguous_format)
    dist.broadcast(out, group=group, group_src=src)
    return out


@broadcast.register_fake
def _(x: Tensor, src: int, axis: str, size: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op(f"{NAMESPACE}::permute_tensor", mutates_args=())
def permute_tensor(x: Tensor, shift: int, axis: str, size: int, exchange_dtype: str | None = None) -> Tensor:
    """[...] -> [...] of rank i - ``shift``: PyTorch's functional collective of this name, for a rotation; any dtype.

    As there, it is an all-to-all of uneven parts.

    Raises:
        CollectiveError: an operand that cannot be sent as ``exchange_dtype``.
    """
    x = _sent(x, exchange_dtype)
    group = _group(axis, size)
    mine = dist.get_rank(group)
    sent, received = [0] * size, [0] * size
    sent[(mine + shift) % size] = received[(mine - shift) % size] = x.numel()
    out = _wait(_c10d.all_to_all_single(x.reshape(-1), received, sent, group.group_name))
    return out.view(x.shape)


@permute_tensor.register_fake
def _(x: Tensor, shift: int, axis: str, size: int, exchange_dtype: str | None = None) -> Tensor:
    check_exchange_dtype(exchange_dtype, x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op(f"{NAMESPACE}::shard", mutates_args=())
def shard(x: Tensor, dim: int, axis: str, size: int) -> Tensor:
    """[.., n, ..] -> [.., n / size, ..]: this rank's chunk on ``dim``, without communication; any dtype.

    Raises:
        CollectiveError: the ranks do not divide n.
    """
    mine = dist.get_rank(_group(axis, size))
    return x.chunk(size, dim)[mine].clone(memory_format=torch.contiguous_format)


@shard.register_fake
def _(x: Tensor, dim: int, axis: str, size: int) -> Tensor:
    return _resized(x, dims={dim: chunk_size(x.shape[dim], size, f"shard on dim {dim}")})


# What a plan asks for.  The model is traced whole, so both are the identity; the sequence analysis makes them shard
# and all_gather.  Their results are contiguous, as those are.
@torch.library.custom_op(f"{NAMESPACE}::split_sequence", mutates_args=())
def split_sequence(x: Tensor, dim: int, axis: str, size: int) -> Tensor:
    """[...] -> [...]: a mark, see above; lowering puts ``shard`` in its place."""
    return x.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op(f"{NAMESPACE}::gather_sequence", mutates_args=())
def gather_sequence(x: Tensor, dim: int, axis: str, size: int) -> Tensor:
    """[...] -> [...]: a mark, see above; lowering puts ``all_gather`` in its place."""
    return x.clone(memory_format=torch.contiguous_format)


@split_sequence.register_fake
@gather_sequence.register_fake
def _(x: Tensor, dim: int, axis: str, size: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    *leading, tokens, _ = q.shape
    for dim, extent in enumerate(leading):  # queries of one batch or head serve all of the keys'
        leading[dim] = k.shape[dim] if extent == 1 else extent
    return q.new_empty([*leading, tokens, v.shape[-1]])


@torch.library.custom_op(f"{NAMESPACE}::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, enable_gqa: bool
) -> Tensor:
    """q [.., H, L, E], k [.., Hkv, S, E], v [.., Hkv, S, Ev], mask [.., L, S] -> [.., H, L, Ev], as PyTorch's."""
    out = F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    return out.contiguous()


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, enable_gqa: bool
) -> Tensor:
    return _attended(q, k, v)


@torch.library.custom_op(f"{NAMESPACE}::context_attention", mutates_args=())
def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    strategy: str,
    axis: str,
    size: int,
    mask: Tensor | None = None,
    lengths: list[int] | None = None,
) -> Tensor:
    """Attention of which each rank has a part of queries, keys and values, in the order of the ranks.

    Args:
        q: [B, H, Sq/P, D], as are k and v.
        is_causal, scale, enable_gqa: as in ``attention``; with ``is_causal`` there is no mask.
        strategy: of ``parallel.STRATEGIES``.
        axis, size: over which the sequence is split.
        mask: as ``scaled_dot_product_attention`` has it, for all ranks' queries and keys; equal on all ranks.
        lengths: of the parts that the keys consist of, how many keys a rank has and how many there are, one after the
            other; those behind the end of a part are not to be seen.  None where there are none.
    """
    whole_k, whole_v = all_gather(k, 2, axis, size), all_gather(v, 2, axis, size)
    mine = dist.get_rank(_group(axis, size))
    seen = seen_by(q, whole_k, is_causal, mask, lengths, mine, size)
    attended: Tensor = attention(q, whole_k, whole_v, seen, False, scale, enable_gqa)
    return attended


@context_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    strategy: str,
    axis: str,
    size: int,
    mask: Tensor | None = None,
    lengths: list[int] | None = None,
) -> Tensor:
    return _attended(q, k, v)


@torch.library.custom_op(f"{NAMESPACE}::ring_attention", mutates_args=())
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coordinate: Tensor | None,
    step: int,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    size: int,
    mask: Tensor | None = None,
    lengths: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`~torchtrt_md.lowering.attention_math.ring_attention_block`; ``coordinate`` is int32 [1], and there where
    the rank matters only."""
    mine = 0 if coordinate is None else int(coordinate.item())
    return ring_attention_block(q, k, v, mine, step, is_causal, scale, enable_gqa, size, mask, lengths)


@ring_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coordinate: Tensor | None,
    step: int,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    size: int,
    mask: Tensor | None = None,
    lengths: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    out = _attended(q, k, v)
    return out, out.new_empty(out.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))


def seen_by(
    q: Tensor, whole_k: Tensor, is_causal: bool, mask: Tensor | None, lengths: list[int] | None, index: int, size: int
) -> Tensor | None:
    """The mask for the ``index``-th part of the queries over all keys, from the arguments of ``context_attention``."""
    if is_causal:
        return causal_rows(q, whole_k, index)
    if mask is not None:
        return mask.chunk(size, -2)[index] if mask.shape[-2] > 1 else mask
    if not lengths:
        return None
    parts = zip(lengths[::2], lengths[1::2], strict=True)
    by_rank = [torch.arange(size * held, device=q.device).view(size, held) < total for held, total in parts]
    return torch.cat(by_rank, 1).view(1, -1)


@torch.library.custom_op(f"{NAMESPACE}::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [S, K], weight [E, K, N], ends int [E] -> [S, N].  PyTorch's kernel takes 16-bit floats only, on GPUs."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        product: Tensor = _aten._grouped_mm.default(x, weight, ends.to(torch.int32))
        return product
    out = x.new_zeros(x.shape[0], weight.shape[2])
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        out[begin:end] = x[begin:end] @ weight[expert]
        begin = end
    return out


@grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op(f"{NAMESPACE}::fake_quantize", mutates_args=(), tags=(torch.Tag.pointwise,))
def fake_quantize(x: Tensor, amax: Tensor, num_bits: int, exponent_bits: int, narrow_range: bool) -> Tensor:
    """:func:`~torchtrt_md.lowering.quantize_math.fake_quantized`: each element by itself, as TensorRT's Q and DQ do."""
    return fake_quantized(x, amax, num_bits, exponent_bits, narrow_range)


@fake_quantize.register_fake
def _(x: Tensor, amax: Tensor, num_bits: int, exponent_bits: int, narrow_range: bool) -> Tensor:
    trailing = x.shape[x.dim() - amax.dim() :]
    if amax.dim() > x.dim() or any(n not in (1, of) for n, of in zip(amax.shape, trailing, strict=True)):
        raise CaptureError(
            f"a quantizer has an amax of {list(amax.shape)}, and quantizes {list(x.shape)}",
            fix="calibrate it with an amax of one element, or of those of one dim; under tensor parallelism, let a"
            " named style cut the layer that has the quantizer",
        )
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def causal_rows(q: Tensor, whole_k: Tensor, index: int) -> Tensor:
    """The rows of the causal mask, True where attended, for the ``index``-th part of the queries."""
    rows = torch.arange(q.shape[-2], device=q.device) + index * q.shape[-2]
    return rows[:, None] >= torch.arange(whole_k.shape[-2], device=q.device)


_ops = torch.ops.torchtrt_md
COLLECTIVES = frozenset(
    {
        _ops.all_reduce.default,
        _ops.all_gather.default,
        _ops.reduce_scatter.default,
        _ops.all_to_all.default,
        _ops.broadcast.default,
        _ops.permute_tensor.default,
    }
)


def is_collective(node: torch.fx.Node) -> bool:
    """Does this node communicate?"""
    return node.op == "call_function" and node.target in COLLECTIVES


@dataclass(frozen=True)
class Packing:
    """How rows in float8 are sent: the operand in so many ``parts``, of so many ``bytes`` each, and how many arrive."""

    parts: int
    arrive: int
    bytes: int


def packing_of(node: torch.fx.Node) -> Packing | None:
    """How this node sends its operand, where it is a collective that sends it as something else."""
    args = bound_args(node) if is_collective(node) else {}
    if not args.get("exchange_dtype"):
        return None
    parts = args["size"] if node.target is _ops.all_to_all.default else 1
    arrive = 1 if node.target is _ops.permute_tensor.default else args["size"]
    return Packing(parts, arrive, packed_bytes(args["x"].meta["val"].shape, parts))


def is_sequence_mark(node: torch.fx.Node) -> bool:
    """Does this node say where a plan splits or gathers a sequence?"""
    return node.target in (_ops.split_sequence.default, _ops.gather_sequence.default)


def bound_args(node: torch.fx.Node) -> dict[str, Any]:
    """All arguments of an op node by name, defaults included, in the order of the op's schema."""
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema.arguments
    values = {a.name: a.default_value for a in schema if a.has_default_value()}
    values.update(zip((a.name for a in schema), node.args, strict=False))
    values.update(node.kwargs)
    return {a.name: values[a.name] for a in schema}
