"""Every private name of PyTorch that capture needs, and what breaks without it.

Tests in ``tests/capture/test_torch_private.py`` name the feature that goes when one of these moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def fake_ranks(size: int) -> Iterator[None]:
    """A process group of ``size`` ranks in this one process, whose collectives move nothing.

    DTensor needs some process group even to trace.  Without the fake backend, tensor-parallel models
    could only be captured inside a launch.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def coordinates(device_mesh: DeviceMesh, where: Sequence[int]) -> Iterator[None]:
    """Let DTensor believe that this process stands at these coordinates of the mesh.

    DTensor slices by the mesh's own record of the coordinate.  Without it, a process could capture
    only the graph of its own rank.
    """
    before = device_mesh._coordinate_on_dim
    device_mesh._coordinate_on_dim = tuple(where)
    try:
        yield
    finally:
        device_mesh._coordinate_on_dim = before
