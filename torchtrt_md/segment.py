"""``Segment``: one step of a rank's program, as cut, built, written to a manifest and brought up.

``place`` makes it and no later stage describes it anew: ``build`` adds what was decided about weights, ``bundle`` the
file that holds it.  Dtypes and wires are text in JSON alone (:mod:`torchtrt_md.bundle.manifest`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, Self, TypeAlias

import msgspec
import torch
from torch.fx import GraphModule

from torchtrt_md.graph.text import graph_digest
from torchtrt_md.program import Coordinate, Source, Weight

# As a TensorRT engine, compiled by Inductor, or op by op in PyTorch.
Runs: TypeAlias = Literal["engine", "inductor", "eager"]
Kind: TypeAlias = Literal["input", "coordinate", "weight", "value", "output"]


class Wire(NamedTuple):
    """What a tensor of a segment is: where an input comes from, and where an output goes.

    input       in       the user's input, this rank's part
    coordinate  in       int32 [1]: where this rank stands along the axis of this name
    weight      in       this rank's part of a weight
    value       in, out  a tensor that passes from a segment to later ones
    output      in, out  an output of the program, which later segments may read
    """

    kind: Kind
    name: str

    @classmethod
    def of(cls, source: Source) -> Self:
        """The wire of a placeholder of a program."""
        if isinstance(source, Coordinate):
            return cls("coordinate", source.axis)
        return cls("weight" if isinstance(source, Weight) else "input", source.name)

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"


class Binding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor of a segment: its name there, what it is, and its dtype and shape on this rank.

    An engine's tensors are found by name.  A graph's inputs are its placeholders and its outputs what it returns,
    both in order.  ``transposed`` is for weights of two dims only: the segment takes [K, N] where the model has
    [N, K].  ``shape`` is what the segment takes.
    """

    name: str
    source: Wire
    dtype: torch.dtype
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def weight(self) -> str | None:
        """The name of the weight that this is, or None where it is none."""
        return self.source.name if self.source.kind == "weight" else None

    @property
    def source_shape(self) -> tuple[int, ...]:
        """The shape of what it is bound to: of a transposed weight, the model's own."""
        return self.shape[::-1] if self.transposed else self.shape


class Collective(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One collective of a rank's schedule.

    ``elements`` is the number of elements of this rank's operand, or of keys and values of a ``ring_attention`` that
    is one op; ``bytes_sent`` what the rank sends to others with the usual ring or pairwise algorithm, the most of any.
    """

    op: str
    axis: str
    ranks: int
    dtype: torch.dtype
    elements: int
    bytes_sent: int


class Segment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One step in a rank's order of execution.

    ``runs`` says as what; an eager one is where collectives and attention outside of engines are.  ``file`` is its
    path in a bundle, "" before there is one.  ``axis`` is the mesh axis of an engine's communicator, None where it
    needs none and for graphs.  An engine's collectives are all on its axis, an eager graph's on any; a graph for
    Inductor has none.  ``name`` is for messages.
    """

    runs: Runs
    file: str
    axis: str | None
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]
    collectives: tuple[Collective, ...]
    name: str = ""

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the weights that it takes, each once."""
        return tuple(dict.fromkeys(b.source.name for b in self.inputs if b.source.kind == "weight"))


@dataclass(frozen=True)
class Part:
    """A segment with what runs it.

    Attributes:
        segment: its description.
        graph: what it computes.  Its placeholders are the segment's inputs, weights among them; it returns the
            outputs; every value that passes between parts is contiguous.  None for an engine that was read from a
            bundle.
        engine: the engine's file once it is built, None for a graph.
    """

    segment: Segment
    graph: GraphModule | None = None
    engine: Path | None = None

    @property
    def runs(self) -> Runs:
        return self.segment.runs

    @cached_property
    def digest(self) -> str:
        """Equal for parts that compute the same, and so can share an engine or a compiled function."""
        return "" if self.graph is None else graph_digest(self.graph)
