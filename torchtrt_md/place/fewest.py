"""In which engines collectives of several axes go, so that each has those of one axis and there are as few as can be.

An engine has one communicator, that of its axis.  So where what a program computes next communicates along several
axes, it is cut, and the collectives between two cuts are those of one axis.  Collectives keep the order that their
operands ask for; others of the same axis may come earlier, to be in an engine that has one of theirs already::

    tp: a          tp: c          c needs no b:        a c | b        two engines
         cp: b                    c needs b:           a | b | c      three

An engine that takes every collective of its axis that it can leaves no more to the engines behind it than any other
would.  So the search is over the order of axes alone, breadth first, and of two states of which one has done all that
the other has, the other is dropped.  It sees the graph only, so ranks with equal graphs are cut alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch.fx import Node


def fewest_engines(
    collectives: Sequence[tuple[Node, str]], nodes: Sequence[Node], operands: Callable[[Node], Sequence[Node]]
) -> list[list[Node]]:
    """The collectives of each engine, in order.

    Args:
        collectives: each with its axis, in the graph's order.
        nodes: what is computed, they among it, in the graph's order.
        operands: what a node reads.
    """
    bits = {node: 1 << index for index, (node, _) in enumerate(collectives)}
    behind: dict[Node, int] = {}  # the collectives that a node depends on, as bits
    for node in nodes:
        found = 0
        for operand in operands(node):
            found |= behind.get(operand, 0) | bits.get(operand, 0)
        behind[node] = found
    of_axis: dict[str, list[Node]] = {}
    for node, axis in collectives:
        of_axis.setdefault(axis, []).append(node)

    def after(done: int, axis: str) -> int:
        for node in of_axis[axis]:
            if not behind[node] & ~done:
                done |= bits[node]
        return done

    whole = (1 << len(collectives)) - 1
    reached: dict[int, tuple[int, ...]] = {0: ()}
    while whole not in reached:
        found_now: dict[int, tuple[int, ...]] = {}
        for done, way in reached.items():
            for axis in of_axis:
                now = after(done, axis)
                if now != done:
                    found_now.setdefault(now, (*way, now))
        reached = {
            done: way for done, way in found_now.items() if not any(done != o and done & ~o == 0 for o in found_now)
        }
    engines, done = [], 0
    for now in reached[whole]:
        engines.append([node for node, _ in collectives if bits[node] & now & ~done])
        done = now
    return engines
