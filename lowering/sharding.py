"""How one value of a graph lies along one axis, and how an op carries that from its operands to its result.

A value is replicated (``None``: equal on all ranks of the axis) or :class:`Sharded`.  Most ops are told by
where each dim of each operand goes in the result: :func:`combine` takes those dims and gives the result's
sharding, or refuses.

While a graph is analyzed its values have the shapes of the whole; what a rank holds of them follows from these
states alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor
from torch.fx import Node

from torchtrt_md.errors import ShardingError
from torchtrt_md.graph.source import source_line, user_name
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.mesh import shown
from torchtrt_md.program import value_of

# What to do about an op that needs the whole sequence.
GATHER_FIRST = "gather the sequence before this op (md.Gather in the plan), or leave this op's module out of the split"


@dataclass(frozen=True)
class Sharded:
    """This rank has ``outer * sum(pieces) * inner`` of dim ``dim``; the middle factor is its part of a sequence.

    A part of a sequence is split over the ranks, in equal chunks, or every rank has all of it, as of text tokens beside
    those of an image that is split.  Where the ranks do not divide a part, its last entry is repeated until they do:
    what lies behind the end is a copy of that entry, through every op that keeps positions apart and all attention that
    is not causal, up to a view that makes one position of several.

    Attributes:
        dim: the tensor dimension, counted from the left.
        pieces: local lengths of the parts that were concatenated on the sharded dim, each of which holds this
            rank's chunk of its own sequence: (T/P, I/P) for text and image tokens.
        outer: product of the unsharded dims that a view merged into ``dim`` before the sequence ([B, S] -> [B*S]).
        inner: the same, after it ([S, H] -> [S*H]).
        totals: lengths of the parts on the whole; () where that is P times what a rank has, for all of them.  A part
            of which a rank has as much as there is, is whole on every rank.
    """

    dim: int
    pieces: tuple[int, ...]
    outer: int = 1
    inner: int = 1
    totals: tuple[int, ...] = ()

    @staticmethod
    def of(dim: int, parts: Iterable[Part], size: int, outer: int = 1, inner: int = 1) -> Sharded:
        """Of these parts; neighbors that are whole on every rank are one."""
        merged: list[Part] = []
        for part in parts:
            if merged and part.is_whole and merged[-1].is_whole:
                part = Part(merged[-1].held + part.held, merged[-1].total + part.total)
                merged.pop()
            merged.append(part)
        even = all(part.total == part.held * size for part in merged)
        pieces = tuple(part.held for part in merged)
        return Sharded(dim, pieces, outer, inner, () if even else tuple(part.total for part in merged))

    def parts(self, size: int) -> tuple[Part, ...]:
        totals = self.totals or tuple(size * held for held in self.pieces)
        return tuple(Part(held, total) for held, total in zip(self.pieces, totals, strict=True))

    @property
    def length(self) -> int:
        return sum(self.pieces)

    @property
    def extent(self) -> int:
        """The local size of ``dim``."""
        return self.outer * self.length * self.inner

    def whole(self, size: int) -> int:
        """The size of ``dim`` on the whole."""
        return self.outer * sum(part.total for part in self.parts(size)) * self.inner

    @property
    def is_chunk(self) -> bool:
        """Do the ranks' parts, concatenated on ``dim``, make the whole in order?"""
        return len(self.pieces) == 1 and self.outer == 1 and not self.totals

    @property
    def is_plain(self) -> bool:
        """Is ``dim`` the sequence and nothing else?"""
        return self.outer == 1 and self.inner == 1


class Part(NamedTuple):
    """One part of a sequence: how many positions a rank has of it, and how many there are."""

    held: int
    total: int

    @property
    def is_whole(self) -> bool:
        """Has every rank all of it?"""
        return self.held == self.total


State: TypeAlias = "Sharded | None"
Result: TypeAlias = "Sharded | list[Sharded | None] | None"

# For each dim of an operand the dim of the result that it becomes, or None where the op reads across it.
Dims: TypeAlias = "Sequence[int | None]"


def is_sharded(result: Result) -> bool:
    return any(s is not None for s in result) if isinstance(result, list) else result is not None


@dataclass(frozen=True)
class Call:
    """One node under analysis along one axis of ``size`` ranks, with what is known of all nodes before it.

    ``to_split`` are the replicated operands of which the op needs this rank's part only, with how they must be split.
    ``unit`` is what a rank's number of positions must divide by.
    """

    node: Node
    axis: str
    size: int
    states: Mapping[Node, Result]
    unit: int = 1
    to_split: dict[Node, Sharded] = field(default_factory=dict)

    @cached_property
    def args(self) -> dict[str, Any]:
        """The op's arguments by name."""
        return bound_args(self.node)

    @property
    def shape(self) -> torch.Size:
        """The shape, on the whole, of the one tensor that the op returns."""
        return value_of(self.node).shape

    @property
    def sharded(self) -> bool:
        """Is any operand sharded?"""
        return any(is_sharded(self.states[n]) for n in self.node.all_input_nodes)

    def held(self, total: int) -> int:
        """How many of these positions each rank has."""
        return self.unit * math.ceil(total / (self.unit * self.size))

    def state(self, operand: object) -> State:
        """An operand's sharding; anything that is not a node is replicated."""
        state = self.states[operand] if isinstance(operand, Node) else None
        if isinstance(state, list):
            self.refuse_unknown()
        return state

    def sole(self, operand: object) -> Sharded:
        """The sharding of the one operand that the op's rule is about; no other may be sharded."""
        state = self.state(operand)
        if state is None:
            self.refuse_unknown()
        return state

    def dim(self, name: str, ndim: int) -> int:
        """An argument that names a dim, counted from the left."""
        return int(self.args[name]) % max(ndim, 1)

    def refuse(self, why: str, fix: str = GATHER_FIRST) -> NoReturn:
        """Raise the error that tells the op, its operands locally and as a whole, and the user's line."""
        operands = "; ".join(_describe(n, self.states[n], self.size) for n in self.node.all_input_nodes)
        problem = f"{self.node.name} ({self.node.target}) {why}. Split over axis {self.axis!r} of {self.size} ranks"
        raise ShardingError(f"{problem}: {operands}", fix=fix, at=source_line(self.node))

    def refuse_unknown(self) -> NoReturn:
        self.refuse("is not known to keep positions apart")


def _describe(node: Node, state: Result, size: int) -> str:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return user_name(node)
    if not isinstance(state, Sharded):
        return f"{user_name(node)} {list(value.shape)}, equal on all ranks"
    held = " + ".join(f"{part.held}{' (all)' if part.is_whole else ''}" for part in state.parts(size))
    pieces = f" as parts of {held} per rank" if len(state.pieces) > 1 else ""
    part, whole = local_shape(value.shape, state), list(value.shape)
    return f"{user_name(node)} {part}, this rank's part of {whole} on dim {state.dim}{pieces}"


def local_shape(whole: Sequence[int], state: State) -> list[int]:
    """The shape of what each rank holds."""
    return [state.extent if state and d == state.dim else n for d, n in enumerate(whole)]


def combine(
    call: Call,
    *operands: tuple[object, Dims],
    across: str = "mixes positions across the shard",
    fix: str = GATHER_FIRST,
) -> State:
    """The sharding of an op's result, from where each operand's dims go in it.

    Replicated operands that have the dim too, such as a table of positions, are to be split like the sharded ones
    (``call.to_split``).  ``across`` says in the error what the op does with the dims that it reads across,
    and ``fix`` what to do instead.

    Raises:
        ShardingError: a sharded dim is read across, operands are sharded differently, or an operand has another
            extent along the sharded dim.
    """
    result: State = None
    for operand, dims in operands:
        state = call.state(operand)
        if state is None:
            continue
        to = dims[state.dim]
        if to is None:
            call.refuse(across, fix)
        moved = replace(state, dim=to)
        if result is not None and result.dim != moved.dim:
            call.refuse(
                f"takes operands that are split differently: on dims {result.dim} and {moved.dim} of its result",
                "split all of them on the same dim; where each position meets each other, as in a mask made of x[:, :,"
                f" None] == x[:, None, :], gather one of the operands: md.gather(x, dim, {shown(call.axis)})",
            )
        if result is not None and result != moved:
            call.refuse(
                "takes operands that are split differently, so their local positions are not those of each other",
                "split all of them on the same dim, concatenated from the same parts in the same order",
            )
        result = moved
    if result is None:
        return None
    needed: dict[Node, State] = {}
    for operand, dims in operands:
        if isinstance(operand, Node) and call.state(operand) is None:
            part = _part_beside(call, operand, dims, result)
            if needed.setdefault(operand, part) != part:
                call.refuse(
                    f"uses {user_name(operand)} both whole and as this rank's part", "pass a copy of it in one place"
                )
    call.to_split.update({operand: part for operand, part in needed.items() if part is not None})
    return result


def _part_beside(call: Call, operand: Node, dims: Dims, result: Sharded) -> State:
    """How a replicated operand is to be split for a result that is; ``None`` where all of it is used."""
    dim = next((dim for dim, to in enumerate(dims) if to == result.dim), None)
    if dim is None or value_of(operand).shape[dim] == 1:  # one entry is for all positions
        return None
    extent, whole = value_of(operand).shape[dim], result.whole(call.size)
    if extent != whole:
        call.refuse(
            f"uses {extent} entries of {user_name(operand)} beside a sharded dim of {whole}",
            "use as many entries of one as of the other",
        )
    return replace(result, dim=dim)


def aligned(operand: object, ndim: int) -> Dims:
    """The dims of an operand that is broadcast to ``ndim`` dims."""
    own = value_of(operand).ndim if isinstance(operand, Node) else 0
    return range(ndim - own, ndim)


def keeping(ndim: int, across: Iterable[int]) -> Dims:
    """All dims stay where they are, of which some are read across."""
    blocked = {d % max(ndim, 1) for d in across}
    return [None if d in blocked else d for d in range(ndim)]


def without(ndim: int, taken: Iterable[int]) -> Dims:
    """Some dims are read across and gone, the others close up."""
    gone = {d % max(ndim, 1) for d in taken}
    return [None if d in gone else d - sum(g < d for g in gone) for d in range(ndim)]


def carried_by_view(state: Sharded, old: Sequence[int], new: Sequence[int], size: int) -> State:
    """Where a view, which keeps the linear order of elements, takes the sharded dim; ``None`` if to no one dim.

    In linear order the sequence has stride ``step`` and spans ``span`` elements.  The new dim that spans these has
    it, with what else is in that dim as ``outer`` and ``inner``; or positions ``[n * m]`` become ``[n, m]``, and the
    ranks hold parts of ``n``, if ``m`` divides what they hold.

    Args:
        state: the sharding before.
        old: the whole shape before.
        new: the whole shape after.
        size: the number of ranks.
    """
    if 0 in new:
        return None
    step = state.inner * math.prod(old[state.dim + 1 :])
    parts = state.parts(size)
    span = step * sum(part.total for part in parts)
    for dim, extent in enumerate(new):
        below = math.prod(new[dim + 1 :])
        if below >= span or below * extent % span:
            continue
        outer = below * extent // span
        if step % below == 0:
            return replace(state, dim=dim, outer=outer, inner=step // below)
        m = below // step
        if below % step == 0 and not any(part.held % m or part.total % m for part in parts):
            return Sharded.of(dim, (Part(part.held // m, part.total // m) for part in parts), size, outer)
    return None


def cut(state: Sharded, start: int, stop: int, size: int) -> State:
    """The sharding of ``start:stop`` of the whole sharded dim; ``None`` unless it consists of whole parts of it.

    Of a part that every rank has, any positions may be cut out.
    """
    if (start, stop) == (0, state.whole(size)):
        return state
    if state.outer != 1 or start >= stop or start % state.inner or stop % state.inner:
        return None
    start, stop, first, kept = start // state.inner, stop // state.inner, 0, []
    for part in state.parts(size):
        taken = min(stop, first + part.total) - max(start, first)
        first += part.total
        if taken <= 0:
            continue
        if part.is_whole:
            part = Part(taken, taken)
        elif taken != part.total:
            return None
        kept.append(part)
    return Sharded.of(state.dim, kept, size, 1, state.inner) if kept else None


def local_position(state: Sharded, at: int, size: int) -> int:
    """Where on a rank's sharded dim a position of the whole is, which is at a border or in a part that is whole."""
    before, local = 0, 0
    for part in state.parts(size):
        extent, held = part.total * state.inner, part.held * state.inner
        if at < before + extent:
            break
        before, local = before + extent, local + held
    return local + at - before


def unless_whole(state: Sharded, size: int) -> State:
    """The same; ``None``, replicated, where every rank has all of it."""
    return None if all(part.is_whole for part in state.parts(size)) else state
