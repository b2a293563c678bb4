"""Sharding rules of the collective IR, along the axis under analysis and along others.

Each takes the :class:`~torchtrt_md.lowering.sharding.Call` and returns the sharding of its result.  The table
that names them is in :mod:`torchtrt_md.lowering.sharding_rules`.
"""

from __future__ import annotations

import torch

import torchtrt_md.lowering.ops  # noqa: F401  (registers torch.ops.torchtrt_md)
from torchtrt_md.lowering.sharding import Call, Part, Result, Sharded, aligned, combine, keeping
from torchtrt_md.program import value_of

md = torch.ops.torchtrt_md


def is_of_axis(call: Call) -> bool:
    """Is it an op of the IR along the axis under analysis?"""
    return getattr(call.node.target, "namespace", "") == "torchtrt_md" and call.args.get("axis") == call.axis


def split_sequence(call: Call) -> Result:
    x, state = call.args["x"], call.state(call.args["x"])
    if call.args["axis"] != call.axis:
        return _of_other_axis(call)
    if state is not None:
        call.refuse("splits a value that is split over this axis already", "name it in the plan once")
    dim = call.dim("dim", value_of(x).ndim)
    extent = call.shape[dim]
    length = call.held(extent)
    if length >= extent:  # which says of a part that every rank has all of it
        call.refuse(
            f"has {extent} entries on dim {dim}, of which each of {call.size} ranks would get {length}",
            f"leave this value out of the plan, or use a sequence of at least {call.unit + 1}",
        )
    return Sharded.of(dim, [Part(length, extent)], call.size)


def gather_sequence(call: Call) -> Result:
    x, state = call.args["x"], call.state(call.args["x"])
    if call.args["axis"] != call.axis:
        return _of_other_axis(call)
    if state is None:
        call.refuse(
            "gathers a replicated value, which every rank has already",
            "drop this gather from the plan, or split the value first",
        )
    if call.dim("dim", value_of(x).ndim) != state.dim:
        call.refuse(f"gathers dim {call.args['dim']} of a value that is split on dim {state.dim}", "gather that dim")
    return None


def collective(call: Call) -> Result:
    """Any collective, along this axis or along another."""
    x, state = call.args["x"], call.state(call.args["x"])
    packet = call.node.target.overloadpacket  # type: ignore[union-attr]
    if call.args["axis"] == call.axis:
        if state is None and packet is md.all_reduce:
            return None
        held = "a replicated value" if state is None else "a sequence that is split over the same axis"
        call.refuse(
            f"is a {packet.__name__} along the axis {call.axis!r} of {held}",
            "split and gather by the plan only; attention communicates by itself",
        )
    ndim = value_of(x).ndim
    dims = [call.args[name] for name in ("dim", "split_dim", "concat_dim") if name in call.args]
    return combine(call, (x, keeping(ndim, dims)), across=_on_the_dim(call))


def _of_other_axis(call: Call) -> Result:
    x = call.args["x"]
    return combine(call, (x, keeping(value_of(x).ndim, [call.args["dim"]])), across=_on_the_dim(call))


def _on_the_dim(call: Call) -> str:
    packet = call.node.target.overloadpacket  # type: ignore[union-attr]
    return f"is a {packet.__name__} along axis {call.args['axis']!r} on the dim that is split"


def attention(call: Call) -> Result:
    """On each rank by itself: batch and heads stay apart, queries too, keys do not."""
    q, k, v = (call.args[name] for name in ("q", "k", "v"))
    mask = call.args.get("mask")
    seq = value_of(q).ndim - 2
    lead = range(seq)
    # An attention along another axis has its queries on that axis.
    queries = None if "axis" in call.args or call.args["is_causal"] else seq
    rows: list[int | None] = [queries if dim == seq else dim for dim in aligned(mask, seq + 2) if dim != seq + 1]
    return combine(
        call,
        (q, [*lead, queries, None]),
        (k, [*lead, None, None]),
        (v, [*lead, None, seq + 1]),
        (mask, [*rows, None]),
        across="reads across the sharded dim of its operands",
    )


def context_attention(call: Call) -> Result:
    if call.args["axis"] != call.axis:
        return attention(call)
    states = [call.state(call.args[name]) for name in ("q", "k", "v")]
    if any(s is None or s.dim != 2 or not s.is_plain for s in states):
        call.refuse("wants queries, keys and values that are split on dim 2", "leave attention to md.capture")
    return states[0]
