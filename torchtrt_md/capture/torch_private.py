"""Every private name of PyTorch that capture needs, and what breaks without it.

Tests in ``tests/capture/test_torch_private.py`` name the feature that goes when one of these moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import nn
from torch._C._distributed_c10d import _unregister_process_group
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import is_fake as is_fake
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import PythonKeyTracer
from torch.nn.modules import module as _modules
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from torchtrt_md.graph.source import entry, told_now
from torchtrt_md.mesh import OF_A_CAPTURE, Mesh, axis_names

# What fake tensors raise where a size, or which code runs, depends on values.
DEPENDS_ON_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
# The function that models call for products of rows with a matrix for each expert; public names of it are later ones.
grouped_mm = torch._grouped_mm
_COORDINATE = "_coordinate_on_dim"
_CREATE = "create_node"


@contextmanager
def fake_ranks(size: int) -> Iterator[None]:
    """A process group of ``size`` ranks in this one process, whose collectives move nothing.

    DTensor needs some process group even to trace.  Without the fake backend, tensor-parallel models could only be
    captured inside a launch, by all ranks together.
    """
    with _no_launch():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
        try:
            yield
        finally:
            for group in list(c10d._world.pg_names):
                _unregister_process_group(group.group_name)


@contextmanager
def fake_mesh(mesh: Mesh, device_type: str) -> Iterator[DeviceMesh]:
    """The mesh over fake ranks.

    DTensor keeps sharding decisions with meshes in them, and takes meshes of equal shape and names for one.  So the
    names say that it is a fake one, and of which mesh: a decision of a capture never meets groups of a launch.
    """
    with fake_ranks(mesh.size):
        yield init_device_mesh(
            device_type, mesh.shape, mesh_dim_names=tuple(f"{name}{OF_A_CAPTURE}{mesh}" for name in mesh.names)
        )


# PyTorch's record of the process groups of this process: dicts, and the number that names the next group.
_RECORDS = ("_pg_map", "_pg_names", "_pg_group_ranks", "_pg_backend_config", "_pg_to_tag", "_tags_to_pg")
_COUNT = "_group_count"
_FIRST = 1_000_000  # names that no group of a launch has, and equal ones in every capture
_depth = 0


@contextmanager
def _no_launch() -> Iterator[None]:
    """Set the process groups of the launch aside, as if there were none.

    Without it, a capture in a launch would make groups of the launch: all ranks would have to take part, and the
    groups would stay.
    """
    global _depth
    held = {name: getattr(c10d, name) for name in (*_RECORDS, _COUNT)}
    default, rank = c10d._world.default_pg, dist.get_rank() if dist.is_initialized() else None
    for name in _RECORDS:
        setattr(c10d, name, {})
    _depth += 1
    setattr(c10d, _COUNT, _FIRST * _depth)
    c10d._world.default_pg = None
    try:
        yield
    finally:
        _depth -= 1
        for name, value in held.items():
            setattr(c10d, name, value)
        c10d._update_default_pg(default)
        assert rank is None or dist.get_rank() == rank


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """The model without what ``torch.compile`` put in place of its calls, or of its submodules'.

    Without it, ``model.forward = torch.compile(model.forward)``, the usual form in transformers, could not be captured:
    the copy that is traced would call the compiled function, which is bound to the model itself.
    """
    held: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        forward: Any = vars(module).get("forward")
        if hasattr(forward, "_torchdynamo_orig_callable"):
            held.append((module, "forward", forward))
            original = forward._torchdynamo_orig_callable
            if getattr(original, "__func__", None) is type(module).forward:
                del module.forward
            else:
                module.forward = original
        if vars(module).get("_compiled_call_impl") is not None:
            held.append((module, "_compiled_call_impl", module._compiled_call_impl))
            module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, name, value in held:
            setattr(module, name, value)


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

    PyTorch keeps frames of functions named ``forward`` only, and makes a summary of the whole stack for each
    node, which takes long.  Without this, an error in a function that several modules share would cite the line that
    calls it.
    """
    entered, create = entry(), PythonKeyTracer.create_node
    own = _CREATE in vars(PythonKeyTracer)

    def recording(tracer: PythonKeyTracer, *args: Any, **kwargs: Any) -> Node:
        node = create(tracer, *args, **kwargs)
        if node.op not in ("placeholder", "output") and not node.stack_trace and (told := told_now(entered)):
            node.stack_trace = told
        return node

    setattr(PythonKeyTracer, _CREATE, recording)
    try:
        yield
    finally:
        if own:
            setattr(PythonKeyTracer, _CREATE, create)
        else:
            delattr(PythonKeyTracer, _CREATE)


def untraced() -> AbstractContextManager[object]:
    """What is computed here has values, and does not enter the graph that is traced.

    Without it, what depends on shapes alone would have no value while a model is traced.
    """
    return _disable_current_modes()


def has_global_hooks() -> bool:
    """Are there hooks that every module runs?

    Without it, a block could be written down again where such a hook has a count.
    """
    return bool(_modules._global_forward_hooks or _modules._global_forward_pre_hooks)


def root_mesh(device_mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that a slice such as ``mesh["tp"]`` was taken from.

    Without it, a model that was parallelized on one axis of a larger mesh would need the mesh to be given again.
    """
    return device_mesh._get_root_mesh()
