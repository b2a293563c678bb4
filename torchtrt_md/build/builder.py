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
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchtrt_md.build import converters, layers, probes
from torchtrt_md.build.decompose import bind_weights, decompose, first_line, origin
from torchtrt_md.build.engine import Binding, Engine
from torchtrt_md.build.flavour import Flavour, boundary_dtypes, flavour, trt_dtype
from torchtrt_md.build.torch_trt import load, without_gpu
from torchtrt_md.errors import BuildError, ConversionError
from torchtrt_md.graph.source import source_line
from torchtrt_md.lowering import lower
from torchtrt_md.lowering.schedule import ScheduledCollective, schedule
from torchtrt_md.program import Coordinate, ShardedProgram, Weight, outputs_of, placeholders, value_of


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
        classes = [c for c in equal_ranks(program, members) if wanted.intersection(c)]
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
    supported = boundary_dtypes(flavour())
    for what, values in (("input", program.inputs), ("output", program.outputs)):
        for value in values:
            if value.dtype not in supported:
                raise BuildError(
                    f"{what} {value.name!r} is {value.dtype}, which TensorRT does not have at an engine's boundary",
                    fix=f"cast it inside or outside the model; supported are {', '.join(map(str, supported))}",
                )


def equal_ranks(program: ShardedProgram, members: Sequence[int]) -> list[tuple[int, ...]]:
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
    weights = {
        name: program.weights.local(source, program.mesh, ranks[0])
        for name, source in program.sources.items()
        if isinstance(source, Weight)
    }
    collectives = schedule(graph)
    inputs, outputs = _bindings(program, graph)
    bound = bind_weights(decomposed, weights)
    count, seconds = build_graph(bound, inputs, outputs, collectives, file, target, what=_named(ranks))
    return Engine(ranks, file, axis, tuple(inputs), tuple(outputs), tuple(collectives), target, count, seconds)


def build_graph(
    graph: GraphModule,
    inputs: Sequence[Binding],
    outputs: Sequence[Binding],
    collectives: Sequence[ScheduledCollective],
    file: Path,
    target: str,
    *,
    what: str,
) -> tuple[int, float]:
    """Build one decomposed graph into an engine file; the number of its layers, and the seconds it took.

    Args:
        graph: its placeholders are ``inputs`` and it returns ``outputs``, in order.
        collectives: those of the program that was verified; the network must have the same.
        what: whose engine this is, for messages.

    Raises:
        BuildError: TensorRT cannot build it.
    """
    start = time.perf_counter()
    if any(c.op == layers.RING for c in collectives):
        flavour().check_ring(target)
    with converters.converting_for(target):
        interpreter = _convert(graph, inputs, outputs)
    network = interpreter.ctx.net
    _check_bindings(network, inputs, outputs)
    _check_collectives(network, collectives)
    f = flavour()
    config = probes.builder_config(f, interpreter.builder)
    f.set_target(config, target)
    if not _write_plan(f, interpreter.builder, network, config, file):
        raise BuildError(
            f"{f.name} {f.version} could not build the engine of {what} for target {target!r}",
            fix="its log above says why; lower(program, dump=...) writes the graph that was converted",
        )
    return network.num_layers, time.perf_counter() - start


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
        if isinstance(source, Coordinate):
            name, wire = f"coordinate_{source.axis}", f"coordinate:{source.axis}"
        else:
            name, wire = source.name, f"input:{source.name}"
        inputs.append(Binding(name, tuple(value_of(node).shape), value_of(node).dtype, wire))
    outputs = [
        Binding(value.name, tuple(value_of(node).shape), value_of(node).dtype, f"output:{value.name}")
        for value, node in zip(program.outputs, outputs_of(graph), strict=True)
    ]
    return inputs, outputs


def _check_converters(graph: GraphModule) -> None:
    for node in without_converter(graph):
        raise BuildError(
            f"Torch-TensorRT has no converter for {node.target} (node {node.name!r})",
            fix="register one with torch_tensorrt.dynamo.conversion.dynamo_tensorrt_converter, or compute it"
            " outside the model",
            at=source_line(node),
        )


def without_converter(decomposed: GraphModule) -> list[Node]:
    """The nodes of a decomposed graph that Torch-TensorRT cannot convert."""
    names = load()
    names.CONVERTERS.set_compilation_settings(_settings())
    return [n for n in decomposed.graph.nodes if n.op == "call_function" and names.CONVERTERS.get(n) is None]


def _settings() -> Any:
    # Double tables, as of rotary embeddings, become float; TensorRT has no doubles.
    with without_gpu():
        return load().CompilationSettings(truncate_double=True, min_block_size=1)


def _convert(graph: GraphModule, inputs: Sequence[Binding], outputs: Sequence[Binding]) -> Any:
    names = load()
    settings = _settings()
    interpreter: Any = None
    try:
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
            interpreter._construct_trt_network_def()
    except BuildError as error:
        node = getattr(interpreter, "_cur_node", None)
        raise ConversionError(error.problem, fix=error.fix, at=error.at, node=origin(node) if node else "") from error
    except Exception as error:  # converters raise anything; the user's line is what helps
        node = getattr(interpreter, "_cur_node", None)
        raise ConversionError(
            f"converting {node.target if node else 'the graph'} failed: {type(error).__name__}: {first_line(error)}",
            fix="see lower(program, dump=...) for the graph",
            at=source_line(node) if node else "",
            node=origin(node) if node else "",
        ) from error
    return interpreter


def _check_bindings(network: Any, inputs: Sequence[Binding], outputs: Sequence[Binding]) -> None:
    """The network must have the inputs and outputs that the engine's manifest will name."""
    f = flavour()
    for what, expected, count, get in (
        ("input", inputs, network.num_inputs, network.get_input),
        ("output", outputs, network.num_outputs, network.get_output),
    ):
        found = [_described(t.name, t.dtype.name, t.shape) for t in map(get, range(count))]
        wanted = [_described(b.name, trt_dtype(f, b.dtype), b.shape) for b in expected]
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


def _check_collectives(network: Any, expected: Sequence[ScheduledCollective]) -> None:
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


def _forms(c: ScheduledCollective) -> list[tuple[str, int, str, int, int]]:
    """The (op, ranks, dtype, elements in, elements out) that this collective's layer may have."""
    dtype = trt_dtype(flavour(), torch.float32 if c.dtype == torch.float64 else c.dtype)  # _settings truncates
    whole, part = c.elements * c.size, c.elements // c.size
    after = {"all_gather": whole, "gather": whole, "reduce_scatter": part, "scatter": part}.get(c.op, c.elements)
    forms = [(c.op, c.size, dtype, c.elements, after)]
    if c.op == "all_gather":
        forms.append(("all_to_all", c.size, dtype, whole, whole))  # layers.add_all_gather_by_exchange
    return forms


def _named(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
