"""``PlacedProgram``: a lowered program cut into parts, and what stays in PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field

from torchtrt_md.parallel import Placement
from torchtrt_md.program import ShardedProgram
from torchtrt_md.segment import Part


@dataclass(frozen=True)
class Kept:
    """Ops that stay in PyTorch, and why."""

    op: str
    reason: str
    count: int
    at: str = ""


@dataclass(frozen=True)
class PlacedProgram:
    """A lowered program, cut into parts.

    Attributes:
        program: what was cut; it is what ``verify`` proved.
        placement: where its attention runs.
        parts: for each rank its parts in order, the same object where the ranks' graphs are.
        kept: what stays in PyTorch although it is neither attention nor a collective that the placement puts there.
    """

    program: ShardedProgram
    placement: Placement
    parts: tuple[tuple[Part, ...], ...]
    kept: tuple[Kept, ...] = field(default=())

    @property
    def is_one_engine(self) -> bool:
        """Is every rank's whole program one engine, and nothing else?"""
        return all([p.runs for p in parts] == ["engine"] for parts in self.parts)

    def distinct(self) -> list[tuple[tuple[Part, ...], tuple[int, ...]]]:
        """The different lists of parts, each with the ranks that have it."""
        ranks: dict[int, list[int]] = {}
        for rank, parts in enumerate(self.parts):
            ranks.setdefault(id(parts), []).append(rank)
        return [(self.parts[members[0]], tuple(members)) for members in ranks.values()]
