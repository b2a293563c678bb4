"""``manifest.json``: everything a runner, in any language, must know to run a bundle.

The schema is these structs.  A reader refuses a ``schema`` that it does not know.
"""

from __future__ import annotations

from typing import Any

import msgspec

SCHEMA = 1


class Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An input or output of the whole program, as the user sees it.

    ``shape`` is the global one.  ``sharding`` lists ``[dim, axis]``: a rank's tensor is its chunk along
    each; it is empty where every rank has the whole.  ``dtype`` is PyTorch's name ("bfloat16").
    """

    name: str
    dtype: str
    shape: list[int]
    sharding: list[tuple[int, str]] = []


class Binding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor of an engine: its name there, its shape on this rank, and what it is.

    ``source`` is ``input:NAME`` or ``coordinate:AXIS`` for an engine's input (a coordinate is int32 [1]:
    where this rank stands along the axis), ``output:NAME`` for an output, ``value:NAME`` for a tensor that
    passes between two segments.
    """

    name: str
    source: str
    dtype: str
    shape: list[int]


class Collective(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One collective, in the order of the schedule.

    ``elements`` is the number of elements of this rank's operand, ``bytes_sent`` what the rank sends to
    others with the usual ring or pairwise algorithm.
    """

    op: str
    axis: str
    ranks: int
    dtype: str
    elements: int
    bytes_sent: int


class Segment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One engine in a rank's order of execution.

    ``engine`` is a path in the bundle; ``axis`` the mesh axis of its communicator, null where it needs none.
    """

    engine: str
    axis: str | None
    inputs: list[Binding]
    outputs: list[Binding]
    collectives: list[Collective]


class Versions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the engines were built with.  ``flavour`` is "TensorRT" or "TensorRT-RTX"."""

    torchtrt_md: str
    torch: str
    flavour: str
    tensorrt: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file.

    ``ranks[r]`` holds rank r's segments.  ``constants`` are the arguments that are built in, as far as a call can
    be compared with them.  A leaf of an argument is named by its path, in ``inputs`` as in ``constants``: ``mask``,
    ``mask.0``.  ``positional`` names the arguments that may be passed by position, in order; one of them may be
    nested, and then names no input itself, or be built in.  ``result`` nests the outputs as the model returns
    them: ``{"output": i}``, ``{"constant": x}``, ``{"tuple": [...]}``, ``{"list": [...]}`` or ``{"dict": {...}}``.
    ``files`` gives the sha256 of every other file of the bundle.
    """

    schema: int
    mesh: dict[str, int]
    inputs: list[Tensor]
    outputs: list[Tensor]
    constants: dict[str, bool | int | float | str | None]
    positional: list[str]
    result: dict[str, Any]
    ranks: list[list[Segment]]
    target: str
    versions: Versions
    files: dict[str, str]
