"""Place: a lowered program -> the same program cut into parts, each of which runs as one.

The parts of a placement:

    engine    one engine, attention and collectives in it; as few as can be that communicate along one axis each, where
              there are several; what an engine cannot hold runs in PyTorch between engines
    split     engines, and between them attention and its collectives in PyTorch, where a rank's part of an input is
              a view of it
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import replace

import msgspec
import torch
from torch.fx import GraphModule, Node

from torchtrt_md.errors import BuildError
from torchtrt_md.graph.quantized import widens_held
from torchtrt_md.graph.source import source_line
from torchtrt_md.graph.uncollected import uncollected
from torchtrt_md.lowering.ops import is_collective
from torchtrt_md.parallel import Placement
from torchtrt_md.place.partition import ATTENTION, is_own_row, partition, readers
from torchtrt_md.place.parts import Kept, PlacedProgram
from torchtrt_md.program import ShardedProgram, dtype_name, outputs_of, placeholders, value_of
from torchtrt_md.segment import Part, Runs

_ROUNDS = 20


@uncollected()
def place(
    program: ShardedProgram,
    placement: Placement,
    *,
    compute: Runs = "engine",
    runs: Mapping[str, Runs] | None = None,
    keep: Mapping[str, str] | None = None,
    boundary: Collection[torch.dtype] | None = None,
    fullgraph: bool = False,
    ranks: Collection[int] | None = None,
) -> PlacedProgram:
    """Cut the graphs of a lowered program into parts.

    Args:
        program: what :func:`torchtrt_md.lower` returned for this placement.
        placement: where attention runs.
        compute: what everything else runs as: ``engine`` or ``inductor``.
        runs: what compute parts of some graphs run as instead, by :attr:`Part.digest`.
        keep: node of the lowered graphs -> why no engine can hold it; such nodes stay in PyTorch.
        boundary: the dtypes that an engine can take and give; None where any can be.
        fullgraph: that an op must stay in PyTorch is an error.
        ranks: cut these ranks' graphs only; others that have another one get no parts.

    Raises:
        BuildError: ``fullgraph``, and an op that no engine can hold.
    """
    keep = keep or {}
    done: dict[int, tuple[Part, ...]] = {}
    kept: dict[tuple[str, str], Kept] = {}
    for graph, members in program.distinct():
        if ranks is not None and not set(ranks) & set(members):
            done[id(graph)] = ()
            continue
        stays = _stays(graph, placement, keep)
        parts = _cut(program, graph, placement, compute, stays, boundary)
        nodes = {node.name: node for node in graph.graph.nodes}
        for name, reason in stays.items():
            node = nodes[name]
            if fullgraph:
                raise BuildError(
                    f"{node.target} (node {name!r}) would stay in PyTorch: {reason}",
                    fix="leave out fullgraph, so that it runs in PyTorch between engines",
                    at=source_line(node),
                )
            key = (str(node.target), reason)
            before = kept.get(key)
            kept[key] = Kept(*key, count=before.count + 1 if before else 1, at=source_line(node))
        done[id(graph)] = tuple(_running_as(part, runs) for part in parts) if runs else parts
    return PlacedProgram(program, placement, tuple(done[id(g)] for g in program.graphs), tuple(kept.values()))


def _running_as(part: Part, runs: Mapping[str, Runs]) -> Part:
    if part.runs == "eager" or part.digest not in runs:
        return part
    return replace(part, segment=msgspec.structs.replace(part.segment, runs=runs[part.digest]))


def _stays(graph: GraphModule, placement: Placement, keep: Mapping[str, str]) -> dict[str, str]:
    """Node -> why it stays in PyTorch, of what the placement itself would not put there."""
    return {
        node.name: keep[node.name]
        for node in graph.graph.nodes
        if node.op == "call_function" and node.name in keep and not _is_placed(node, placement)
    }


def _is_placed(node: Node, placement: Placement) -> bool:
    """Does the placement itself put this node in PyTorch?"""
    if placement != "split":
        return False
    if node.target is operator.getitem:
        node = node.all_input_nodes[0]
    return node.target in ATTENTION or is_collective(node) or is_own_row(node)


def _cut(
    program: ShardedProgram,
    graph: GraphModule,
    placement: Placement,
    compute: Runs,
    stays: dict[str, str],
    boundary: Collection[torch.dtype] | None,
) -> tuple[Part, ...]:
    def is_eager(node: Node) -> bool:
        return _is_placed(node, placement) or node.name in stays

    for _ in range(_ROUNDS):  # each keeps what makes or takes a dtype that no engine can pass on
        parts = partition(program, graph, is_eager=is_eager, compute=compute)
        found = {} if boundary is None else _outside(graph, parts, boundary)
        if not found:
            return parts
        stays.update(found)
    raise BuildError(
        "the program passes tensors that engines cannot take or give, and cutting it further did not help",
        fix="cast them inside the model",
    )


def _outside(graph: GraphModule, parts: tuple[Part, ...], boundary: Collection[torch.dtype]) -> dict[str, str]:
    """The nodes that make or take what an engine cannot pass."""
    nodes = {node.name: node for node in graph.graph.nodes}
    found = {}
    for part in parts:
        if part.runs != "engine":
            continue
        assert part.graph is not None
        for placeholder in placeholders(part.graph):
            dtype = value_of(placeholder).dtype
            if dtype not in boundary:
                for user in readers(placeholder):
                    if user.name in nodes and user.op == "call_function" and not widens_held(user):
                        found[user.name] = f"it takes {dtype_name(dtype)}, which an engine cannot be given"
        for value in outputs_of(part.graph):
            dtype = value_of(value).dtype
            if dtype not in boundary and value.name in nodes and value.op == "call_function":
                found[value.name] = f"it gives {dtype_name(dtype)}, which an engine cannot return"
    return found


__all__ = ["Kept", "PlacedProgram", "place"]
