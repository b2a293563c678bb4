"""The weights of a bundle that has none: given at load, whole, as the model's own checkpoint has them."""

from __future__ import annotations

import torch
from torch import Tensor

from torchtrt_md.bundle.manifest import Manifest
from torchtrt_md.bundle.structure import mesh_of
from torchtrt_md.checkpoint import Checkpoint, Given
from torchtrt_md.errors import BundleError


def given_tensors(manifest: Manifest, source: Given, device: torch.device) -> dict[str, Tensor]:
    """Of the weights that are given as tensors those on this device: what is read of them may be views."""
    if source is None or not manifest.given:
        return {}
    return Checkpoint(source).tensors([value.name for value in manifest.given], device)


def given_weights(manifest: Manifest, rank: int, source: Given, device: torch.device | str) -> dict[str, Tensor]:
    """A rank's part of the weights that the bundle does not have, by the names that segments read.

    Each is on the device before the next is read.

    Args:
        source: see :class:`Checkpoint`.  It may have weights that the model has not.
        device: where they are wanted.

    Raises:
        BundleError: weights are given where the bundle has its own, or are not where it has none.
        WeightsError: one is missing, in two files, or of another dtype or shape than the model had.
    """
    wanted = sorted(manifest.given_names.intersection(w for segment in manifest.ranks[rank] for w in segment.weights))
    if not manifest.given:
        if source is not None:
            raise BundleError("weights are given, and the bundle has its own", fix="leave weights out")
        return {}
    if source is None:
        raise BundleError(
            f"the bundle was exported without its {len(manifest.given)} weights",
            fix="pass load(..., weights=...): the model's safetensors file, a folder of them, or its state_dict()",
        )
    checkpoint, mesh = Checkpoint(source), mesh_of(manifest)
    whole = {value.name: value for value in manifest.given}
    leaves = {name: manifest.joined.get(name, [name]) for name in wanted}
    for value in (whole[leaf] for of in leaves.values() for leaf in of):
        checkpoint.check(value.name, value.dtype, value.shape)

    def read(leaf: str) -> Tensor:
        return checkpoint.part(leaf, whole[leaf].sharding, mesh, rank).to(device)

    return {
        name: torch.cat(list(map(read, of))) if name in manifest.joined else read(name) for name, of in leaves.items()
    }
