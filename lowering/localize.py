"""The end of the sequence analysis: from the shapes of the whole to those of what a rank holds.

    before    x = split_sequence(x, 1, "cp", 2)           # [B, S, 8], and the analysis says Sharded(1, (S/2,))
              y = view(x, [B, S, 2, 4])                   # [B, S, 2, 4]
              z = gather_sequence(y, 1, "cp", 2)
    after     x = shard(x, 1, "cp", 2)                    # [B, S/2, 8]
              y = view(x, [B, S/2, 2, 4])
              z = all_gather(y, 1, "cp", 2)               # [B, S, 2, 4]

Only the few ops whose arguments are sizes or positions of the sharded dim get other arguments (:data:`_ARGUMENTS`).
Every op's shape is then computed anew, from what the ranks hold of its operands: where it is not the part of the whole
that the analysis said, the graph is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from torchtrt_md.graph.results import fake_result
from torchtrt_md.graph.rewrite import emit, substitute
from torchtrt_md.lowering.ops import bound_args, is_sequence_mark
from torchtrt_md.lowering.sharding import Call, Result, Sharded, is_sharded, local_position, local_shape
from torchtrt_md.lowering.sharding_moves import bounds
from torchtrt_md.program import value_of

aten, md = torch.ops.aten, torch.ops.torchtrt_md

# Every entry of their results is the same.
_UNIFORM = {aten.full, aten.zeros, aten.ones, aten.new_full, aten.new_zeros, aten.new_ones, aten.zeros_like}
_UNIFORM |= {aten.ones_like, aten.full_like}


def localize(graph: GraphModule, axis: str, size: int, states: dict[Node, Result]) -> None:
    """Give every node the arguments and the shape that it has on a rank.

    Raises:
        ShardingError: an op's result on a rank is not the part that the analysis said.
    """
    _place_marks(graph, axis, size, states)
    held: dict[Node, Any] = {}
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        call = Call(node, axis, size, states)
        if not call.sharded and not is_sharded(states[node]):
            continue
        whole = node.meta.get("val")
        expected = _expected(states[node], whole)
        rewrite = _ARGUMENTS.get(getattr(node.target, "overloadpacket", None))
        if rewrite is not None:
            rewrite(call)
        held[node] = _computed(call, held)
        if _shapes(held[node]) != expected:
            call.refuse(f"has {_shapes(held[node])} on each rank, and {expected} would be its part of the whole")
    for node, value in held.items():
        if "val" in node.meta:
            node.meta["val"] = value


def _place_marks(graph: GraphModule, axis: str, size: int, states: dict[Node, Result]) -> None:
    """Marks of the axis -> what ranks do there."""
    for node in [n for n in graph.graph.nodes if is_sequence_mark(n) and bound_args(n)["axis"] == axis]:
        x, dim = bound_args(node)["x"], bound_args(node)["dim"] % value_of(node).ndim
        gathers = node.target is md.gather_sequence.default
        state = states[x] if gathers else states[node]
        assert isinstance(state, Sharded)
        (part,) = state.parts(size)
        behind = state.inner * (part.held * size - part.total)
        if gathers:
            new = _added(node, md.all_gather.default, x, dim, axis, size)
            if behind:  # the copies of the last entry go
                longer = [n + behind if d == dim else n for d, n in enumerate(value_of(node).shape)]
                new.meta, states[new] = {**node.meta, "val": value_of(node).new_empty(longer)}, None
                new = _cut(node, new, dim, state.inner * part.total, states)
        elif _is_uniform(x, dim):  # all parts are equal, and the first is cheaper to take than one's own
            new = _cut(node, x, dim, state.extent, states)
        else:
            new = _added(
                node, md.shard.default, _repeated_last(x, node, dim, state.inner, behind, states), dim, axis, size
            )
        new.meta, states[new] = node.meta, states[node]
        substitute(node, new)


def _cut(mark: Node, x: Node, dim: int, extent: int, states: dict[Node, Result]) -> Node:
    """The first entries of a dim, in one piece as the mark's own result is: views of that may not be views of a cut."""
    cut = _added(mark, aten.slice.Tensor, x, dim, 0, extent)
    if math.prod(value_of(mark).shape[:dim]) == 1:
        return cut
    cut.meta, states[cut] = dict(mark.meta), states[mark]
    return _added(mark, aten.clone.default, cut, memory_format=torch.contiguous_format)


def _added(before: Node, target: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Node:
    """The op, without a shape: those of a rank are computed later."""
    with before.graph.inserting_before(before):
        return before.graph.call_function(target, args, kwargs)


def _repeated_last(x: Node, before: Node, dim: int, inner: int, behind: int, states: dict[Node, Result]) -> Node:
    """The whole with ``behind`` more entries of ``dim``, copies of its last position, so that the ranks divide it.

    A copy of what is there cannot turn into what no position does, as zeros do that something divides by.
    """
    if not behind:
        return x
    extent = value_of(x).shape[dim]
    last = emit(before, aten.slice.Tensor, x, dim, extent - inner, extent)
    shape = [behind if d == dim else n for d, n in enumerate(value_of(x).shape)]
    copies = [emit(before, aten.expand.default, last, shape)] if inner == 1 else [last] * (behind // inner)
    longer = emit(before, aten.cat.default, [x, *copies], dim)
    for node in (last, *copies, longer):
        states[node] = None
        node.meta["sharding"] = dict(x.meta["sharding"])
    return longer


def _is_uniform(x: Node, dim: int) -> bool:
    """Is it the same at all positions of ``dim``, by the op that made it?  An input's strides are an example's."""
    packet = getattr(x.target, "overloadpacket", None)
    if packet is not aten.expand:
        return packet in _UNIFORM
    before = value_of(bound_args(x)["self"])
    dim -= value_of(x).ndim - before.ndim
    return dim < 0 or before.shape[dim] == 1


def _expected(state: Result, whole: Any) -> list[list[int]]:
    values = pytree.tree_leaves(whole)
    states = state if isinstance(state, list) else [state] * len(values)
    return [local_shape(v.shape, s) for v, s in zip(values, states, strict=True) if isinstance(v, Tensor)]


def _shapes(values: Any) -> list[list[int]]:
    return [list(v.shape) for v in pytree.tree_leaves(values) if isinstance(v, Tensor)]


def _computed(call: Call, held: Mapping[Node, Any]) -> Any:
    node = call.node
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: held.get(n, n.meta["val"]))
    mode = next(t.fake_mode for t in pytree.tree_leaves((args, kwargs)) if hasattr(t, "fake_mode"))
    try:
        return fake_result(mode, node.target, args, kwargs)  # type: ignore[arg-type]
    except Exception as error:  # PyTorch has many for operands that do not fit an op
        reason = next(iter(str(error).splitlines()), "")
        call.refuse(f"cannot be computed of what a rank holds ({type(error).__name__}: {reason})")


# Arguments that are sizes or positions.

Rewrite: TypeAlias = Callable[[Call], None]


def _set(call: Call, **values: Any) -> None:
    """Set arguments by name, the others staying as they are."""
    schema = call.node.target._schema.arguments  # type: ignore[union-attr]
    positional = [a.name for a in schema if not a.kwarg_only]
    args = bound_args(call.node) | values
    keep = max(len(call.node.args), *(positional.index(name) + 1 for name in values))
    call.node.args = tuple(args[name] for name in positional[:keep])
    call.node.kwargs = {k: v for k, v in call.node.kwargs.items() if k not in positional[:keep]}


def _result_shape(call: Call) -> list[int]:
    state = call.states[call.node]
    assert not isinstance(state, list)
    return local_shape(call.shape, state)


def _view(call: Call) -> None:
    name = next((name for name in ("size", "shape") if name in call.args), None)
    if name is not None:  # else it is a view of another dtype
        _set(call, **{name: _result_shape(call)})


def _squeeze(call: Call) -> None:
    """A dim of which each rank has one entry is not to go."""
    call.node.target, call.node.args = aten.view.default, (call.args["self"], _result_shape(call))


def _unflatten(call: Call) -> None:
    dim = call.dim("dim", value_of(call.args["self"]).ndim)
    _set(call, sizes=_result_shape(call)[dim : dim + len(call.args["sizes"])])


def _expand(call: Call) -> None:
    _set(call, size=_result_shape(call))


def _slice(call: Call) -> None:
    state = call.state(call.args["self"])
    if state is None or call.dim("dim", len(call.shape)) != state.dim:
        return
    start, stop = (local_position(state, at, call.size) for at in bounds(call, state))
    _set(call, **({"start": start, "length": stop - start} if "length" in call.args else {"start": start, "end": stop}))


def _split(call: Call) -> None:
    state = call.state(call.args["self"])
    dim = call.dim("dim", value_of(call.args["self"]).ndim)
    if state is not None and state.dim == dim:
        edges = [0, *accumulate(part.shape[dim] for part in call.node.meta["val"])]
        sizes = [b - a for a, b in pairwise(local_position(state, at, call.size) for at in edges)]
        call.node.target, call.node.kwargs = aten.split_with_sizes.default, {}
        call.node.args = (call.args["self"], sizes, dim)


def _select(call: Call) -> None:
    state = call.state(call.args["self"])
    if state is not None and state.dim == call.dim("dim", value_of(call.args["self"]).ndim):
        _set(call, index=local_position(state, call.args["index"] % state.whole(call.size), call.size))


def _slice_scatter(call: Call) -> None:
    state = call.states[call.node]
    if isinstance(state, Sharded) and call.dim("dim", len(call.shape)) == state.dim:
        start, stop = (local_position(state, at, call.size) for at in bounds(call, state))
        _set(call, start=start, end=stop)


def _group_norm(call: Call) -> None:
    _set(call, N=call.sole(call.args["input"]).extent)


_ARGUMENTS: dict[Any, Rewrite] = {
    **dict.fromkeys((aten.view, aten._unsafe_view, aten.reshape, aten._reshape_copy, aten.view_copy), _view),
    aten.squeeze: _squeeze,
    aten.unflatten: _unflatten,
    **dict.fromkeys((aten.expand, aten.expand_copy), _expand),
    **dict.fromkeys((aten.slice, aten.slice_copy, aten.narrow, aten.narrow_copy), _slice),
    **dict.fromkeys((aten.split, aten.split_with_sizes, aten.unsafe_split, aten.split_copy), _split),
    **dict.fromkeys((aten.unsafe_split_with_sizes, aten.split_with_sizes_copy, aten.chunk, aten.unsafe_chunk), _split),
    **dict.fromkeys((aten.select, aten.select_copy), _select),
    aten.slice_scatter: _slice_scatter,
    aten.native_group_norm: _group_norm,
}
