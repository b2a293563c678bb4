"""Sequence analysis: which values hold only a part of the sequence, and what attention must do about it.

A model is traced whole, and its plan's wishes are marks in the graph.  So every number in it, be it a size, the end of
a slice or a table of positions, is that of the whole sequence, and none can be a local length by mistake.  From the
marks on, a forward data-flow pass, axis by axis, says of every value whether each rank has all of it or which part.
What a rank computes follows from that (:mod:`torchtrt_md.lowering.localize`).  Before::

    x = torchtrt_md.split_sequence(x, 1, "cp", 2)         # x [B, S, D]
    x = x + table                                         # [S, D], equal on all ranks
    q, k, v = ...                                         # [B, H, S, D/H]
    y = torchtrt_md.attention(q, k, v, None, False, None, False)
    z = torchtrt_md.attention(learned, k, v, None, False, None, False)   # learned: equal on all ranks

After::

    x = torchtrt_md.shard(x, 1, "cp", 2)                  # [B, S/2, D] is this rank's part
    x = x + torchtrt_md.shard(table, 0, "cp", 2)
    q, k, v = ...                                         # [B, H, S/2, D/H]
    y = torchtrt_md.context_attention(q, k, v, False, None, False, "ulysses", "cp", 2)
    whole_k, whole_v = torchtrt_md.all_gather(k, 2, "cp", 2), torchtrt_md.all_gather(v, 2, "cp", 2)
    z = torchtrt_md.attention(learned, whole_k, whole_v, None, False, None, False)

Queries of a part of the sequence over replicated keys (cross attention) need nothing.  Every node gets
``meta["sharding"]``: axis -> :class:`~torchtrt_md.lowering.sharding.Sharded`, or a list of such dicts
where the node has several results; an axis that is not in it is one along which the value is replicated.

An op that would compute something else on the parts than on the whole is refused, with the user's source
line; the rules are in :mod:`torchtrt_md.lowering.sharding_rules`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchtrt_md.errors import ShardingError
from torchtrt_md.graph.rewrite import emit, substitute
from torchtrt_md.graph.source import source_line
from torchtrt_md.lowering.localize import localize
from torchtrt_md.lowering.ops import bound_args, is_sequence_mark
from torchtrt_md.lowering.passes import PassContext
from torchtrt_md.lowering.sharding import Call, Result, Sharded, piece_edges
from torchtrt_md.lowering.sharding_rules import infer
from torchtrt_md.program import value_of

aten, md = torch.ops.aten, torch.ops.torchtrt_md

_FIX_LAYOUT = "bring queries, keys and values into the form [batch, heads, sequence, head_dim]"
_SEQ = 2  # q, k and v are [batch, heads, sequence, head_dim]


def run(graph: GraphModule, context: PassContext) -> int:
    """Analyze along every context-parallel axis; number of attentions rewritten and gathers inserted.

    Raises:
        ShardingError: an op mixes positions across the shard.
    """
    for node in graph.graph.nodes:
        values = node.meta.get("val")
        node.meta["sharding"] = [{} for _ in values] if isinstance(values, (tuple, list)) else {}
    count = 0
    for axis, strategy in context.strategies.items():
        size = context.mesh.axis_size(axis)
        # A single rank has the whole of everything.
        if size > 1 and any(is_sequence_mark(node) and bound_args(node)["axis"] == axis for node in graph.graph.nodes):
            count += _analyze(graph, axis, strategy, size)
    return count


def _analyze(graph: GraphModule, axis: str, strategy: str, size: int) -> int:
    states: dict[Node, Result] = {}
    split: dict[tuple[Node, Sharded], Node] = {}
    count = 0
    for node in list(graph.graph.nodes):
        call = Call(node, axis, size, states)
        if node.op == "output":
            _check_outputs(call)
        elif node.op in ("placeholder", "get_attr"):
            states[node] = None
        elif node.target is md.attention.default and call.sharded:
            node, result, rewrites = _attention(call, strategy, states)
            states[node] = result
            count += rewrites
        else:
            states[node] = infer(call)
        for operand, wanted in call.to_split.items():
            if (operand, wanted) not in split:
                split[operand, wanted] = _split(call, operand, wanted, states)
            node.replace_input_with(operand, split[operand, wanted])
    localize(graph, axis, size, states)
    for node, result in states.items():
        _record(node, axis, result)
    return count


def _split(call: Call, operand: Node, state: Sharded, states: dict[Node, Result]) -> Node:
    """This rank's part of a replicated operand, split as ``state`` says: part by part of those that it concatenates."""

    def emitted(state: Sharded | None, target: torch._ops.OpOverload, *args: Any) -> Node:
        node = emit(call.node, target, *args)
        node.meta["sharding"] = dict(operand.meta["sharding"])
        states[node] = state
        return node

    dim, shape = state.dim, list(value_of(operand).shape)
    if state.outer > 1:
        by_entry = [*shape[:dim], state.outer, shape[dim] // state.outer, *shape[dim + 1 :]]
        whole = emitted(None, aten.reshape.default, operand, by_entry)
        inner = Sharded(dim + 1, state.pieces, 1, state.inner)
        return emitted(state, aten.reshape.default, _split(call, whole, inner, states), shape)
    if len(state.pieces) == 1:
        return emitted(state, md.split_sequence.default, operand, dim, call.axis, call.size)
    parts = []
    for (start, stop), piece in zip(pairwise(piece_edges(state, call.size)), state.pieces, strict=True):
        part = emitted(None, aten.slice.Tensor, operand, dim, start, stop)
        held = Sharded(dim, (piece,), 1, state.inner)
        parts.append(emitted(held, md.split_sequence.default, part, dim, call.axis, call.size))
    return emitted(state, aten.cat.default, parts, dim)


def _record(node: Node, axis: str, result: Result) -> None:
    if isinstance(result, list):
        for shardings, state in zip(node.meta["sharding"], result, strict=True):
            if state is not None:
                shardings[axis] = state
    elif result is not None:
        node.meta["sharding"][axis] = result


def _check_outputs(call: Call) -> None:
    """Every output is the whole, or chunk after chunk of it: that is what a program can say of its outputs."""
    returned = call.node.args[0]
    for number, value in enumerate(returned if isinstance(returned, (tuple, list)) else [returned]):
        state = call.state(value)
        if state is None or state.is_chunk:
            continue
        assert isinstance(value, Node)
        held = (
            f"{len(state.pieces)} concatenated parts, of {' and '.join(map(str, state.pieces))} per rank"
            if len(state.pieces) > 1
            else f"a view that merged the sequence with the {state.outer} entries before it"
        )
        whole = list(value_of(value).shape)
        raise ShardingError(
            f"output {number} ({value.name}, of the whole {whole}) is split over axis {call.axis!r} on"
            f" dim {state.dim}, which holds {held}: the outputs of {call.size} ranks, one after the other, are not"
            " the whole",
            fix="gather it (md.Gather in the plan), or return each part by itself, viewed as it was when split",
            at=source_line(value),
        )


def _attention(call: Call, strategy: str, states: dict[Node, Result]) -> tuple[Node, Result, int]:
    """What stands for this attention after the pass, its sharding, and the number of rewrites."""
    q, k, v = (call.state(call.args[name]) for name in ("q", "k", "v"))
    seq = value_of(call.args["q"]).ndim - 2
    split = tuple(s is not None and s.dim == seq for s in (q, k, v))
    if q and k and v and all(split):
        return _over_sequence(call, q, k, v, strategy), q, 1
    if split == (True, False, False) and k is None and v is None:
        if call.args["is_causal"]:
            call.refuse(
                "is causal with split queries and whole keys: each rank would count its queries from 0",
                "split the keys like the queries, or pass is_causal=False where every query may see every key",
            )
        return call.node, infer(call), 0
    if q is None and k and v and all(split[1:]):
        return call.node, None, _gather_keys(call, k, v, states)
    if any(split):
        call.refuse(
            "has queries, keys and values that are split differently",
            "split keys and values alike, on the sequence; queries on the sequence too, or not at all",
        )
    return call.node, infer(call), 0


def _over_sequence(call: Call, q: Sharded, k: Sharded, v: Sharded, strategy: str) -> Node:
    _check_keys(call, k, v)
    if not q.is_plain:
        call.refuse("has queries of which a view merged the sequence with other dims", _FIX_LAYOUT)
    if call.args["mask"] is not None:
        call.refuse(
            f"has a mask ({call.args['mask'].name}), and masks over a split sequence are not supported yet",
            "pass no mask (run without padding: one prompt length per call), or is_causal=True where it is causal",
        )
    if call.args["is_causal"] and (len(q.pieces) > 1 or len(k.pieces) > 1):
        call.refuse(
            "is causal over concatenated parts: each rank holds a chunk of every part, so its positions are not in"
            " one row",
            "concatenate the parts before they are split, so that the plan splits the whole sequence",
        )
    if call.args["is_causal"] and q.pieces != k.pieces:
        call.refuse(
            f"is causal with {q.length} queries and {k.length} keys per rank, so a query's position is not its key's",
            "use as many queries as keys, or is_causal=False",
        )
    args = (call.args[name] for name in ("q", "k", "v", "is_causal", "scale", "enable_gqa"))
    new = emit(call.node, md.context_attention.default, *args, strategy, call.axis, call.size)
    substitute(call.node, new)
    return new


def _gather_keys(call: Call, k: Sharded, v: Sharded, states: dict[Node, Result]) -> int:
    """Give whole queries the whole of the keys and values; number of gathers."""
    _check_keys(call, k, v)
    mask = call.args["mask"]
    if len(k.pieces) > 1 and (mask is not None or call.args["is_causal"]):
        call.refuse(
            "has whole queries over keys of concatenated parts: gathered, the keys come in another order than the"
            " mask's",
            "gather each part before they are concatenated, or pass no mask and is_causal=False",
        )
    if call.state(mask) is not None:
        call.refuse(
            f"has a mask ({mask.name}) that is split, and whole queries and keys",
            "leave the mask out of the plan, or gather it",
        )
    gathered: dict[Node, Node] = {}
    for source in (call.args["k"], call.args["v"]):
        if source not in gathered:
            gathered[source] = _insert_gather(call, source)
            states[gathered[source]] = None
    names = ("q", "k", "v", "mask", "is_causal", "scale", "enable_gqa")
    call.node.args = tuple(gathered.get(call.args[name], call.args[name]) for name in names)
    call.node.kwargs = {}
    return len(gathered)


def _insert_gather(call: Call, source: Node) -> Node:
    gather = emit(call.node, md.gather_sequence.default, source, _SEQ, call.axis, call.size)
    gather.meta["sharding"] = dict(source.meta["sharding"])  # along the axes that were analyzed before
    return gather


def _check_keys(call: Call, k: Sharded, v: Sharded) -> None:
    if value_of(call.args["q"]).ndim != _SEQ + 2:
        call.refuse(
            "is over a split sequence, and its operands are not [batch, heads, sequence, head_dim]", _FIX_LAYOUT
        )
    if k != v:
        call.refuse("has keys and values that are split differently", "make both from the same tokens")
    if not k.is_plain:
        call.refuse("has keys of which a view merged the sequence with other dims", _FIX_LAYOUT)
