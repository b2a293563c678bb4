"""The backend of ``torch.compile(model, backend="torchtrt_md", options={...})``, found by its entry point.

    the model                                                     captured by
    holds DTensors, or calls functional collectives               capture.dynamo: this rank's graph, from Dynamo's own
    dense, with the options ``mesh`` and ``parallel``             md.capture: the plan needs modules, which Dynamo's
                                                                  graph has no more; it says what goes in and out

Each graph is compiled for the shapes at hand.  Other shapes compile anew: a symbolic size is guarded at its value.
It is for inference: a graph whose result would need gradients is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from torchtrt_md.capture import capture
from torchtrt_md.capture.arguments import Arguments
from torchtrt_md.capture.async_private import arrived
from torchtrt_md.capture.dynamo import (
    GraphInput,
    WrittenInput,
    awaited_inputs,
    capture_graph,
    graph_inputs,
    launch_mesh,
)
from torchtrt_md.capture.dynamo_private import (
    CallInProgress,
    call_in_progress,
    graph_break,
    local_tensor,
    outside_dynamo,
    passed_on,
    runs_outside,
)
from torchtrt_md.capture.torch_private import root_mesh
from torchtrt_md.doors.agreed import agreed_options
from torchtrt_md.doors.compared import compare_ranks, is_close, limit_of, run_graph
from torchtrt_md.doors.flat_call import Compiled, FlatCall, check_apart
from torchtrt_md.doors.unused import check_launch_used
from torchtrt_md.doors.views import views
from torchtrt_md.errors import CaptureError, MDError, OptionError, PlanError
from torchtrt_md.lowering import split_outputs
from torchtrt_md.options import Options
from torchtrt_md.program import Output, ShardedProgram, Value, Weight, outputs_of, part, placeholders
from torchtrt_md.runtime.autocast import without_autocast

if TYPE_CHECKING:
    from torchtrt_md.runtime.graphs import Budget

Verify = Callable[[ShardedProgram], None]


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
        asked = Options.of(options or {})
        # Dynamo compiles again for other shapes, in the midst of a call.
        return replace(asked, tune=False) if asked.tune == "auto" else asked

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
                check_launch_used(gm, found[0].program, found[0].inputs, options, given, call)
        return found[0].program

    call = call_in_progress()
    with without_autocast():
        runner = build(
            captured,
            options,
            verify=lambda lowered: found[0].verify(lowered),
            name="a function" if call is None else type(call.module).__name__,
            budget=budget,
        )
    return _callable(found[0], runner, gm)


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


def _refuse_gradients(gm: GraphModule) -> None:
    for node in outputs_of(gm):
        value = node.meta.get("example_value")
        if isinstance(value, Tensor) and value.requires_grad:
            raise CaptureError(
                "the model was called with gradients on, and engines compute none",
                fix="call it under torch.no_grad() or torch.inference_mode(), or model.requires_grad_(False)",
            )


def _callable(captured: _Captured, runner: Compiled, gm: GraphModule) -> FlatCall:
    return FlatCall(
        inputs=captured.inputs,
        feeds=captured.feeds,
        weights=captured.weights,
        unused=captured.unused,
        results=captured.results,
        written=captured.written,
        views=views(gm, [i for i, each in enumerate(captured.inputs) if each.kind == "value"]),
        waits=awaited_inputs(gm),
        outputs=[value.name for value in captured.program.outputs],
        runner=runner,
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
            expected = [local_tensor(t) for t in run_graph(gm, own) if isinstance(t, Tensor)]
        expected += [local_tensor(copies[leaf.name]) for leaf in written]
        compare_ranks(lowered, expected, inputs, _groups_of(inputs, options.mesh))

    weights = {i: [each.name] for i, each in enumerate(inputs) if each.kind == "weight"}
    results = program.out_leaves[: len(program.out_leaves) - len(written)]
    return _Captured(inputs, program, feeds, weights, {}, results, written, verify)


def _groups_of(inputs: Sequence[GraphInput], mesh: Any) -> DeviceMesh | None:
    """The mesh that the user made, whose groups exist; None where there is none."""
    of = [mesh, *(i.example for i in inputs)]
    own = next(
        (m.device_mesh if isinstance(m, DTensor) else m for m in of if isinstance(m, (DTensor, DeviceMesh))), None
    )
    return None if own is None else root_mesh(own)


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
    outside = runs_outside(call.module)
    if outside is not None:
        raise CaptureError(
            f"{name} has what torch.compile runs around the function that it compiles: {outside}",
            fix="use torchtrt_md.compile, which compiles it with the model; or let hooks be of modules inside, and no"
            " function in the model be disabled for Dynamo",
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
    nodes = {leaf for leaf in returned.args[0] if isinstance(leaf, torch.fx.Node)}
    of_graph = {node for node in nodes if isinstance(_example(node), Tensor)}  # and no number, as a shape may be
    of_program = {leaf.index for leaf in results if isinstance(leaf, Output)}
    # More of the graph than of the program: something that the model does beside, as where it keeps a tensor.
    if certain and not check and len(of_graph) == len(of_program):
        return results
    limit = limit_of(program)
    theirs = run_graph(gm, inputs)
    with torch.compiler.set_stance("force_eager"):
        ours = [t for t in pytree.tree_leaves(call.module(*call.args, **call.kwargs)) if isinstance(t, Tensor)]
    results, certain = _matched(theirs, ours, program, lambda a, b: is_close(a, b, limit))
    if not certain:
        raise CaptureError(
            f"two outputs of {type(call.module).__name__} have the same shape and values, so that those of the graph"
            " of torch.compile cannot be told apart",
            fix="use torchtrt_md.compile",
        )
    if len(of_graph) > len(program.outputs):
        raise CaptureError(
            f"{type(call.module).__name__} keeps a tensor beside what it returns, of which nothing says that it is"
            " always one of the results",
            fix="return it as well, or use torchtrt_md.compile, which says what it does not keep",
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
