"""Collectives without NCCL: each rank stores its parts into the memory of the others.

What arrives lies in memory that the ranks of the axis can write.  They may do so once all of them are behind the
exchange before it, whose barrier says so, and the layout has seen to it that nobody reads that memory any more by then.
Behind the copies is a barrier of all ranks of the axis: then everything has arrived everywhere.  For a sum every rank
then adds up what came, in the order of ranks, so that all have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import Node

from torchtrt_md.errors import LaunchError, first_line
from torchtrt_md.graph.rewrite import ALONE
from torchtrt_md.lowering.ops import bound_args, packing_of
from torchtrt_md.runtime import private, rows

# (This rank's operand, what all ranks of the axis get, in order) -> what is copied: (to, from).
Copies = Callable[[Tensor, Sequence[Tensor]], list[tuple[Tensor, Tensor]]]
_SUMMED = (torch.float32, torch.bfloat16, torch.float16)
_SMALL = 1 << 20  # bytes


@dataclass(frozen=True)
class Push:
    """How ranks do a collective by writing into each other's memory.

    Attributes:
        copies: what goes where: into the results, or for a sum beside each other, into [ranks, *the result's shape].
        sums: how many parts the result is the sum of; 0 where it is what arrived.
        scale: what the sum is multiplied by.
        packed: where each part is sent as rows in float8, how many arrive and the bytes of each: uint8 [parts, bytes],
            beside the result.
        alone: nothing runs beside it, as beside most sums, whose results the next product needs.
    """

    copies: Copies
    sums: int = 0
    scale: float = 1.0
    packed: tuple[int, int] | None = None
    alone: bool = False

    @property
    def beside(self) -> bool:
        """Does what arrives lie beside the result, which is computed of it?"""
        return self.sums > 0 or self.packed is not None


def push_of(node: Node, me: int) -> Push | None:
    """How to do a collective of the IR so; None where NCCL is to.

    Args:
        me: where this rank stands along the axis.
    """
    name, args = str(node.target).split(".")[1], bound_args(node)
    size, alone = args["size"], node.meta.get(ALONE, False)
    packing = packing_of(node)
    packed = None if packing is None else (packing.arrive, packing.bytes)
    if name == "all_to_all":
        return Push(lambda x, results: _exchanged(x.chunk(size), results, me), packed=packed, alone=alone)
    if name == "all_gather":
        return Push(lambda x, results: _exchanged([x] * size, results, me), packed=packed, alone=alone)
    if name == "permute_tensor":
        to = (me + args["shift"]) % size
        return Push(lambda x, results: [(results[to], x)], packed=packed)
    if name in ("all_reduce", "reduce_scatter"):
        held: Tensor = args["x"].meta["val"]
        whole = name == "all_reduce"
        if adds_up(args["op"], held) and (not whole or goes_at_once(held, size)):
            scale = 1 / size if args["op"] == "avg" else 1.0
            sent: Copies = lambda x, parts: _exchanged([x] * size if whole else x.chunk(size), parts, me)  # noqa: E731
            return Push(sent, size, scale, alone=True)
    return None


def adds_up(op: str, x: Tensor) -> bool:
    """Is a reduction of this tensor one that ranks compute from the parts that arrive?"""
    return op in ("sum", "avg") and x.dtype in _SUMMED


def goes_at_once(x: Tensor, size: int) -> bool:
    """Is a sum one step: everything goes to everyone, which for many ranks is more than NCCL sends?"""
    return size == 2 or x.nbytes <= _SMALL


def _exchanged(parts: Sequence[Tensor], results: Sequence[Tensor], me: int) -> list[tuple[Tensor, Tensor]]:
    size = len(results)
    turns = [(me + 1 + turn) % size for turn in range(size)]  # so that not all ranks write to one at once
    return [(results[to].chunk(size)[me], parts[to]) for to in turns]


class Shared:
    """Memory of this rank that the other ranks of an axis write, and theirs.

    Args:
        size: bytes; the same on all ranks of the axis.

    Raises:
        LaunchError: the GPUs have no access to each other's memory.
    """

    def __init__(self, size: int, group: dist.ProcessGroup, device: torch.device) -> None:
        from torchtrt_md.runtime import store  # Triton is there where GPUs are

        self._store, self.add_up = store.store, store.add_up
        try:
            self.memory, self._handle = private.symmetric_memory(size, group, device)
        except RuntimeError as error:
            raise LaunchError(
                f"these GPUs cannot write each other's memory: {first_line(error)}", fix="use transport='nccl'"
            ) from error
        self.ranks, self.me = dist.get_world_size(group), dist.get_rank(group)
        self._size = size

    def results(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        """The tensor at this offset, in bytes, on each rank of the axis in order."""
        found = []
        for rank in range(self.ranks):
            whole = self._handle.get_buffer(rank, (self._size,), torch.uint8, 0)
            size = dtype.itemsize * torch.Size(shape).numel()
            found.append(whole[offset : offset + size].view(dtype).view(shape))
        return found

    def send(self, push: Push, operand: Tensor, everyones: Sequence[Tensor], result: Tensor) -> None:
        """Store, and let the current stream wait until all ranks of the axis have and what came is the result.

        Args:
            operand: this rank's, contiguous.
            everyones: where things arrive, of all ranks of the axis in order.
            result: the memory of the result, where that is not where things arrive.
        """
        (rows.pack if push.packed else self._store)(push.copies(operand, everyones), alone=push.alone)
        self.barrier()
        if push.sums:
            self.add_up(everyones[self.me], result, push.scale)
        elif push.packed:
            rows.unpack(everyones[self.me], result)

    def barrier(self) -> None:
        """Let the current stream wait until all ranks of the axis are here."""
        self._handle.barrier(0)
