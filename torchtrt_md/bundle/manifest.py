"""``manifest.json``: everything a runner, in any language, must know to run a bundle.

The schema is these structs.  A reader refuses a ``schema`` that it does not know.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec

SCHEMA = 2

Runs: TypeAlias = Literal["engine", "inductor", "eager"]
_WEIGHT = "weight:"


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
    """One tensor of a segment: its name there, its shape on this rank, and what it is.

    An engine's tensors are found by name.  A graph's inputs are its placeholders and its outputs what it returns,
    both in order.  ``source`` says where an input comes from and where an output goes:

        input:NAME       in       the user's input, this rank's part
        coordinate:AXIS  in       int32 [1]: where this rank stands along the axis
        weight:NAME      in       this rank's part of a weight, from the rank's file of weights
        value:NAME       in, out  a tensor that passes from a segment to later ones
        output:NAME      in, out  an output of the program, which later segments may read

    ``transposed`` is for weights of two dims only: the segment takes [K, N] where the file has [N, K].  ``shape`` is
    what the segment takes.
    """

    name: str
    source: str
    dtype: str
    shape: list[int]
    transposed: bool = False

    @property
    def weight(self) -> str | None:
        """The name of the weight that this is, or None where it is none."""
        return self.source.removeprefix(_WEIGHT) if self.source.startswith(_WEIGHT) else None

    @property
    def source_shape(self) -> list[int]:
        """The shape of what it is bound to: of a transposed weight, the one in the file."""
        return self.shape[::-1] if self.transposed else self.shape


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
    """One step in a rank's order of execution.

    ``runs`` says as what: a TensorRT engine; a graph that Inductor compiles when it is loaded; or a graph whose ops
    PyTorch runs one by one, which is where collectives and attention outside of engines are.  ``file`` is its path
    in the bundle: ``engines/<sha256>.engine`` or ``graphs/<sha256>.json`` (see :mod:`torchtrt_md.graph.json`).
    ``axis`` is the mesh axis of an engine's communicator, null where it needs none and for graphs.  An engine's
    collectives are all on its axis, an eager graph's on any; a graph for Inductor has none.  ``name`` is for
    messages ("blocks 3-4").
    """

    runs: Runs
    file: str
    axis: str | None
    inputs: list[Binding]
    outputs: list[Binding]
    collectives: list[Collective]
    name: str = ""


class Decision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Something that was chosen for this program, by formula or by timing, in words for people.

    ``what`` was decided ("attention [1,24,4608,128]"), what was ``chosen`` ("ulysses"), ``why`` ("sends the fewest
    bytes"), and candidate -> milliseconds where candidates were timed.
    """

    what: str
    chosen: str
    why: str
    times_ms: dict[str, float] = {}


class Versions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the bundle was made with.  ``flavour`` is "TensorRT" or "TensorRT-RTX"."""

    torchtrt_md: str
    torch: str
    flavour: str
    tensorrt: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file.

    ``placement`` says where attention runs, "engine" or "split", and ``transport`` what does the exchanges between
    segments, "nccl" or the GPUs' "copy" engines.  ``ranks[r]`` holds rank r's segments and
    ``weights[r]`` the path of the safetensors file with its part of the weights, null where it needs none: engines
    may hold their own.  ``constants`` are the arguments that are built in, as far as a call can
    be compared with them.  A leaf of an argument is named by its path, in ``inputs`` as in ``constants``: ``mask``,
    ``mask.0``.  ``positional`` names the arguments that may be passed by position, in order; one of them may be
    nested, and then names no input itself, or be built in.  ``result`` nests the outputs as the model returns
    them: ``{"output": i}``, ``{"constant": x}``, ``{"tuple": [...]}``, ``{"list": [...]}`` or ``{"dict": {...}}``.
    ``files`` gives the sha256 of every other file of the bundle.  ``decisions`` is what was chosen and why;
    ``tuned_on`` the name of the GPU whose times decided, "" where none did.
    """

    schema: int
    mesh: dict[str, int]
    inputs: list[Tensor]
    outputs: list[Tensor]
    constants: dict[str, bool | int | float | str | None]
    positional: list[str]
    result: dict[str, Any]
    placement: str
    ranks: list[list[Segment]]
    weights: list[str | None]
    target: str
    versions: Versions
    files: dict[str, str]
    transport: str = "nccl"
    decisions: list[Decision] = []
    tuned_on: str = ""
