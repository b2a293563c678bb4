"""Sharding rules of the ops that move elements and compute none: views, slices, concatenation, indexing.

Each takes the :class:`~torchtrt_md.lowering.sharding.Call` and returns the sharding of its result.  The table
that names them is in :mod:`torchtrt_md.lowering.sharding_rules`.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from torchtrt_md.lowering.sharding import (
    Call,
    Part,
    Result,
    Sharded,
    State,
    aligned,
    carried_by_view,
    combine,
    cut,
    keeping,
    unless_whole,
    without,
)
from torchtrt_md.program import value_of

_BORDER = (
    "gather the sequence before this op (md.Gather in the plan), or cut only at the border of parts that were"
    " concatenated after the split"
)

_ACROSS = "writes across the shard"


def view(call: Call) -> Result:
    x = call.args["self"]
    state, old, new = call.sole(x), value_of(x).shape, call.shape
    if "dtype" in call.args:
        return combine(call, (x, keeping(len(old), [-1] if old != new else [])))
    after = carried_by_view(state, old, new, call.size)
    if after is None:
        call.refuse(
            f"views the whole {list(old)} as {list(new)}, of which a rank's part is no part of one dim",
            f"view the sharded dim by itself, merge it with whole neighbors, or split it into (n, m) with n a multiple"
            f" of {call.size}",
        )
    return after


def keep(call: Call) -> Result:
    """Dims are added behind the others."""
    return call.sole(call.args["self"])


def permute(call: Call) -> Result:
    x = call.args["self"]
    order = [d % len(call.shape) for d in call.args["dims"]]
    return combine(call, (x, [order.index(d) for d in range(len(order))]))


def transpose(call: Call) -> Result:
    x = call.args["self"]
    dims = list(range(len(call.shape)))
    a, b = (call.dim("dim0", len(dims)), call.dim("dim1", len(dims))) if "dim0" in call.args else (0, len(dims) - 1)
    dims[a], dims[b] = dims[b], dims[a]
    return combine(call, (x, dims))


def expand(call: Call) -> Result:
    x = call.args["self"]
    return combine(call, (x, aligned(x, len(call.shape))))


def repeat(call: Call) -> Result:
    x = call.args["self"]
    dims = aligned(x, len(call.shape))
    return combine(call, (x, [None if call.args["repeats"][to] != 1 else to for to in dims if to is not None]))


def slice_(call: Call) -> Result:
    x = call.args["self"]
    state = call.sole(x)
    if call.dim("dim", value_of(x).ndim) != state.dim:
        return state
    start, stop = bounds(call, state)
    after = cut(state, start, stop, call.size)
    if after is None:
        call.refuse(f"cuts {start}:{stop} out of dim {state.dim}, across the shard", _BORDER)
    return unless_whole(after, call.size)


def bounds(call: Call, state: Sharded) -> tuple[int, int]:
    """Start and stop of a slice of the sharded dim, on the whole, counted from its first entry."""
    extent = state.whole(call.size)
    start, step = call.args["start"] or 0, call.args.get("step", 1)
    if isinstance(start, Node):
        call.refuse("takes a part of the sharded dim that starts where the data says")
    if "length" in call.args:
        start %= extent
        stop = start + call.args["length"]
    else:
        start, stop, _ = slice(start, call.args["end"]).indices(extent)
    if step != 1:
        call.refuse(f"takes {start}:{stop}:{step} of the sharded dim, across the shard", _BORDER)
    return start, stop


def select(call: Call) -> Result:
    x, state = call.args["self"], call.state(call.args["self"])
    if state is not None and state.dim == call.dim("dim", value_of(x).ndim) and state.inner == 1:
        index = call.args["index"]
        after = None if isinstance(index, Node) else cut(state, at := index % state.whole(call.size), at + 1, call.size)
        if after is not None and unless_whole(after, call.size) is None:
            return None  # one of the positions that every rank has
    return combine(call, (x, without(value_of(x).ndim, [call.args["dim"]])), across="takes one position of the shard")


def unbind(call: Call) -> Result:
    x = call.args["self"]
    return combine(call, (x, without(value_of(x).ndim, [call.args["dim"]])), across="takes the shard apart")


def split(call: Call) -> Result:
    x, parts = call.args["self"], call.node.meta["val"]
    state = call.sole(x)
    if call.dim("dim", value_of(x).ndim) != state.dim:
        return state
    results: list[State] = []
    start = 0
    for part in parts:
        stop = start + part.shape[state.dim]
        after = cut(state, start, stop, call.size)
        if after is None:
            call.refuse(f"cuts {start}:{stop} out of dim {state.dim}, across the shard", _BORDER)
        results.append(unless_whole(after, call.size))
        start = stop
    return results


def cat(call: Call) -> Result:
    # torch.cat skips empty tensors of one dim, whatever the others look like.
    tensors = [t for t in call.args["tensors"] if value_of(t).shape != (0,)]
    states = [call.state(t) for t in tensors]
    dim = call.dim("dim", len(call.shape))
    first = next(s for s in states if s is not None)
    if first.dim != dim:
        return combine(call, *((t, range(len(call.shape))) for t in tensors))
    parts: list[Part] = []
    for tensor, state in zip(tensors, states, strict=True):
        extent = value_of(tensor).shape[dim]
        if state is None and extent % first.inner == 0:  # every rank has all of it, and keeps it
            parts += [Part(extent // first.inner, extent // first.inner)] if extent else []
        elif state is not None and (len(states) == 1 or (state.dim, state.outer, state.inner) == (dim, 1, first.inner)):
            parts += state.parts(call.size)
        else:
            call.refuse(
                "concatenates this rank's part of one sequence with something else on the sharded dim",
                "split every part on this dim before it is concatenated, or gather them all",
            )
    return first if len(states) == 1 else Sharded.of(dim, parts, call.size, 1, first.inner)


def stack(call: Call) -> Result:
    new = call.dim("dim", len(call.shape))
    dims = [d for d in range(len(call.shape)) if d != new]
    return combine(call, *((t, dims) for t in call.args["tensors"]))


# Indexing.


def index(call: Call) -> Result:
    x, given = call.args["self"], call.args["indices"]
    tensors = {dim: t for dim, t in enumerate(given) if t is not None}
    if any(value_of(t).dtype in (torch.bool, torch.uint8) for t in tensors.values()):
        call.refuse("picks positions by a mask, as many as the data says")
    indexed, ndim = list(tensors), max(value_of(t).ndim for t in tensors.values())
    # As in NumPy: the indices' dims stand where the indexed dims were, if these were neighbors, else first.
    at = indexed[0] if indexed[-1] - indexed[0] == len(indexed) - 1 else 0
    own: list[int | None] = []
    for dim in range(value_of(x).ndim):
        rank = dim - sum(i < dim for i in indexed)
        own.append(None if dim in tensors else rank if rank < at else rank + ndim)
    return combine(
        call,
        (x, own),
        *((t, range(at + ndim - value_of(t).ndim, at + ndim)) for t in tensors.values()),
        across="looks positions up across the shard",
    )


def index_select(call: Call) -> Result:
    x, dim = call.args["self"], call.args["dim"] % max(len(call.shape), 1)
    return combine(call, (x, keeping(len(call.shape), [dim])), (call.args["index"], [dim]))


def embedding(call: Call) -> Result:
    ndim = len(call.shape)
    return combine(call, (call.args["weight"], [None, ndim - 1]), (call.args["indices"], range(ndim - 1)))


def gather(call: Call) -> Result:
    ndim = len(call.shape)
    return combine(call, (call.args["self"], keeping(ndim, [call.args["dim"]])), (call.args["index"], range(ndim)))


def slice_scatter(call: Call) -> Result:
    x, src, ndim = call.args["self"], call.args["src"], len(call.shape)
    dim = call.dim("dim", ndim)
    into, given = call.state(x), call.state(src)
    if all(state is None or state.dim != dim for state in (into, given)):
        return combine(call, (x, keeping(ndim, [dim])), (src, keeping(ndim, [dim])))
    if into is None:
        into = call.to_split[x] = _around(call, given, dim)
    if into.dim != dim:
        call.refuse(_ACROSS, _BORDER)
    start, stop = bounds(call, into)
    part = cut(into, start, stop, call.size)
    if part is None:
        call.refuse(_ACROSS, _BORDER)
    part = unless_whole(part, call.size)
    if given is None and part is not None:
        call.to_split[src] = part
    elif given != part:
        call.refuse(_ACROSS, _BORDER)
    return into


def _around(call: Call, given: State, dim: int) -> Sharded:
    """How a replicated value is to be split into which a part of a sequence is written: what is around it is whole."""
    assert given is not None
    extent = call.shape[dim]
    start, stop, step = slice(call.args["start"], call.args["end"], call.args["step"]).indices(extent)
    if step != 1 or not given.is_plain:
        call.refuse(_ACROSS, _BORDER)
    parts = [Part(start, start), *given.parts(call.size), Part(extent - stop, extent - stop)]
    return Sharded.of(dim, (part for part in parts if part.total), call.size)


def select_scatter(call: Call) -> Result:
    ndim = len(call.shape)
    dim = call.dim("dim", ndim)
    src = [d for d in range(ndim) if d != dim]
    return combine(call, (call.args["self"], keeping(ndim, [dim])), (call.args["src"], src), across=_ACROSS)
