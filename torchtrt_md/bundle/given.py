"""The weights of a bundle that has none: given at load, whole, as the model's own checkpoint has them."""

from __future__ import annotations

import torch
from torch import Tensor

from torchtrt_md.bundle.manifest import Manifest
from torchtrt_md.bundle.structure import mesh_of
from torchtrt_md.checkpoint import Checkpoint, Given
from torchtrt_md.errors import BundleError


def given_checkpoint(manifest: Manifest, source: Given) -> Checkpoint | None:
    """What the weights are read from that the bundle does not have; None where it has its own.

    Raises:
        BundleError: weights are given where the bundle has its own, or are not where it has none.
        WeightsError: a file that is damaged, or a name that is in two.
    """
    if not manifest.given:
        if source is not None:
            raise BundleError("weights are given, and the bundle has its own", fix="leave weights out")
        return None
    if source is None:
        raise BundleError(
            f"the bundle was exported without its {len(manifest.given)} weights",
            fix="pass load(..., weights=...): the model's safetensors file, a folder of them, or its state_dict()",
        )
    return Checkpoint(source)


def given_weights(
    manifest: Manifest, rank: int, checkpoint: Checkpoint | None, device: torch.device | str
) -> dict[str, Tensor]:
    """A rank's part of the weights that the bundle does not have, by the names that segments read.

    Each is on the device before the next is read.

    Args:
        checkpoint: of :func:`given_checkpoint`.  It may have weights that the model has not.
        device: where they are wanted.

    Raises:
        WeightsError: one is missing, or of another dtype or shape than the model had.
    """
    if checkpoint is None:
        return {}
    wanted = sorted(manifest.given_names.intersection(w for segment in manifest.ranks[rank] for w in segment.weights))
    mesh = mesh_of(manifest)
    whole = {value.name: value for value in manifest.given}
    leaves = {name: manifest.joined.get(name, [name]) for name in wanted}
    for value in (whole[leaf] for of in leaves.values() for leaf in of):
        checkpoint.check(value.name, value.dtype, value.shape)

    def read(leaf: str) -> Tensor:
        return checkpoint.part(leaf, whole[leaf].sharding, mesh, rank).to(device)

    return {
        name: torch.cat(list(map(read, of))) if name in manifest.joined else read(name) for name, of in leaves.items()
    }
