"""Which step runs beside which exchange, where the data leave a choice."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from torchtrt_md.runtime.steps import Key, Step


def overlapped(steps: Sequence[Step]) -> list[Step]:
    """The steps in an order in which more of what is sent is hidden.

    A step that waits for an exchange beside which nothing runs may be followed by others that wait for nothing, as the
    half of a block that needs no attention.  They run beside the next exchange.  Where more is sent in the first one,
    they run beside that, in front of the step that waits for it; of several the last stays, so that both have one.
    Collectives keep their order, which is that of all ranks, those inside engines as well, and what is computed of what
    stays as it is.
    """
    ordered = list(steps)
    waits = _Waits(steps)
    joined, index = -1, 0
    while index < len(ordered):
        awaited = waits.of(ordered[index])
        if awaited > joined:
            end = next((i for i in range(index, len(ordered)) if waits.of(ordered[i]) > awaited), len(ordered))
            free = waits.independent(ordered[index:end], joined)
            bare = sum(_sent(s) for s in _last_in_a_row(ordered[:index]) if waits.number[id(s)] <= awaited)
            if bare > sum(map(_sent, ordered[index:end])) and not all(step.looks for step in free):
                working = [step for step in free if not step.looks]
                if len(working) > 1:
                    free = waits.without(free, working[-1])
                moved = {id(step) for step in free}
                ordered[index:end] = [*free, *(step for step in ordered[index:end] if id(step) not in moved)]
                index += len(free)
            joined = awaited
        index += 1
    return ordered


class _Waits:
    """What each step waits for, whatever the order.

    Attributes:
        number: of each collective, by its step's identity: how many there are before it.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        counts = accumulate((step.communicates for step in steps), initial=0)
        self.number = {id(step): n for n, step in zip(counts, steps, strict=False) if step.communicates}
        self._maker: dict[Key, Step] = {}
        self._of: dict[int, int] = {}
        for step in steps:
            makers = [self._maker[value] for value in step.reads if value in self._maker]
            # A view waits for nothing; who reads it does.
            self._of[id(step)] = max((self.number.get(id(m), self._seen(m)) for m in makers), default=-1)
            self._maker |= dict.fromkeys([*step.writes, *(slot.name for slot in step.slots)], step)

    def _seen(self, maker: Step) -> int:
        return self._of[id(maker)] if maker.looks else -1

    def of(self, step: Step) -> int:
        """The number of the last collective whose result, or a view of it, a step of the main stream reads; else -1."""
        return -1 if step.communicates or step.looks else self._of[id(step)]

    def without(self, steps: Sequence[Step], left: Step) -> list[Step]:
        """These, but for one and what reads what it makes."""
        gone = {id(left)}
        for step in steps:
            gone |= {id(step)} if any(id(self._maker.get(value)) in gone for value in step.reads) else set()
        return [step for step in steps if id(step) not in gone]

    def independent(self, steps: Sequence[Step], joined: int) -> list[Step]:
        """Those that read nothing which these steps make, but for each other, and no collective behind this one."""
        left, free = {id(step) for step in steps}, []
        for step in steps:
            makers = [self._maker[value] for value in step.reads if value in self._maker]
            if _meets_others(step):
                break  # nothing goes in front of it that was behind it
            if not step.communicates and self._of[id(step)] <= joined and not any(id(m) in left for m in makers):
                free.append(step)
                left.remove(id(step))
        return free


def _last_in_a_row(steps: Sequence[Step]) -> list[Step]:
    """The collectives behind the last step of the main stream that computes: nothing runs beside them yet."""
    found = []
    for step in reversed(steps):
        if step.communicates:
            found.append(step)
        elif not step.looks:
            break
    return found


def _meets_others(step: Step) -> bool:
    """Is it an engine with collectives inside?"""
    return step.engine is not None and step.engine.segment.axis is not None


def _sent(step: Step) -> int:
    """Bytes of a collective's result, and 0 of all else."""
    return sum(slot.bytes for slot in step.slots) if step.communicates else 0
