"""How one value of a graph lies along one axis, and how an op carries that from its operands to its result.

A value is replicated (``None``: equal on all ranks of the axis) or :class:`Sharded`.  Most ops are told by
where each dim of each operand goes in the result: :func:`combine` takes those dims and gives the result's
sharding, or refuses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor
from torch.fx import Node

from torchtrt_md.errors import ShardingError
from torchtrt_md.graph.source import source_line
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.program import value_of

# What to do about an op that needs the whole sequence.
GATHER_FIRST = "gather the sequence before this op (md.Gather in the plan), or leave this op's module out of the split"


@dataclass(frozen=True)
class Sharded:
    """Tensor dim ``dim`` has size ``outer * sum(pieces) * inner``; the middle factor is this rank's part of a sequence.

    Attributes:
        dim: the tensor dimension, counted from the left.
        pieces: local lengths of the parts that were concatenated on the sharded dim, each of which holds this
            rank's chunk of its own sequence: (T/P, I/P) for text and image tokens.
        outer: product of the unsharded dims that a view merged into ``dim`` before the sequence ([B, S] -> [B*S]).
        inner: the same, after it ([S, H] -> [S*H]).
    """

    dim: int
    pieces: tuple[int, ...]
    outer: int = 1
    inner: int = 1

    @property
    def length(self) -> int:
        return sum(self.pieces)

    @property
    def extent(self) -> int:
        """The local size of ``dim``."""
        return self.outer * self.length * self.inner

    @property
    def is_chunk(self) -> bool:
        """Do the ranks' parts, concatenated on ``dim``, make the whole in order?"""
        return len(self.pieces) == 1 and self.outer == 1

    @property
    def is_plain(self) -> bool:
        """Is ``dim`` the sequence and nothing else?"""
        return self.outer == 1 and self.inner == 1


State: TypeAlias = "Sharded | None"
Result: TypeAlias = "Sharded | list[Sharded | None] | None"

# For each dim of an operand the dim of the result that it becomes, or None where the op reads across it.
Dims: TypeAlias = "Sequence[int | None]"


def is_sharded(result: Result) -> bool:
    return any(s is not None for s in result) if isinstance(result, list) else result is not None


@dataclass(frozen=True)
class Call:
    """One node under analysis along one axis of ``size`` ranks, with what is known of all nodes before it."""

    node: Node
    axis: str
    size: int
    states: Mapping[Node, Result]

    @cached_property
    def args(self) -> dict[str, Any]:
        """The op's arguments by name."""
        return bound_args(self.node)

    @property
    def shape(self) -> torch.Size:
        """The shape of the one tensor that the op returns."""
        return value_of(self.node).shape

    @property
    def sharded(self) -> bool:
        """Is any operand sharded?"""
        return any(is_sharded(self.states[n]) for n in self.node.all_input_nodes)

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
        return node.name
    shape = list(value.shape)
    if not isinstance(state, Sharded):
        return f"{node.name} {shape}, equal on all ranks"
    whole = [*shape[: state.dim], shape[state.dim] * size, *shape[state.dim + 1 :]]
    pieces = f" as parts of {' + '.join(map(str, state.pieces))} per rank" if len(state.pieces) > 1 else ""
    return f"{node.name} {shape}, this rank's part of {whole} on dim {state.dim}{pieces}"


def combine(call: Call, *operands: tuple[object, Dims], across: str = "mixes positions across the shard") -> State:
    """The sharding of an op's result, from where each operand's dims go in it.

    ``across`` says in the error what the op does with the dims that it reads across.

    Raises:
        ShardingError: a sharded dim is read across, operands are sharded differently, or a replicated
            operand varies along the sharded dim of another.
    """
    result: State = None
    for operand, dims in operands:
        state = call.state(operand)
        if state is None:
            continue
        to = dims[state.dim]
        if to is None:
            call.refuse(across)
        moved = replace(state, dim=to)
        if result is not None and result != moved:
            call.refuse(
                "takes operands that are split differently, so their local positions are not those of each other",
                "split all of them on the same dim, concatenated from the same parts in the same order",
            )
        result = moved
    if result is None:
        return None
    for operand, dims in operands:
        if not isinstance(operand, Node) or call.state(operand) is not None:
            continue
        for dim, to in enumerate(dims):
            if to == result.dim and not _is_uniform(value_of(operand), dim):
                call.refuse(
                    f"has a replicated tensor of the local length used beside a sharded one: {operand.name} has"
                    f" {value_of(operand).shape[dim]} entries, the same ones on every rank",
                    "make it from the length of the whole sequence and let the plan split it like the others",
                )
    return result


def _is_uniform(value: Tensor, dim: int) -> bool:
    """Is it the same at all positions of ``dim``, whatever the length?  An expanded dim has stride 0."""
    return value.shape[dim] == 1 or value.stride(dim) == 0


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


def carried_by_view(state: Sharded, old: Sequence[int], new: Sequence[int], asked: Sequence[int]) -> State:
    """Where a view, which keeps the linear order of elements, takes the sharded dim; ``None`` if that is not clear.

    In linear order the sequence has stride ``step`` and spans ``span`` elements.  The new dim that spans these
    has it, with what else is in that dim as ``outer`` and ``inner``; or ``[n * m]`` becomes ``[n, m]``,
    and the ranks hold parts of ``n``.

    Args:
        state: the sharding before.
        old: the local shape before.
        new: the local shape after.
        asked: the sizes that the user passed, of which one may be -1.
    """
    if 0 in new:
        return None
    step = state.inner * math.prod(old[state.dim + 1 :])
    span = step * state.length
    for dim, extent in enumerate(new):
        below = math.prod(new[dim + 1 :])
        if below >= span or below * extent % span:
            continue
        outer = below * extent // span
        # [n * m] -> (-1, m) where n is 1 on each rank looks like a new dim before the sequence.
        n_is_one = 1 not in old[: state.dim] and any(s == -1 and new[d] == 1 for d, s in enumerate(asked) if d < dim)
        if step % below == 0:
            return None if n_is_one else Sharded(dim, state.pieces, outer, step // below)
        # m is taken to be the user's number, and n to follow from the length: when m was left to PyTorch as -1,
        # it is the other way round, and each rank would have a part of m instead.
        m_is_left_open = any(s == -1 and math.prod(new[d + 1 :]) >= step for d, s in enumerate(asked) if d > dim)
        if len(state.pieces) == 1 and below % step == 0 and span % below == 0 and not m_is_left_open:
            return Sharded(dim, (span // below,), outer)
    return None


def cut(state: Sharded, start: int, stop: int) -> State:
    """The sharding of positions ``start:stop`` of the sharded dim; ``None`` unless whole pieces are cut out."""
    if (start, stop) == (0, state.extent):
        return state
    edges = [sum(state.pieces[:i]) * state.inner for i in range(len(state.pieces) + 1)]
    if state.outer != 1 or start not in edges or stop not in edges or start >= stop:
        return None
    return replace(state, pieces=state.pieces[edges.index(start) : edges.index(stop)])
