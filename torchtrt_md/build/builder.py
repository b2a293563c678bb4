"""Build one engine: FX -> INetworkDefinition by Torch-TensorRT's converters -> engine file.

What Torch-TensorRT made of the graph is compared with the program that was verified before TensorRT sees it: the same
inputs and outputs, and the same collectives in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchtrt_md.build import converters, layers, probes
from torchtrt_md.build.decompose import origin
from torchtrt_md.build.flavour import Flavour, flavour, trt_dtype
from torchtrt_md.build.torch_trt import load, without_gpu
from torchtrt_md.errors import BuildError, ConversionError, first_line
from torchtrt_md.graph.source import source_line
from torchtrt_md.segment import Collective, Segment
from torchtrt_md.selftest import RING


def build_engine(
    graph: GraphModule, segment: Segment, file: Path, target: str, *, what: str, streaming: bool = False
) -> None:
    """Build one decomposed graph into an engine file.

    Args:
        graph: its placeholders are the segment's inputs and it returns its outputs, in order.
        segment: the engine's bindings, and the collectives of the program that was verified: the network must have
            the same.
        target: as for :func:`torchtrt_md.build`.
        what: whose engine this is, for messages.
        streaming: let its weights be streamed from host memory when it runs, as far as the one who loads it asks.

    Raises:
        ConversionError: naming the node of the lowered graph that cannot be converted.
        BuildError: TensorRT cannot build it.
    """
    converters.register()
    f = flavour()
    if any(c.op == RING for c in segment.collectives):
        f.check_ring(target)
    for node in without_converter(graph):
        raise ConversionError(
            f"Torch-TensorRT has no converter for {node.target} (node {node.name!r})",
            fix="register one with torch_tensorrt.dynamo.conversion.dynamo_tensorrt_converter, or compute it"
            " outside the model",
            at=source_line(node),
            node=origin(node),
        )
    with converters.converting_for(target):
        interpreter = _convert(graph, segment)
    network = interpreter.ctx.net
    _check_bindings(network, segment)
    _check_collectives(network, segment.collectives)
    config = probes.builder_config(f, interpreter.builder)
    f.set_target(config, target)
    if streaming:
        config.set_flag(f.trt.BuilderFlag.WEIGHT_STREAMING)
    file.parent.mkdir(parents=True, exist_ok=True)
    if not write_engine(f, interpreter.builder, network, config, file):
        raise BuildError(
            f"{f.name} {f.version} could not build the engine of {what} for target {target!r}",
            fix="its log above says why; lower(program, dump=...) writes the graph that was converted",
        )


def write_engine(f: Flavour, builder: Any, network: Any, config: Any, file: Path) -> bool:
    """Build into the file; as a stream where that is possible, so that the whole engine is never in memory."""
    with file.open("wb") as stream:
        if hasattr(builder, "build_serialized_network_to_stream"):

            class Writer(f.trt.IStreamWriter):  # type: ignore[name-defined, misc]
                def write(self, data: Any) -> int:
                    return stream.write(data)

            return bool(builder.build_serialized_network_to_stream(network, config, Writer()))
        engine = builder.build_serialized_network(network, config)
        return engine is not None and stream.write(memoryview(engine)) > 0


def without_converter(decomposed: GraphModule) -> list[Node]:
    """The nodes of a decomposed graph that Torch-TensorRT cannot convert."""
    names = load()
    names.CONVERTERS.set_compilation_settings(_settings())
    calls = [n for n in decomposed.graph.nodes if n.op == "call_function"]
    return [n for n in calls if names.CONVERTERS.get(n) is None or _sorts_integers(n)]


def _sorts_integers(node: Node) -> bool:
    """TensorRT sorts floats only, and Torch-TensorRT's converter says nothing until the network's outputs are asked."""
    if node.target not in (torch.ops.aten.sort.default, torch.ops.aten.sort.stable):
        return False
    operand = node.all_input_nodes[0].meta.get("val")
    return isinstance(operand, torch.Tensor) and not operand.is_floating_point()


def _settings() -> Any:
    # Double tables, as of rotary embeddings, become float; TensorRT has no doubles.
    with without_gpu():
        return load().CompilationSettings(truncate_double=True, min_block_size=1)


def _convert(graph: GraphModule, segment: Segment) -> Any:
    names = load()
    settings = _settings()
    interpreter: Any = None
    try:
        with without_gpu():
            graph = names.post_lowering(graph, settings)
            interpreter = names.TRTInterpreter(
                graph,
                [names.Input(shape=b.shape, dtype=b.dtype, name=b.name) for b in segment.inputs],
                output_dtypes=[b.dtype for b in segment.outputs],
                compilation_settings=settings,
                input_binding_names=[b.name for b in segment.inputs],
                output_binding_names=[b.name for b in segment.outputs],
            )
            interpreter.convert()
    except BuildError as error:
        node = interpreter and interpreter.converting
        raise ConversionError(error.problem, fix=error.fix, at=error.at, node=origin(node) if node else "") from error
    except Exception as error:  # converters raise anything; the user's line is what helps
        node = interpreter and interpreter.converting
        raise ConversionError(
            f"converting {node.target if node else 'the graph'} failed: {type(error).__name__}: {first_line(error)}",
            fix="see lower(program, dump=...) for the graph",
            at=source_line(node) if node else "",
            node=origin(node) if node else "",
        ) from error
    return interpreter


def _check_bindings(network: Any, segment: Segment) -> None:
    """The network must have the inputs and outputs that the engine's manifest will name."""
    for what, expected, count, get in (
        ("input", segment.inputs, network.num_inputs, network.get_input),
        ("output", segment.outputs, network.num_outputs, network.get_output),
    ):
        found = [_described(t.name, t.dtype.name, t.shape) for t in map(get, range(count))]
        wanted = [_described(b.name, trt_dtype(b.dtype), b.shape) for b in expected]
        if found != wanted:
            # by position, for their order is the order in which the engine is called
            pairs = zip_longest(found, wanted, fillvalue="none")
            have, want = next((have, want) for have, want in pairs if have != want)
            raise BuildError(
                f"the network has {len(found)} {what}s and the program {len(wanted)}; they first differ in {have} for"
                f" {want}",
                fix="give inputs names that no other input or output has; where they have, report this model",
            )


def _described(name: str, dtype: str, shape: Sequence[int]) -> str:
    return f"{name!r} {dtype} {tuple(shape)}"


def _check_collectives(network: Any, expected: Sequence[Collective]) -> None:
    """The network must communicate as the program that was verified does, in the same order."""
    found = layers.communications(flavour(), network)
    if len(found) != len(expected):
        raise BuildError(
            f"the network has {len(found)} collectives and the verified program {len(expected)}",
            fix="report this model: a pass of Torch-TensorRT removed or repeated one",
        )
    for index, (have, collective) in enumerate(zip(found, expected, strict=True)):
        forms = _forms(collective)
        if have not in forms:
            raise BuildError(
                f"collective {index} of the network is (op, ranks, dtype, elements in, elements out) {tuple(have)}, and"
                f" that of the verified program {forms[0]}",
                fix="report this model: a pass of Torch-TensorRT changed or reordered one",
            )


def _forms(c: Collective) -> list[tuple[str, int, str, int, int]]:
    """The (op, ranks, dtype, elements in, elements out) that this collective's layer may have."""
    dtype = trt_dtype(torch.float32 if c.dtype == torch.float64 else c.dtype)  # _settings truncates
    whole, part = c.elements * c.ranks, c.elements // c.ranks
    after = {"all_gather": whole, "reduce_scatter": part}.get(c.op, c.elements)
    forms = [(c.op, c.ranks, dtype, c.elements, after)]
    if c.op == "all_gather":
        forms.append(("all_to_all", c.ranks, dtype, whole, whole))  # layers.add_all_gather_by_exchange
    if c.dtype == torch.int64 and c.op in layers.MOVES:
        forms.append((c.op, c.ranks, trt_dtype(torch.int32), 2 * c.elements, 2 * after))  # layers.add_in_words
    return forms
