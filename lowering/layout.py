"""How tensors lie in front of and behind the exchanges of attention: what copies is explicit, all else is a view.

``aten.reshape`` may be either, which a reader of the graph cannot tell.  Here views are ``aten.view``, and a copy is
``aten.cat`` or ``aten.clone``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.fx import Node

from torchtrt_md.graph.rewrite import emit, permute
from torchtrt_md.program import value_of

aten = torch.ops.aten


def copied(before: Node, x: Node) -> Node:
    """``x`` contiguous, as a tensor of its own."""
    return emit(before, aten.clone.default, x, memory_format=torch.contiguous_format)


def joined(before: Node, parts: Sequence[Node], dim: int) -> Node:
    """One contiguous tensor of the parts, by one copy."""
    return emit(before, aten.cat.default, list(parts), dim) if len(parts) > 1 else copied(before, parts[0])


def viewed(before: Node, x: Node, shape: list[int]) -> Node:
    """``x`` seen in this shape; no node where it has it already."""
    return x if list(value_of(x).shape) == shape else emit(before, aten.view.default, x, shape)


def whole_sequence(before: Node, received: Node, batch: int, heads: Sequence[int]) -> list[Node]:
    """What all ranks sent, as operands of attention.

    Args:
        before: where nodes are inserted.
        received: [P, B, S/P, n, D] or [P B, S/P, n, D], contiguous: of each rank its part of the sequence.
        batch: B.
        heads: how many of the n heads each operand has, in order.

    Returns:
        For each a view [B, h, S, D] of one tensor.  With a batch of one that is ``received`` itself; otherwise a
        copy, since the ranks' parts of an entry of the batch do not lie in a row.
    """
    *leading, tokens, total, width = value_of(received).shape
    ranks = math.prod(leading) // batch
    if batch > 1:
        by_rank = viewed(before, received, [ranks, batch, tokens, total, width])
        received = copied(before, permute(before, by_rank, [1, 0, 2, 3, 4]))
    whole = viewed(before, received, [batch, ranks * tokens, total, width])
    return slices(before, permute(before, whole, [0, 2, 1, 3]), 1, heads)


def seen_keys(before: Node, x: Node, lengths: Sequence[int] | None, size: int) -> Node:
    """All ranks' keys or values [B, h, S, D] without those behind the ends of their parts.

    Args:
        before: where nodes are inserted.
        x: of all ranks, in their order.
        lengths: as ``context_attention`` has them.
        size: the number of ranks.
    """
    lengths = lengths or ()
    parts = list(zip(lengths[::2], lengths[1::2], strict=True))
    if len(parts) < 2:
        return emit(before, aten.slice.Tensor, x, 2, 0, parts[0][1]) if parts else x
    seen = [
        part if total == size * held else emit(before, aten.slice.Tensor, part, 2, 0, total)
        for (held, total), part in zip(parts, _parts(before, x, lengths, size), strict=True)
    ]
    return emit(before, aten.cat.default, seen, 2)


def by_part(before: Node, x: Node, lengths: Sequence[int] | None, size: int) -> Node:
    """All ranks' keys or values [B, h, S, D], part after part: of each part those of all ranks.

    Args: as :func:`seen_keys`.
    """
    return x if not lengths or len(lengths) == 2 else joined(before, _parts(before, x, lengths, size), 2)


def _parts(before: Node, x: Node, lengths: Sequence[int], size: int) -> list[Node]:
    """The parts that keys or values of all ranks, in their order, consist of."""
    batch, heads, tokens, width = value_of(x).shape
    by_rank = emit(before, aten.reshape.default, x, [batch, heads, size, tokens // size, width])
    held = lengths[::2]
    return [
        emit(before, aten.reshape.default, part, [batch, heads, size * n, width])
        for n, part in zip(held, slices(before, by_rank, 3, held), strict=True)
    ]


def slices(before: Node, x: Node, dim: int, sizes: Sequence[int]) -> list[Node]:
    """``x`` cut on ``dim``; no node where one slice is all of it."""
    if len(sizes) == 1:
        return [x]
    found, start = [], 0
    for size in sizes:
        found.append(emit(before, aten.slice.Tensor, x, dim, start, start + size))
        start += size
    return found


def kv_repeats(heads: int, kv_heads: int, size: int) -> int:
    """How often each key/value head is repeated for an exchange among ``size`` ranks.

    As rarely as can be for the ranks to divide them.  Where they cannot: not at all, if that leaves no more heads to
    attend to than a repetition for each query head does, and for each query head otherwise.
    """
    group = heads // kv_heads
    times = size // math.gcd(kv_heads, size)
    if group % times == 0:
        return times
    whole_groups = group * size * math.ceil(kv_heads / size)
    return 1 if whole_groups <= size * math.ceil(heads / size) else group


def exchanged_heads(heads: int, kv_heads: int, size: int) -> tuple[int, int]:
    """How many heads and key/value heads ``size`` ranks exchange: numbers that they divide, copies among them.

    Query heads of one key/value head stay together, so that each rank has those of its key/value heads.
    """
    kv_heads *= kv_repeats(heads, kv_heads, size)
    sent = size * math.ceil(kv_heads / size)
    return heads // kv_heads * sent, sent
