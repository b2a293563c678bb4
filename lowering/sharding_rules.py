"""What every op does to a sharded dim: :func:`infer`, the table :data:`RULES`, and the functions that it names.

A rule takes the :class:`~torchtrt_md.lowering.sharding.Call` and returns the sharding of its result: one for
all results of the op, or a list with one for each.  It is asked only when an operand is sharded.  Most rules
say no more than where each dim goes.  An op that is not in the table is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._ops import OpOverload

from torchtrt_md.lowering import sharding_ir as ir
from torchtrt_md.lowering import sharding_moves as moves
from torchtrt_md.lowering.ops import OF_PARTS
from torchtrt_md.lowering.sharding import (
    GATHER_FIRST,
    Call,
    Dims,
    Result,
    State,
    aligned,
    combine,
    keeping,
    without,
)
from torchtrt_md.program import value_of

Rule: TypeAlias = Callable[[Call], Result]

aten, md = torch.ops.aten, ir.md

_EXPERTS = (
    "where it sorts tokens by their experts, use a form of the experts that does not: in transformers,"
    " model.set_experts_implementation('batched_mm')"
)
_ATTEND = (
    "use torch.nn.functional.scaled_dot_product_attention so that the attention is seen, and communicates by itself"
)


def infer(call: Call) -> Result:
    """The sharding of a node's result.

    Raises:
        ShardingError: the op would compute something else on the shards than on the whole.
    """
    values = call.node.meta.get("val")
    if not call.sharded and not ir.is_of_axis(call):
        return [None] * len(values) if isinstance(values, (tuple, list)) else None
    rule = _rule_for(call)
    result = rule(call) if rule else call.refuse_unknown()
    if isinstance(values, (tuple, list)) and not isinstance(result, list):
        result = [result if isinstance(v, Tensor) and v.numel() else None for v in values]
    if not _fits(call, result, values):
        call.refuse_unknown()
    return result


def _rule_for(call: Call) -> Rule | None:
    target = call.node.target
    if target is operator.getitem:
        return getitem
    if not isinstance(target, OpOverload):
        return None
    # The tag is the overload's: aten.max.other is elementwise and aten.max.dim is not.  aten.equal has it too.
    if torch.Tag.pointwise in target.tags and isinstance(call.node.meta["val"], Tensor):
        return None if torch.Tag.nondeterministic_seeded in target.tags else elementwise
    packet = target.overloadpacket
    # Functionalization may leave view_copy, slice_copy, ... in place of the views.
    of_view = getattr(aten, packet.__name__.removesuffix("_copy"), None) if target.namespace == "aten" else None
    return RULES.get(packet) or RULES.get(of_view)


def _fits(call: Call, result: Result, values: Any) -> bool:
    """Does the claim fit the shape that the op really returns, whatever the rule thought of it?"""
    pairs = zip(result, values, strict=True) if isinstance(result, list) else [(result, values)]
    return all(
        state is None or value.shape[state.dim : state.dim + 1] == (state.whole(call.size),) for state, value in pairs
    )


def getitem(call: Call) -> Result:
    source, index = call.node.args
    states = call.states[source]  # type: ignore[index]
    return states[index] if isinstance(states, list) else call.refuse_unknown()  # type: ignore[index]


def elementwise(call: Call) -> Result:
    operands = call.node.all_input_nodes
    ndim = max(value_of(n).ndim for n in operands)
    return combine(call, *((n, aligned(n, ndim)) for n in operands))


def dropout(call: Call) -> Result:
    if call.args["train"] is not False and call.args["p"]:
        call.refuse("draws other random numbers on each rank than on the whole", "call model.eval() before the capture")
    return call.sole(call.args["input"])


def unread(call: Call) -> Result:
    """The op looks at the operand's dtype, device or shape, and not at what it holds."""
    return None


def reduction(call: Call) -> Result:
    x, ndim = call.args["self"], value_of(call.args["self"]).ndim
    dims = _dims(call.args.get("dim"), ndim)
    return combine(call, (x, keeping(ndim, dims) if call.args.get("keepdim") else without(ndim, dims)))


def extreme(call: Call) -> Result:
    """As :func:`reduction`; over the sharded dim each rank finds that of its part, and the ranks compare theirs."""
    x, ndim = call.args["self"], value_of(call.args["self"]).ndim
    state = call.state(x)
    over = call.node.target in OF_PARTS and state and state.dim in {d % ndim for d in _dims(call.args.get("dim"), ndim)}
    return None if over else reduction(call)


def along(call: Call) -> Result:
    """Reads across one dim, which the result has too."""
    x = call.args["self"]
    return combine(call, (x, keeping(value_of(x).ndim, [call.args["dim"]])))


def sort(call: Call) -> Result:
    """As :func:`along`; what is sorted across a sequence is mostly the tokens of all experts."""
    x = call.args["self"]
    dims = keeping(value_of(x).ndim, [call.args["dim"]])
    return combine(call, (x, dims), fix=f"{GATHER_FIRST}; {_EXPERTS}")


def along_dims(call: Call) -> Result:
    x, ndim = call.args["self"], len(call.shape)
    return combine(call, (x, keeping(ndim, _dims(call.args["dims"], ndim))))


def along_last_two(call: Call) -> Result:
    return combine(call, (call.args["self"], keeping(len(call.shape), [-2, -1])))


def along_last(call: Call) -> Result:
    x = call.args["self"]
    return combine(call, (x, keeping(value_of(x).ndim, [-1])))


def _dims(dims: Any, ndim: int) -> Iterable[int]:
    """Given dims as a list; none given means all."""
    return [dims] if isinstance(dims, int) else dims or range(ndim)


def pad(call: Call) -> Result:
    x, amounts, ndim = call.args["self"], call.args["pad"], len(call.shape)
    padded = [ndim - 1 - i // 2 for i, amount in enumerate(amounts) if amount]
    return combine(call, (x, keeping(ndim, padded)), across="pads every rank's part of the sharded dim")


def norm_of_last(call: Call) -> Result:
    x, count = call.args["input"], len(call.args["normalized_shape"])
    ndim = value_of(x).ndim
    weights = ((call.args.get(name), [None] * count) for name in ("weight", "bias"))
    return combine(call, (x, keeping(ndim, range(ndim - count, ndim))), *weights)


def within_samples(call: Call) -> Result:
    """Everything is mixed but the samples of the batch."""
    name = call.node.target.overloadpacket.__name__  # type: ignore[union-attr]
    x, weight, bias = (call.args[name] for name in ("input", "weight", "bias"))
    apart: Dims = [0, *[None] * (value_of(x).ndim - 1)]
    across = f"is a {name}, which mixes positions across the shard"
    return combine(call, (x, apart), *((w, [None] * 8) for w in (weight, bias)), across=across)


def product(call: Call) -> Result:
    left, right = _first(call, 2)
    return _product(call, left, right)


def product_and_sum(call: Call) -> Result:
    addend, left, right = _first(call, 3)
    return _product(call, left, right, (addend, aligned(addend, len(call.shape))))


def _first(call: Call, count: int) -> list[Any]:
    assert isinstance(call.node.target, OpOverload)
    return [call.args[a.name] for a in call.node.target._schema.arguments[:count]]


def _product(call: Call, left: Any, right: Any, *addends: tuple[object, Dims]) -> State:
    """[..., M, K] x [..., K, N] as torch.matmul has it: a vector lacks M or N."""
    ndim, l_ndim, r_ndim = len(call.shape), value_of(left).ndim, value_of(right).ndim
    batch = ndim - (l_ndim > 1) - (r_ndim > 1)
    rows: Dims = [None] if l_ndim == 1 else [*range(batch - l_ndim + 2, batch + 1), None]
    columns: Dims = [None] if r_ndim == 1 else [*range(batch - r_ndim + 2, batch), None, ndim - 1]
    l_state, r_state = call.state(left), call.state(right)
    if l_state and r_state and l_state.dim == l_ndim - 2 and r_state.dim == r_ndim - 1 and r_ndim > 1:
        call.refuse("multiplies the rows of one shard with those of another, as queries with keys", _ATTEND)
    across = "sums over the sharded dim, which mixes positions across the shard"
    return combine(call, (left, rows), (right, columns), *addends, across=across)


def scaled_product(call: Call) -> Result:
    """A product of narrow numbers, with scales of rows and of columns, or one for all."""
    left, right = _first(call, 2)
    more = [call.args.get(name) for name in ("scale_a", "scale_b", "bias", "scale_result")]
    return _product(call, left, right, *((x, aligned(x, 2)) for x in more if x is not None))


def linear(call: Call) -> Result:
    x, weight, bias = (call.args[name] for name in ("input", "weight", "bias"))
    last = len(call.shape) - 1
    columns: Dims = [last, None] if value_of(weight).ndim == 2 else [None]
    across = "sums over the sharded dim, which mixes positions across the shard"
    return combine(call, (x, keeping(value_of(x).ndim, [-1])), (weight, columns), (bias, [last]), across=across)


RULES: dict[Any, Rule] = {
    # Each position by itself.  Ops with torch.Tag.pointwise need no entry.
    **dict.fromkeys((aten._to_copy, aten.to, aten.clone, aten.contiguous, aten.copy, aten.fill), elementwise),
    **dict.fromkeys(
        (aten.detach, aten.alias, aten.lift_fresh_copy, aten._neg_view, aten.log_sigmoid_forward), elementwise
    ),
    **dict.fromkeys((aten._conj, aten.complex, aten.polar, aten.real, aten.imag), elementwise),
    **dict.fromkeys((aten.masked_fill, aten.rsub, aten.floor_divide, aten.hardswish), elementwise),
    **dict.fromkeys((aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like), elementwise),
    **dict.fromkeys((aten.new_empty, aten.new_zeros, aten.new_ones, aten.new_full), unread),
    aten._assert_tensor_metadata: unread,
    **dict.fromkeys((aten.dropout, aten.native_dropout), dropout),
    # Moves.
    **dict.fromkeys((aten.view, aten._unsafe_view, aten.reshape, aten._reshape_copy), moves.view),
    **dict.fromkeys((aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze), moves.view),
    **dict.fromkeys((aten.transpose, aten.t), moves.transpose),
    aten.permute: moves.permute,
    aten.expand: moves.expand,
    aten.repeat: moves.repeat,
    aten.view_as_real: moves.keep,
    aten.view_as_complex: along_last,
    **dict.fromkeys((aten.slice, aten.narrow), moves.slice_),
    aten.select: moves.select,
    aten.unbind: moves.unbind,
    **dict.fromkeys((aten.split, aten.split_with_sizes, aten.unsafe_split), moves.split),
    **dict.fromkeys((aten.unsafe_split_with_sizes, aten.chunk, aten.unsafe_chunk), moves.split),
    aten.cat: moves.cat,
    aten.stack: moves.stack,
    # Indexing.
    **dict.fromkeys((aten.index, aten._unsafe_index), moves.index),
    aten.index_select: moves.index_select,
    aten.embedding: moves.embedding,
    aten.gather: moves.gather,
    aten.slice_scatter: moves.slice_scatter,
    aten.select_scatter: moves.select_scatter,
    # Reading across some dims, all of them where none are given.
    **dict.fromkeys((aten.sum, aten.nansum, aten.mean, aten.prod, aten.logsumexp, aten.count_nonzero), reduction),
    **dict.fromkeys((aten.amax, aten.amin, aten.max, aten.min), extreme),
    **dict.fromkeys((aten.argmax, aten.argmin), reduction),
    **dict.fromkeys((aten.var, aten.std, aten.var_mean, aten.std_mean, aten.any, aten.all), reduction),
    **dict.fromkeys((aten.norm, aten.linalg_vector_norm, aten.median, aten.mode, aten.kthvalue), reduction),
    **dict.fromkeys((aten.softmax, aten._softmax, aten._safe_softmax, aten.log_softmax, aten._log_softmax), along),
    **dict.fromkeys((aten.cumsum, aten.cumprod, aten.cummax, aten.cummin, aten.logcumsumexp), along),
    **dict.fromkeys((aten.sort, aten.argsort, aten.topk), sort),
    aten.glu: along,
    **dict.fromkeys((aten.flip, aten.roll), along_dims),
    **dict.fromkeys((aten.tril, aten.triu), along_last_two),
    aten.constant_pad_nd: pad,
    # Normalization and convolution.  Batch norm is left out: in training it is over all positions.
    **dict.fromkeys((aten.layer_norm, aten.native_layer_norm, aten.rms_norm, aten._fused_rms_norm), norm_of_last),
    **dict.fromkeys((aten.group_norm, aten.native_group_norm, aten.convolution), within_samples),
    # Products.
    **dict.fromkeys((aten.mm, aten.bmm, aten.matmul, aten.mv, aten.dot, aten._int_mm), product),
    aten._scaled_mm: scaled_product,
    **dict.fromkeys((aten.addmm, aten.baddbmm, aten.addmv), product_and_sum),
    aten.linear: linear,
    # The collective IR.
    md.split_sequence: ir.split_sequence,
    md.gather_sequence: ir.gather_sequence,
    **dict.fromkeys((md.all_reduce, md.all_gather, md.reduce_scatter, md.all_to_all), ir.collective),
    **dict.fromkeys((md.broadcast, md.shard), ir.collective),
    md.attention: ir.attention,
    md.context_attention: ir.context_attention,
}
