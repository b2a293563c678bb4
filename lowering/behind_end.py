"""What lies behind the end of a part that the ranks do not divide, hidden from an op that reads across it.

    before    a = amax(x, [1])                            # x [B, 2, D] of 6 positions on 4 ranks
    after     t = shard(arange(8) < 6, 0, "cp", 4)        # whether this rank's positions are any: [2]
              a = amax(masked_fill(x, ~t seen as [1, 2, 1], -inf), [1])

The ops are inserted behind :mod:`torchtrt_md.lowering.localize`, where every shape is that of a rank.  ``shard`` has
the sharding of a sequence, so that what changes the order of one (:mod:`torchtrt_md.lowering.zigzag`) does so here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from torchtrt_md.graph.rewrite import emit
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.lowering.sharding import Part, Sharded
from torchtrt_md.program import value_of

aten, md = torch.ops.aten, torch.ops.torchtrt_md


class BehindEnd:
    """Hides it along one axis; what says where it lies is made once for all values that are split alike."""

    def __init__(self, axis: str, size: int) -> None:
        self.axis, self.size = axis, size
        self.made: dict[Sharded, Node] = {}

    def hide(self, before: Node, name: str, state: Sharded, fill: float | bool) -> None:
        """Let this operand of ``before``, which is split like this, have ``fill`` behind the end."""
        operand = bound_args(before)[name]
        x = value_of(operand)
        shape = [state.extent if dim == state.dim else 1 for dim in range(x.ndim)]
        mask = self._emitted(before, {}, aten.view.default, self._behind(before, state), shape)
        hidden = self._emitted(before, operand.meta["sharding"], aten.masked_fill.Scalar, operand, mask, fill)
        before.replace_input_with(operand, hidden)

    def _behind(self, before: Node, state: Sharded) -> Node:
        """Of each entry of the sharded dim, whether it lies behind the end of its part."""
        if state not in self.made:
            parts = [self._of_part(before, part.held, part.total) for part in state.parts(self.size)]
            row = parts[0] if len(parts) == 1 else self._emitted(before, {}, aten.cat.default, parts)
            if not state.is_plain:  # each position is ``inner`` entries, and all of them come ``outer`` times
                row = self._emitted(before, {}, aten.view.default, row, [1, state.length, 1])
                row = self._emitted(before, {}, aten.expand.default, row, [state.outer, state.length, state.inner])
                row = self._emitted(before, {}, aten.reshape.default, row, [state.extent])
            self.made[state] = row
        return self.made[state]

    def _of_part(self, before: Node, held: int, total: int) -> Node:
        """Of a part of which a rank has ``held`` positions; all of them are any where every rank has the whole."""
        count = held if held == total else held * self.size
        positions = self._emitted(before, {}, aten.arange.default, count, device=value_of(before).device)
        behind = self._emitted(before, {}, aten.ge.Scalar, positions, total)
        if held == total:
            return behind
        state = Sharded.of(0, [Part(held, total)], self.size)
        return self._emitted(before, {self.axis: state}, md.shard.default, behind, 0, self.axis, self.size)

    def _emitted(
        self, before: Node, sharding: dict[str, Sharded], target: torch._ops.OpOverload, *args: Any, **kwargs: Any
    ) -> Node:
        node = emit(before, target, *args, **kwargs)
        node.meta["sharding"] = dict(sharding)
        return node
