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

Text tokens that every rank has, concatenated with those of a split image, are split for attention over both: each rank
attends with its part of either, and what comes of the text is gathered.  The image never is.  The mask of an attention
over a split sequence is whole on every rank, its rows and columns in the order in which all ranks' queries and keys
follow each other::

    x = cat(text, torchtrt_md.split_sequence(image, 1, "cp", 2), 1)
    y = torchtrt_md.attention(q, k, v, mask, False, None, False)         # in the order T I

    q', k', v' = cat of shard of the text's part of q, k, v, and of the image's                     # T0 I0 on rank 0
    y' = torchtrt_md.context_attention(q', k', v', ..., mask')           # in the order T0 I0 T1 I1
    y = cat(all_gather of the text's part of y', the image's part)

The largest or the least number of a split value, as what a quantization scales by, is that of all ranks' own::

    a = amax(x, [0, 1, 2])
    a' = amax(torchtrt_md.all_gather(unsqueeze(a, 0), 0, "cp", 2), [0])

What a rank has behind the end, where the ranks do not divide the sequence, is hidden from it
(:mod:`torchtrt_md.lowering.behind_end`).

Queries of a part of the sequence over replicated keys (cross attention) need nothing.  Every node gets
``meta["sharding"]``: axis -> :class:`~torchtrt_md.lowering.sharding.Sharded`, or a list of such dicts
where the node has several results; an axis that is not in it is one along which the value is replicated.

An op that would compute something else on the parts than on the whole is refused, with the user's source
line; the rules are in :mod:`torchtrt_md.lowering.sharding_rules`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchtrt_md.errors import ShardingError
from torchtrt_md.graph.rewrite import emit, substitute
from torchtrt_md.graph.source import source_line, user_name
from torchtrt_md.lowering.behind_end import BehindEnd
from torchtrt_md.lowering.localize import localize
from torchtrt_md.lowering.ops import OF_PARTS, bound_args, is_sequence_mark
from torchtrt_md.lowering.passes import PassContext
from torchtrt_md.lowering.sharding import Call, Part, Result, Sharded, State
from torchtrt_md.lowering.sharding_rules import infer
from torchtrt_md.program import value_of

aten, md = torch.ops.aten, torch.ops.torchtrt_md

_FIX_LAYOUT = "bring queries, keys and values into the form [batch, heads, sequence, head_dim]"
_SPLIT_ALIKE = "split keys and values alike, on the sequence; queries on the sequence too, or not at all"
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
        size = context.mesh.joined_size(axis)
        # A single rank has the whole of everything.
        if size > 1 and any(is_sequence_mark(node) and bound_args(node)["axis"] == axis for node in graph.graph.nodes):
            # A causal ring gives each rank two chunks of the sequence.
            unit = 2 if strategy == "ring" and context.placement == "split" and _any_causal(graph) else 1
            count += _Analysis(graph, axis, strategy, size, unit).run()
    return count


def _any_causal(graph: GraphModule) -> bool:
    attentions = graph.graph.find_nodes(op="call_function", target=md.attention.default)
    return any(bound_args(node)["is_causal"] for node in attentions)


class _Analysis:
    """Of one graph along one axis."""

    def __init__(self, graph: GraphModule, axis: str, strategy: str, size: int, unit: int) -> None:
        self.graph, self.axis, self.strategy, self.size, self.unit = graph, axis, strategy, size, unit
        self.states: dict[Node, Result] = {}
        # What was made of a value once serves all of its users: layers have their tables and masks in common.
        self.made: dict[tuple[object, ...], Node] = {}
        # Once a view has joined positions, what lies behind the end need be no copy of any.
        self.joins = False
        # What reads across the end: the op, the name of its operand, how that is split, and what stands behind the end.
        self.hidden: list[tuple[Node, str, Sharded, float | bool]] = []

    def run(self) -> int:
        count = 0
        for node in list(self.graph.graph.nodes):
            call = Call(node, self.axis, self.size, self.states, self.unit)
            if node.op == "output":
                _check_outputs(call)
            elif node.op in ("placeholder", "get_attr"):
                self.states[node] = None
            elif node.target is md.attention.default and call.sharded:
                count += self.attention(call)
            else:
                self.states[node] = infer(call)
                if node.target is md.gather_sequence.default and call.sharded and self.states[node] is None:
                    substitute(node, self.gathered(node, bound_args(node)["x"]))
                elif node.target in OF_PARTS and call.sharded and self.states[node] is None:
                    self.compared(call)
                    count += 1
                self.joins |= self._joins(call)
            for operand, wanted in call.to_split.items():
                node.replace_input_with(operand, self.part(node, operand, wanted))
        localize(self.graph, self.axis, self.size, self.states)
        for node, result in self.states.items():
            _record(node, self.axis, result)
        behind_end = BehindEnd(self.axis, self.size)
        for node, name, state, fill in self.hidden:
            behind_end.hide(node, name, state, fill)
        return count

    def emitted(self, before: Node, state: State, target: torch._ops.OpOverload, x: Node, *args: Any) -> Node:
        """An op on ``x``, or on a list of which it is the first, that leaves it along other axes as it was."""
        first = x[0] if isinstance(x, list) else x
        node = emit(before, target, x, *args)
        node.meta["sharding"] = dict(first.meta["sharding"])
        self.states[node] = state
        return node

    def part(self, before: Node, operand: Node, state: Sharded) -> Node:
        """This rank's part of a replicated operand, split as ``state`` says: part by part of those in it."""
        if (operand, state) not in self.made:
            self.made[operand, state] = self._part(before, operand, state)
        return self.made[operand, state]

    def _part(self, before: Node, operand: Node, state: Sharded) -> Node:
        dim, shape = state.dim, list(value_of(operand).shape)
        if state.outer > 1:
            by_entry = [*shape[:dim], state.outer, shape[dim] // state.outer, *shape[dim + 1 :]]
            whole = self.emitted(before, None, aten.reshape.default, operand, by_entry)
            inner = self._part(before, whole, replace(state, dim=dim + 1, outer=1))
            return self.emitted(before, state, aten.reshape.default, inner, shape)
        parts = []
        for part, piece in zip(state.parts(self.size), self._pieces(before, operand, None, state), strict=True):
            held = Sharded.of(dim, [part], self.size, 1, state.inner)
            parts.append(piece if part.is_whole else self._marked(before, piece, held))
        return parts[0] if len(parts) == 1 else self.emitted(before, state, aten.cat.default, parts, dim)  # type: ignore[arg-type]

    def _marked(self, before: Node, x: Node, state: Sharded) -> Node:
        return self.emitted(before, state, md.split_sequence.default, x, state.dim, self.axis, self.size)

    def _pieces(self, before: Node, x: Node, held: State, layout: Sharded) -> list[Node]:
        """The parts of the sequence that ``layout`` has on its dim, each by itself; ``held`` is how ``x`` is split."""
        found, start = [], 0
        parts = layout.parts(self.size)
        for part in parts:
            stop = start + part.total * layout.inner
            state = None
            if held is not None and not part.is_whole:
                state = Sharded.of(layout.dim, [part], self.size, 1, layout.inner)
            whole = len(parts) == 1
            found.append(x if whole else self.emitted(before, state, aten.slice.Tensor, x, layout.dim, start, stop))
            start = stop
        return found

    def gathered(self, before: Node, x: Node) -> Node:
        """All of a value that is split, part after part, on every rank."""
        state = self.states[x]
        if not isinstance(state, Sharded):
            return x
        if (x, None) not in self.made:
            self.made[x, None] = self._gathered(before, x, state)
        return self.made[x, None]

    def _gathered(self, before: Node, x: Node, state: Sharded) -> Node:
        dim, shape = state.dim, list(value_of(x).shape)
        if state.outer > 1:
            by_entry = [*shape[:dim], state.outer, shape[dim] // state.outer, *shape[dim + 1 :]]
            inner = replace(state, dim=dim + 1, outer=1)
            whole = self._gathered(before, self.emitted(before, inner, aten.reshape.default, x, by_entry), inner)
            return self.emitted(before, None, aten.reshape.default, whole, shape)
        pieces = [
            piece
            if part.is_whole
            else self.emitted(before, None, md.gather_sequence.default, piece, dim, self.axis, self.size)
            for part, piece in zip(state.parts(self.size), self._pieces(before, x, state, state), strict=True)
        ]
        return pieces[0] if len(pieces) == 1 else self.emitted(before, None, aten.cat.default, pieces, dim)  # type: ignore[arg-type]

    def _joins(self, call: Call) -> bool:
        """Does it make one position of several, in a part that the ranks do not divide?"""
        after = self.states[call.node]
        if not isinstance(after, Sharded) or not after.totals:
            return False
        before = [state for n in call.node.all_input_nodes if isinstance(state := self.states[n], Sharded)]
        known = {part for state in before for part in state.parts(self.size)}
        return bool(known) and any(not part.is_whole and part not in known for part in after.parts(self.size))

    def compared(self, call: Call) -> None:
        """The largest, or least, of a rank's part -> that of all parts.

        They are gathered and not reduced: NCCL's max is not said to keep NaN, which PyTorch's does.
        """
        node = call.node
        state = call.sole(call.args["self"])
        if state.totals:  # what lies behind the end need be no copy, and could be the largest
            self.hidden.append((node, "self", state, _passed_over(node)))
        users = list(node.users)
        row = self.emitted(node.next, None, aten.unsqueeze.default, node, 0)
        rows = self.emitted(row.next, None, md.all_gather.default, row, 0, self.axis, self.size)
        whole = self.emitted(rows.next, None, OF_PARTS[node.target], rows, [0])
        for user in users:
            user.replace_input_with(node, whole)

    def attention(self, call: Call) -> int:
        """Let this attention have what it lacks, and say how its result is split; number of rewrites."""
        q, k, v = (call.state(call.args[name]) for name in ("q", "k", "v"))
        seq = value_of(call.args["q"]).ndim - 2
        if not any(state is not None and state.dim == seq for state in (q, k, v)):
            self.states[call.node] = infer(call)  # split by batches or heads, or in its mask alone
            return 0
        if seq != _SEQ:
            call.refuse(
                "is over a split sequence, and its operands are not [batch, heads, sequence, head_dim]", _FIX_LAYOUT
            )
        if any(state is not None and state.dim != _SEQ for state in (q, k, v)):
            call.refuse("has queries, keys and values that are split differently", _SPLIT_ALIKE)
        if q and call.args["is_causal"] and not _is_in_one_row(q, k):
            call = self._with_order(call)
        mask = call.args["mask"]
        mask_state = call.state(mask)
        at = None if mask_state is None else mask_state.dim + 4 - value_of(mask).ndim
        if at in (0, 1):
            call.refuse(
                f"has a mask ({user_name(mask)}) that is split by batches or heads, unlike its queries", _SPLIT_ALIKE
            )
        if q and k and v:
            self._over_sequence(call, q, k, v)
            return 1
        if q and (k or v):
            call.refuse("has queries, keys and values that are split differently", _SPLIT_ALIKE)
        # Whole queries over split keys, or the other way round: everything but split queries is gathered.
        whole = [call.args["k"], call.args["v"]]
        if not q or at == 3:
            whole.append(mask)
        before = dict.fromkeys(x for x in whole if isinstance(x, Node) and self.states[x] is not None)
        for x in before:
            call.node.replace_input_with(x, self.gathered(call.node, x))
        call = Call(call.node, self.axis, self.size, self.states, self.unit)
        self.states[call.node] = infer(call)
        for operand, wanted in call.to_split.items():
            call.node.replace_input_with(operand, self.part(call.node, operand, wanted))
        return len(before)

    def _with_order(self, call: Call) -> Call:
        """The same attention with the mask that ``is_causal`` stands for: query i sees the keys up to i."""
        node, args = call.node, call.args
        queries, keys = (value_of(args[name]).shape[_SEQ] for name in ("q", "k"))
        key = ("order", queries, keys)
        if key not in self.made:
            device = value_of(args["q"]).device
            rows, columns = (self._made_whole(node, aten.arange.default, n, device=device) for n in (queries, keys))
            rows = self._made_whole(node, aten.unsqueeze.default, rows, 1)
            self.made[key] = self._made_whole(node, aten.ge.Tensor, rows, columns)
        node.args = (args["q"], args["k"], args["v"], self.made[key], False, args["scale"], args["enable_gqa"])
        node.kwargs = {}
        return Call(node, self.axis, self.size, self.states, self.unit)

    def _made_whole(self, before: Node, target: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Node:
        node = emit(before, target, *args, **kwargs)
        node.meta["sharding"] = {}
        self.states[node] = None
        return node

    def _over_sequence(self, call: Call, q: Sharded, k: Sharded, v: Sharded) -> None:
        """Attention of which each rank has a part of queries, keys and values."""
        if k != v:
            call.refuse("has keys and values that are split differently", "make both from the same tokens")
        for state, what in ((q, "queries"), (k, "keys")):
            if not state.is_plain:
                call.refuse(f"has {what} of which a view merged the sequence with other dims", _FIX_LAYOUT)
        before, split_q, split_k = call.node, self._all_split(call, q), self._all_split(call, k)
        operands = [
            self._split_everywhere(before, call.args[name], state, split)
            for name, state, split in (("q", q, split_q), ("k", k, split_k), ("v", v, split_k))
        ]
        mask = call.args["mask"]
        if mask is not None:
            mask = self._mask(before, mask, split_q, split_k)
        # Keys behind the end of a part are hidden by the mask, or by the order where attention is causal; what is
        # hidden so counts nothing times what it is, which is NaN where that is no number.
        hides = mask is not None or call.args["is_causal"] or not split_k.totals
        lengths = None if hides else [n for part in split_k.parts(self.size) for n in part]
        rest = [call.args[name] for name in ("is_causal", "scale", "enable_gqa")]
        hides_any = () if mask is None and lengths is None else (mask, lengths)
        args = (*operands[1:], *rest, self.strategy, self.axis, self.size, *hides_any)
        y = self.emitted(before, split_q, md.context_attention.default, operands[0], *args)
        y.meta["sharding"] = dict(before.meta["sharding"])
        if self.joins and split_k.totals and lengths is None:
            self.hidden += [(y, name, split_k, 0.0) for name in ("k", "v")]
        substitute(before, self._as_before(before, y, q, split_q))

    def _all_split(self, call: Call, state: Sharded) -> Sharded:
        """The same positions, with a part on each rank of those that every rank has."""
        parts = [Part(self._held(call, p.total), p.total) if p.is_whole else p for p in state.parts(self.size)]
        return Sharded.of(state.dim, parts, self.size)

    def _held(self, call: Call, total: int) -> int:
        held = call.held(total)
        if held >= total > 1:
            call.refuse(
                f"has {total} positions that every rank has, of which a causal ring over the axis would give each rank"
                f" {held}",
                'use strategy="ulysses" or "allgather_kv" for this axis',
            )
        return held  # of one position every rank has a copy, as it would behind the end of a part

    def _split_everywhere(self, before: Node, x: Node, state: Sharded, split: Sharded) -> Node:
        if split == state:
            return x
        if (x, split) not in self.made:
            pieces = self._pieces(before, x, state, state)
            parts = zip(state.parts(self.size), split.parts(self.size), pieces, strict=True)
            marked = [
                self._marked(before, piece, Sharded.of(_SEQ, [new], self.size)) if new != old else piece
                for old, new, piece in parts
            ]
            self.made[x, split] = (
                self.emitted(before, split, aten.cat.default, marked, _SEQ)  # type: ignore[arg-type]
                if len(marked) > 1
                else marked[0]
            )
        return self.made[x, split]

    def _as_before(self, before: Node, y: Node, state: Sharded, split: Sharded) -> Node:
        """The result as its queries were: gathered, where they were whole."""
        if split == state:
            return y
        parts = zip(state.parts(self.size), split.parts(self.size), self._pieces(before, y, split, split), strict=True)
        pieces = [
            self.emitted(before, None, md.gather_sequence.default, piece, _SEQ, self.axis, self.size)
            if new != old
            else piece
            for old, new, piece in parts
        ]
        if len(pieces) == 1:
            return pieces[0]
        return self.emitted(before, state, aten.cat.default, pieces, _SEQ)  # type: ignore[arg-type]

    def _mask(self, before: Node, mask: Node, q: Sharded, k: Sharded) -> Node:
        """The mask, whole, with the rows of all ranks' queries and the columns of all ranks' keys."""
        key = (mask, q, k)
        if key not in self.made:
            whole = self.gathered(before, mask)
            if value_of(whole).ndim < 4:
                shape = [*[1] * (4 - value_of(whole).ndim), *value_of(whole).shape]
                whole = self.emitted(before, None, aten.reshape.default, whole, shape)
            keys = sum(part.total for part in k.parts(self.size))
            if k.totals and value_of(whole).shape[3] == 1:  # what lies behind the end of a part is not to be seen
                whole = self.emitted(before, None, aten.expand.default, whole, [*value_of(whole).shape[:3], keys])
            self.made[key] = self._by_rank(before, self._by_rank(before, whole, 2, q, False), 3, k, True)
        return self.made[key]

    def _by_rank(self, before: Node, x: Node, dim: int, state: Sharded, hides: bool) -> Node:
        """A dim in the order in which the ranks hold the parts, with more entries where the ranks do not divide them.

        Those repeat the last, or hide.
        """
        if value_of(x).shape[dim] == 1 or (len(state.pieces) == 1 and not state.totals):
            return x
        parts = state.parts(self.size)
        found = []
        for part, piece in zip(parts, self._pieces(before, x, None, replace(state, dim=dim)), strict=True):
            behind = part.held * self.size - part.total
            found.append(self._longer(before, piece, dim, behind, hides) if behind else piece)
        if len(found) == 1:
            return found[0]
        shape = value_of(x).shape
        seen = [
            self.emitted(
                before,
                None,
                aten.reshape.default,
                piece,
                [*shape[:dim], self.size, part.held, *shape[dim + 1 :]],
            )
            for part, piece in zip(parts, found, strict=True)
        ]
        joined = self.emitted(before, None, aten.cat.default, seen, dim + 1)  # type: ignore[arg-type]
        rows = [*shape[:dim], self.size * state.length, *shape[dim + 1 :]]
        return self.emitted(before, None, aten.reshape.default, joined, rows)

    def _longer(self, before: Node, x: Node, dim: int, behind: int, hides: bool) -> Node:
        extent = value_of(x).shape[dim]
        shape = [behind if d == dim else n for d, n in enumerate(value_of(x).shape)]
        last = self.emitted(before, None, aten.slice.Tensor, x, dim, extent - 1, extent)
        if hides:
            last = self.emitted(before, None, aten.full_like.default, last, _hidden(value_of(x)))
        copies = self.emitted(before, None, aten.expand.default, last, shape)
        return self.emitted(before, None, aten.cat.default, [x, copies], dim)  # type: ignore[arg-type]


def _passed_over(node: Node) -> float | bool:
    """What the largest of some numbers, or the least, is never; or what changes nothing where it is."""
    dtype, of_largest = value_of(node).dtype, OF_PARTS[node.target] is aten.amax.default
    if dtype is torch.bool:
        return not of_largest
    if not dtype.is_floating_point:
        return torch.iinfo(dtype).min if of_largest else torch.iinfo(dtype).max
    return -math.inf if of_largest else math.inf


def _hidden(mask: torch.Tensor) -> bool | float:
    return False if mask.dtype is torch.bool else -math.inf


def _is_in_one_row(q: Sharded, k: State) -> bool:
    """Has each rank the queries of one chunk of the sequence, and the keys of the same?"""
    return k is not None and len(q.pieces) == 1 and (q.pieces, q.totals) == (k.pieces, k.totals)


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
        parts = state.parts(call.size)
        held = (
            f"{parts[0].total} positions, which the ranks do not divide"
            if len(parts) == 1 and state.outer == 1
            else f"{len(state.pieces)} concatenated parts, of {' and '.join(map(str, state.pieces))} per rank"
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
