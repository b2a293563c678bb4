"""Graphs as JSON: what Inductor compiles or PyTorch runs op by op when a bundle is loaded.

    graph_to_json     GraphModule -> bytes; equal graphs give equal bytes
    graph_from_json   bytes -> GraphModule that computes the same bits

A graph is a list of nodes as in torch.fx: ``placeholder``, ``get_attr``, ``call_function``, ``output``.  What it calls
is named ``namespace.name.overload``, as PyTorch prints it, so any version of PyTorch that has the op can read it.
None, booleans, integers, finite floats (always with a point or an exponent) and strings are what they are in JSON;
everything else is an object whose ``kind`` says what:

    {"kind": "node", "name": "add_1"}           the value of another node
    {"kind": "list", "items": [...]}            a list; "tuple" likewise
    {"kind": "float", "name": "inf"}            a float that JSON lacks: inf, -inf, nan
    {"kind": "torch", "name": "bfloat16"}       torch.bfloat16; layouts and memory formats likewise
    {"kind": "device", "name": "cuda:0"}        a device

Nothing is unpickled, and no text of the file becomes code: torch.fx makes Python of names, so they are checked to be
plain ones.
"""

from __future__ import annotations

import keyword
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import msgspec
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

import torchtrt_md.lowering.ops  # noqa: F401  registers torch.ops.torchtrt_md
from torchtrt_md.errors import BundleError
from torchtrt_md.graph.source import source_line
from torchtrt_md.program import dtype_name, outputs_of, placeholders
from torchtrt_md.segment import Segment

GRAPH_SCHEMA = 1
NAMESPACES = ("aten", "prims", "torchtrt_md")
MAX_CONSTANT_BYTES = 1 << 20

_GETITEM = "operator.getitem"
_INTEGERS = range(-(1 << 63), 1 << 64)  # what PyTorch's ops take, signed or not
_REBUILD = "export the bundle again; do not edit its graphs by hand"


class _Tagged(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind"):
    pass


class NodeName(_Tagged, frozen=True, tag="node"):
    name: str


class ListOf(_Tagged, frozen=True, tag="list"):
    items: list[Argument]


class TupleOf(_Tagged, frozen=True, tag="tuple"):
    items: list[Argument]


class SpecialFloat(_Tagged, frozen=True, tag="float"):
    name: Literal["inf", "-inf", "nan"]


class TorchName(_Tagged, frozen=True, tag="torch"):
    name: str


class DeviceName(_Tagged, frozen=True, tag="device"):
    name: str


Argument: TypeAlias = (
    bool | int | float | str | NodeName | ListOf | TupleOf | SpecialFloat | TorchName | DeviceName | None
)


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is known of a node's tensor before it is computed.  ``dtype`` is PyTorch's name ("bfloat16")."""

    dtype: str
    shape: list[int]
    strides: list[int]


Spec: TypeAlias = TensorSpec | list[TensorSpec | None] | None


class NodeEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One node.  ``source_line`` is the user's own line that it comes from, "" where that is not known."""

    op: Literal["placeholder", "get_attr", "call_function", "output"]
    name: str
    target: str
    args: list[Argument] = []
    kwargs: dict[str, Argument] = {}
    value: Spec = None
    source_line: str = ""


class Constant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A small tensor that the graph holds: its elements' bytes in row-major order, little-endian, as base64."""

    dtype: str
    shape: list[int]
    data: bytes


class GraphFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file.  ``constants`` are the tensors that ``get_attr`` nodes name."""

    schema: int
    nodes: list[NodeEntry]
    constants: dict[str, Constant]


class _Schema(msgspec.Struct):
    """The one field that every schema has, so that a newer graph is refused by its number."""

    schema: int


def graph_to_json(graph: GraphModule) -> bytes:
    """The graph as JSON; equal graphs give equal bytes.

    Args:
        graph: calls of ops of aten, prims and the collective IR, and of ``operator.getitem``, with static shapes.
            Tensors that it holds are written into the file; weights are better placeholders.

    Raises:
        BundleError: an op of another namespace, an argument or value of a kind that has no place in the file, or
            constants of more than 1 MiB in all.
    """
    nodes = [_entry(node) for node in graph.graph.nodes]
    held: dict[str, Tensor] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            held[str(node.target)] = _held(graph, node)
    _check_size(held)
    constants = {target: _constant(tensor) for target, tensor in held.items()}
    return msgspec.json.encode(GraphFile(GRAPH_SCHEMA, nodes, constants))


def graph_from_json(data: bytes, what: str = "the graph") -> GraphModule:
    """The graph of :func:`graph_to_json`.

    Nodes have their names, order and arguments of before.  Their ``meta`` has

        spec         :class:`TensorSpec`, a tuple of them (None where an op gives none), or None where nothing is known
        val          the same as tensors without memory, on device ``meta``
        source_line  the user's line, or ""

    Constants are contiguous buffers of the module, on the CPU.

    Args:
        what: names the graph in messages.

    Raises:
        BundleError: not a graph, of another schema, or one that this PyTorch cannot run.
    """
    parsed = _parse(data, what)
    try:
        constants = {target: _tensor(constant) for target, constant in parsed.constants.items()}
        graph, nodes = Graph(), dict[str, Node]()
        for entry in parsed.nodes:
            if entry.name in nodes:
                raise BundleError(f"two nodes are named {entry.name!r}", fix=_REBUILD)
            nodes[entry.name] = _add(graph, entry, nodes, constants)
        if [at for at, entry in enumerate(parsed.nodes) if entry.op == "output"] != [len(parsed.nodes) - 1]:
            raise BundleError("its last node, and no other, must be the output", fix=_REBUILD)
        return GraphModule(constants, graph)
    except BundleError as error:
        raise BundleError(f"{what} cannot be read: {error.problem}", fix=error.fix, at=error.at) from error
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:  # what torch.fx makes of nonsense
        raise BundleError(f"{what} cannot be read: {error}", fix=_REBUILD) from error


def check_bindings(graph: GraphModule, segment: Segment, what: str = "the graph") -> None:
    """Refuse a graph that does not take and return what the segment's bindings say, in their order.

    Raises:
        BundleError: naming the binding and both values that disagree.
    """
    for kind, nodes, bindings in (
        ("takes", placeholders(graph), segment.inputs),
        ("returns", list(outputs_of(graph)), segment.outputs),
    ):
        if len(nodes) != len(bindings):
            raise BundleError(
                f"{what} {kind} {len(nodes)} tensors, and its segment has {len(bindings)}:"
                f" {[b.name for b in bindings]}",
                fix=_REBUILD,
            )
        for node, binding in zip(nodes, bindings, strict=True):
            value = node.meta.get("val")
            if not isinstance(value, Tensor):
                raise BundleError(f"{what} {kind} {node.name!r}, whose shape it does not say", fix=_REBUILD)
            if (value.dtype, tuple(value.shape)) != (binding.dtype, binding.shape):
                raise BundleError(
                    f"{what} {kind} {node.name!r} as {dtype_name(value.dtype)} {list(value.shape)}, and its segment"
                    f" binds {binding.name!r} ({binding.source}) as {dtype_name(binding.dtype)} {list(binding.shape)}",
                    fix=_REBUILD,
                )


# Writing


def _entry(node: Node) -> NodeEntry:
    at: str = node.meta.get("source_line") or source_line(node)
    try:
        return NodeEntry(
            op=_op(node),
            name=node.name,
            target=_target_name(node),
            args=[_argument(value) for value in node.args],
            kwargs={name: _argument(value) for name, value in node.kwargs.items()},
            value=_spec(node.meta.get("val")),
            source_line=at,
        )
    except BundleError as error:
        raise BundleError(f"node {node.name!r}: {error.problem}", fix=error.fix, at=at) from error


def _op(node: Node) -> Literal["placeholder", "get_attr", "call_function", "output"]:
    if node.op == "placeholder" and node.args:
        raise BundleError("a placeholder with a default", fix="trace the graph with tensors for all inputs")
    match node.op:
        case "placeholder" | "get_attr" | "call_function" | "output" as op:
            return op
    raise BundleError(f"a {node.op} node has no place in a bundle", fix="trace the graph with make_fx")


def _target_name(node: Node) -> str:
    target = node.target
    if node.op != "call_function":
        return str(target)
    if target is operator.getitem:
        return _GETITEM
    name = str(target)
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in NAMESPACES:
        raise BundleError(
            f"calls {name}, which is no op of {', '.join(NAMESPACES)}", fix="lower the program before it is bundled"
        )
    if _function(name) is not target:
        raise BundleError(f"calls {name}, which torch.ops does not have under that name", fix="use an op of torch.ops")
    return name


def _argument(value: Any) -> Argument:
    match value:
        case None | bool():
            return value
        case Node():
            return NodeName(value.name)
        case str():
            return str(value)
        case int():
            return _integer(value)
        case float():
            return float(value) if math.isfinite(value) else _special(value)
        case list():
            return ListOf([_argument(item) for item in value])
        case tuple():
            return TupleOf([_argument(item) for item in value])
        case torch.dtype() | torch.layout() | torch.memory_format():
            return TorchName(str(value).removeprefix("torch."))
        case torch.device():
            return DeviceName(str(value))
    raise BundleError(
        f"has the argument {value!r}, a {type(value).__name__}, which has no place in a bundle",
        fix="use tensors, numbers, strings, lists, tuples, dtypes, layouts, memory formats and devices",
    )


def _integer(value: int) -> int:
    if value not in _INTEGERS:
        raise BundleError(f"has the argument {value}, which is beyond 64 bits", fix="use a 64-bit integer")
    return int(value)


def _special(value: float) -> SpecialFloat:
    return SpecialFloat("nan" if math.isnan(value) else "inf" if value > 0 else "-inf")


def _spec(value: Any) -> Spec:
    if isinstance(value, (tuple, list)):
        return [None if part is None else _tensor_spec(part) for part in value]
    return None if value is None else _tensor_spec(value)


def _tensor_spec(value: Any) -> TensorSpec:
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        raise BundleError(
            f"its value is a {type(value).__name__}, and a graph in a bundle has dense tensors", fix="leave that op out"
        )
    shape, strides = list(value.shape), list(value.stride())
    if not all(type(extent) is int for extent in (*shape, *strides)):
        raise BundleError(f"its shape {shape} is not static", fix="trace the graph with static shapes")
    return TensorSpec(dtype_name(value.dtype), shape, strides)


def _held(graph: GraphModule, node: Node) -> Tensor:
    value: object = graph
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
        raise BundleError(
            f"node {node.name!r} reads {node.target!r} of the graph, which is no tensor with values but a"
            f" {type(value).__name__}",
            fix="pass it as an input",
            at=source_line(node),
        )
    return value.detach()


def _check_size(held: Mapping[str, Tensor]) -> None:
    total = sum(tensor.nbytes for tensor in held.values())
    if total > MAX_CONSTANT_BYTES:
        largest = max(held, key=lambda target: held[target].nbytes)
        raise BundleError(
            f"the graph holds constants of {total} bytes, the largest of them {largest!r}"
            f" {list(held[largest].shape)} with {held[largest].nbytes}, and at most {MAX_CONSTANT_BYTES} are written"
            " into a graph",
            fix="pass them as weights: make them buffers of the model",
        )


def _constant(tensor: Tensor) -> Constant:
    flat = tensor.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return Constant(dtype_name(tensor.dtype), list(tensor.shape), flat.view(torch.uint8).numpy().tobytes())


# Reading


def _parse(data: bytes, what: str) -> GraphFile:
    try:
        schema = msgspec.json.decode(data, type=_Schema).schema
        if schema != GRAPH_SCHEMA:
            raise BundleError(
                f"{what} has schema {schema} and this version of torchtrt_md reads graphs of schema {GRAPH_SCHEMA}",
                fix="install the version of torchtrt_md that wrote the bundle, or export it again",
            )
        return msgspec.json.decode(data, type=GraphFile)
    except (msgspec.DecodeError, RecursionError) as error:  # ValidationError is one of the first
        raise BundleError(f"{what} is not a graph: {error}", fix=_REBUILD) from error


def _add(graph: Graph, entry: NodeEntry, nodes: Mapping[str, Node], constants: Mapping[str, Tensor]) -> Node:
    _check_name(entry.name, "node")
    for name in entry.kwargs:
        _check_name(name, "argument")
    target = _target(entry, constants)
    try:
        node = graph.create_node(
            entry.op,
            target,
            tuple(_value(argument, nodes) for argument in entry.args),
            {name: _value(argument, nodes) for name, argument in entry.kwargs.items()},
            name=entry.name,
        )
        if node.name != entry.name:  # torch.fx renames what Python or it itself has another meaning for
            raise BundleError("its name is not one that a node can have", fix=_REBUILD)
        node.meta["spec"] = tuple(entry.value) if isinstance(entry.value, list) else entry.value
        if entry.value is not None:
            node.meta["val"] = _meta_value(entry.value)
    except BundleError as error:
        raise BundleError(f"node {entry.name!r}: {error.problem}", fix=error.fix, at=entry.source_line) from error
    node.meta["source_line"] = entry.source_line
    return node


def _target(entry: NodeEntry, constants: Mapping[str, Tensor]) -> str | Callable[..., Any]:
    if entry.op == "call_function":
        function = operator.getitem if entry.target == _GETITEM else _function(entry.target)
        if function is None:
            raise BundleError(
                f"node {entry.name!r} calls {entry.target}, which PyTorch {torch.__version__} lacks or which is no op"
                f" of {', '.join(NAMESPACES)}",
                fix="install the PyTorch that wrote the bundle (versions.torch in its manifest.json)",
                at=entry.source_line,
            )
        return function
    if entry.op == "get_attr":
        if entry.target not in constants:
            raise BundleError(
                f"node {entry.name!r} reads the constant {entry.target!r}, which is missing", fix=_REBUILD
            )
        for part in entry.target.split("."):
            _check_name(part, "constant")
    else:
        _check_name(entry.target, entry.op)
    return entry.target


def _function(name: str) -> torch._ops.OpOverload[Any, Any] | None:
    """The op ``namespace.name.overload``, or None where there is none."""
    namespace, *rest = name.split(".")
    if namespace not in NAMESPACES or len(rest) != 2:
        return None
    found: object = getattr(torch.ops, namespace)
    for part in rest:
        found = getattr(found, part, None)
    return found if isinstance(found, torch._ops.OpOverload) else None


def _check_name(name: str, what: str) -> None:
    """Names become Python when torch.fx compiles a graph."""
    if not (name.isascii() and name.isidentifier()) or keyword.iskeyword(name):
        raise BundleError(f"the name {name!r} of a {what} is not a plain one", fix=_REBUILD)


def _value(argument: Argument, nodes: Mapping[str, Node]) -> Any:
    match argument:
        case NodeName(name):
            if name not in nodes:
                raise BundleError(f"reads {name!r}, which no node before it makes", fix=_REBUILD)
            return nodes[name]
        case ListOf(items):
            return [_value(item, nodes) for item in items]
        case TupleOf(items):
            return tuple(_value(item, nodes) for item in items)
        case SpecialFloat(name):
            return float(name)
        case TorchName(name):
            return _torch_value(name, (torch.dtype, torch.layout, torch.memory_format))
        case DeviceName(name):
            try:
                return torch.device(name)
            except RuntimeError as error:
                raise BundleError(f"has the device {name!r}, which PyTorch does not know", fix=_REBUILD) from error
    return argument


def _torch_value(name: str, kinds: tuple[type, ...]) -> Any:
    value = getattr(torch, name, None)
    if not isinstance(value, kinds):
        raise BundleError(
            f"has torch.{name}, which PyTorch {torch.__version__} lacks or which is no {kinds[0].__name__}",
            fix="install the PyTorch that wrote the bundle (versions.torch in its manifest.json)",
        )
    return value


def _meta_value(spec: TensorSpec | Sequence[TensorSpec | None]) -> Any:
    if not isinstance(spec, TensorSpec):
        return tuple(None if part is None else _meta_value(part) for part in spec)
    if len(spec.shape) != len(spec.strides) or min((*spec.shape, *spec.strides), default=0) < 0:
        raise BundleError(f"has shape {spec.shape} and strides {spec.strides}", fix=_REBUILD)
    return torch.empty_strided(spec.shape, spec.strides, dtype=_torch_value(spec.dtype, (torch.dtype,)), device="meta")


def _tensor(constant: Constant) -> Tensor:
    dtype = _torch_value(constant.dtype, (torch.dtype,))
    if min(constant.shape, default=0) < 0 or len(constant.data) != math.prod(constant.shape) * dtype.itemsize:
        raise BundleError(
            f"a constant of {constant.dtype} {constant.shape} has {len(constant.data)} bytes", fix=_REBUILD
        )
    flat = torch.empty(len(constant.data), dtype=torch.uint8)  # aligned for every dtype
    if constant.data:
        flat.copy_(torch.frombuffer(bytearray(constant.data), dtype=torch.uint8))
    return flat.view(dtype).reshape(constant.shape)
