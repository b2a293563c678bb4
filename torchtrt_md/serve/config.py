"""``config.pbtxt``: what Triton must know of a bundle, for its Python backend and for its TensorRT backend.

Both take requests of the bundle's global shapes, one at a time: ``max_batch_size`` is 0, which turns Triton's batching
off.  The shapes are fixed, and nothing in a manifest says that the rows of a first dim are independent of each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from torchtrt_md.bundle.manifest import Manifest
from torchtrt_md.bundle.structure import mesh_of
from torchtrt_md.errors import BundleError
from torchtrt_md.mesh import Mesh
from torchtrt_md.program import Value
from torchtrt_md.segment import Segment

TYPES = {
    torch.bool: "TYPE_BOOL",
    torch.uint8: "TYPE_UINT8",
    torch.uint16: "TYPE_UINT16",
    torch.uint32: "TYPE_UINT32",
    torch.uint64: "TYPE_UINT64",
    torch.int8: "TYPE_INT8",
    torch.int16: "TYPE_INT16",
    torch.int32: "TYPE_INT32",
    torch.int64: "TYPE_INT64",
    torch.float16: "TYPE_FP16",
    torch.bfloat16: "TYPE_BF16",
    torch.float32: "TYPE_FP32",
    torch.float64: "TYPE_FP64",
}
PYTHON = "serve it with --format triton-python, which gives each rank its own part"


def dims(value: Value) -> tuple[int, ...]:
    """The shape that Triton has of a value: it knows no tensors without dims."""
    return value.shape or (1,)


def python_config(manifest: Manifest) -> str:
    """For a ``model.py`` that runs the bundle in processes of its own.

    Raises:
        BundleError: a value that Triton cannot pass, or a bundle that was exported without its weights.
    """
    if manifest.given:
        raise BundleError(
            f"the bundle was exported without its weights ({manifest.given[0].name} is one), and Triton gives none",
            fix="export it with its weights",
        )
    parameters = {
        "gpus": ",".join(map(str, range(mesh_of(manifest).size))),
        "timeout_seconds": "300",
        "cuda_graph": "false",
        "unload_on_failure": "true",
    }
    return _config("python", manifest, parameters)


def tensorrt_config(manifest: Manifest) -> str:
    """For Triton's TensorRT backend, in which one process runs ``model.plan.rank{r}`` on the GPU of each rank r.

    It gives the same inputs to every rank and returns the outputs of rank 0, so that is what the bundle must be made
    for; see :func:`check_tensorrt`.

    Raises:
        BundleError: as :func:`check_tensorrt`.
    """
    check_tensorrt(manifest)
    parameters = {
        "enable_multi_device": "true",
        "multi_device_gpus": ",".join(map(str, range(mesh_of(manifest).size))),
        "multi_device_per_rank_engines": "true",
    }
    return _config("tensorrt", manifest, parameters)


def check_tensorrt(manifest: Manifest) -> None:
    """Refuse a bundle that Triton's TensorRT backend would not run, or would run to wrong values.

    Raises:
        BundleError: naming what it cannot be given.
    """
    check_flavour(manifest.versions.flavour, manifest.versions.tensorrt)
    mesh = mesh_of(manifest)
    check_values(mesh, manifest.inputs, manifest.outputs)
    (axis,) = _split(mesh)
    for rank, segments in enumerate(manifest.ranks):
        _check_rank(rank, segments, axis)
        _check_equal(rank, segments[0], manifest.ranks[0][0])


def check_flavour(name: str, version: str) -> None:
    """Refuse engines of another TensorRT than Triton's.

    Args:
        name, version: what the engines were, or would be, built with.

    Raises:
        BundleError: with both.
    """
    if not name:
        raise BundleError(
            "nothing of the program is in an engine, and Triton's TensorRT backend runs engines",
            fix="use --compute tensorrt, or --format triton-python, a process for each rank",
        )
    if name != "TensorRT" or int(version.partition(".")[0]) < 11:
        raise BundleError(
            f"the engines are of {name} {version}, and Triton's TensorRT backend runs"
            " engines of TensorRT 11 on several GPUs",
            fix="export with TensorRT 11 installed, or with --format triton-python, a process for each rank",
        )


def check_values(mesh: Mesh, inputs: Iterable[Value], outputs: Iterable[Value]) -> None:
    """Refuse what can be told before anything is built.

    Raises:
        BundleError: naming the axes, the input or the output.
    """
    if len(_split(mesh)) != 1:
        raise BundleError(
            f"{mesh} has {len(_split(mesh))} axes of more than one rank, and Triton's TensorRT backend has one"
            " communicator, of all ranks, of which there are at least two",
            fix=f"export for one axis, or {PYTHON}",
        )
    for what, values in (("input", inputs), ("output", outputs)):
        for value in values:
            _check_whole(what, value)


def _split(mesh: Mesh) -> list[str]:
    return [axis for axis in mesh.names if mesh.axis_size(axis) > 1]


def _check_whole(what: str, value: Value) -> None:
    if value.sharding:
        told = "gives the whole of it to every rank" if what == "input" else "returns what rank 0 has of it"
        dim, axis = value.sharding[0]
        raise BundleError(
            f"{what} {value.name!r} is split on dim {dim} along axis {axis!r}, and Triton's TensorRT backend {told}",
            fix=f"export a model that takes and returns whole tensors, or {PYTHON}",
        )
    if not value.shape:
        raise BundleError(
            f"{what} {value.name!r} has no dims, which Triton cannot pass to an engine",
            fix=f"give it a dim of 1, or {PYTHON}",
        )


def _check_rank(rank: int, segments: Sequence[Segment], axis: str) -> None:
    if len(segments) != 1 or segments[0].runs != "engine":
        told = ", ".join(f"{s.runs} {s.name}".strip() for s in segments[:4]) + (", ..." if len(segments) > 4 else "")
        raise BundleError(
            f"rank {rank} has {len(segments)} segments ({told}), and Triton's TensorRT backend runs one engine a rank",
            fix=f'export with placement="engine" and see that nothing stays in PyTorch, or {PYTHON}',
        )
    (segment,) = segments
    for binding in segment.inputs:
        if binding.source.kind == "coordinate":
            raise BundleError(
                f"the engine of rank {rank} reads its coordinate along axis {binding.source.name!r}, and Triton's"
                " TensorRT backend gives every rank the inputs of rank 0: all ranks would compute what rank 0 does",
                fix=f"export with coordinates_inside=True (--format triton does), or {PYTHON}",
            )
        if binding.source.kind != "input":
            raise BundleError(
                f"the engine of rank {rank} reads the {binding.source.kind} {binding.source.name!r}, and Triton gives"
                " it the model's inputs only",
                fix=f"export as one engine, which holds its weights, or {PYTHON}",
            )
    if segment.axis != axis:
        raise BundleError(
            f"the engine of rank {rank} has no collectives along axis {axis!r}, and Triton's TensorRT backend gives a"
            " communicator to every engine, which such an engine refuses",
            fix=f"serve it on one GPU, or {PYTHON}",
        )


def _check_equal(rank: int, segment: Segment, first: Segment) -> None:
    for what, mine, others in (("inputs", segment.inputs, first.inputs), ("outputs", segment.outputs, first.outputs)):
        if {(b.name, b.dtype, b.shape) for b in mine} != {(b.name, b.dtype, b.shape) for b in others}:
            raise BundleError(
                f"the engine of rank {rank} has other {what} than that of rank 0, from which Triton's TensorRT backend"
                " takes the memory of all",
                fix=f"export a model of which all ranks take and return the same, or {PYTHON}",
            )
    for binding in (*segment.inputs, *segment.outputs):
        if binding.name != binding.source.name:
            raise BundleError(
                f"the engine of rank {rank} calls {binding.source.name!r} {binding.name!r}",
                fix="export the bundle again as one engine, whose tensors have the program's names",
            )


def _config(backend: str, manifest: Manifest, parameters: Mapping[str, str]) -> str:
    lines = [f'backend: "{backend}"', "max_batch_size: 0"]
    lines += _tensors("input", manifest.inputs)
    lines += _tensors("output", manifest.outputs)
    lines.append("instance_group [ { kind: KIND_MODEL count: 1 } ]")
    for key, value in parameters.items():
        lines.append(f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}")
    return "\n".join(lines) + "\n"


def _tensors(what: str, values: Iterable[Value]) -> list[str]:
    lines = []
    for value in values:
        if value.dtype not in TYPES:
            raise BundleError(
                f"{what} {value.name!r} is {value.dtype}, which Triton does not have",
                fix=f"cast it inside the model; Triton has {', '.join(map(str, TYPES))}",
            )
        if 0 in value.shape:
            raise BundleError(
                f"{what} {value.name!r} of shape {list(value.shape)} has no elements, which Triton cannot pass",
                fix="leave it out of what the model takes and returns",
            )
        name, extents = _quoted(value.name), ", ".join(map(str, dims(value)))
        lines.append(f"{what} [ {{ name: {name} data_type: {TYPES[value.dtype]} dims: [ {extents} ] }} ]")
    return lines


def _quoted(text: str) -> str:
    """A string of protobuf's text format."""
    plain = (chr(b) if 32 <= b < 127 and b not in b'"\\' else f"\\{b:03o}" for b in text.encode())
    return f'"{"".join(plain)}"'
