"""Every private name of PyTorch that capture needs, and what breaks without it.

Tests in ``tests/capture/test_torch_private.py`` name the feature that goes when one of these moves.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import is_fake as is_fake
from torch.distributed.device_mesh import DeviceMesh
from torch.fx.experimental.proxy_tensor import PythonKeyTracer
from torch.testing._internal.distributed.fake_pg import FakeStore

from torchtrt_md.graph.source import told_frames
from torchtrt_md.mesh import axis_names

_COORDINATE = "_coordinate_on_dim"
_FRAMES = "_filter_traceback_frames"


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
def coordinates(where: Mapping[str, int]) -> Iterator[None]:
    """Let DTensor believe that this process stands at these coordinates, by axis name.

    DTensor slices by its mesh's own record of the coordinate.  Without this, a process could capture only the
    graph of its own rank.  The record is overlaid on the class, since DTensor caches sharding decisions with
    the mesh objects of earlier captures in them, and those must agree with the one in hand.
    """

    def read(device_mesh: DeviceMesh) -> tuple[int, ...] | None:
        names = axis_names(device_mesh)
        if all(name in where for name in names):
            return tuple(where[name] for name in names)
        own: tuple[int, ...] | None = device_mesh.__dict__[_COORDINATE]
        return own

    def write(device_mesh: DeviceMesh, value: object) -> None:
        device_mesh.__dict__[_COORDINATE] = value

    setattr(DeviceMesh, _COORDINATE, property(read, write))
    try:
        yield
    finally:
        delattr(DeviceMesh, _COORDINATE)


@contextmanager
def told_stacks() -> Iterator[None]:
    """Let nodes that are traced record the user's innermost frame, whatever its function is called.

    PyTorch keeps frames of functions named ``forward`` only.  Without this, an error in a function that several
    modules share would cite the line that calls it.
    """

    def keep(_: PythonKeyTracer, stack: traceback.StackSummary) -> traceback.StackSummary:
        return traceback.StackSummary.from_list(told_frames(stack))

    setattr(PythonKeyTracer, _FRAMES, keep)
    try:
        yield
    finally:
        delattr(PythonKeyTracer, _FRAMES)
