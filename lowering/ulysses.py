"""Context attention by exchanging heads for sequence (DeepSpeed Ulysses, https://arxiv.org/abs/2309.14509).

    before    y = context_attention(q, k, v, ..., "ulysses", axis, P)      # q [B, H, S/P, D], k, v [B, Hkv, S/P, D]
    after     x = cat of q, k, v, each seen as [P, B, S/P, heads/P, D], on heads
              x = all_to_all(x, 0, 0)                                      # from rank r its S/P tokens of my heads
              q', k', v' = slices of x seen as [B, (H + 2 Hkv)/P, S, D]
              y = attention(q', k', v', ...)                               # [B, H/P, S, D]
              y = all_to_all(y seen as [P, B, S/P, H/P, D], 0, 0)
              y = y in the form [B, H, S/P, D]

One packed exchange there and one back, on dim 0.  Tokens stand before heads in what is exchanged, which is how models
make queries, keys and values, and how attention kernels of PyTorch write their result: with a batch of one nothing is
copied between the exchanges and attention.  What is copied is what is sent (the cat) and what came back.  Sent by each
rank, of N tokens and width d = H D in b bytes, with f = Hkv / H: (2 + 2f) (N d b / P) (P - 1) / P.

Heads that P does not divide are exchanged with copies of the last behind them, which are dropped from the result.  Of
fewer key/value heads than ranks, or of a number that P does not divide, each is repeated as often as its queries allow.
A mask is there for all queries and keys; a rank takes that of its heads, if they have one each.  Keys behind the end of
the sequence, where P does not divide it, are cut off once they are there.

Of a sequence that is split over several axes, heads are exchanged along the last, and what is left is attention over
the others, of the heads and the tokens that an exchange leaves.  That is repeated until one axis is left, which has the
strategy that was asked for (with a ring: unified sequence parallelism, USP, https://arxiv.org/abs/2405.07719)::

    before    y = context_attention(q, k, v, ..., "ring", "a+b", A B)      # q [B, H, S/(A B), D]
    after     x = all_to_all(cat of q, k, v, 0, 0, "b", B)
              y = context_attention(q', k', v', ..., "ring", "a", A)       # q' [B, H/B, S/A, D]
              y = all_to_all(y, 0, 0, "b", B)

A rank of "a" has the chunks of all of "b" then, which follow each other.  So a mask is in the order that this needs;
keys that lie in several parts, with some behind their ends, are put part by part, as ``lengths`` counts them.

In the split placement an :class:`~torchtrt_md.lowering.passes.Exchange` may ask for more exchanges that send the same
bytes, so that a runtime which starts collectives in the order of the graph overlaps them with something:

    values_first      v is exchanged by itself, right behind the node that makes it
    head_groups=g     a rank's heads in g parts: all exchanges there, then attention and the way back of each part
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.fx import GraphModule, Node

from torchtrt_md.errors import ShardingError
from torchtrt_md.graph.rewrite import emit, permute, substitute
from torchtrt_md.graph.source import source_line
from torchtrt_md.lowering.choose_strategy import attention_key
from torchtrt_md.lowering.layout import (
    by_part,
    copied,
    exchanged_heads,
    joined,
    kv_repeats,
    seen_keys,
    slices,
    whole_sequence,
)
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.lowering.passes import Exchange, PassContext
from torchtrt_md.mesh import axes_of
from torchtrt_md.mesh import joined as joined_name
from torchtrt_md.program import value_of

aten, md = torch.ops.aten, torch.ops.torchtrt_md
_BY_RANK = [1, 0, 3, 2, 4]  # [B, P, heads/P, S/P, D] <-> [P, B, S/P, heads/P, D]


def run(graph: GraphModule, context: PassContext) -> int:
    """Number of attentions that were rewritten.

    Raises:
        ShardingError: a rank's heads do not divide by the groups that were asked for.
    """
    count = 0
    todo = _exchanged(graph)
    while todo:  # of several axes, what is left over the others comes again
        for node in todo:
            substitute(node, _Expansion(node, _how(node, context), context).attended())
        count += len(todo)
        todo = _exchanged(graph)
    return count


def _exchanged(graph: GraphModule) -> list[Node]:
    """The attentions of which heads are exchanged along their axis, or along the last of several."""
    nodes = graph.graph.find_nodes(op="call_function", target=md.context_attention.default)
    return [n for n in nodes if bound_args(n)["strategy"] == "ulysses" or len(axes_of(bound_args(n)["axis"])) > 1]


def _how(node: Node, context: PassContext) -> Exchange:
    """In an engine nothing overlaps, so what is chosen for the split placement does not hold there."""
    plain = Exchange("ulysses")
    return context.exchanges.get(attention_key(node), plain) if context.placement == "split" else plain


class _Expansion:
    """What one attention becomes."""

    def __init__(self, node: Node, how: Exchange, context: PassContext) -> None:
        self.node, self.how, self.args, self.sent = node, how, bound_args(node), context.sent
        *self.others, self.axis = axes_of(self.args["axis"])
        self.size = context.mesh.axis_size(self.axis) if self.others else self.args["size"]
        self.operands = _with_heads_for_all(node, {name: self.args[name] for name in ("q", "k", "v")}, self.size)
        _check_groups(node, self.operands, self.size, how.head_groups)
        # of each operand, those of a group that stay on a rank
        self.heads = {n: value_of(x).shape[1] // self.size // how.head_groups for n, x in self.operands.items()}

    def attended(self) -> Node:
        groups, masks = self._exchange_there(), self._masks()
        returned = [
            self._exchange_back(self._attention(group, mask)) for group, mask in zip(groups, masks, strict=True)
        ]
        by_rank = [permute(self.node, x, _BY_RANK) for x in returned]  # [B, P, heads/P, S/P, D]
        batch, wanted, tokens, width = value_of(self.node).shape
        heads = value_of(self.operands["q"]).shape[1]
        y = emit(self.node, aten.view.default, joined(self.node, by_rank, 2), [batch, heads, tokens, width])
        # What reads attention was traced on a contiguous result.
        return y if heads == wanted else copied(self.node, emit(self.node, aten.slice.Tensor, y, 1, 0, wanted))

    def _attention(self, operands: Mapping[str, Node], mask: Node | None) -> Node:
        """Of the heads and tokens that this rank has now."""
        q, lengths = operands["q"], self.args["lengths"]
        rest = (self.args["is_causal"], self.args["scale"], self.args["enable_gqa"])
        if not self.others:
            k, v = (seen_keys(self.node, operands[name], lengths, self.size) for name in ("k", "v"))
            return emit(self.node, md.attention.default, q, k, v, mask, *rest)
        k, v = (by_part(self.node, operands[name], lengths, self.size) for name in ("k", "v"))
        if lengths:
            lengths = [n * self.size if i % 2 == 0 else n for i, n in enumerate(lengths)]  # held, total, held, ...
        over = (self.args["strategy"], joined_name(self.others), self.args["size"] // self.size)
        return emit(self.node, md.context_attention.default, q, k, v, *rest, *over, mask, lengths)

    def _masks(self) -> list[Node | None]:
        """The mask of each group of heads."""
        mask, groups = self.args["mask"], self.how.head_groups
        if mask is None or value_of(mask).shape[1] == 1:
            return [mask] * groups
        mask = _repeated_last(self.node, mask, value_of(self.operands["q"]).shape[1])
        mine = emit(self.node, md.shard.default, mask, 1, self.axis, self.size)
        return list(slices(self.node, mine, 1, [self.heads["q"]] * groups))

    def _exchange_there(self) -> list[dict[str, Node]]:
        """For each group of heads q, k and v of the whole sequence, [B, h, S, D]."""
        groups = range(self.how.head_groups)
        values = self._values_first() if self.how.values_first else []
        packs = _packs({name: x for name, x in self.operands.items() if name != "v" or not values})
        packed = [self._packed(names) for names in packs]
        received = [[self._all_to_all(x, *self.sent) for x in of_group] for of_group in zip(*packed, strict=True)]
        found = []
        for group in groups:
            operands = {"v": values[group]} if values else {}
            for names, x in zip(packs, received[group], strict=True):
                operands.update(zip(names, self._whole_sequence(x, [self.heads[n] for n in names]), strict=True))
            found.append(operands)
        return found

    def _values_first(self) -> list[Node]:
        """The values [B, h, S, D] of each group, by one exchange as early as it can be."""
        v, last = self.operands["v"], self.node.prev
        received = self._all_to_all(joined(self.node, [self._by_rank(v)], 3), *self.sent)
        _move_behind(v, last, self.node)
        return self._whole_sequence(received, [self.heads["v"]] * self.how.head_groups)

    def _packed(self, names: list[str]) -> list[Node]:
        """These operands as one contiguous tensor [P, B, S/P, n, D] for each group, by one copy for all groups."""
        operands, groups = [self.operands[name] for name in names], self.how.head_groups
        if groups == 1:
            return [joined(self.node, [self._by_rank(x) for x in operands], 3)]
        packed = joined(self.node, [self._by_group(x) for x in operands], 4)
        return [emit(self.node, aten.select.int, packed, 0, group) for group in range(groups)]

    def _by_rank(self, x: Node) -> Node:
        """[B, heads, S/P, D] seen as [P, B, S/P, heads/P, D]: by the rank that gets it."""
        batch, heads, tokens, width = value_of(x).shape
        split = emit(self.node, aten.view.default, x, [batch, self.size, heads // self.size, tokens, width])
        return permute(self.node, split, _BY_RANK)

    def _by_group(self, x: Node) -> Node:
        """[B, heads, S/P, D] seen as [groups, P, B, S/P, h, D]: by group, then by the rank that gets it."""
        batch, heads, tokens, width = value_of(x).shape
        groups = self.how.head_groups
        shape = [batch, self.size, groups, heads // self.size // groups, tokens, width]
        return permute(self.node, emit(self.node, aten.view.default, x, shape), [2, 1, 0, 4, 3, 5])

    def _exchange_back(self, local: Node) -> Node:
        """[B, h, S, D] -> [P, B, S/P, h, D]: of rank r the heads that it attended to.

        However attention lays out its result, it can be seen by parts of the sequence.
        """
        batch, heads, tokens, width = value_of(local).shape
        split = emit(self.node, aten.view.default, local, [batch, heads, self.size, tokens // self.size, width])
        return self._all_to_all(permute(self.node, split, [2, 0, 3, 1, 4]))

    def _whole_sequence(self, received: Node, heads: list[int]) -> list[Node]:
        return whole_sequence(self.node, received, value_of(received).shape[1], heads)

    def _all_to_all(self, x: Node, *sent: str) -> Node:
        return emit(self.node, md.all_to_all.default, x, 0, 0, self.axis, self.size, *sent)


def _packs(operands: Mapping[str, Node]) -> list[list[str]]:
    """The operands that fit one tensor: those of one batch, length and width."""
    packs: dict[tuple[int, ...], list[str]] = {}
    for name, x in operands.items():
        batch, _, tokens, width = value_of(x).shape
        packs.setdefault((batch, tokens, width), []).append(name)
    return list(packs.values())


def _move_behind(node: Node, last: Node, end: Node) -> None:
    """Move the nodes between ``last`` and ``end`` to right behind ``node``, or the placeholders if it is one."""
    while node.next.op == "placeholder":
        node = node.next
    while node is not last and last.next is not end:  # they may be there already
        moved = last.next
        node.append(moved)
        node = moved


def _with_heads_for_all(node: Node, operands: dict[str, Node], size: int) -> dict[str, Node]:
    """The operands with numbers of heads that the ranks divide."""
    heads, kv_heads = (value_of(operands[name]).shape[1] for name in ("q", "k"))
    assert heads % kv_heads == 0, f"{node.name} has {heads} heads over {kv_heads}; capture makes them fit"
    times = kv_repeats(heads, kv_heads, size)
    all_heads, all_kv_heads = exchanged_heads(heads, kv_heads, size)
    found = {"q": _repeated_last(node, operands["q"], all_heads)}
    for name in ("k", "v"):
        found[name] = _repeated_last(node, _each_repeated(node, operands[name], times), all_kv_heads)
    return found


def _each_repeated(before: Node, x: Node, times: int) -> Node:
    """[B, h, S, D] -> [B, h times, S, D], each head beside its copies."""
    if times == 1:
        return x
    batch, heads, tokens, width = value_of(x).shape
    copies = emit(before, aten.unsqueeze.default, x, 2)
    copies = emit(before, aten.expand.default, copies, [batch, heads, times, tokens, width])
    return emit(before, aten.reshape.default, copies, [batch, heads * times, tokens, width])


def _repeated_last(before: Node, x: Node, heads: int) -> Node:
    """[B, h, ...] -> [B, heads, ...] with copies of the last head."""
    shape = list(value_of(x).shape)
    missing = heads - shape[1]
    if not missing:
        return x
    last = emit(before, aten.slice.Tensor, x, 1, shape[1] - 1, shape[1])
    copies = emit(before, aten.expand.default, last, [shape[0], missing, *shape[2:]])
    return emit(before, aten.cat.default, [x, copies], 1)


def _check_groups(node: Node, operands: Mapping[str, Node], size: int, groups: int) -> None:
    heads, kv_heads = (value_of(operands[name]).shape[1] // size for name in ("q", "k"))
    if groups < 1 or heads % groups or kv_heads % groups:
        raise ShardingError(
            f"the {heads} heads and {kv_heads} key/value heads of attention {node.name!r} that each of {size} ranks"
            f" gets cannot be exchanged in {groups} equal groups",
            fix=f"use a number of head_groups that divides {math.gcd(heads, kv_heads)}",
            at=source_line(node),
        )
