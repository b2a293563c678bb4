"""The inputs and outputs of a program, whole, in memory that a supervisor shares with its ranks.

The memory has no name: the processes that hold its descriptor share it, and it is gone when the last of them is.
Shapes are fixed, so a call passes no more than a word from process to process.
"""

from __future__ import annotations

import math
import mmap
import os

import torch
from torch import Tensor

from torchtrt_md.bundle.manifest import Manifest
from torchtrt_md.mesh import Mesh
from torchtrt_md.program import Value

_ALIGNMENT = 256


class SharedTensors:
    """Tensors on the CPU that all holders of ``descriptor`` see.

    Args:
        manifest: of the bundle; equal in all processes.
        descriptor: of memory that another process made; new memory by default.

    Attributes:
        inputs, outputs: by name, of the global shapes of the manifest.
    """

    def __init__(self, manifest: Manifest, descriptor: int | None = None) -> None:
        starts, size = [], 0
        values = [*manifest.inputs, *manifest.outputs]
        for value in values:
            starts.append(size)
            size += -(-_bytes(value) // _ALIGNMENT) * _ALIGNMENT
        self.descriptor = os.memfd_create("torchtrt_md") if descriptor is None else descriptor
        if descriptor is None:
            os.ftruncate(self.descriptor, max(size, 1))
        self._memory = mmap.mmap(self.descriptor, max(size, 1))
        tensors = [self._tensor(value, start) for value, start in zip(values, starts, strict=True)]
        count = len(manifest.inputs)
        self.inputs = {v.name: t for v, t in zip(values[:count], tensors[:count], strict=True)}
        self.outputs = {v.name: t for v, t in zip(values[count:], tensors[count:], strict=True)}

    def close(self) -> None:
        """Let go of the descriptor.  The memory stays for as long as its tensors do."""
        os.close(self.descriptor)

    def _tensor(self, value: Value, start: int) -> Tensor:
        if not _bytes(value):
            return torch.empty(value.shape, dtype=value.dtype)
        flat = torch.frombuffer(self._memory, dtype=torch.uint8, count=_bytes(value), offset=start)
        return flat.view(value.dtype).view(value.shape)


def writes(value: Value, mesh: Mesh, rank: int) -> bool:
    """Whether this rank writes its part of an output: of ranks that have the same, the first does."""
    split = {axis for _, axis in value.sharding}
    return all(axis in split or mesh.coordinate(rank, axis) == 0 for axis in mesh.names)


def _bytes(value: Value) -> int:
    return math.prod(value.shape) * value.dtype.itemsize
