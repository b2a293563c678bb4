"""What a lowering pass is, and how a list of them is run.

A pass is a module with one function ``run(graph, context) -> int``: it rewrites the graph in place and
returns how many rewrites it made.  Its docstring shows the graph before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from torch.fx import GraphModule

from torchtrt_md.mesh import Mesh


@dataclass(frozen=True)
class PassContext:
    """What a pass may know beside the graph.

    Attributes:
        mesh: the mesh that the axes of the IR name.
        strategies: context-parallel axis -> strategy.
        groups: process-local group name in the captured graph -> mesh axis.
    """

    mesh: Mesh
    strategies: Mapping[str, str]
    groups: Mapping[str, str]


Pass: TypeAlias = Callable[[GraphModule, PassContext], int]


def run_passes(
    passes: Mapping[str, Pass], graph: GraphModule, context: PassContext, dump: Path | None = None
) -> dict[str, int]:
    """Run passes in order; pass name -> number of rewrites.

    ``dump`` is a folder that gets ``NN_name.before.txt`` and ``.after.txt`` for each pass that rewrote something.
    """
    counts: dict[str, int] = {}
    for number, (name, run) in enumerate(passes.items()):
        before = readable(graph) if dump else ""
        counts[name] = run(graph, context)
        if counts[name]:
            graph.graph.eliminate_dead_code()
            graph.graph.lint()
            graph.recompile()
            if dump:
                dump.mkdir(parents=True, exist_ok=True)
                (dump / f"{number:02}_{name}.before.txt").write_text(before)
                (dump / f"{number:02}_{name}.after.txt").write_text(readable(graph))
    return counts


def readable(graph: GraphModule) -> str:
    """One line per node: name, op, arguments, shape."""
    lines = []
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        shape = f"  # {value.dtype} {list(value.shape)}" if hasattr(value, "shape") else ""
        lines.append(f"{node.format_node()}{shape}")
    return "\n".join(lines) + "\n"
