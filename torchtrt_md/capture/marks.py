"""``md.split`` and ``md.gather``: what a plan says of modules, said in the model's own code.

While a model is captured they are the marks of a plan (:mod:`torchtrt_md.capture.context_parallel`): the value stays
whole, and lowering decides what a rank holds.  Called in a launch, in a model that runs as it is, they act on the
groups of the mesh that :func:`use_mesh` was given.  Elsewhere, as in the dense model that a program is compared with,
one process has the whole, and both return it as it is.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchtrt_md.errors import MeshError, PlanError, PlanWarning
from torchtrt_md.graph.source import running_line
from torchtrt_md.lowering import ops
from torchtrt_md.mesh import axes_of, axis_names, joined


@dataclass(frozen=True)
class Marking:
    """A capture under way.

    Attributes:
        sizes: of the axes over which a sequence is split.
        called: several axes as code names them -> those of them that have more than one rank.
        split: those of them over which the model's own code split something so far.
        unknown: other axes that it named.
    """

    sizes: Mapping[str, int]
    called: Mapping[str, str] = field(default_factory=dict)
    split: set[str] = field(default_factory=set)
    unknown: set[str] = field(default_factory=set)

    def check_used(self) -> None:
        """
        Warns:
            PlanWarning: the model's code splits or gathers along an axis that no ContextParallel is for.
        """
        if self.sizes and self.unknown:
            axes = " and ".join(repr(axis) for axis in sorted(self.unknown))
            warnings.warn(
                f"the model calls md.split or md.gather along axis {axes}, and that did nothing: the sequence is split"
                f" along {' and '.join(map(repr, self.sizes))} only",
                PlanWarning,
                stacklevel=3,
            )


# Plain globals, and no context variables: Dynamo guards what it compiled on these only.
_capture: Marking | None = None
_launch: DeviceMesh | None = None


@contextmanager
def marking(capture: Marking) -> Iterator[None]:
    """Let ``split`` and ``gather`` be the marks of this capture."""
    global _capture
    outer, _capture = _capture, capture
    try:
        yield
    finally:
        _capture = outer


@contextmanager
def use_mesh(device_mesh: DeviceMesh) -> Iterator[None]:
    """Let :func:`split` and :func:`gather` act on the groups of this mesh, in a launch that runs the model itself.

    Args:
        device_mesh: its axes are those that ``split`` and ``gather`` name.

    Raises:
        MeshError: it is no ``DeviceMesh``.
    """
    global _launch
    if not isinstance(device_mesh, DeviceMesh):
        raise MeshError(
            f"use_mesh was given a {type(device_mesh).__name__}",
            fix='pass a DeviceMesh: init_device_mesh("cuda", (4,), mesh_dim_names=("cp",))',
        )
    outer, _launch = _launch, device_mesh
    try:
        with ops.use_device_mesh(device_mesh):
            yield
    finally:
        _launch = outer


def split(x: Tensor, dim: int, axis: str | tuple[str, ...]) -> Tensor:
    """From here on each rank along ``axis`` has its part of ``x``: the r-th of equal chunks of ``dim``.

    A model that is captured may have any length there; lowering divides it.

    The mesh is that of the capture, or of :func:`use_mesh`.  Without either ``x`` is returned as it is.

    Args:
        x: equal on all ranks of the axis, of any shape and dtype.
        dim: counted from the end where negative.
        axis: of the mesh, or a tuple of axes.  While a model is captured: of a ``ContextParallel``, which may have
            ``plan={}``.

    Returns:
        While a model is captured, ``x`` whole, since its code is traced on whole shapes.  In a launch this rank's
        chunk.  There attention sees what it is given: gather keys and values for it.

    Raises:
        PlanError: an argument of another type, or a dim that ``x`` lacks; in a launch, one that does not divide.
        MeshError: the mesh of :func:`use_mesh` has no such axis.
    """
    dim, axis = _checked("split", x, dim, axis), joined(axis)
    if _capture is not None:
        return _marked(_capture, x, dim, axis, splits=True)
    return x if _launch is None else _split_now(x, dim, axis)


def gather(x: Tensor, dim: int, axis: str | tuple[str, ...]) -> Tensor:
    """From here on every rank along ``axis`` has all of ``x``: the parts of the ranks, one after the other on ``dim``.

    The inverse of :func:`split`, with the same arguments and errors.
    """
    dim, axis = _checked("gather", x, dim, axis), joined(axis)
    if _capture is not None:
        return _marked(_capture, x, dim, axis, splits=False)
    return x if _launch is None else _gather_now(x, dim, axis)


def mark_split(x: Tensor, dim: int, axis: str, size: int) -> Tensor:
    """``x``, marked in the graph as split on ``dim`` from here on; on one rank it is as it was."""
    return x if size == 1 else ops.split_sequence(x, dim, axis, size)


def mark_gathered(x: Tensor, dim: int, axis: str, size: int) -> Tensor:
    """``x``, marked in the graph as whole from here on."""
    return x if size == 1 else ops.gather_sequence(x, dim, axis, size)


def _marked(capture: Marking, x: Tensor, dim: int, axis: str, splits: bool) -> Tensor:
    axis = capture.called.get(axis, axis)
    if axis not in capture.sizes:
        capture.unknown.add(axis)
        return x
    if splits:
        capture.split.add(axis)
    return (mark_split if splits else mark_gathered)(x, dim, axis, capture.sizes[axis])


# These communicate, so torch.compile is to leave them as they are.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _split_now(x: Tensor, dim: int, axis: str) -> Tensor:
    sizes = {one: _size(one) for one in axes_of(axis)}
    size = math.prod(sizes.values())
    if x.shape[dim] % size:
        raise PlanError(
            f"md.split of {x.shape[dim]} entries of dim {dim} over the {size} ranks of axis {axis!r} leaves"
            f" {x.shape[dim] % size} over",
            fix="pad it to a multiple; a model that is compiled needs no such padding",
            at=running_line(),
        )
    for one, ranks in sizes.items():
        x = ops.shard(x, dim, one, ranks)
    return x


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _gather_now(x: Tensor, dim: int, axis: str) -> Tensor:
    for one in reversed(axes_of(axis)):
        x = ops.all_gather(x, dim, one, _size(one))
    return x


def _size(axis: str) -> int:
    assert _launch is not None
    names = axis_names(_launch)
    if axis not in names:
        raise MeshError(
            f"the mesh in use has no axis {axis!r}; it has {', '.join(map(repr, names))}",
            fix="name an axis of the mesh that use_mesh was given",
            at=running_line(),
        )
    return int(_launch.mesh.shape[names.index(axis)])


def _checked(name: str, x: object, dim: object, axis: object) -> int:
    """The dim, counted from the left."""
    if not isinstance(x, Tensor):
        raise PlanError(f"md.{name} was given a {type(x).__name__}", fix="give it a tensor", at=running_line())
    if not isinstance(axis, str) and not (isinstance(axis, tuple) and axis and all(isinstance(a, str) for a in axis)):
        raise PlanError(f"md.{name} was given the axis {axis!r}", fix="name an axis of the mesh", at=running_line())
    if not isinstance(dim, int) or isinstance(dim, bool) or not -x.dim() <= dim < x.dim():
        raise PlanError(
            f"md.{name} was given dim {dim!r} of a tensor of {x.dim()} dims",
            fix="give the dimension as an integer" + (f" from -{x.dim()} to {x.dim() - 1}" if x.dim() else ""),
            at=running_line(),
        )
    return dim % x.dim()
