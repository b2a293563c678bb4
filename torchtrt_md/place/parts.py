"""``Part``: consecutive nodes of a lowered graph that run as one, and how the parts of a graph are wired."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch.fx import GraphModule

from torchtrt_md.parallel import Placement
from torchtrt_md.program import ShardedProgram

Runs: TypeAlias = Literal["engine", "inductor", "eager"]


@dataclass(frozen=True)
class Part:
    """Some nodes of a rank's graph as a graph of their own.

    Attributes:
        runs: as a TensorRT engine, compiled by Inductor, or op by op in PyTorch.
        graph: its placeholders are all that it reads, weights among them; it returns all that later parts read.
            Every value that passes between parts is contiguous.
        inputs: what each placeholder reads: ``input:NAME``, ``coordinate:AXIS``, ``weight:NAME``, or what an earlier
            part wrote.
        outputs: what each returned value is: ``value:NAME``, or ``output:NAME`` of the program.
        name: for messages and the summary.
    """

    runs: Runs
    graph: GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    name: str

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the weights that it reads."""
        return tuple(s.removeprefix("weight:") for s in self.inputs if s.startswith("weight:"))


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
