"""What makes a manifest consistent, asked both when a bundle is written and when it is read.

A runner trusts a checked manifest: each wire has one producer that runs before its consumers, each shape
follows from the mesh, an engine's collectives are all on the axis of the communicator it will get, and a rank whose
segments take weights has a file of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, TypeAlias, get_args

import torch

from torchtrt_md.bundle.manifest import Manifest
from torchtrt_md.errors import BundleError, MeshError
from torchtrt_md.mesh import Mesh
from torchtrt_md.parallel import Placement
from torchtrt_md.program import Value, dtype_name
from torchtrt_md.segment import Binding, Segment, Wire

Expected: TypeAlias = dict[Wire, tuple[torch.dtype, tuple[int, ...]]]
_REBUILD = "export the bundle again; do not edit manifest.json by hand"


def mesh_of(manifest: Manifest) -> Mesh:
    """The manifest's mesh.

    Raises:
        BundleError: it is not one.
    """
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
    if manifest.placement not in get_args(Placement):
        raise BundleError(
            f"the manifest's placement is {manifest.placement!r}, which is none of {', '.join(get_args(Placement))}",
            fix=_REBUILD,
        )
    for path in manifest.files:
        check_path(path)
    _check_names(manifest)
    _check_times(manifest)
    for rank, segments in enumerate(manifest.ranks):
        _check_rank(manifest, mesh, rank, segments)
    _check_result(manifest.result, len(manifest.outputs))


def check_path(path: str) -> None:
    """Refuse a path that is not a plain relative one inside the bundle.

    Raises:
        BundleError: naming the path.
    """
    parts = PurePosixPath(path).parts
    if not parts or PurePosixPath(path).is_absolute() or ".." in parts or "\\" in path or ":" in path or "\0" in path:
        raise BundleError(f"the manifest names the file {path!r}, which is not inside the bundle", fix=_REBUILD)


def _check_names(manifest: Manifest) -> None:
    for kind, names in (
        ("input", [t.name for t in manifest.inputs] + list(manifest.constants)),
        ("output", [t.name for t in manifest.outputs]),
        ("positional argument", manifest.positional),
    ):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise BundleError(f"the manifest has more than one {kind} {twice[0]!r}", fix=_REBUILD)


def _check_times(manifest: Manifest) -> None:
    """JSON has no infinity: written as one, a time would be read as null."""
    for decision in manifest.decisions:
        for candidate, time in decision.times_ms.items():
            if not math.isfinite(time):
                raise BundleError(
                    f"the time of {candidate!r} for {decision.what!r} is {time}",
                    fix="leave out of times_ms what could not be timed, and say so in why",
                )


def _check_rank(manifest: Manifest, mesh: Mesh, rank: int, segments: Sequence[Segment]) -> None:
    expected: Expected = {Wire("coordinate", axis): (torch.int32, (1,)) for axis in mesh.names}
    expected |= {Wire("input", v.name): (v.dtype, local_shape(v, mesh)) for v in manifest.inputs}
    outputs: Expected = {Wire("output", v.name): (v.dtype, local_shape(v, mesh)) for v in manifest.outputs}
    weights = manifest.weights[rank]
    if weights is not None and weights not in manifest.files:
        raise BundleError(
            f"the weights of rank {rank} are in {weights!r}, which is not among the manifest's files", fix=_REBUILD
        )
    live = set(expected)
    expected |= outputs
    for index, segment in enumerate(segments):
        where = f"segment {index} of rank {rank}"
        _check_segment(manifest, mesh, segment, where)
        for binding in segment.inputs:
            if binding.weight is not None:
                if weights is None:
                    raise BundleError(
                        f"{where} reads '{binding.source}', and rank {rank} has no file of weights", fix=_REBUILD
                    )
                expected.setdefault(binding.source, (binding.dtype, binding.source_shape))
            elif binding.source not in live:
                raise BundleError(f"{where} reads '{binding.source}', which nothing before it makes", fix=_REBUILD)
            _check_binding(binding, expected, where)
        for binding in segment.outputs:
            if binding.source not in outputs and binding.source.kind != "value":
                raise BundleError(
                    f"{where} writes '{binding.source}', which is no output of the program and no value", fix=_REBUILD
                )
            if binding.source in live:
                raise BundleError(f"{where} writes '{binding.source}' a second time", fix=_REBUILD)
            expected.setdefault(binding.source, (binding.dtype, binding.shape))
            _check_binding(binding, expected, where)
            live.add(binding.source)
    missing = sorted(set(outputs) - live)
    if missing:
        raise BundleError(f"no segment of rank {rank} writes '{missing[0]}'", fix=_REBUILD)


def _check_segment(manifest: Manifest, mesh: Mesh, segment: Segment, where: str) -> None:
    if segment.file not in manifest.files:
        raise BundleError(f"{where} runs {segment.file!r}, which is not among the manifest's files", fix=_REBUILD)
    _check_communication(mesh, segment, where)
    # An engine finds all its tensors by name, a graph its inputs only; what it returns has an order.
    names = [b.name for b in (*segment.inputs, *(segment.outputs if segment.runs == "engine" else ()))]
    if len(set(names)) != len(names):
        raise BundleError(f"{where} binds a tensor of its {_noun(segment)} twice: {names}", fix=_REBUILD)
    for binding in (*segment.inputs, *segment.outputs):
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


def _noun(segment: Segment) -> str:
    return "engine" if segment.runs == "engine" else "graph"


def _check_binding(binding: Binding, expected: Expected, where: str) -> None:
    dtype, shape = expected[binding.source]
    found = binding.source_shape
    if (binding.dtype, found) != (dtype, shape):
        raise BundleError(
            f"{where} binds '{binding.source}' as {dtype_name(binding.dtype)} {list(found)}, and it is"
            f" {dtype_name(dtype)} {list(shape)}",
            fix=_REBUILD,
        )


def _check_result(result: Any, outputs: int) -> None:
    kind, value = next(iter(result.items())) if isinstance(result, dict) and len(result) == 1 else (None, None)
    if kind in ("tuple", "list") and isinstance(value, list):
        for part in value:
            _check_result(part, outputs)
    elif kind == "dict" and isinstance(value, dict):
        for part in value.values():
            _check_result(part, outputs)
    elif kind == "output" and isinstance(value, int) and 0 <= value < outputs:
        pass
    elif kind != "constant":
        raise BundleError(f"the manifest's result has a part that is not understood: {result!r}", fix=_REBUILD)
