"""Capture what Dynamo recorded: a graph of ``torch.compile`` -> the program of this rank.

Dynamo's graph is at the level of PyTorch's functions and holds DTensors.  It is traced once more, as a model is, to
flat aten ops over local shapes: in the process group of the launch, and for this rank only, since each compiles its
own.

    placeholder of Dynamo's graph                      in the program
    parameter or registered buffer, DTensor or not     Weight, of which this process holds its own part
    any other tensor                                   Value, named after the user's argument; of a DTensor this
                                                       process's part
    number that Dynamo made symbolic                   the value it has now, guarded: another value compiles anew
    DeviceMesh, process group                          itself; the traced graph has group names in its place

An argument may be written to, as ``dist.all_reduce`` does: the program returns its new value, which the door copies.
A weight may not: engines hold it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree

from torchtrt_md.capture import tensor_parallel
from torchtrt_md.capture.arguments import Scalar
from torchtrt_md.capture.async_private import arrived
from torchtrt_md.capture.attention import WholeAttention
from torchtrt_md.capture.dynamo_private import (
    graph_break,
    group_ranks,
    is_weight,
    local_tensor,
    source_path,
)
from torchtrt_md.capture.torch_private import FakeTensorMode, root_mesh
from torchtrt_md.capture.trace import LocalWeight, as_placed, fake, recorded, without_memory
from torchtrt_md.errors import CaptureError, CollectiveError
from torchtrt_md.graph.source import set_user_name, source_line
from torchtrt_md.lowering.ops import COLLECTIVES, bound_args
from torchtrt_md.mesh import Mesh, joined
from torchtrt_md.program import Output, ShardedProgram, Value, Weight, Weights, outputs_of, placeholders
from torchtrt_md.wrappers import is_wrapper

# Parts of a source's path that say how a module keeps what it has, and not where.
_STORAGE = ("self", "fn", "_modules", "_parameters", "_buffers")


@dataclass(frozen=True)
class GraphInput:
    """An input of a Dynamo graph.

    Attributes:
        name: of a weight its name in the model, of an argument the user's: ``x``, ``args.0``, ``mask``.
        kind: what the program has for it: a weight, a value, or a constant that is built in.
        example: what Dynamo has it called with now: the user's own tensor, a number, or a mesh.
    """

    name: str
    kind: Literal["weight", "value", "constant"]
    example: Any


def graph_inputs(gm: GraphModule, example_inputs: Sequence[Any]) -> list[GraphInput]:
    """What the placeholders stand for, in order.

    Symbolic numbers and sizes are taken at the value that they have now, which Dynamo guards from here on.

    Raises:
        CaptureError: a DTensor of uneven parts, a number that is the value of a tensor, or a quantized tensor.
    """
    numbers = {node for node in gm.graph.nodes if specialized(node) is not None}
    inputs: list[GraphInput] = []
    names: set[str] = set()
    for index, (node, example) in enumerate(zip(placeholders(gm), map(arrived, example_inputs), strict=True)):
        path = source_path(node)
        if isinstance(example, Tensor) and is_wrapper(example):
            raise CaptureError(
                f"the graph of torch.compile takes {'.'.join(p for p in path if p not in _STORAGE)!r}, a"
                f" {type(example).__name__}",
                fix="use torchtrt_md.compile, which takes models with quantized weights",
            )
        number = specialized(node)
        # Dynamo passes a float that has changed as a tensor, of which the graph takes the number.
        if not isinstance(example, Tensor) or number is not None or (node.users and numbers.issuperset(node.users)):
            name, kind, example = f"arg{index}", "constant", example if number is None else number
        elif is_weight(node):
            name, kind = ".".join(part for part in path if part not in _STORAGE) or f"weight{index}", "weight"
        else:
            path = tuple(part for part in path if part not in _STORAGE) if "_parameters" in path else path
            name, kind = ".".join(path[path[:1] == ("kwargs",) :]) or f"arg{index}", "value"
            if isinstance(example, DTensor):
                # What is on Dynamo's stack was left there by the code in front of the graph.
                broken = "Dynamo ended a graph in front of this one" if name.startswith("___stack") else ""
                _check_placed(f"the input {name!r}", example, broken)
        while name in names:
            name = f"{name}_"
        names.add(name)
        inputs.append(GraphInput(name, kind, example))  # type: ignore[arg-type]
    return inputs


def _value(mode: FakeTensorMode, example: Tensor) -> Tensor:
    """An input without memory; of a DTensor the part of this rank, as it lies."""
    if isinstance(example, DTensor):
        return mode.from_tensor(local_tensor(example).detach(), static_shapes=True)
    return without_memory(mode, example)


def _check_placed(what: str, tensor: DTensor, broken: str) -> None:
    """Refuse a DTensor that goes in or out with parts that are not equal on all ranks in shape and kind.

    Args:
        broken: why Dynamo ended the graph that returns it; "" where it did not.
    """
    even = all(
        type(p) in (Replicate, Partial) or (type(p) is Shard and tensor.shape[p.dim] % _ranks(tensor, p.dim) == 0)
        for p in tensor.placements
    )
    if not even:
        raise CaptureError(
            f"{what} is a DTensor of {list(tensor.shape)}, placed as {tensor.placements}"
            + (f"; it crosses a break of the graph: {broken}" if broken else ""),
            fix="use Replicate(), Partial(), or Shard(dim) with a dim that divides by the ranks; or pass the whole:"
            " full_tensor()"
            + (
                "; or mend what broke the graph (torch.compile(fullgraph=True) shows the line), so that it stays inside"
                if broken
                else ""
            ),
        )


def _ranks(tensor: DTensor, dim: int) -> int:
    """How many parts a dim is in."""
    mesh = tensor.device_mesh
    return math.prod(mesh.size(axis) for axis, p in enumerate(tensor.placements) if p == Shard(dim))


def specialized(node: Node) -> int | float | bool | None:
    """The value of a symbolic number, which Dynamo guards from here on; None where the node is no number.

    The sizes of a tensor are specialized with it.  By PyTorch's rules a backend may do so while it compiles.

    Raises:
        CaptureError: a number that only the values of tensors say.
    """
    value = node.meta.get("example_value")
    plain: Any = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}.get(type(value))
    if plain is not None:
        try:
            number: int | float | bool = plain(value)
            return number
        except Exception as error:  # PyTorch has several for a number that is not known before the graph runs
            raise CaptureError(
                f"node {node.name!r} is a number that depends on the values of tensors",
                fix="make what is compiled depend on shapes only, or compute the number outside and pass it in",
                at=source_line(node),
            ) from error
    if node.op == "placeholder" and isinstance(value, Tensor):
        for tensor in {id(t): t for t in (value, local_tensor(value))}.values():
            for size in (*tensor.shape, *tensor.stride()):
                int(size)
    return None


def awaited_inputs(gm: GraphModule) -> list[int]:
    """The inputs that the graph itself waits for: their collectives were begun before it, and may be under way."""
    found = []
    for index, node in enumerate(placeholders(gm)):
        seen, pending = {node}, [node]
        while pending:
            for user in pending.pop().users:
                if _is_wait(user):
                    found.append(index)
                    pending.clear()
                    break
                if user not in seen and user.op in ("call_function", "call_method") and not _is_funcol(user):
                    seen.add(user)
                    pending.append(user)
    return found


def _is_funcol(node: Node) -> bool:
    return str(node.target).startswith(("_c10d_functional.", "_c10d_functional_autograd."))


def _is_wait(node: Node) -> bool:
    return _is_funcol(node) and "wait_tensor" in str(node.target)


class Specialized(Interpreter):
    """Runs a Dynamo graph, eagerly or traced, with its symbolic numbers as they are now."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.extra_traceback = False  # it would rewrite the messages of our own errors
        self.node: Node | None = None

    def run_node(self, n: Node) -> Any:
        self.node = n
        number = specialized(n)
        if number is None or n.op == "placeholder":
            result = super().run_node(n)
        return _as_expected(result, n) if number is None else number


def _as_expected(result: Any, node: Node) -> Any:
    """A DTensor placed as Dynamo has it.

    Dynamo went on with the placements that PyTorch's own attention gives, and sizes of local tensors followed from
    them.  Ours may give others.
    """
    expected = node.meta.get("example_value")
    if not isinstance(result, DTensor) or not isinstance(expected, DTensor):
        return result
    placements = expected.placements
    if node.op != "call_function" or result.placements == placements:
        return result
    if any(p.is_partial() for p in placements):
        raise CaptureError(
            f"node {node.name!r} gives a DTensor placed as {result.placements}, and in PyTorch as {placements}",
            fix="redistribute what goes into it: tensor.redistribute(placements=...)",
        )
    return result.redistribute(placements=placements)


@dataclass(frozen=True)
class PlacedOutput(Output):
    """An output that is this rank's part of a DTensor.

    Attributes:
        mesh, placements, shape, stride: of the DTensor.
        local_stride: of the part.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size
    stride: tuple[int, ...]
    local_stride: tuple[int, ...]

    def placed(self, local: Tensor) -> DTensor:
        if local.stride() != self.local_stride:
            local = local.new_empty_strided(local.shape, self.local_stride).copy_(local)
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )


@dataclass(frozen=True)
class WrittenInput(Output):
    """An output that is the new value of an input, of which the graph itself returns nothing."""

    name: str


def capture_graph(
    gm: GraphModule, example_inputs: Sequence[Any], *, mesh: Mesh | DeviceMesh | None = None
) -> ShardedProgram:
    """This rank's program of a graph that Dynamo recorded.

    All entries of ``graphs`` are this rank's graph, and ``weights`` has this rank's parts only: the program is for the
    process that captured it.  The outputs nest as the graph returns them, in one flat list; behind them are the new
    values of inputs that the graph writes to (:class:`WrittenInput`).

    Args:
        gm: the graph, as a backend of ``torch.compile`` gets it.
        example_inputs: what comes with it.
        mesh: the mesh of the launch; None takes that of the DTensors, else the one that the groups make, else one axis
            over all ranks.

    Raises:
        CaptureError: the graph does what cannot be one flat graph, or takes or returns a DTensor of uneven parts.
        CollectiveError: a collective over ranks that are not an axis of the mesh.
        MeshError: a mesh that does not fit the launch.
        PlanError: a weight that is not evenly split over the mesh.
    """
    inputs = graph_inputs(gm, example_inputs)
    launch = launch_mesh(inputs, mesh)
    rank = dist.get_rank() if dist.is_initialized() else 0
    weights = [
        LocalWeight(
            Weight(i.name, tuple(i.example.shape), i.example.dtype, _shardings(i, launch)), i.example, i.example.device
        )
        for i in inputs
        if i.kind == "weight"
    ]
    values = [Value(i.name, tuple(local_tensor(i.example).shape), i.example.dtype) for i in inputs if i.kind == "value"]
    graph, leaves = _trace(gm, inputs, weights)
    if mesh is None and next(_device_meshes(inputs), None) is None:
        launch = groups_mesh(_group_ranks(graph), launch.size, rank) or launch
    in_order: list[Weight | Value] = [*(w.weight for w in weights), *values]
    for node, source in zip(placeholders(graph), in_order, strict=True):
        set_user_name(node, source.name)
    outputs = [node.meta["val"] for node in _returned(graph)]
    prefix = "output" if not any(v.name.startswith("output") for v in values) else "graph_output"
    return ShardedProgram(
        mesh=launch,
        graphs=(graph,) * launch.size,
        sources={node.name: source for node, source in zip(placeholders(graph), in_order, strict=True)},
        outputs=tuple(Value(f"{prefix}{i}", tuple(t.shape), t.dtype) for i, t in enumerate(outputs)),
        weights=Weights(
            {},
            {w.weight.name: _local(w.tensor) for w in weights},
            rank,
            frozenset(w.weight.name for w in weights if not isinstance(w.tensor, DTensor)),
        ),
        constants={},
        strategies={},
        groups=_groups(graph, launch, rank),
        out_spec=pytree.tree_structure(list(range(len(leaves)))),
        out_leaves=leaves,
        positional=tuple(v.name for v in values),
    )


def launch_mesh(inputs: Iterable[GraphInput], mesh: Mesh | DeviceMesh | None) -> Mesh:
    """The mesh that was given, else that of the graph's DTensors, else one axis over all ranks of the launch.

    Raises:
        MeshError: it does not fit the launch, or has no names.
    """
    size = dist.get_world_size() if dist.is_initialized() else 1
    if mesh is None:
        mesh = next(_device_meshes(inputs), None) or Mesh(world=size)
    if isinstance(mesh, DeviceMesh):
        mesh = Mesh.from_device_mesh(root_mesh(mesh))
    mesh.check_launch(size)
    return mesh


def _device_meshes(inputs: Iterable[GraphInput]) -> Iterator[DeviceMesh]:
    for i in inputs:
        if isinstance(i.example, DTensor):
            yield i.example.device_mesh
        elif isinstance(i.example, DeviceMesh):
            yield i.example


def _shardings(weight: GraphInput, mesh: Mesh) -> Any:
    return tensor_parallel.shardings(weight.name, weight.example, mesh) if isinstance(weight.example, DTensor) else ()


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _trace(
    gm: GraphModule, inputs: Sequence[GraphInput], weights: Sequence[LocalWeight]
) -> tuple[GraphModule, tuple[object, ...]]:
    """The flat graph, weights first, and the leaves of what it returns."""
    if next(gm.parameters(), None) is not None:
        raise CaptureError(
            "Dynamo kept parameters inside its graph",
            fix="leave torch._dynamo.config.inline_inbuilt_nn_modules as it is: True",
        )
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    named = {w.weight.name: w for w in weights}
    tensors = [i for i in inputs if i.kind != "constant"]
    tensors.sort(key=lambda i: i.kind == "value")  # stable: weights, then values
    flat = [fake(mode, named[i.name]) if i.kind == "weight" else _value(mode, i.example) for i in tensors]
    run = Specialized(gm)
    broken = graph_break(gm) or ""
    # Before it is traced: DTensor's mask of a split vocabulary, in a sum that is not reduced yet, outlives no graph.
    _check_leaves((node.meta.get("example_value") for node in outputs_of(gm)), broken)
    leaves: list[object] = []

    def call(*given: Tensor) -> tuple[Tensor, ...]:
        by_name = {i.name: t for i, t in zip(tensors, given, strict=True)}
        args = [i.example if i.kind == "constant" else as_placed(i.example, by_name[i.name]) for i in inputs]
        with WholeAttention(), torch.no_grad(), preserve_node_meta():
            result = run.run(*args)
        _check_plain(result)
        found = [leaf for leaf in result if isinstance(leaf, Tensor)]
        indices = iter(range(len(found)))
        leaves.extend(_output(leaf, next(indices)) if isinstance(leaf, Tensor) else leaf for leaf in result)
        return tuple(map(local_tensor, found))

    graph = recorded(
        call,
        flat,
        "the graph",
        lambda _: source_line(run.node) if run.node is not None else "",
        names=[i.name for i in tensors],
        writable=[i.name for i in tensors if i.kind == "value"],
    )
    written = graph.meta["written"]
    first = len(_returned(graph)) - len(written)
    return graph, (*leaves, *(WrittenInput(first + i, name) for i, name in enumerate(written)))


def _output(leaf: Tensor, index: int) -> Output:
    if not isinstance(leaf, DTensor):
        return Output(index)
    strides = leaf.stride(), local_tensor(leaf).stride()
    return PlacedOutput(index, leaf.device_mesh, leaf.placements, leaf.shape, *strides)


def _check_leaves(leaves: Iterable[object], broken: str) -> None:
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, DTensor):
            _check_placed(f"output {index} of the graph", leaf, broken)


def _check_plain(leaves: Iterable[object]) -> None:
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, (Tensor, *Scalar)):
            raise CaptureError(
                f"output {index} of the graph is a {type(leaf).__name__}, neither a tensor nor a plain value",
                fix="return tensors from what is compiled, and keep the rest outside",
            )


def _returned(graph: GraphModule) -> Sequence[Node]:
    (output,) = graph.graph.find_nodes(op="output")
    returned = output.args[0]
    assert isinstance(returned, (tuple, list))
    return [node for node in returned if isinstance(node, Node)]


def groups_mesh(groups: Iterable[tuple[int, ...]], size: int, rank: int) -> Mesh | None:
    """The mesh of a launch of which each group is an axis; None where there is none, or no group that needs one.

        groups of rank 2 of 4     mesh
        (2, 3)                    dim0=2, dim1=2
        (0, 2)                    dim0=2, dim1=2
        (0, 1, 2, 3)              none is needed

    Each rank finds it from its own groups, so the ranks must compare what they found.
    """
    found = set(groups) - {tuple(range(size))}
    if not found:
        return None
    if any(len(ranks) == 1 for ranks in found):
        return None
    cuts = {1, size}  # the distances of neighbours along the axes
    for ranks in found:
        stride = ranks[1] - ranks[0]
        cuts |= {stride, stride * len(ranks)}
    ordered = sorted(cuts)
    if ordered[0] < 1 or any(far % near for near, far in itertools.pairwise(ordered)):
        return None
    sizes = [far // near for near, far in itertools.pairwise(ordered)][::-1]
    mesh = Mesh({f"dim{i}": n for i, n in enumerate(sizes)})
    axes = {mesh.ranks(axis, rank) for axis in mesh.names}
    return mesh if mesh.size == size and found <= axes else None


def _group_ranks(graph: GraphModule) -> list[tuple[int, ...]]:
    names = dict.fromkeys(filter(None, map(_group_name, graph.graph.nodes)))
    return [tuple(group_ranks(name)) for name in names]


def _groups(graph: GraphModule, mesh: Mesh, rank: int) -> dict[str, str]:
    """Group name -> the axis of the mesh that has the same ranks in the same order, or the axes, joined."""
    some = [axes for count in range(1, len(mesh.names) + 1) for axes in itertools.combinations(mesh.names, count)]
    axes = {mesh.ranks(joined(axes), rank): joined(axes) for axes in reversed(some)}
    groups: dict[str, str] = {}
    for node in graph.graph.nodes:
        name = _group_name(node)
        if name is None or name in groups:
            continue
        ranks = tuple(group_ranks(name))
        if ranks not in axes:
            raise CollectiveError(
                f"{node.target} in node {node.name!r} is over the ranks {list(ranks)}, which are not an axis of {mesh}:"
                f" from rank {rank} these are "
                + ", ".join(f"{axis} {list(mesh.ranks(axis, rank))}" for axis in mesh.names),
                fix="communicate over groups of a DeviceMesh (device_mesh.get_group(axis)), and pass it as the option"
                " 'mesh'; every rank must be in one of the groups",
                at=source_line(node),
            )
        groups[name] = axes[ranks]
    return groups


def _group_name(node: Node) -> str | None:
    if not isinstance(node.target, torch._ops.OpOverload) or node.target in COLLECTIVES:
        return None
    if not any(argument.name == "group_name" for argument in node.target._schema.arguments):
        return None
    group: Any = bound_args(node)["group_name"]
    return str(getattr(group, "group_name", group))
