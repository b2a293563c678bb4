"""The JSON of a graph: these structs.  A reader refuses a ``schema`` that it does not know.

A graph is a list of nodes as in torch.fx: ``placeholder``, ``get_attr``, ``call_function``, ``output``.  What it calls
is named ``namespace.name.overload``, as PyTorch prints it, so any version of PyTorch that has the op can read it.
None, booleans, integers, finite floats (always with a point or an exponent) and strings are what they are in JSON;
everything else is an object whose ``kind`` says what:

    {"kind": "node", "name": "add_1"}           the value of another node
    {"kind": "list", "items": [...]}            a list; "tuple" likewise
    {"kind": "float", "name": "inf"}            a float that JSON lacks: inf, -inf, nan
    {"kind": "torch", "name": "bfloat16"}       torch.bfloat16; layouts and memory formats likewise
    {"kind": "device", "name": "cuda:0"}        a device
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

GRAPH_SCHEMA = 1
MAX_CONSTANT_BYTES = 1 << 20
GETITEM = "operator.getitem"  # which picks one of several results
REBUILD = "export the bundle again; do not edit its graphs by hand"
INTEGERS = range(-(1 << 63), 1 << 64)  # what PyTorch's ops take, signed or not


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
