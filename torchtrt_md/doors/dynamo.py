"""The backend of ``torch.compile(model, backend="torchtrt_md", options={...})``, found by its entry point.

    the model                                                     captured by
    holds DTensors, or calls functional collectives               capture.dynamo: this rank's graph, from Dynamo's own
    dense, with the options ``mesh`` and ``parallel``             md.capture: the plan needs modules, which Dynamo's
                                                                  graph has no more; it says what goes in and out

Each graph is compiled for the shapes at hand.  Other shapes compile anew: a symbolic size is guarded at its value.
It is for inference: a graph whose result would need gradients is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakSet

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule, Interpreter
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torchtrt_md.capture import capture
from torchtrt_md.capture.arguments import Arguments
from torchtrt_md.capture.dynamo import (
    GraphInput,
    Specialized,
    WrittenInput,
    awaited_inputs,
    capture_graph,
    graph_inputs,
    launch_mesh,
)
from torchtrt_md.capture.dynamo_private import (
    CallInProgress,
    arrived,
    call_in_progress,
    graph_break,
    local_tensor,
    outside_dynamo,
    passed_on,
)
from torchtrt_md.capture.model import own_mesh
from torchtrt_md.capture.torch_private import root_mesh
from torchtrt_md.doors.agreed import agreed_options
from torchtrt_md.doors.flat_call import Compiled, FlatCall, check_apart
from torchtrt_md.errors import CaptureError, MDError, MeshError, OptionError, PlanError, PlanWarning, VerificationError
from torchtrt_md.launch import communicator
from torchtrt_md.lowering import split_outputs, uninitialized
from torchtrt_md.lowering.ops import is_collective, use_device_mesh
from torchtrt_md.mesh import Mesh
from torchtrt_md.options import Options
from torchtrt_md.program import Coordinate, Output, ShardedProgram, Value, Weight, outputs_of, part, placeholders
from torchtrt_md.verification.compare import relative_error

if TYPE_CHECKING:
    from torchtrt_md.runtime.graphs import Budget

Verify = Callable[[ShardedProgram], None]
# Two runs of the same ops in the same dtype: what differs is the order of sums.
_TOLERANCE = 1e-5
_ROUNDINGS = 4


class Build(Protocol):
    """What makes a program run: :func:`torchtrt_md.doors.compile.compile_program`, whose docstring says the rest.

    ``captured`` and ``verify`` communicate: every rank calls them, and what one raises is raised by all.
    """

    def __call__(
        self,
        captured: Callable[[], ShardedProgram],
        options: Options,
        /,
        *,
        verify: Verify,
        name: str,
        budget: Budget | None,
    ) -> Compiled: ...


@dataclass(frozen=True)
class _Captured:
    """A program and how a Dynamo graph's flat inputs and outputs are its own.

    Attributes:
        inputs: the graph's.
        program: captured, not lowered.
        feeds: name of the program's input -> index among the graph's.
        weights: index among the graph's inputs -> names of the program's weights that it is.
        unused: the program's inputs that the graph has not, with what to pass for them.
        results: for each output of the graph the program's, or the constant that it is.
        written: what the program returns for inputs that the graph writes to.
        verify: proves the lowered program.
    """

    inputs: Sequence[GraphInput]
    program: ShardedProgram
    feeds: Mapping[str, int]
    weights: Mapping[int, Sequence[str]]
    unused: Mapping[str, Tensor]
    results: tuple[Output | object, ...]
    written: tuple[WrittenInput, ...]
    verify: Verify


def backend(
    gm: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, **other: Any
) -> Callable[..., list[Any]]:
    """Compile a graph of Dynamo's.  Collective: every rank of the launch compiles the same.

    Args:
        gm: the graph.
        example_inputs: its inputs, parameters and buffers of the model among them.
        options: see :class:`torchtrt_md.options.Options`.
        other: what else ``torch.compile`` passes on, such as ``mode``; there is none that this backend takes.

    Raises:
        MDError: the graph cannot be compiled; every rank raises the same.
    """
    from torchtrt_md.doors.compile import compile_program  # it loads TensorRT

    return compile_graph(gm, example_inputs, build=compile_program, options=options, **other)


def compile_graph(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    build: Build,
    options: Mapping[str, Any] | None = None,
    **other: Any,
) -> Callable[..., list[Any]]:
    """:func:`backend`, with what builds the program given."""

    def read() -> Options:
        if other:
            raise OptionError(
                f"the backend torchtrt_md takes no {', '.join(other)}", fix="pass options={...} to torch.compile"
            )
        return Options.of(options or {})

    if _is_of_numbers(gm):  # a rank may have one alone
        return lambda *flat: list(gm(*flat))
    try:
        with outside_dynamo(), torch.no_grad():
            chosen = agreed_options((options or {}).get("timeout"), read)
            return _compiled(gm, example_inputs, chosen, build, _budget(options, chosen), options)
    except MDError as error:
        raise passed_on(error) from error.__cause__


# torch.compile's options -> what its graphs share.  They are told apart as objects, and held so that they stay it.
_budgets: list[tuple[Mapping[str, Any], Budget]] = []


def _budget(options: Mapping[str, Any] | None, chosen: Options) -> Budget | None:
    """Of CUDA graphs, for all graphs and shapes of one ``torch.compile``, which passes on one mapping."""
    if options is None or not chosen.cuda_graph:
        return None
    found = next((budget for of, budget in _budgets if of is options), None)
    if found is None:
        from torchtrt_md.runtime.graphs import Budget

        found = Budget(chosen.max_graphs)
        _budgets.append((options, found))
    return found


def _compiled(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    build: Build,
    budget: Budget | None,
    given: Mapping[str, Any] | None,
) -> Callable[..., list[Any]]:
    autocast = Autocast()
    found: list[_Captured] = []

    def captured() -> ShardedProgram:
        with autocast.as_it_was():
            _refuse_gradients(gm)
            inputs = graph_inputs(gm, example_inputs)
            found.append((_of_model if options.parallels else _of_graph)(gm, inputs, options, autocast))
            if not options.parallels:
                _check_launch_used(gm, found[0], options, given, call)
        return found[0].program

    call = call_in_progress()
    with autocast.off():
        runner = build(
            captured,
            options,
            verify=lambda lowered: found[0].verify(lowered),
            name="a function" if call is None else type(call.module).__name__,
            budget=budget,
        )
    return _callable(found[0], runner, autocast, gm)


def _is_of_numbers(gm: GraphModule) -> bool:
    """Does the graph neither return nor write to a tensor?"""
    return not any(isinstance(node.meta.get("example_value"), Tensor) for node in outputs_of(gm)) and not _writes(gm)


def _writes(gm: GraphModule) -> bool:
    """Does it call a method that writes to a tensor?"""
    methods = (str(node.target) for node in gm.graph.nodes if node.op == "call_method")
    return any(name.endswith("_") and not name.endswith("__") for name in methods)


class Autocast:
    """The autocast that is on around the call that is compiled.  Captured, it is ops of the graph, and so off when run.

    Dynamo guards it: where it is another, another graph is compiled.
    """

    def __init__(self) -> None:
        self.on = [
            (kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)
        ]

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        with ExitStack() as stack:
            for kind, dtype in self.on:
                stack.enter_context(torch.autocast(kind, dtype))
            yield

    @contextmanager
    def off(self) -> Iterator[None]:
        with ExitStack() as stack:
            for kind, _ in self.on:
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield


def _refuse_gradients(gm: GraphModule) -> None:
    for node in outputs_of(gm):
        value = node.meta.get("example_value")
        if isinstance(value, Tensor) and value.requires_grad:
            raise CaptureError(
                "the model was called with gradients on, and engines compute none",
                fix="call it under torch.no_grad() or torch.inference_mode(), or model.requires_grad_(False)",
            )


def _callable(captured: _Captured, runner: Compiled, autocast: Autocast, gm: GraphModule) -> FlatCall:
    return FlatCall(
        inputs=captured.inputs,
        feeds=captured.feeds,
        weights=captured.weights,
        unused=captured.unused,
        results=captured.results,
        written=captured.written,
        waits=awaited_inputs(gm),
        outputs=[value.name for value in captured.program.outputs],
        runner=runner,
        around=autocast.off if autocast.on else nullcontext,
    )


# --- a graph that communicates by itself ---


def _of_graph(gm: GraphModule, inputs: Sequence[GraphInput], options: Options, autocast: Autocast) -> _Captured:
    program = capture_graph(gm, [i.example for i in inputs], mesh=options.mesh)
    feeds = {each.name: i for i, each in enumerate(inputs) if each.kind == "value"}

    written = tuple(leaf for leaf in program.out_leaves if isinstance(leaf, WrittenInput))
    check_apart([feeds[leaf.name] for leaf in written], inputs, [i.example for i in inputs])

    def verify(lowered: ShardedProgram) -> None:
        # The graph writes to copies here: the call that is compiled has not been made yet.
        copies = {leaf.name: inputs[feeds[leaf.name]].example.clone() for leaf in written}
        own = [replace(i, example=copies[i.name]) if i.name in copies else i for i in inputs]
        with autocast.as_it_was():
            expected = [local_tensor(t) for t in _run_graph(gm, own) if isinstance(t, Tensor)]
        expected += [local_tensor(copies[leaf.name]) for leaf in written]
        _compare(lowered, expected, inputs, _groups_of(inputs, options.mesh))

    weights = {i: [each.name] for i, each in enumerate(inputs) if each.kind == "weight"}
    results = program.out_leaves[: len(program.out_leaves) - len(written)]
    return _Captured(inputs, program, feeds, weights, {}, results, written, verify)


# What was compiled in several graphs, or used the launch: modules, and of functions the options.
_modules_in_parts: WeakSet[nn.Module] = WeakSet()
_functions_in_parts: list[Mapping[str, Any]] = []  # held, so that they stay the objects that they are
_used_meshes: set[Mesh] = set()  # a model may be compiled block by block, of which some are dense


def _check_launch_used(
    gm: GraphModule, captured: _Captured, options: Options, given: Mapping[str, Any] | None, call: CallInProgress | None
) -> None:
    """Tell of a model that every rank would run whole: of one graph, since of several others may communicate.

    Raises, warns:
        as :func:`_tell_unused`.
    """
    program = captured.program
    if call is None and given is None:
        return
    if _uses_launch(captured, call):
        _used_meshes.add(program.mesh)
    elif graph_break(gm) is None:
        parts = any(each is given for each in _functions_in_parts) if call is None else call.module in _modules_in_parts
        if not parts and (options.mesh is None or program.mesh not in _used_meshes):
            _tell_unused(program, options, call)
        return
    if call is not None:
        _modules_in_parts.add(call.module)
    elif given is not None and not any(each is given for each in _functions_in_parts):
        _functions_in_parts.append(given)


def _tell_unused(program: ShardedProgram, options: Options, call: CallInProgress | None) -> None:
    """
    Raises:
        MeshError: a mesh was given for it.

    Warns:
        PlanWarning: none was.
    """
    what = "the function" if call is None else type(call.module).__name__
    problem = f"nothing of {what} is split over ranks, and it does not communicate"
    fix = (
        "say what is parallel, as in options={'mesh': Mesh(cp=2), 'parallel': ContextParallel('cp')}, or shard the"
        " model with parallelize_module; where each rank has data of its own, options={'mesh': Mesh(dp=2), 'parallel':"
        " DataParallel('dp')}"
    )
    if options.mesh is not None:
        raise MeshError(
            f"all {program.mesh.size} ranks of {program.mesh} would do the same work: {problem}",
            fix=f"leave out the option 'mesh'; or {fix}",
        )
    warnings.warn(
        f"each of the {program.mesh.size} ranks runs all of {what} by itself: {problem}; {fix}",
        PlanWarning,
        stacklevel=2,
    )


def _uses_launch(captured: _Captured, call: CallInProgress | None) -> bool:
    program = captured.program
    return (
        program.mesh.size == 1
        or bool(program.groups)
        or any(isinstance(source, Weight) and source.shardings for source in program.sources.values())
        or any(isinstance(i.example, (DTensor, DeviceMesh)) for i in captured.inputs)
        or any(is_collective(node) for graph, _ in program.distinct() for node in graph.graph.nodes)
        or (call is not None and own_mesh(call.module) is not None)
    )


def _run_graph(gm: GraphModule, inputs: Sequence[GraphInput]) -> list[Any]:
    """What Dynamo's graph gives in PyTorch, over the ranks of the launch where it communicates."""
    with _Initialized():  # type: ignore[no-untyped-call]
        return list(Specialized(gm).run(*(i.example for i in inputs)))


class _Initialized(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Memory is zero before it is written, as in a lowered graph; a graph may return it unwritten at a graph break."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.zero_() if func in uninitialized.FILLED else result


def _compare(
    program: ShardedProgram,
    expected: Sequence[Tensor],
    inputs: Sequence[GraphInput],
    device_mesh: DeviceMesh | None,
) -> None:
    """Run the lowered program in PyTorch too, over the ranks of the launch.

    Raises:
        VerificationError: the outputs differ by more than rounding.
    """
    limit = _limit(program)
    given = {i.name: arrived(local_tensor(i.example)) for i in inputs if i.kind == "value"}
    produced = run_rank(program, given, device_mesh)
    for value, ours, theirs in zip(program.outputs, produced, expected, strict=True):
        if not _close(ours, theirs, limit):
            raise VerificationError(
                f"{value.name} of the lowered graph is not what the graph returns, by more than rounding",
                fix="report it, with the model",
            )


def _groups_of(inputs: Sequence[GraphInput], mesh: Any) -> DeviceMesh | None:
    """The mesh that the user made, whose groups exist; None where there is none."""
    of = [mesh, *(i.example for i in inputs)]
    own = next(
        (m.device_mesh if isinstance(m, DTensor) else m for m in of if isinstance(m, (DTensor, DeviceMesh))), None
    )
    return None if own is None else root_mesh(own)


def run_rank(program: ShardedProgram, inputs: Mapping[str, Tensor], device_mesh: DeviceMesh | None) -> list[Tensor]:
    """This rank's lowered graph in PyTorch, over the process group of the launch."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    graph = program.graphs[rank]
    device = next((t.device for t in (*inputs.values(), *program.weights.shards.values())), torch.device("cpu"))
    flat: list[Tensor] = []
    for node in placeholders(graph):
        source = program.sources[node.name]
        if isinstance(source, Weight):
            flat.append(program.weights.local(source, program.mesh, rank))
        elif isinstance(source, Coordinate):
            flat.append(torch.tensor([program.mesh.coordinate(rank, source.axis)], dtype=torch.int32, device=device))
        else:
            flat.append(inputs[source.name])
    if device_mesh is None and not dist.is_initialized():
        return list(Interpreter(graph).run(*flat))
    with use_device_mesh(device_mesh or communicator.device_mesh(program.mesh, device.type)):
        return list(Interpreter(graph).run(*flat))


# --- a dense model with a plan ---


def _of_model(gm: GraphModule, inputs: Sequence[GraphInput], options: Options, autocast: Autocast) -> _Captured:
    call = call_in_progress()
    if call is None:
        raise PlanError(
            "the option 'parallel' names modules, and what was compiled is a function",
            fix="pass the nn.Module itself to torch.compile, or use torchtrt_md.compile",
        )
    name = type(call.module).__name__
    broken = graph_break(gm)
    if broken is not None:
        raise CaptureError(
            f"{name} is not one graph, as the option 'parallel' needs: Dynamo broke it off: {broken}",
            fix="mend what broke it (torch.compile(fullgraph=True) shows the line), or use torchtrt_md.compile",
        )
    if options.mesh is None and not any(isinstance(i.example, DTensor) for i in inputs):
        raise OptionError("the option 'parallel' needs the option 'mesh'", fix='options={"mesh": Mesh(cp=2), ...}')
    if autocast.on and options.check:
        raise CaptureError(
            f"{name} was called under autocast, where a program cannot be compared with the dense model",
            fix="cast the model itself, as in model.to(torch.bfloat16), or pass check=False",
        )
    placed = next((i.name for i in inputs if i.kind == "value" and isinstance(i.example, DTensor)), None)
    if placed is not None:
        raise CaptureError(
            f"the input {placed!r} is a DTensor, and the option 'parallel' says what is split",
            fix="pass the whole tensor (full_tensor()), or shard the model itself and leave out the option",
        )
    mesh = launch_mesh(inputs, options.mesh)
    program = capture(call.module, call.args, call.kwargs, mesh=mesh, parallel=options.parallels)
    arguments = {n: arrived(t) for n, t in Arguments.of(call.module, call.args, call.kwargs).tensors.items()}
    feeds = _feeds(arguments, inputs)
    unused = _unused(program, arguments, inputs, call.module)
    of_rank = tuple(
        msgspec.structs.replace(v, shape=tuple(part(torch.empty(v.shape, device="meta"), v.sharding, mesh, 0).shape))
        for v in split_outputs(program)
    )
    results = _results(gm, inputs, call, replace(program, outputs=of_rank), options.check)
    weights = _weights(call.module, inputs)
    return _Captured(inputs, program, feeds, weights, unused, results, (), lambda lowered: _verify(lowered, call))


def _weights(model: nn.Module, inputs: Sequence[GraphInput]) -> dict[int, list[str]]:
    """Index of the graph's input -> the names that the model has for it; tied weights have several."""
    index = {id(each.example): i for i, each in enumerate(inputs)}
    found: dict[int, list[str]] = {}
    for name, t in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        if id(t) in index:
            found.setdefault(index[id(t)], []).append(name)
    return found


def _verify(program: ShardedProgram, call: CallInProgress) -> None:
    """Against the dense model, where this process has it; on one rank, since each has the graphs of all."""
    from torchtrt_md.verification import verify

    first = not dist.is_initialized() or dist.get_rank() == 0
    if first and not program.weights.shards:
        with torch.compiler.set_stance("force_eager"):
            verify(program, call.module, call.args, call.kwargs)


def _feeds(arguments: Mapping[str, Tensor], inputs: Sequence[GraphInput]) -> dict[str, int]:
    """Argument -> index of the graph's input that is the same tensor."""
    index = {id(each.example): i for i, each in enumerate(inputs)}
    return {name: index[id(t)] for name, t in arguments.items() if id(t) in index}


def _unused(
    program: ShardedProgram, arguments: Mapping[str, Tensor], inputs: Sequence[GraphInput], model: nn.Module
) -> dict[str, Tensor]:
    """Something to pass for the arguments that Dynamo left out, since nothing depends on them.

    Raises:
        CaptureError: the model uses an argument or a weight that the graph does not have: it is a part of the model.
    """
    had = {id(each.example) for each in inputs}
    own = {**arguments, **dict(model.named_buffers(remove_duplicate=False))}
    own.update(model.named_parameters(remove_duplicate=False))
    for graph, _ in program.distinct():
        for node in placeholders(graph):
            source = program.sources[node.name]
            if node.users and isinstance(source, (Value, Weight)) and id(own[source.name]) not in had:
                raise CaptureError(
                    f"{type(model).__name__} uses {source.name!r}, which the graph of torch.compile does not have: it"
                    " is a part of the model",
                    fix="find what divides the model (torch.compile(fullgraph=True) shows the line), or use"
                    " torchtrt_md.compile",
                )
    return {
        name: torch.zeros_like(t, memory_format=torch.contiguous_format)
        for name, t in arguments.items()
        if id(t) not in had
    }


def _results(
    gm: GraphModule, inputs: Sequence[GraphInput], call: CallInProgress, program: ShardedProgram, check: bool
) -> tuple[object, ...]:
    """For each output of Dynamo's graph the output of the program that it is.

    By shape and dtype.  By values too, where those leave a choice or a proof is wanted: the graph and the model are
    both run.  It also shows that the graph is the whole model.

    Raises:
        CaptureError: an output of the graph is none of the model's, or might be either of two.
    """
    (returned,) = gm.graph.find_nodes(op="output")
    theirs = [_example(leaf) for leaf in returned.args[0]]
    results, certain = _matched(theirs, program.outputs, program, _alike)
    if certain and not check:
        return results
    limit = _limit(program)
    theirs = _run_graph(gm, inputs)
    with torch.compiler.set_stance("force_eager"):
        ours = [t for t in pytree.tree_leaves(call.module(*call.args, **call.kwargs)) if isinstance(t, Tensor)]
    results, certain = _matched(theirs, ours, program, lambda a, b: _close(a, b, limit))
    if not certain:
        raise CaptureError(
            f"two outputs of {type(call.module).__name__} have the same shape and values, so that those of the graph"
            " of torch.compile cannot be told apart",
            fix="use torchtrt_md.compile",
        )
    return results


def _example(leaf: Any) -> Any:
    return leaf.meta["example_value"] if isinstance(leaf, torch.fx.Node) else leaf


def _matched(
    theirs: Sequence[Any], ours: Sequence[Any], program: ShardedProgram, same: Callable[[Any, Any], bool]
) -> tuple[tuple[object, ...], bool]:
    """For each of ``theirs`` the first of ``ours`` that is the same, and whether all others that are too equal it."""
    nodes = list(outputs_of(program.graphs[0]))
    certain = True
    results: list[object] = []
    for number, leaf in enumerate(theirs):
        if not isinstance(leaf, Tensor):
            results.append(leaf)
            continue
        found = [i for i, own in enumerate(ours) if _alike(leaf, program.outputs[i]) and same(leaf, own)]
        if not found:
            raise CaptureError(
                f"output {number} of the graph of torch.compile, {leaf.dtype} {list(leaf.shape)}, is none of the"
                " model's under the plan, "
                + ", ".join(f"{value.dtype} {list(value.shape)}" for value in program.outputs),
                fix="gather what the plan left split, or use torchtrt_md.compile",
            )
        certain = certain and len({nodes[i] for i in found}) == 1
        results.append(Output(found[0]))
    return tuple(results), certain


def _alike(a: Any, b: Any) -> bool:
    return tuple(a.shape) == tuple(b.shape) and a.dtype == b.dtype


def _limit(program: ShardedProgram) -> float:
    """How far two runs of the same ops may be apart, relative, which differ in the order of sums only."""
    values = [node.meta.get("val") for node in program.graphs[0].graph.nodes]
    dtypes = {v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()}
    return max([_TOLERANCE, *(_ROUNDINGS * torch.finfo(dtype).eps for dtype in dtypes)])


def _close(a: Tensor, b: Tensor, limit: float) -> bool:
    """Equal up to ``limit`` in every part; what is not finite is equal in place and kind."""
    return relative_error(a, b) <= (limit if a.is_floating_point() or a.is_complex() else 0.0)
