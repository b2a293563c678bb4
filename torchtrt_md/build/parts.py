"""Build the parts of a placed program: one engine file for all parts that are equal.

The weights are inputs of these engines, not part of them.  So equal blocks of a model, at all depths and on all ranks,
are one engine; it is built in seconds; and the weights stay where PyTorch has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch.fx import GraphModule, Node

from torchtrt_md.build import converters
from torchtrt_md.build.builder import build_graph, without_converter
from torchtrt_md.build.cache import EngineCache, engine_key
from torchtrt_md.build.decompose import decompose, origin
from torchtrt_md.build.engine import Binding
from torchtrt_md.build.flavour import boundary_dtypes, flavour
from torchtrt_md.errors import ConversionError
from torchtrt_md.graph.functional import copied
from torchtrt_md.graph.text import graph_digest
from torchtrt_md.lowering.schedule import ScheduledCollective, schedule
from torchtrt_md.place.parts import Part, Runs
from torchtrt_md.program import outputs_of, placeholders, value_of

aten = torch.ops.aten


@dataclass(frozen=True)
class BuiltPart:
    """A part with what runs it.

    Attributes:
        runs, name: as the part's.
        inputs, outputs: its wiring; names of an engine's own tensors are ``in0`` and so on.
        collectives: in order.
        axis: of the communicator of an engine that has collectives.
        engine: the engine file, None where it is no engine.
        graph: what is compiled or run op by op, None where it is an engine.
        text: a digest of the graph, equal for equal parts.
    """

    runs: Runs
    name: str
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]
    collectives: tuple[ScheduledCollective, ...]
    axis: str | None
    engine: Path | None
    graph: GraphModule | None
    text: str


def unconvertible(graph: GraphModule) -> dict[str, str]:
    """Node of a lowered graph -> why Torch-TensorRT cannot convert it."""
    converters.register()
    return {origin(n): f"Torch-TensorRT has no converter for {n.target}" for n in without_converter(decompose(graph))}


def engine_boundary() -> tuple[torch.dtype, ...]:
    """The dtypes that the installed TensorRT's engines can take and give."""
    return boundary_dtypes(flavour())


def build_parts(
    parts: Sequence[Part],
    folder: Path,
    target: str,
    *,
    cache: EngineCache | None = None,
    transpose_weights: bool = True,
    progress: Callable[[str], None] = lambda message: None,
) -> list[BuiltPart]:
    """Build what of these parts runs in TensorRT.

    Args:
        parts: of one rank, in order.
        folder: for engine files that are not in the cache.
        target: as for :func:`torchtrt_md.build`.
        cache: where engines of earlier builds are, and these will be.
        transpose_weights: engines take the weights of products as [K,N], which TensorRT-RTX runs faster than [N,K].
        progress: called with a line for each engine begun.

    Raises:
        ConversionError: naming the node of the lowered graph that cannot be converted.
        BuildError: TensorRT cannot build an engine.
    """
    made: dict[str, Path] = {}
    built = []
    for part in parts:
        graph, transposed = part.graph, cast(tuple[str, ...], ())
        if part.runs == "engine" and transpose_weights:
            graph, transposed = with_transposed_weights(part)
        inputs, outputs = _bindings(part, graph, transposed)
        collectives = tuple(schedule(graph))
        axis = next((c.axis for c in collectives), None) if part.runs == "engine" else None
        text = graph_digest(graph)
        engine = None
        if part.runs == "engine":
            if text not in made:
                size = next((c.size for c in collectives), 1)
                key = engine_key(
                    graph, weights=None, axis=axis, size=size, rank_class=(), target=target, flavour=flavour()
                )
                found = cache.find(key) if cache else None
                if found is None:
                    progress(f"engine {len(made) + 1}: {sum(n.op == 'call_function' for n in graph.graph.nodes)} ops")
                    found = folder / f"part{len(made)}.engine"
                    _build(part, graph, inputs, outputs, collectives, found, target)
                    found = cache.store(key, found) if cache else found
                made[text] = found
            engine = made[text]
        built.append(
            BuiltPart(
                part.runs,
                part.name,
                tuple(inputs),
                tuple(outputs),
                collectives,
                axis,
                engine,
                None if part.runs == "engine" else graph,
                text,
            )
        )
    return built


def _build(
    part: Part,
    graph: GraphModule,
    inputs: Sequence[Binding],
    outputs: Sequence[Binding],
    collectives: Sequence[ScheduledCollective],
    file: Path,
    target: str,
) -> None:
    converters.register()
    file.parent.mkdir(parents=True, exist_ok=True)
    decomposed = decompose(graph)
    for node in without_converter(decomposed):
        raise ConversionError(f"Torch-TensorRT has no converter for {node.target}", node=origin(node))
    build_graph(decomposed, inputs, outputs, collectives, file, target, what=part.name)


def _bindings(part: Part, graph: GraphModule, transposed: Sequence[str]) -> tuple[list[Binding], list[Binding]]:
    engine = part.runs == "engine"
    inputs = [
        _binding(f"in{i}" if engine else node.name, node, source, source in transposed)
        for i, (node, source) in enumerate(zip(placeholders(graph), part.inputs, strict=True))
    ]
    outputs = [
        _binding(f"out{i}" if engine else node.name, node, source, False)
        for i, (node, source) in enumerate(zip(outputs_of(graph), part.outputs, strict=True))
    ]
    return inputs, outputs


def _binding(name: str, node: Node, source: str, transposed: bool) -> Binding:
    return Binding(name, tuple(value_of(node).shape), value_of(node).dtype, source, transposed)


def with_transposed_weights(part: Part) -> tuple[GraphModule, tuple[str, ...]]:
    """The part's graph with the weights as [K,N] of which it reads only the transpose, and their sources."""
    graph = copied(part.graph)
    found = []
    for node, source in zip(placeholders(graph), part.inputs, strict=True):
        users = list(node.users)
        if not source.startswith("weight:") or not users or not all(map(_is_transpose, users)):
            continue
        value = value_of(node)
        with value.fake_mode:  # type: ignore[attr-defined]
            node.meta["val"] = torch.empty(value.shape[1], value.shape[0], dtype=value.dtype, device=value.device)
        for user in users:
            user.replace_all_uses_with(node)
            graph.graph.erase_node(user)
        found.append(source)
    graph.recompile()
    return graph, tuple(found)


def _is_transpose(node: Node) -> bool:
    """Does this node transpose a matrix?"""
    if node.target is aten.t.default:
        return value_of(node).ndim == 2
    if node.target is aten.permute.default:
        return list(node.args[1]) == [1, 0]  # type: ignore[arg-type]
    return node.target is aten.transpose.int and value_of(node).ndim == 2 and bool(node.args[1] != node.args[2])
