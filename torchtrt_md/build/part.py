"""Build one part of a placed program: one engine file for all parts that are equal.

Where weights are inputs of the engine, equal blocks of a model, at all depths and on all ranks, are one engine; it is
built in seconds; and the weights stay where PyTorch has them.  Where they are inside, equal parts have equal weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import msgspec
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from torchtrt_md.build import converters, quantizers
from torchtrt_md.build.builder import build_engine, without_converter
from torchtrt_md.build.cache import EngineCache, engine_key
from torchtrt_md.build.decompose import bind_weights, decompose, origin
from torchtrt_md.build.flavour import flavour
from torchtrt_md.build.torch_trt import user_converters, user_decompositions
from torchtrt_md.graph.functional import copied
from torchtrt_md.graph.quantized import QUANTIZED, widens_held
from torchtrt_md.graph.text import fingerprint
from torchtrt_md.program import dtype_name, placeholders, value_of
from torchtrt_md.segment import Part

aten = torch.ops.aten


def unconvertible(graph: GraphModule) -> dict[str, str]:
    """Node of a lowered graph -> why Torch-TensorRT cannot convert it, or TensorRT would take it for something else."""
    converters.register()
    lacking = {n: f"Torch-TensorRT has no converter for {n.target}" for n in without_converter(decompose(graph))}
    quantized = {n.name: reason for n in graph.graph.nodes if (reason := _quantized(n))}
    return {**{origin(n): reason for n, reason in lacking.items()}, **quantized}


def _quantized(node: Node) -> str:
    """Why an op on quantized numbers, or one that quantizes, cannot be in an engine; "" of any other."""
    if node.op != "call_function":
        return ""
    if node.target is torch.ops.torchtrt_md.fake_quantize.default:
        return quantizers.why_not(node)
    if widens_held(node):
        return ""
    values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
    found = next((v.dtype for v in values if isinstance(v, torch.Tensor) and v.dtype in QUANTIZED), None)
    return f"TensorRT scales {dtype_name(found)} in layers of its own only" if found else ""


def build_part(
    part: Part,
    target: str,
    cache: EngineCache,
    *,
    weights: Mapping[str, Tensor] | None = None,
    transpose_weights: bool = True,
    streaming: bool = False,
    what: str = "",
    progress: Callable[[str], None] = lambda message: None,
) -> Part:
    """The part with its engine's file, where it is one; equal parts get one file.

    Args:
        part: as ``place`` made it.
        target: as for :func:`torchtrt_md.build`.
        cache: where engines of earlier builds are, and this will be.
        weights: all that it reads, by their names: they go inside.  None to take weights as inputs.
        transpose_weights: inputs that are weights of products are [K,N], which TensorRT-RTX runs faster than [N,K].
        streaming: let the weights inside be streamed from host memory when the engine runs, as far as its loader asks.
        what: whose engine it is, for messages; by default the segment's name.
        progress: called with a line where an engine is built.

    Raises:
        ConversionError: naming the node of the lowered graph that cannot be converted.
        BuildError: TensorRT cannot build an engine.
    """
    if part.runs != "engine":
        return part
    held: dict[str, Tensor] = {}
    inside: list[str] = []
    if weights is None:
        part = with_transposed_weights(part) if transpose_weights else part
    else:
        assert part.graph is not None
        bound = zip(placeholders(part.graph), part.segment.inputs, strict=True)
        held = {node.name: weights[b.weight] for node, b in bound if b.weight is not None}
        segment = msgspec.structs.replace(part.segment, inputs=tuple(b for b in part.segment.inputs if not b.weight))
        part = replace(part, segment=segment)
        names = [binding.name for binding in (*segment.inputs, *segment.outputs)]
        inside = [f"streaming: {streaming}", *names, *(f"{node} {fingerprint(w)}" for node, w in held.items())]
    assert part.graph is not None
    key = _key(part, target, cache, inside)
    found = cache.find(key)
    if found is None:
        what = what or part.segment.name
        ops = sum(n.op == "call_function" for n in part.graph.graph.nodes)
        progress(f"engine of {what}: {ops} ops")
        graph = bind_weights(decompose(part.graph), held)
        with cache.unfinished() as file:
            build_engine(graph, part.segment, file, target, what=what, streaming=streaming)
            found = cache.store(key, file)
    return replace(part, engine=found)


def is_built(part: Part, target: str, cache: EngineCache, *, transpose_weights: bool = True) -> bool:
    """Would :func:`build_part` find the engine of this part in the cache?"""
    return cache.has(_key(with_transposed_weights(part) if transpose_weights else part, target, cache))


def as_built(part: Part, built: Part) -> Part:
    """The part with the engine of an equal one, which takes weights as that engine does."""
    inputs = [
        msgspec.structs.replace(mine, shape=its.shape, transposed=its.transposed)
        for mine, its in zip(part.segment.inputs, built.segment.inputs, strict=True)
    ]
    segment = msgspec.structs.replace(part.segment, inputs=tuple(inputs))
    return replace(part, segment=segment, graph=built.graph, engine=built.engine)


def _key(part: Part, target: str, cache: EngineCache, inside: Sequence[str] = ()) -> str:
    size = next((c.ranks for c in part.segment.collectives), 1)
    assert part.graph is not None
    more = [cache.own if _is_made_by_the_user(part.graph) else "", *inside]
    return engine_key(part.digest, axis=part.segment.axis, size=size, target=target, flavour=flavour(), more=more)


def _is_made_by_the_user(graph: GraphModule) -> bool:
    """Do converters or decompositions of the user's decide what the engine is?

    They may depend on anything, so that no other process's engine is taken for theirs.
    """
    if user_decompositions():
        return True
    converters = user_converters()
    ops = {str(node.target) for node in decompose(graph).graph.nodes} if converters else set()
    return any(op in converters or op.rpartition(".")[0] in converters for op in ops)


def with_transposed_weights(part: Part) -> Part:
    """The part with the weights as [K,N] of which it reads only the transpose."""
    assert part.graph is not None
    graph = copied(part.graph)
    inputs = []
    for node, binding in zip(placeholders(graph), part.segment.inputs, strict=True):
        users = list(node.users)
        if binding.weight is None or not users or not all(map(_is_transpose, users)):
            inputs.append(binding)
            continue
        value = value_of(node)
        with value.fake_mode:  # type: ignore[attr-defined]
            node.meta["val"] = torch.empty(value.shape[1], value.shape[0], dtype=value.dtype, device=value.device)
        for user in users:
            user.replace_all_uses_with(node)
            graph.graph.erase_node(user)
        inputs.append(msgspec.structs.replace(binding, shape=tuple(value_of(node).shape), transposed=True))
    graph.recompile()
    return replace(part, graph=graph, segment=msgspec.structs.replace(part.segment, inputs=tuple(inputs)))


def _is_transpose(node: Node) -> bool:
    """Does this node transpose a matrix?"""
    if node.target is aten.t.default:
        return value_of(node).ndim == 2
    if node.target is aten.permute.default:
        return list(node.args[1]) == [1, 0]  # type: ignore[arg-type]
    return node.target is aten.transpose.int and value_of(node).ndim == 2 and bool(node.args[1] != node.args[2])
