"""What is timed of a placed program: the parts around each different attention, and each different compute part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

from torchtrt_md.place.partition import ATTENTION
from torchtrt_md.segment import Part

# Digest -> a segment as an engine, as Inductor has it, and how many are equal.
Pair: TypeAlias = tuple[str, tuple[Part, Part, int]]


def windows_of(parts: Sequence[Part], order: Sequence[str]) -> Iterator[tuple[str, Sequence[Part]]]:
    """For each different attention the parts around one of its kind: from the attention before it to the next.

    Args:
        parts: of a rank, in order.
        order: the key of each attention of the program, in order.
    """
    at = [i for i, part in enumerate(parts) if part.runs == "eager" and _attends(part)]
    if len(at) != len(order):  # one attention is in several parts: the program is timed as a whole
        return
    for key in dict.fromkeys(order):
        of = [i for i, k in enumerate(order) if k == key]
        middle = of[len(of) // 2]  # its neighbours are of its own kind, if any are
        first = at[middle - 1] + 1 if middle else 0
        last = at[middle + 1] if middle + 1 < len(at) else len(parts)
        yield key, parts[first:last]


def _attends(part: Part) -> bool:
    assert part.graph is not None
    return any(node.target in ATTENTION for node in part.graph.graph.nodes)


def pairs_of(in_trt: Sequence[Part], in_inductor: Sequence[Part]) -> dict[str, tuple[Part, Part, int]]:
    """Digest of a compute part's graph -> the part as an engine, as Inductor has it, and how many are equal.

    Empty where an op that no engine can hold cuts the two differently.
    """
    found: dict[str, tuple[Part, Part, int]] = {}
    if [p.runs == "eager" for p in in_trt] != [p.runs == "eager" for p in in_inductor]:
        return {}
    for a, b in zip(in_trt, in_inductor, strict=True):
        if a.runs == "engine":
            found[b.digest] = (a, b, found[b.digest][2] + 1 if b.digest in found else 1)
    return found


def least_work(pair: Pair) -> int:
    """Minus the ops of all segments that are equal to one."""
    _, (engine, _, count) = pair
    assert engine.graph is not None
    return -count * len(engine.graph.graph.nodes)
