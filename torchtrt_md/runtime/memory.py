"""When each step may run and where its results lie: decided once, before the first call.

Two streams.  The main one has the engines, kernels and attention, in order; the side one the collectives, in order.
A collective waits for the main stream up to the step that made its operand, and for whoever last used the memory of
its result.  A step of the main stream that reads a collective's result waits for that collective.  So whatever lies
between a collective and the first step that reads it runs beside it.

What engines and collectives write lies in memory that is made once and used again as soon as nothing can still be
reading it.  What PyTorch's ops return is PyTorch's own, and is held until the same moment.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from torchtrt_md.errors import LaunchError
from torchtrt_md.runtime.steps import Key, Slot, Step
from torchtrt_md.runtime.tensors import ALIGNMENT


@dataclass
class Moment:
    """What surrounds one step.

    Attributes:
        after: of a collective: the step of the main stream that it waits for; -1 for the start of the call.
        joins: of a step of the main stream: the last collective whose end it waits for; None where there is none.
        releases: values that nothing reads any more once this step is enqueued.
    """

    after: int = -1
    joins: int | None = None
    releases: list[Key] = field(default_factory=list)


@dataclass
class MemoryLayout:
    """The moments of all steps, and for each slot the block of memory that it lies in.

    ``blocks`` are sizes in bytes.  ``marks`` are the steps of the main stream that a collective waits for.
    ``shared_of`` has what collectives without NCCL write (:attr:`Step.landing`), each with its axis and its offset in
    the memory that the ranks of the axis share, of which ``shared`` has the bytes.  ``over`` are slots that are written
    over the operand of their step, which PyTorch made.
    """

    moments: list[Moment]
    block_of: dict[Key, int]
    blocks: list[int]
    marks: frozenset[int]
    shared_of: dict[Key, tuple[str, int]]
    shared: dict[str, int]
    over: frozenset[Key]

    @property
    def bytes(self) -> int:
        """What is made once, for all calls."""
        return sum(self.blocks) + sum(self.shared.values())


def check_room(layout: MemoryLayout, device: torch.device) -> None:
    """See that a GPU has memory for it, before ranks meet in what would leave the others waiting for one that has not.

    Raises:
        LaunchError: it has not.
    """
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()  # memory that ranks share is none of PyTorch's pool
    free, _ = torch.cuda.mem_get_info(device)
    size = layout.bytes + ALIGNMENT * len(layout.blocks)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if sum(layout.shared.values()) > free or size > free + held:
        raise LaunchError(
            f"what passes between the parts of a program takes {size >> 20} MiB, and {free >> 20} MiB of the GPU's"
            " memory are free",
            fix="use more ranks, a smaller batch, or free what else is on the GPU",
        )


def lay_out(steps: Sequence[Step], keep: Sequence[Key], *, push: bool = False) -> MemoryLayout:
    """Say when the steps of a rank run, and where what they write lies.

    Args:
        steps: in the order in which they are enqueued.
        keep: the values that the call returns; they get memory of their own in each call.
        push: do collectives without NCCL, where what they need holds.
    """
    bases = _bases(steps)
    moments = [Moment() for _ in steps]
    made_by = {value: index for index, step in enumerate(steps) for value in _made(step)}
    _join(steps, moments, bases, made_by)
    free_at = _free_at(steps, moments, bases, set(keep))
    shared_of, shared = _shared(steps, moments, free_at) if push else ({}, {})
    over = _over_operands(steps, bases, free_at) - shared_of.keys()
    ours = {v: i for v, i in free_at.items() if v not in shared_of and v not in over}
    block_of, blocks = _blocks(steps, moments, bases, ours)
    _wait_for_pytorchs_memory(steps, moments, block_of.keys() | shared_of.keys() | over)
    for value, index in free_at.items():
        if index < len(steps):
            moments[index].releases.append(value)
    marks = frozenset(m.after for m, s in zip(moments, steps, strict=True) if s.communicates)
    return MemoryLayout(moments, block_of, blocks, marks, shared_of, shared, frozenset(over))


def _made(step: Step) -> tuple[Key, ...]:
    return (*step.writes, *(slot.name for slot in step.slots))


def _bases(steps: Sequence[Step]) -> dict[Key, tuple[Key, ...]]:
    """Value -> the values whose memory it may be looking at."""
    bases: dict[Key, tuple[Key, ...]] = {}
    for step in steps:
        seen = tuple(dict.fromkeys(base for value in step.reads for base in bases.get(value, (value,))))
        for value in _made(step):
            bases[value] = (value, *seen) if step.aliases else (value,)
    return bases


def _join(
    steps: Sequence[Step],
    moments: Sequence[Moment],
    bases: Mapping[Key, tuple[Key, ...]],
    made_by: Mapping[Key, int],
) -> None:
    """Let steps of the main stream wait for the collectives that they read, and collectives for what made theirs."""
    joined = -1
    for index, step in enumerate(steps):
        makers = [made_by[b] for value in step.reads for b in bases.get(value, (value,)) if b in made_by]
        if step.communicates:
            moments[index].after = max((m for m in makers if not steps[m].communicates), default=-1)
        elif not step.looks:
            awaited = max((m for m in makers if steps[m].communicates), default=-1)
            if awaited > joined:  # the side stream is in order: who waited for one has waited for those before it
                moments[index].joins = joined = awaited


def _free_at(
    steps: Sequence[Step], moments: Sequence[Moment], bases: Mapping[Key, tuple[Key, ...]], keep: set[Key]
) -> dict[Key, int]:
    """Value -> the step from which on its memory may be used again, or the value let go of.

    Its last reader on the main stream, or where a collective read it (or wrote it, unread) the step that waits for
    that collective or for a later one.
    """
    joins = [(index, m.joins) for index, m in enumerate(moments) if m.joins is not None]
    kept = {base for value in keep for base in bases.get(value, (value,))}

    def passed(index: int) -> int:
        if not steps[index].communicates:
            return index
        return next((at for at, collective in joins if collective >= index), len(steps))

    free: dict[Key, int] = {}
    for index, step in enumerate(steps):
        for value in _made(step):
            free[value] = passed(index)
        for value in step.reads:
            for base in bases.get(value, (value,)):
                if base in free:
                    free[base] = max(free[base], passed(index))
    return {value: index for value, index in free.items() if value not in kept and value not in keep}


def _blocks(
    steps: Sequence[Step],
    moments: Sequence[Moment],
    bases: Mapping[Key, tuple[Key, ...]],
    free_at: Mapping[Key, int],
) -> tuple[dict[Key, int], list[int]]:
    """Give each slot a block: one that is free again, the smallest that is large enough, or a new one."""
    blocks: list[int] = []
    block_of: dict[Key, int] = {}
    available: list[tuple[int, int]] = []  # (block, the step that freed it)
    freed: dict[int, list[Key]] = {}
    for value, index in free_at.items():
        freed.setdefault(index, []).append(value)
    slots = {slot.name for step in steps for slot in step.slots}
    for index, step in enumerate(steps):
        for slot in step.slots:
            if slot.name not in free_at:
                continue
            shared = _operand_block(step, bases, block_of, steps, index)
            if shared is not None:
                block_of[slot.name] = shared
                continue
            size = slot.bytes
            fitting = [(blocks[b], b, at) for b, at in available if blocks[b] >= size]
            if fitting:
                _, block, at = min(fitting)
                available.remove((block, at))
                if step.communicates:
                    moments[index].after = max(moments[index].after, at)
            else:
                block = len(blocks)
                blocks.append(size)
            block_of[slot.name] = block
        for value in freed.get(index, ()):
            if value in slots and value in block_of and not _lives_on(value, block_of, free_at, index):
                entry = (block_of[value], index)
                if entry not in available:  # two values of one block may end together
                    available.append(entry)
    return block_of, blocks


def _over_operands(steps: Sequence[Step], bases: Mapping[Key, tuple[Key, ...]], free_at: Mapping[Key, int]) -> set[Key]:
    """The slots that may be written over what their steps read: that PyTorch made, and nobody else reads."""
    made = {value for step in steps if not step.aliases for value in step.writes}
    seen_as = {value for step in steps if step.aliases and step.reads for value in step.writes}  # no constant
    readers: dict[Key, list[Step]] = {}
    for step in steps:
        for base in {base for value in step.reads for base in bases.get(value, (value,))}:
            readers.setdefault(base, []).append(step)
    found = set()
    for step in steps:
        if not step.in_place or step.slots[0].name not in free_at:
            continue
        seen = bases.get(step.reads[0], (step.reads[0],))
        others = [other for base in seen for other in readers[base] if other is not step]
        alone = all(other.looks and set(other.writes) <= set(seen) for other in others)
        if alone and made.issuperset(set(seen) - seen_as) and all(base in free_at for base in seen):
            found.add(step.slots[0].name)
    return found


def _wait_for_pytorchs_memory(steps: Sequence[Step], moments: Sequence[Moment], ours: Collection[Key]) -> None:
    """What a collective writes and a call returns, PyTorch makes on the main stream, of memory just let go of there."""
    last = -1
    for index, step in enumerate(steps):
        if not step.communicates:
            last = index
        elif any(slot.name not in ours for slot in step.slots):
            moments[index].after = max(moments[index].after, last)


def _shared(
    steps: Sequence[Step], moments: Sequence[Moment], free_at: Mapping[Key, int]
) -> tuple[dict[Key, tuple[str, int]], dict[str, int]]:
    """For each collective that ranks can do without NCCL, where in the memory that its axis shares they write.

    Other ranks may write there once they are behind the barrier of the exchange before it on that axis, which this
    rank enters when its main stream has reached that exchange's ``after``.  So memory may be used again if its last
    reader is no later than that.  Where the result is computed of it the reader is the exchange itself, behind its own
    barrier; so it is the barrier of the next one that tells.  For the first exchange of a call the one before is the
    last of the previous call: its memory is its own, and must have been read before that one began.  Where it is not,
    as where there is one exchange only, and where nothing is sent, NCCL does those of the axis.
    """
    found: dict[Key, tuple[str, int]] = {}
    total: dict[str, int] = {}
    by_axis: dict[str, list[tuple[int, Slot, int]]] = {}  # (step, where it lands, free from this step on)
    for index, step in enumerate(steps):
        landing = step.landing
        if landing is not None and step.push is not None and (step.push.beside or landing.name in free_at):
            free = -1 if step.push.beside else free_at[landing.name]
            by_axis.setdefault(step.axis, []).append((index, landing, free))
    for axis, exchanges in by_axis.items():
        sends = any(slot.bytes for _, slot, _ in exchanges)
        if not sends or len(exchanges) < 2 or exchanges[0][2] > moments[exchanges[-1][0]].after:
            continue
        available: list[tuple[int, int, int, int]] = []  # (bytes, offset, free from this step, and this exchange on)
        end = 0
        for number, (_, slot, free) in enumerate(exchanges):
            size = -(-slot.bytes // ALIGNMENT) * ALIGNMENT
            before = moments[exchanges[number - 1][0]].after if number else -1
            fitting = [e for e in available if e[0] >= size and e[2] <= before and e[3] <= number]
            if fitting:
                chosen = min(fitting)
                available.remove(chosen)
            else:
                chosen = (size, end, 0, 0)
                end += size
            found[slot.name] = (axis, chosen[1])
            if number:
                available.append((*chosen[:2], free, number + 2))
        total[axis] = end
    return found, total


def _operand_block(
    step: Step,
    bases: Mapping[Key, tuple[Key, ...]],
    block_of: Mapping[Key, int],
    steps: Sequence[Step],
    index: int,
) -> int | None:
    """The operand's block, where the result may take its place: nothing else reads the operand."""
    if not step.in_place:
        return None
    (operand,) = step.reads
    if operand not in block_of or bases.get(operand, (operand,)) != (operand,):
        return None
    readers = [i for i, s in enumerate(steps) if any(operand in bases.get(r, (r,)) for r in s.reads)]
    return block_of[operand] if readers == [index] else None


def _lives_on(value: Key, block_of: Mapping[Key, int], free_at: Mapping[Key, int], index: int) -> bool:
    """Is the block of this value, which is free now, that of another which is not?"""
    return any(
        other != value and block == block_of[value] and free_at.get(other, index + 1) > index
        for other, block in block_of.items()
    )
