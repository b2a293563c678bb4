"""Build one engine for each class of equal ranks.

    decompose       the lowered graph -> ops that have converters       once for each graph
    bind_weights    placeholders of weights -> this rank's constants     once for each class of ranks
    convert         FX -> INetworkDefinition, by Torch-TensorRT
    build           INetworkDefinition -> engine file

One class's weights are in memory at a time.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchtrt_md.build import converters, probes
from torchtrt_md.build.decompose import bind_weights, decompose
from torchtrt_md.build.engine import Binding, Engine
from torchtrt_md.build.flavour import Flavour, flavour
from torchtrt_md.build.torch_trt import load, without_gpu
from torchtrt_md.errors import BuildError
from torchtrt_md.lowering import lower
from torchtrt_md.lowering.schedule import ScheduledCollective, schedule
from torchtrt_md.program import Coordinate, ShardedProgram, Weight, outputs_of, placeholders, value_of
from torchtrt_md.source import source_line


def build_program(
    program: ShardedProgram,
    folder: Path,
    target: str,
    ranks: Sequence[int] | None,
    progress: Callable[[str], None],
) -> list[Engine]:
    """See :func:`torchtrt_md.build`."""
    program = lower(program)
    wanted = set(range(program.mesh.size) if ranks is None else ranks)
    flavour().check_target(target)
    axes = {id(graph): _communicator_axis(graph) for graph, _ in program.distinct()}
    _check_dtypes(program)
    converters.register()
    folder.mkdir(parents=True, exist_ok=True)
    engines = []
    for graph, members in program.distinct():
        classes = [c for c in _equal_ranks(program, members) if wanted.intersection(c)]
        decomposed = decompose(graph) if classes else graph
        if classes:
            _check_converters(decomposed)
        for equal in classes:
            progress(f"{_named(equal)}: {sum(1 for n in decomposed.graph.nodes if n.op == 'call_function')} ops")
            file = folder / f"rank{equal[0]}.engine"
            engines.append(_build(program, graph, decomposed, equal, file, axes[id(graph)], target))
            _release_memory()
    return engines


def _release_memory() -> None:
    """Give one rank's weights back to the system before the next rank's are made; glibc would keep them."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _communicator_axis(graph: GraphModule) -> str | None:
    axes = dict.fromkeys(c.axis for c in schedule(graph))
    if len(axes) > 1:
        raise BuildError(
            f"the program communicates over axes {' and '.join(axes)}, and an engine has one communicator",
            fix="use one of them; cutting a program into engines of one axis each is not supported yet",
        )
    return next(iter(axes), None)


def _check_dtypes(program: ShardedProgram) -> None:
    for value in (*program.inputs, *program.outputs):
        if value.dtype in (torch.float64, torch.complex64, torch.complex128):
            raise BuildError(
                f"{value.name!r} is {value.dtype}, which TensorRT does not have",
                fix="pass and return float32 or narrower",
            )


def _equal_ranks(program: ShardedProgram, members: Sequence[int]) -> list[tuple[int, ...]]:
    """The ranks among ``members`` grouped by equal weights: by their coordinates on axes that split a weight."""
    axes = sorted({s.axis for w in program.sources.values() if isinstance(w, Weight) for s in w.shardings})
    classes: dict[tuple[int, ...], list[int]] = {}
    for rank in members:
        classes.setdefault(tuple(program.mesh.coordinate(rank, axis) for axis in axes), []).append(rank)
    return [tuple(ranks) for ranks in classes.values()]


def _build(
    program: ShardedProgram,
    graph: GraphModule,
    decomposed: GraphModule,
    ranks: tuple[int, ...],
    file: Path,
    axis: str | None,
    target: str,
) -> Engine:
    start = time.perf_counter()
    weights = {
        name: program.weights.local(source, program.mesh, ranks[0])
        for name, source in program.sources.items()
        if isinstance(source, Weight)
    }
    collectives = schedule(graph)
    inputs, outputs = _bindings(program, graph)
    interpreter = _convert(bind_weights(decomposed, weights), inputs, outputs)
    network = interpreter.ctx.net
    _check_collectives(network, collectives)
    f = flavour()
    config = probes.builder_config(f, interpreter.builder)
    f.set_target(config, target)
    if not _write_plan(f, interpreter.builder, network, config, file):
        raise BuildError(
            f"{f.name} {f.version} could not build the engine of {_named(ranks)} for target {target!r}",
            fix="its log above says why; lower(program, dump=...) writes the graph that was converted",
        )
    return Engine(
        ranks=ranks,
        file=file,
        axis=axis,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        collectives=tuple(collectives),
        target=target,
        layers=network.num_layers,
        seconds=time.perf_counter() - start,
    )


def _write_plan(f: Flavour, builder: Any, network: Any, config: Any, file: Path) -> bool:
    """Build into the file; as a stream where that is possible, so that the whole plan is never in memory."""
    with file.open("wb") as stream:
        if hasattr(builder, "build_serialized_network_to_stream"):

            class Writer(f.trt.IStreamWriter):  # type: ignore[name-defined, misc]
                def write(self, data: Any) -> int:
                    return stream.write(data)

            return bool(builder.build_serialized_network_to_stream(network, config, Writer()))
        plan = builder.build_serialized_network(network, config)
        return plan is not None and stream.write(memoryview(plan)) > 0


def _bindings(program: ShardedProgram, graph: GraphModule) -> tuple[list[Binding], list[Binding]]:
    inputs = []
    for node in placeholders(graph):
        source = program.sources[node.name]
        if isinstance(source, Weight):
            continue
        name = f"coordinate_{source.axis}" if isinstance(source, Coordinate) else source.name
        inputs.append(Binding(name, tuple(value_of(node).shape), value_of(node).dtype, source))
    outputs = [
        Binding(value.name, tuple(value_of(node).shape), value_of(node).dtype, value)
        for value, node in zip(program.outputs, outputs_of(graph), strict=True)
    ]
    return inputs, outputs


def _check_converters(graph: GraphModule) -> None:
    names = load()
    names.CONVERTERS.set_compilation_settings(_settings())
    for node in graph.graph.nodes:
        if node.op == "call_function" and names.CONVERTERS.get(node) is None:
            raise BuildError(
                f"Torch-TensorRT has no converter for {node.target} (node {node.name!r})",
                fix="register one with torch_tensorrt.dynamo.conversion.dynamo_tensorrt_converter, or compute it"
                " outside the model",
                at=source_line(node),
            )


def _settings() -> Any:
    # Double tables, as of rotary embeddings, become float; TensorRT has no doubles.
    with without_gpu():
        return load().CompilationSettings(truncate_double=True, min_block_size=1)


def _convert(graph: GraphModule, inputs: Sequence[Binding], outputs: Sequence[Binding]) -> Any:
    names = load()
    settings = _settings()
    _distinct_outputs(graph)
    with without_gpu():
        graph = names.post_lowering(graph, settings)
        interpreter = names.TRTInterpreter(
            graph,
            [names.Input(shape=b.shape, dtype=b.dtype, name=b.name) for b in inputs],
            output_dtypes=[b.dtype for b in outputs],
            compilation_settings=settings,
            input_binding_names=[b.name for b in inputs],
            output_binding_names=[b.name for b in outputs],
        )
        try:
            interpreter._construct_trt_network_def()
        except BuildError:
            raise
        except Exception as error:  # converters raise anything; the user's line is what helps
            node: Node | None = interpreter._cur_node
            raise BuildError(
                f"converting {node.target if node else 'the graph'} failed: {type(error).__name__}: {error}",
                fix="see lower(program, dump=...) for the graph",
                at=source_line(node) if node else "",
            ) from error
    return interpreter


def _distinct_outputs(graph: GraphModule) -> None:
    """Give each output a node of its own: a tensor that is returned twice would be one output of the engine."""
    (output,) = graph.graph.find_nodes(op="output")
    seen: set[Node] = set()
    returned = []
    for node in output.args[0]:
        if node in seen:
            with graph.graph.inserting_before(output):
                twin = graph.graph.call_function(torch.ops.aten.clone.default, (node,))
            twin.meta = dict(node.meta)
            node = twin
        seen.add(node)
        returned.append(node)
    output.args = (tuple(returned),)
    graph.recompile()


def _check_collectives(network: Any, expected: Sequence[ScheduledCollective]) -> None:
    """The network must communicate as the program that was verified does."""
    found = [
        network.get_layer(i) for i in range(network.num_layers) if network.get_layer(i).type.name == "DIST_COLLECTIVE"
    ]
    if len(found) != len(expected):
        raise BuildError(
            f"the network has {len(found)} collectives and the verified program {len(expected)}",
            fix="report this model: a pass of Torch-TensorRT removed or repeated one",
        )


def _named(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
