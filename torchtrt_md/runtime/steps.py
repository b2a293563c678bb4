"""A rank's program as steps: what is enqueued one after the other, and what each reads and writes.

Engines and Inductor kernels are a step each.  A part that runs in PyTorch is taken apart into its ops, so that each of
its collectives can run on a stream of its own.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from torchtrt_md.graph.functional import RESHAPES
from torchtrt_md.lowering.attention_math import ring_attention_block
from torchtrt_md.lowering.ops import bound_args, is_collective, packing_of
from torchtrt_md.program import outputs_of, placeholders
from torchtrt_md.runtime import collective
from torchtrt_md.runtime.engine import Engine
from torchtrt_md.runtime.push import Push, push_of
from torchtrt_md.runtime.rows import check_device
from torchtrt_md.runtime.tensors import ALIGNMENT
from torchtrt_md.segment import Binding, Segment, Wire

aten, md = torch.ops.aten, torch.ops.torchtrt_md
# What a value is called among the steps of a rank: a wire, ("local", ...) within a segment, ("transposed", ...) of a
# weight.  Who orders the steps and runs them does not look inside.
Key: TypeAlias = Hashable
_Name: TypeAlias = tuple[str, str]
Values: TypeAlias = dict[Key, Any]


@dataclass(frozen=True)
class Slot:
    """A tensor that the executor makes for a step to write: its name, shape and dtype."""

    name: Key
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """What it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class Step:
    """One thing that is enqueued.

    Attributes:
        name: for messages.
        reads: the values that it reads.
        writes: the values that it makes itself, or looks at.
        slots: the values that it writes into memory that the executor gives it.
        run: enqueue it on the current stream: reads ``values`` and its slots there, and adds ``writes`` to it.
        communicates: it is a collective, and may run on a stream of its own.
        looks: it only looks at what it reads: nothing is enqueued.
        aliases: its result may be the memory of what it reads.
        in_place: the slot may be the memory of the only value that it reads, which is contiguous.
        push: of a collective: how the ranks can do it by writing into each other's memory.
        axis: of a collective.
        engine: what it is, where it is one.
    """

    name: str
    reads: tuple[Key, ...]
    run: Callable[[Values], None]
    writes: tuple[Key, ...] = ()
    slots: tuple[Slot, ...] = ()
    communicates: bool = False
    looks: bool = False
    aliases: bool = False
    in_place: bool = False
    push: Push | None = None
    axis: str = ""
    engine: Engine | None = None

    @cached_property
    def landing(self) -> Slot | None:
        """Where what other ranks write arrives, of a collective that can be done so: its result, or beside it."""
        if self.push is None or not self.push.beside:
            return self.slots[0] if self.push else None
        (result,) = self.slots
        if self.push.packed:
            return Slot(("landed", result.name), self.push.packed, torch.uint8)
        return Slot(("landed", result.name), (self.push.sums, *result.shape), result.dtype)


def engine_step(segment: Segment, engine: Engine) -> Step:
    """An engine: it reads and writes tensors of PyTorch in place."""
    keys: dict[Wire, Key] = {b.source: source_key(b) for b in segment.inputs}
    keys |= {b.source: b.source for b in segment.outputs}
    bound: tuple[int, ...] = ()

    def run(values: Values) -> None:
        nonlocal bound
        tensors = {source: _aligned(values[key]) for source, key in keys.items()}
        addresses = tuple(tensor.data_ptr() for tensor in tensors.values())
        if addresses != bound:  # most lie where they always do
            engine.bind(tensors)
            bound = addresses
        engine.launch(torch.cuda.current_stream().cuda_stream)

    return Step(
        name=engine.name,
        reads=tuple(source_key(b) for b in segment.inputs),
        slots=tuple(Slot(b.source, b.shape, b.dtype) for b in segment.outputs),
        run=run,
        engine=engine,
    )


def _aligned(tensor: Tensor) -> Tensor:
    """What an engine can read: contiguous, and not, as a part of an input may, beginning where TensorRT cannot load."""
    return tensor if tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0 else _owned(tensor)


def source_key(binding: Binding) -> _Name:
    """The value that a binding reads.  A weight that is taken transposed is another tensor than the weight."""
    return ("transposed", binding.source.name) if binding.transposed else binding.source


def call_step(segment: Segment, function: Callable[..., Sequence[Tensor]]) -> Step:
    """A compiled function: it makes its results itself."""
    reads, writes = tuple(b.source for b in segment.inputs), tuple(b.source for b in segment.outputs)

    def run(values: Values) -> None:
        operands = [values[r] for r in reads]
        results = function(*operands)
        held = {x.untyped_storage().data_ptr() for x in operands}
        # Inductor may lay out a result as it likes, or return an operand or one result as two; what passes between
        # steps is contiguous, and memory of its own: that of operands is used again, and sums are written over theirs.
        for name, result in zip(writes, results, strict=True):
            own = _owned(result) if result.untyped_storage().data_ptr() in held else result.contiguous()
            held.add(own.untyped_storage().data_ptr())
            values[name] = own

    return Step(name=segment.name, reads=reads, writes=writes, run=run)


def _owned(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def eager_steps(
    segment: Segment,
    graph: GraphModule,
    *,
    groups: Mapping[str, dist.ProcessGroup],
    coordinates: Mapping[str, int],
    device: torch.device,
    index: int = 0,
) -> list[Step]:
    """The ops of a part that runs in PyTorch, in order.

    Args:
        groups: axis -> this rank's group along it.
        coordinates: where this rank stands along each axis; ops that need to know are told on the host.
        device: this rank's.
        index: of the segment; values that no other segment reads are named after it.
    """
    to_device(graph, device)
    names: dict[Node, _Name] = {}
    for node, binding in zip(placeholders(graph), segment.inputs, strict=True):
        names[node] = binding.source
    returned = outputs_of(graph)
    for node, binding in zip(returned, segment.outputs, strict=True):
        names.setdefault(node, binding.source)
    for node in graph.graph.nodes:
        names.setdefault(node, ("local", f"{index}/{node.name}"))
    steps = [
        _step(node, names, graph, groups, coordinates, device)
        for node in graph.graph.nodes
        if node.op in ("call_function", "get_attr")
    ]
    for node, binding in zip(returned, segment.outputs, strict=True):
        if names[node] != binding.source:  # returned twice, or as it came
            steps.append(_copy(names[node], binding.source))
    return steps


def _step(
    node: Node,
    names: Mapping[Node, _Name],
    graph: GraphModule,
    groups: Mapping[str, dist.ProcessGroup],
    coordinates: Mapping[str, int],
    device: torch.device,
) -> Step:
    reads = tuple(names[x] for x in node.all_input_nodes)
    name = names[node]
    if node.op == "get_attr":
        constant = getattr(graph, str(node.target))
        return Step(name[1], (), lambda values: values.update({name: constant}), (name,), looks=True, aliases=True)
    if is_collective(node):
        if packing_of(node) is not None:
            check_device(device)
        slot = Slot(name, tuple(node.meta["val"].shape), node.meta["val"].dtype)
        go = collective.runner_of(node, groups)

        def communicate(values: Values) -> None:
            go(values[name], values[reads[0]].contiguous())

        return Step(
            name[1],
            reads,
            communicate,
            slots=(slot,),
            communicates=True,
            in_place=collective.is_in_place(node) and _is_in_one_piece(node.all_input_nodes[0]),
            push=push_of(node, coordinates[bound_args(node)["axis"]]),
            axis=bound_args(node)["axis"],
        )
    if node.target is aten.index_select.default and names[node.args[2]][0] == "coordinate":  # type: ignore[index]
        return _row_step(node, names, coordinates)
    if node.target is md.ring_attention.default:
        return _ring_step(node, names, reads, coordinates)
    target: Any = node.target
    function: Any = _attention if target is md.attention.default else target

    def call(values: Values) -> None:
        args, kwargs = map_arg((node.args, node.kwargs), lambda x: values[names[x]])
        values[name] = function(*args, **kwargs)

    may_copy = node.target in (aten.reshape.default, aten.contiguous.default)
    # by the op's schema: a view that passes between parts is no view to the cut, and looks at its operand all the same
    views = node.target is operator.getitem or any(r.alias_info is not None for r in target._schema.returns)
    looks = views and not may_copy
    return Step(name[1], reads, call, (name,), looks=looks, aliases=views)


def _is_in_one_piece(node: Node) -> bool:
    """Is this surely contiguous: what another part passes, or that in another shape?"""
    while node.target in RESHAPES:
        node = node.all_input_nodes[0]
    return node.op == "placeholder"


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, enable_gqa: bool
) -> Tensor:
    """PyTorch's kernel, on tensors as they lie; the IR's own op would make its result contiguous."""
    return F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)


def _ring_step(
    node: Node, names: Mapping[Node, _Name], reads: tuple[_Name, ...], coordinates: Mapping[str, int]
) -> Step:
    args = bound_args(node)
    q, k, v, coordinate, mask = (args.pop(x) for x in ("q", "k", "v", "coordinate", "mask"))
    name = names[node]
    # On the host the rank is known, so nothing waits for the GPU to tell it.
    mine = 0 if coordinate is None else coordinates[names[coordinate][1]]

    def call(values: Values) -> None:
        hidden = None if mask is None else values[names[mask]]
        operands = (values[names[q]], values[names[k]], values[names[v]])
        values[name] = ring_attention_block(*operands, mine, mask=hidden, **args)

    return Step(name[1], tuple(r for r in reads if r[0] != "coordinate"), call, (name,))


def _row_step(node: Node, names: Mapping[Node, _Name], coordinates: Mapping[str, int]) -> Step:
    """This rank's part of an input, by ``index_select`` in the graph: the host knows the rank, so it is a view."""
    x, dim, coordinate = node.args
    name, source = names[node], names[x]  # type: ignore[index]
    mine = coordinates[names[coordinate][1]]  # type: ignore[index]

    # Behind other entries than one it is not in one piece, and what passes between steps is.
    whole = all(extent == 1 for extent in node.meta["val"].shape[:dim])

    def look(values: Values) -> None:
        values[name] = values[source].narrow(dim, mine, 1).contiguous()

    return Step(name[1], (source,), look, (name,), looks=whole, aliases=whole)


def _copy(source: _Name, target: _Name) -> Step:
    return Step(target[1], (source,), lambda values: values.update({target: values[source].clone()}), (target,))


def to_device(graph: GraphModule, device: torch.device) -> None:
    """Let a graph that was captured elsewhere make its own tensors on this device, and hold its constants there."""
    for node in graph.graph.nodes:
        if node.op == "call_function" and "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": device}
    for name, constant in list(graph.named_buffers()):
        setattr(graph, name, constant.to(device))
    for node in graph.graph.find_nodes(op="get_attr"):
        held = getattr(graph, str(node.target))
        if isinstance(held, Tensor) and held.device != device:
            setattr(graph, str(node.target), held.detach().to(device))
    graph.recompile()
