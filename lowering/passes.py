"""What a lowering pass is, and how a list of them is run.

A pass is a module with one function ``run(graph, context) -> int``: it rewrites the graph in place and
returns how many rewrites it made.  Its docstring shows the graph before and after.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from torch.fx import GraphModule

from torchtrt_md.graph.functional import eliminate_dead
from torchtrt_md.graph.results import each_once
from torchtrt_md.mesh import Mesh


@dataclass(frozen=True)
class Exchange:
    """How one attention over a split sequence gets what it lacks.

    Attributes:
        strategy: ``ulysses``, ``allgather_kv`` or ``ring``.
        head_groups: ulysses in this many groups of heads, so that one group is exchanged while another is attended to.
        values_first: ulysses with an exchange for the values alone, in front of that of queries and keys, so that it
            overlaps with what is still done to those (norm, rotary).
    """

    strategy: str
    head_groups: int = 1
    values_first: bool = False


@dataclass(frozen=True)
class PassContext:
    """What a pass may know beside the graph.

    Attributes:
        mesh: the mesh that the axes of the IR name.
        strategies: context-parallel axis -> strategy.
        groups: process-local group name in the captured graph -> mesh axis.
        placement: where attention will run, ``engine`` or ``split``.
        exchanges: what was chosen for attentions of some shapes, by
            :func:`torchtrt_md.lowering.choose_strategy.attention_key`; it takes precedence over ``strategies``.
        alike: the axes along which the graph is that of all ranks, which differ by what its placeholders say only.
        stores: ranks will store into each other's memory, and not exchange by NCCL.
        exchange_dtype: what queries, keys and values are sent as: ``model`` for their own dtype, or ``float8``.
    """

    mesh: Mesh
    strategies: Mapping[str, str]
    groups: Mapping[str, str]
    placement: str = "engine"
    exchanges: Mapping[str, Exchange] = field(default_factory=dict)
    alike: frozenset[str] = frozenset()
    stores: bool = False
    exchange_dtype: str = "model"

    @property
    def sent(self) -> tuple[str, ...]:
        """The last arguments of a collective that sends queries, keys or values."""
        return () if self.exchange_dtype == "model" else (self.exchange_dtype,)


Pass: TypeAlias = Callable[[GraphModule, PassContext], int]
log = logging.getLogger(__name__)


def run_passes(
    passes: Mapping[str, Pass],
    graph: GraphModule,
    context: PassContext,
    dump: Path | None = None,
    *,
    behind: str | None = None,
    last: str | None = None,
) -> dict[str, int]:
    """Run passes in order; pass name -> number of rewrites.

    ``dump`` is a folder that gets ``NN_name.before.txt`` and ``.after.txt`` for each pass that rewrote something.
    ``behind`` is the pass that was the last of those that the graph has had, and ``last`` the one to stop after.
    """
    counts: dict[str, int] = {}
    begin = 0 if behind is None else list(passes).index(behind) + 1
    with each_once():
        for number, (name, run) in list(enumerate(passes.items()))[begin:]:
            before = readable(graph) if dump else ""
            start = time.perf_counter()
            counts[name] = run(graph, context)
            log.debug("%s: %d rewrites, %.3f s", name, counts[name], time.perf_counter() - start)
            if counts[name]:
                eliminate_dead(graph.graph)
                if dump:
                    dump.mkdir(parents=True, exist_ok=True)
                    (dump / f"{number:02}_{name}.before.txt").write_text(before)
                    (dump / f"{number:02}_{name}.after.txt").write_text(readable(graph))
            if name == last:
                break
    if any(counts.values()):
        graph.recompile()  # once: passes read nodes, and code takes longer to generate than most of them
    return counts


def readable(graph: GraphModule) -> str:
    """One line per node: name, op, arguments, shape."""
    lines = []
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        shape = f"  # {value.dtype} {list(value.shape)}" if hasattr(value, "shape") else ""
        lines.append(f"{node.format_node()}{shape}")
    return "\n".join(lines) + "\n"
