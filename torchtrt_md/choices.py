"""``Choices``: what is left to choose once a program is captured, and was chosen by formula or by timing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torchtrt_md.bundle.manifest import Decision
from torchtrt_md.graph.text import graph_digest
from torchtrt_md.lowering.passes import Exchange
from torchtrt_md.parallel import Placement
from torchtrt_md.place import PlacedProgram, Runs


@dataclass(frozen=True)
class Choices:
    """How a program is lowered, cut and built.

    Attributes:
        placement: where attention runs.
        compute: what compute parts run as: ``engine`` or ``inductor``.
        exchanges: how attentions get what they lack, by
            :func:`torchtrt_md.lowering.choose_strategy.attention_key`; others follow the axis's strategy.
        runs: what compute parts of some graphs run as, by the graph's digest; others as ``compute`` says.
        transport: what does the exchanges between engines: ``nccl`` or the ``copy`` engines.
        decisions: why, in words, and the times that decided.
        tuned_on: the GPU that they were timed on, "" where nothing was timed.
    """

    placement: Placement
    compute: Runs = "engine"
    exchanges: Mapping[str, Exchange] = field(default_factory=dict)
    runs: Mapping[str, Runs] = field(default_factory=dict)
    transport: str = "nccl"
    decisions: tuple[Decision, ...] = ()
    tuned_on: str = ""


def chosen_runs(placed: PlacedProgram, choices: Choices) -> PlacedProgram:
    """The program with its compute parts running as what was chosen for each."""
    if not choices.runs:
        return placed
    chosen = {
        id(parts): tuple(
            p if p.runs == "eager" else replace(p, runs=choices.runs.get(graph_digest(p.graph), p.runs)) for p in parts
        )
        for parts, _ in placed.distinct()
    }
    return replace(placed, parts=tuple(chosen[id(parts)] for parts in placed.parts))
