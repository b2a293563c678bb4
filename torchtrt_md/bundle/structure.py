"""What makes a manifest consistent, asked both when a bundle is written and when it is read.

A runner trusts a checked manifest: each wire has one producer that runs before its consumers, each shape
follows from the mesh, an engine's collectives are all on the axis of the communicator it will get, and a rank whose
segments take weights has a file of them, and the ranks meet at their collectives.  Every size is bounded, and the work
is linear in the manifest's: it may be anybody's.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple, TypeAlias, get_args

import msgspec
import torch

from torchtrt_md.bundle.files import check_path
from torchtrt_md.bundle.limits import MAX_AXES, MAX_DEPTH, MAX_RANKS, MAX_TENSOR_BYTES, check_shape
from torchtrt_md.bundle.manifest import Manifest
from torchtrt_md.bundle.rendezvous import check_rendezvous
from torchtrt_md.checks import TRANSPORTS
from torchtrt_md.errors import BundleError, MeshError
from torchtrt_md.lowering.ops import COLLECTIVES
from torchtrt_md.mesh import Mesh
from torchtrt_md.parallel import Placement
from torchtrt_md.program import Value, dtype_name
from torchtrt_md.segment import Binding, Collective, Segment, Wire
from torchtrt_md.selftest import OPS, RING, RING_DTYPES, self_tests

_REBUILD = "export the bundle again; do not edit manifest.json by hand"
# What a schedule names: the ops of the IR that communicate, and a ring that is one op of an engine.
_COLLECTIVES = {op._schema.name.split("::")[1] for op in COLLECTIVES} | {RING}
_SHA256 = re.compile("[0-9a-f]{64}")

Known: TypeAlias = tuple[torch.dtype, tuple[int, ...]]  # the dtype and shape of a wire


class _Wires(NamedTuple):
    """The wires that every rank has: the program's inputs and this rank's coordinates, and its outputs."""

    given: dict[Wire, Known]
    outputs: dict[Wire, Known]
    weights: dict[Wire, Known]  # those that are given at load


def mesh_of(manifest: Manifest) -> Mesh:
    """The manifest's mesh.

    Raises:
        BundleError: it is not one.
    """
    if len(manifest.mesh) > MAX_AXES:
        raise BundleError(f"the manifest's mesh has {len(manifest.mesh)} axes, more than {MAX_AXES}", fix=_REBUILD)
    for axis in manifest.mesh:
        if not axis.isidentifier() or axis == "self":  # which Mesh(self=2) cannot have
            raise BundleError(f"the manifest's mesh has an axis {axis!r}, which is no name of an axis", fix=_REBUILD)
    try:
        return Mesh(**manifest.mesh)
    except MeshError as error:
        raise BundleError(f"the manifest's mesh {manifest.mesh} is not one: {error.problem}", fix=_REBUILD) from error


def local_shape(tensor: Value, mesh: Mesh) -> tuple[int, ...]:
    """The shape that each rank holds of an input or output: the global one, divided along each sharding.

    Raises:
        BundleError: a sharding that does not fit the shape or the mesh.
    """
    shape = list(tensor.shape)
    for dim, axis in tensor.sharding:
        if axis not in mesh.axes or not 0 <= dim < len(shape) or shape[dim] % mesh.axes[axis]:
            raise BundleError(
                f"{tensor.name!r} of shape {list(tensor.shape)} cannot be sharded on dim {dim} along axis {axis!r} of"
                f" {mesh}",
                fix=_REBUILD,
            )
        shape[dim] //= mesh.axes[axis]
    return tuple(shape)


def check_structure(manifest: Manifest) -> None:
    """Refuse a manifest that contradicts itself.

    Raises:
        BundleError: naming the two parts that disagree.
    """
    mesh = mesh_of(manifest)
    for what, number in (("segments", len(manifest.ranks)), ("weights", len(manifest.weights))):
        if number != mesh.size:
            raise BundleError(f"the manifest has {what} for {number} ranks and {mesh} has {mesh.size}", fix=_REBUILD)
    if mesh.size > MAX_RANKS:
        raise BundleError(f"the manifest has {mesh.size} ranks, more than {MAX_RANKS}", fix=_REBUILD)
    _check_choice("placement", manifest.placement, get_args(Placement))
    _check_choice("transport", manifest.transport, TRANSPORTS)
    _check_files(manifest)
    _check_names(manifest)
    _check_times(manifest)
    wires = _wires(manifest, mesh)
    for rank, segments in enumerate(manifest.ranks):
        _check_rank(manifest, mesh, wires, rank, segments)
    _check_self_tests(manifest)
    check_rendezvous(mesh, manifest.ranks)
    _check_result(manifest.result, len(manifest.outputs))


def _check_choice(what: str, found: str, choices: Iterable[object]) -> None:
    if found not in choices:
        raise BundleError(
            f"the manifest's {what} is {found!r}, which is none of {', '.join(map(str, choices))}", fix=_REBUILD
        )


def _check_files(manifest: Manifest) -> None:
    for path, digest in manifest.files.items():
        check_path(path)
        if path == "manifest.json" or not _SHA256.fullmatch(digest):
            raise BundleError(f"the manifest gives the file {path!r} the sha256 {digest[:80]!r}", fix=_REBUILD)


def _check_names(manifest: Manifest) -> None:
    for kind, names in (
        ("input", [t.name for t in manifest.inputs] + list(manifest.constants) + manifest.opaque),
        ("output", [t.name for t in manifest.outputs]),
        ("positional argument", manifest.positional),
    ):
        twice = _twice(names)
        if twice is not None:
            raise BundleError(f"the manifest has more than one {kind} {twice!r}", fix=_REBUILD)
        if "" in names:
            raise BundleError(f"the manifest has an {kind} without a name", fix=_REBUILD)


def _twice(names: Iterable[str]) -> str | None:
    """The first name that comes a second time."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _wires(manifest: Manifest, mesh: Mesh) -> _Wires:
    for kind, tensors in (("input", manifest.inputs), ("output", manifest.outputs)):
        for tensor in tensors:
            check_shape(tensor.shape, tensor.dtype.itemsize, f"the {kind} {tensor.name!r}")
    given: dict[Wire, Known] = {Wire("coordinate", axis): (torch.int32, (1,)) for axis in mesh.names}
    given |= {Wire("input", v.name): (v.dtype, local_shape(v, mesh)) for v in manifest.inputs}
    outputs = {Wire("output", v.name): (v.dtype, local_shape(v, mesh)) for v in manifest.outputs}
    return _Wires(given, outputs, _given_weights(manifest, mesh))


def _given_weights(manifest: Manifest, mesh: Mesh) -> dict[Wire, Known]:
    """What a rank holds of each weight that is given at load."""
    twice = _twice([*(v.name for v in manifest.given), *manifest.joined])
    if twice is not None:
        raise BundleError(f"the manifest has more than one weight {twice!r}", fix=_REBUILD)
    for value in manifest.given:
        check_shape(value.shape, value.dtype.itemsize, f"the weight {value.name!r}")
    held = {v.name: (v.dtype, local_shape(v, mesh)) for v in manifest.given}
    found = dict(held)
    for name, parts in manifest.joined.items():
        known = [held[part] for part in parts if part in held]
        alike = {(dtype, len(shape), shape[1:]) for dtype, shape in known}
        if len(known) != len(parts) or len(alike) != 1 or not known[0][1]:
            raise BundleError(f"the manifest joins {name!r} of {reprlib.repr(parts)}, which do not fit", fix=_REBUILD)
        dtype, shape = known[0]
        found[name] = (dtype, (sum(shape[0] for _, shape in known), *shape[1:]))
    return {Wire("weight", name): known for name, known in found.items()}


def _check_times(manifest: Manifest) -> None:
    """JSON has no infinity: written as one, a time would be read as null."""
    for decision in manifest.decisions:
        for candidate, time in decision.times_ms.items():
            if not math.isfinite(time):
                raise BundleError(
                    f"the time of {candidate!r} for {decision.what!r} is {time}",
                    fix="leave out of times_ms what could not be timed, and say so in why",
                )


def _check_rank(manifest: Manifest, mesh: Mesh, wires: _Wires, rank: int, segments: Sequence[Segment]) -> None:
    weights = manifest.weights[rank]
    if weights is not None and weights not in manifest.files:
        raise BundleError(
            f"the weights of rank {rank} are in {weights!r}, which is not among the manifest's files", fix=_REBUILD
        )
    made: dict[Wire, Known] = {}  # by a segment before, of weights: taken by one
    for index, segment in enumerate(segments):
        where = f"segment {index} of rank {rank}"
        _check_segment(manifest, mesh, segment, where)
        for binding in segment.inputs:
            source = binding.source
            if source in wires.weights:
                made[source] = wires.weights[source]
            elif binding.weight is not None:
                if weights is None:
                    raise BundleError(f"{where} reads '{source}', and rank {rank} has no file of weights", fix=_REBUILD)
                made.setdefault(source, (binding.dtype, binding.source_shape))
            known = made.get(source) or wires.given.get(source)
            if known is None:
                raise BundleError(f"{where} reads '{source}', which nothing before it makes", fix=_REBUILD)
            _check_binding(binding, known, where)
        for binding in segment.outputs:
            source = binding.source
            if source not in wires.outputs and source.kind != "value":
                raise BundleError(
                    f"{where} writes '{source}', which is no output of the program and no value", fix=_REBUILD
                )
            if source in made:
                raise BundleError(f"{where} writes '{source}' a second time", fix=_REBUILD)
            made[source] = wires.outputs.get(source) or (binding.dtype, binding.shape)
            _check_binding(binding, made[source], where)
    missing = next((output for output in wires.outputs if output not in made), None)
    if missing is not None:
        raise BundleError(f"no segment of rank {rank} writes '{missing}'", fix=_REBUILD)


def _check_segment(manifest: Manifest, mesh: Mesh, segment: Segment, where: str) -> None:
    if segment.file not in manifest.files:
        raise BundleError(f"{where} runs {segment.file!r}, which is not among the manifest's files", fix=_REBUILD)
    _check_communication(mesh, segment, where)
    # An engine finds all its tensors by name, a graph its inputs only; what it returns has an order.
    names = [b.name for b in (*segment.inputs, *(segment.outputs if segment.runs == "engine" else ()))]
    twice = _twice(names)
    if twice is not None:
        raise BundleError(f"{where} binds a tensor of its {_noun(segment)} twice: {twice!r}", fix=_REBUILD)
    for binding in (*segment.inputs, *segment.outputs):
        check_shape(binding.shape, binding.dtype.itemsize, f"{where}: '{binding.source}'")
        if binding.transposed and (binding.weight is None or len(binding.shape) != 2):
            raise BundleError(
                f"{where} takes '{binding.source}' of shape {list(binding.shape)} transposed, and only weights of two"
                " dims can be",
                fix=_REBUILD,
            )


def _check_communication(mesh: Mesh, segment: Segment, where: str) -> None:
    if segment.axis is not None and segment.runs != "engine":
        raise BundleError(
            f"{where} runs as {segment.runs} and has a communicator of axis {segment.axis!r}, which only an engine has",
            fix=_REBUILD,
        )
    if segment.axis is not None and segment.axis not in mesh.axes:
        raise BundleError(f"{where} communicates on axis {segment.axis!r}, which {mesh} lacks", fix=_REBUILD)
    for c in segment.collectives:
        if segment.runs == "inductor":
            raise BundleError(f"{where} runs as inductor and has a {c.op} on axis {c.axis!r}", fix=_REBUILD)
        if segment.runs == "engine" and c.axis != segment.axis:
            raise BundleError(
                f"{where} has a {c.op} on axis {c.axis!r}, and its communicator is that of axis {segment.axis!r}",
                fix=_REBUILD,
            )
        if c.axis not in mesh.axes or c.ranks != mesh.axis_size(c.axis):
            raise BundleError(f"{where} has a {c.op} over {c.ranks} ranks of axis {c.axis!r} of {mesh}", fix=_REBUILD)
        _check_collective(c, where)


def _check_collective(c: Collective, where: str) -> None:
    if c.op not in _COLLECTIVES:
        raise BundleError(f"{where} has the collective {c.op!r}, which is none of {sorted(_COLLECTIVES)}", fix=_REBUILD)
    check_shape([c.elements], c.dtype.itemsize, f"the operand of a {c.op} of {where}")
    if not 0 <= c.bytes_sent <= MAX_TENSOR_BYTES * c.ranks:
        raise BundleError(f"a {c.op} of {where} sends {c.bytes_sent} bytes", fix=_REBUILD)


def _check_self_tests(manifest: Manifest) -> None:
    """There is one for each axis and op of the engines, of the form that every reader knows, and no other."""
    wanted = {test.name: test for test in self_tests(s for segments in manifest.ranks for s in segments)}
    found = {test.name: test for test in manifest.self_tests}
    for segments in manifest.ranks:
        for c in (c for s in segments if s.runs == "engine" for c in s.collectives):
            if c.op not in OPS or (c.op == RING and c.dtype not in RING_DTYPES):
                raise BundleError(
                    f"an engine has a {c.op} in {dtype_name(c.dtype)}, which engines do not have", fix=_REBUILD
                )
    if len(found) != len(manifest.self_tests) or found.keys() != wanted.keys():
        raise BundleError(
            f"the manifest has {len(manifest.self_tests)} self-tests, and its engines ask for {len(wanted)}; the first"
            f" that differs is {_first_other([test.name for test in manifest.self_tests], wanted)}",
            fix=_REBUILD,
        )
    for name, test in found.items():
        if test.file not in manifest.files:
            raise BundleError(f"{name} runs {test.file!r}, which is not among the manifest's files", fix=_REBUILD)
        if msgspec.structs.replace(test, file="") != wanted[name]:
            raise BundleError(f"{name} is not of the form that schema {manifest.schema} gives it", fix=_REBUILD)


def _first_other(found: Sequence[str], wanted: Iterable[str]) -> str:
    pairs = zip_longest(sorted(found), sorted(wanted))
    return next(str(have or want)[:100] for have, want in pairs if have != want)


def _noun(segment: Segment) -> str:
    return "engine" if segment.runs == "engine" else "graph"


def _check_binding(binding: Binding, known: Known, where: str) -> None:
    dtype, shape = known
    found = binding.source_shape
    if (binding.dtype, found) != (dtype, shape):
        raise BundleError(
            f"{where} binds '{binding.source}' as {dtype_name(binding.dtype)} {list(found)}, and it is"
            f" {dtype_name(dtype)} {list(shape)}",
            fix=_REBUILD,
        )


def _check_result(result: Any, outputs: int, depth: int = 0) -> None:
    kind, value = next(iter(result.items())) if isinstance(result, dict) and len(result) == 1 else (None, None)
    if depth > MAX_DEPTH:
        raise BundleError(f"the manifest's result is nested deeper than {MAX_DEPTH}", fix=_REBUILD)
    if kind in ("tuple", "list") and isinstance(value, list):
        for part in value:
            _check_result(part, outputs, depth + 1)
    elif kind == "dict" and isinstance(value, dict):
        for part in value.values():
            _check_result(part, outputs, depth + 1)
    elif kind == "output" and type(value) is int and 0 <= value < outputs:
        pass
    elif kind != "constant" or not isinstance(value, (type(None), bool, int, float, str)):
        raise BundleError(
            f"the manifest's result has a part that is not understood: {reprlib.repr(result)}", fix=_REBUILD
        )
