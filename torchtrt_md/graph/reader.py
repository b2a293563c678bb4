"""From the JSON of a graph to a graph.

Nothing is unpickled, and no text of the file becomes code: torch.fx makes Python of names, so they are checked to be
plain ones.  Nothing in the file is believed: not that its ops do no harm, nor the sizes that it says they have.
"""

from __future__ import annotations

import keyword
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from torchtrt_md.bundle.limits import MAX_GRAPH_BYTES, check_shape
from torchtrt_md.bundle.read import NO_JSON
from torchtrt_md.errors import BundleError
from torchtrt_md.graph.allowed import NAMESPACES, check_call, check_op, find_op
from torchtrt_md.graph.schema import (
    GETITEM,
    GRAPH_SCHEMA,
    INTEGERS,
    MAX_CONSTANT_BYTES,
    REBUILD,
    Argument,
    Constant,
    DeviceName,
    GraphFile,
    ListOf,
    NodeEntry,
    NodeName,
    SpecialFloat,
    TensorSpec,
    TorchName,
    TupleOf,
)
from torchtrt_md.graph.values import value_of_call

_MAX_NESTING = 8  # of lists in arguments


class _Schema(msgspec.Struct):
    """The one field that every schema has, so that a newer graph is refused by its number."""

    schema: int


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
        BundleError: not a graph, of another schema, one that calls what lowering cannot have written, that says of
            its values what is not so or what no machine holds, or that this PyTorch cannot run.
    """
    parsed = _parse(data, what)
    try:
        return _Reader(parsed).module()
    except BundleError as error:
        raise BundleError(f"{what} cannot be read: {error.problem}", fix=error.fix, at=error.at) from error
    except Exception as error:  # as above, of the graph as a whole
        raise BundleError(f"{what} cannot be read: {type(error).__name__}: {error}", fix=REBUILD) from error


def _parse(data: bytes, what: str) -> GraphFile:
    if len(data) > MAX_GRAPH_BYTES:
        raise BundleError(f"{what} has {len(data)} bytes, and a graph has at most {MAX_GRAPH_BYTES}", fix=REBUILD)
    try:
        schema = msgspec.json.decode(data, type=_Schema).schema
        if schema != GRAPH_SCHEMA:
            raise BundleError(
                f"{what} has schema {schema} and this version of torchtrt_md reads graphs of schema {GRAPH_SCHEMA}",
                fix="install the version of torchtrt_md that wrote the bundle, or export it again",
            )
        return msgspec.json.decode(data, type=GraphFile)
    except NO_JSON as error:
        raise BundleError(f"{what} is not a graph: {error}", fix=REBUILD) from error


class _Reader:
    """From the entries of a file to a graph, node by node."""

    def __init__(self, file: GraphFile) -> None:
        self.file = file
        self.constants = _tensors(file.constants)
        self.graph = Graph()
        self.nodes: dict[str, Node] = {}
        self.values: dict[Node, Any] = {}  # on device meta

    def module(self) -> GraphModule:
        if [at for at, entry in enumerate(self.file.nodes) if entry.op == "output"] != [len(self.file.nodes) - 1]:
            raise BundleError("its last node, and no other, must be the output", fix=REBUILD)
        for entry in self.file.nodes:
            try:
                self._add(entry)
            except BundleError as error:
                raise BundleError(
                    f"node {entry.name!r}: {error.problem}", fix=error.fix, at=entry.source_line
                ) from error
            except Exception as error:  # torch.fx and the ops' rules raise anything for nonsense
                first = next(iter(str(error).splitlines()), "")
                raise BundleError(
                    f"node {entry.name!r} ({entry.target}): {type(error).__name__}: {first}",
                    fix=REBUILD,
                    at=entry.source_line,
                ) from error
        taken = [str(node.target) for node in self.graph.find_nodes(op="placeholder")]
        if len(set(taken)) < len(taken) or "self" in taken:
            raise BundleError("two of its inputs have one name, or one is named 'self'", fix=REBUILD)
        return GraphModule(self.constants, self.graph)

    def _add(self, entry: NodeEntry) -> None:
        if entry.name in self.nodes:
            raise BundleError(f"two nodes are named {entry.name!r}", fix=REBUILD)
        _check_name(entry.name, "node")
        for name in entry.kwargs:
            _check_name(name, "argument")
        node = self.graph.create_node(
            entry.op,
            self._target(entry),
            tuple(_value(argument, self.nodes) for argument in entry.args),
            {name: _value(argument, self.nodes) for name, argument in entry.kwargs.items()},
            name=entry.name,
        )
        if node.name != entry.name:  # torch.fx renames what Python or it itself has another meaning for
            raise BundleError("its name is not one that a node can have", fix=REBUILD)
        node.meta["source_line"] = entry.source_line
        node.meta["spec"] = tuple(entry.value) if isinstance(entry.value, list) else entry.value
        if entry.value is not None:
            node.meta["val"] = _meta_value(entry.value)
        self.nodes[entry.name] = node
        self.values[node] = self._checked(node)

    def _target(self, entry: NodeEntry) -> str | Callable[..., Any]:
        if entry.op != "call_function":
            for part in entry.target.split(".") if entry.op == "get_attr" else [entry.target]:
                _check_name(part, "constant" if entry.op == "get_attr" else entry.op)
            return entry.target
        function = operator.getitem if entry.target == GETITEM else find_op(entry.target)
        if function is None:
            raise BundleError(
                f"calls {entry.target}, which PyTorch {torch.__version__} lacks or which is no op of"
                f" {', '.join(NAMESPACES)}",
                fix="install the PyTorch that wrote the bundle (versions.torch in its manifest.json)",
            )
        return function

    def _checked(self, node: Node) -> Any:
        """What the node gives, on device ``meta``, once it is one that a graph of a bundle has."""
        if node.op == "call_function":
            if isinstance(node.target, torch._ops.OpOverload):
                check_op(node.target)
                check_call(node, self.values.__getitem__)
            return value_of_call(node, self.values)
        if node.op == "output":
            return _check_output(node, self.values)
        if node.args or node.kwargs:
            raise BundleError(f"a {node.op} has no arguments", fix=REBUILD)
        if node.op == "placeholder":
            if not isinstance(node.meta.get("val"), Tensor):
                raise BundleError("does not say what tensor it is", fix=REBUILD)
            return node.meta["val"]
        if node.target not in self.constants:
            raise BundleError(f"reads the constant {node.target!r}, which is missing", fix=REBUILD)
        return self.constants[node.target].to("meta")


def _check_output(node: Node, values: Mapping[Node, Any]) -> None:
    returned = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    if node.target != "output" or not isinstance(returned, (list, tuple)):
        raise BundleError("it does not return a list of tensors", fix=REBUILD)
    for item in returned:
        if isinstance(item, (list, tuple)) or (isinstance(item, Node) and not isinstance(values[item], Tensor)):
            raise BundleError(f"it returns {item!r}, which is no tensor", fix=REBUILD)


def _check_name(name: str, what: str) -> None:
    """Names become Python when torch.fx compiles a graph."""
    special = keyword.iskeyword(name) or name.startswith("__")
    if special or not (name.isascii() and name.isidentifier()):
        raise BundleError(f"the name {name!r} of a {what} is not a plain one", fix=REBUILD)


def _value(argument: Argument, nodes: Mapping[str, Node], depth: int = 0) -> Any:
    if depth > _MAX_NESTING:
        raise BundleError(f"has lists nested deeper than {_MAX_NESTING}", fix=REBUILD)
    match argument:
        case NodeName(name):
            if name not in nodes:
                raise BundleError(f"reads {name!r}, which no node before it makes", fix=REBUILD)
            return nodes[name]
        case ListOf(items):
            return [_value(item, nodes, depth + 1) for item in items]
        case TupleOf(items):
            return tuple(_value(item, nodes, depth + 1) for item in items)
        case SpecialFloat(name):
            return float(name)
        case TorchName(name):
            return _torch_value(name, (torch.dtype, torch.layout, torch.memory_format))
        case DeviceName(name):
            try:
                return torch.device(name)
            except RuntimeError as error:
                raise BundleError(f"has the device {name!r}, which PyTorch does not know", fix=REBUILD) from error
        case int() if argument not in INTEGERS:
            raise BundleError("has an integer that is beyond 64 bits", fix=REBUILD)
    return argument


def _torch_value(name: str, kinds: tuple[type, ...]) -> Any:
    value = vars(torch).get(name)  # getattr would import some modules of these names
    if not isinstance(value, kinds):
        raise BundleError(
            f"has torch.{name}, which PyTorch {torch.__version__} lacks or which is no {kinds[0].__name__}",
            fix="install the PyTorch that wrote the bundle (versions.torch in its manifest.json)",
        )
    return value


def _meta_value(spec: TensorSpec | Sequence[TensorSpec | None]) -> Any:
    if not isinstance(spec, TensorSpec):
        return tuple(None if part is None else _meta_value(part) for part in spec)
    dtype = _torch_value(spec.dtype, (torch.dtype,))
    check_shape(spec.shape, dtype.itemsize, "it", spec.strides)
    return torch.empty_strided(spec.shape, spec.strides, dtype=dtype, device="meta")


def _tensors(constants: Mapping[str, Constant]) -> dict[str, Tensor]:
    total = sum(len(constant.data) for constant in constants.values())
    if total > MAX_CONSTANT_BYTES:
        raise BundleError(f"it holds constants of {total} bytes, more than {MAX_CONSTANT_BYTES}", fix=REBUILD)
    return {target: _tensor(constant) for target, constant in constants.items()}


def _tensor(constant: Constant) -> Tensor:
    dtype = _torch_value(constant.dtype, (torch.dtype,))
    check_shape(constant.shape, dtype.itemsize, "a constant")
    if len(constant.data) != math.prod(constant.shape) * dtype.itemsize:
        raise BundleError(
            f"a constant of {constant.dtype} {constant.shape} has {len(constant.data)} bytes", fix=REBUILD
        )
    flat = torch.empty(len(constant.data), dtype=torch.uint8)  # aligned for every dtype
    if constant.data:
        flat.copy_(torch.frombuffer(bytearray(constant.data), dtype=torch.uint8))
    return flat.view(dtype).reshape(constant.shape)
