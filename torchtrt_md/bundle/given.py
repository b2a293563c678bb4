"""The weights of a bundle that has none: given at load, whole, as the model's own checkpoint has them.

Each rank reads its part of each, and no more, from safetensors files or from tensors at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torchtrt_md.bundle.manifest import Manifest
from torchtrt_md.bundle.structure import local_shape, mesh_of
from torchtrt_md.bundle.weights import DTYPES, opened
from torchtrt_md.errors import BundleError
from torchtrt_md.mesh import Mesh
from torchtrt_md.program import Value, dtype_name, part

Given: TypeAlias = Mapping[str, Tensor] | Path | str | None


def given_weights(manifest: Manifest, rank: int, source: Given, device: torch.device | str) -> dict[str, Tensor]:
    """A rank's part of the weights that the bundle does not have, by the names that segments read.

    Args:
        source: whole tensors by name, as ``state_dict()`` of the dense model returns them; or a safetensors file, or a
            folder of them.
        device: where they are wanted.

    Raises:
        BundleError: weights are given where the bundle has its own, or are not where it has none; one is missing, in
            two files, or of another dtype or shape than the model had.
    """
    wanted = manifest.given_names.intersection(w for segment in manifest.ranks[rank] for w in segment.weights)
    if not manifest.given:
        if source is not None:
            raise BundleError("weights are given, and the bundle has its own", fix="leave weights out")
        return {}
    if source is None:
        raise BundleError(
            f"the bundle was exported without its {len(manifest.given)} weights",
            fix="pass load(..., weights=...): the model's safetensors file, a folder of them, or its state_dict()",
        )
    leaves = {leaf for name in wanted for leaf in manifest.joined.get(name, [name])}
    whole = [value for value in manifest.given if value.name in leaves]
    mesh = mesh_of(manifest)
    if isinstance(source, Mapping):
        held = {value.name: _of_tensor(value, source, mesh, rank) for value in whole}
    else:
        held = _of_files(whole, Path(source), mesh, rank)
    return {
        name: torch.cat([held[leaf].to(device) for leaf in manifest.joined[name]])
        if name in manifest.joined
        else held[name].to(device)
        for name in sorted(wanted)
    }


def _of_tensor(value: Value, source: Mapping[str, Tensor], mesh: Mesh, rank: int) -> Tensor:
    if value.name not in source:
        raise _missing(value, f"the {len(source)} tensors that were given")
    tensor = source[value.name].detach()
    _check(value, dtype_name(tensor.dtype), tuple(tensor.shape), "what was given")
    return part(tensor, value.sharding, mesh, rank)


def _of_files(values: list[Value], path: Path, mesh: Mesh, rank: int) -> dict[str, Tensor]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise BundleError(f"there is no safetensors file in {path}", fix="give the folder of the model's checkpoint")
    found: dict[str, Tensor] = {}
    names = {value.name for value in values}
    for file in files:
        with opened(file, torch.device("cpu")) as stored:
            there = names.intersection(stored.keys())
            for value in (value for value in values if value.name in there):
                if value.name in found:
                    raise BundleError(
                        f"the weight {value.name!r} is in more than one file of {path}, {file.name} among them",
                        fix="give one file, or a folder of one checkpoint",
                    )
                found[value.name] = _of_file(value, stored, file, mesh, rank)
    for value in values:
        if value.name not in found:
            raise _missing(value, str(path))
    return found


def _of_file(value: Value, stored: Any, file: Path, mesh: Mesh, rank: int) -> Tensor:
    """This rank's part; of the file, the bytes of that part are read."""
    header = stored.get_slice(value.name)
    kinds = {theirs: ours for ours, theirs in DTYPES.items()}
    _check(value, kinds.get(header.get_dtype(), header.get_dtype()), tuple(header.get_shape()), str(file))
    if not value.sharding:
        return stored.get_tensor(value.name)  # type: ignore[no-any-return]
    ranges = [(0, extent) for extent in value.shape]
    for dim, axis in value.sharding:  # as program.part cuts it
        start, end = ranges[dim]
        extent = (end - start) // mesh.axis_size(axis)
        start += mesh.coordinate(rank, axis) * extent
        ranges[dim] = start, start + extent
    tensor: Tensor = header[tuple(slice(start, end) for start, end in ranges)]
    assert tuple(tensor.shape) == local_shape(value, mesh)
    return tensor


def _check(value: Value, dtype: str, shape: tuple[int, ...], where: str) -> None:
    if (dtype, shape) != (dtype_name(value.dtype), value.shape):
        raise BundleError(
            f"the weight {value.name!r} is {dtype} {list(shape)} in {where}, and the model had"
            f" {dtype_name(value.dtype)} {list(value.shape)} when it was exported",
            fix="give weights of the exported model's form and dtype, or export again",
        )


def _missing(value: Value, where: str) -> BundleError:
    return BundleError(
        f"the weight {value.name!r} is not in {where}",
        fix="give the checkpoint of the exported model; of tied weights, a state_dict() has all names",
    )
