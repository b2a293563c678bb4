"""Every axis of the mesh is there, given once, and does something."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.fx import Node

from torchtrt_md.capture.trace import Trace
from torchtrt_md.errors import MeshError, PlanError
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.mesh import Mesh, axes_of, axis_names, joined
from torchtrt_md.parallel import ContextParallel, DataParallel, Parallel
from torchtrt_md.program import Weight


def check_axes(parallels: Sequence[Parallel], mesh: Mesh) -> None:
    """
    Raises:
        MeshError: something is parallel along an axis that the mesh lacks.
        PlanError: two things are parallel along one axis.
    """
    seen: set[str] = set()
    for p in parallels:
        for axis in (p.axis,) if isinstance(p.axis, str) else p.axis:
            mesh.axis_size(axis)
            if axis in seen:
                raise PlanError(f"axis {axis!r} is given twice", fix="give each kind of parallelism its own axis")
            seen.add(axis)


def with_one_name(p: Parallel, mesh: Mesh) -> Parallel:
    """The same with one name for all of its axes; of several, those of one rank are left out.

    Heads are exchanged along all axes but the first, so they are where the first is one of those.
    """
    if isinstance(p.axis, str):
        return p
    assert isinstance(p, ContextParallel)
    axes = [axis for axis in p.axis if mesh.axis_size(axis) > 1] or [*p.axis[:1]]
    return replace(p, axis=joined(axes), strategy=p.strategy if axes[0] == p.axis[0] else "ulysses")


def check_axes_used(
    mesh: Mesh, parallels: Sequence[Parallel], own: DeviceMesh | None, first: Trace, groups: Mapping[str, str]
) -> None:
    """Refuse an axis along which all ranks would do the same work, unless ``DataParallel`` says so.

    Args:
        mesh: of the launch.
        parallels: what is parallel.
        own: the mesh of a model that was parallelized already, whose axes were chosen there.
        first: the first rank's graph.
        groups: name of a process group in it -> its axis.

    Raises:
        MeshError: nothing is split or sent along an axis.
    """
    used = {p.axis for p in parallels if isinstance(p, DataParallel)} | set(axis_names(own) if own is not None else ())
    used |= {s.axis for w in first.sources.values() if isinstance(w, Weight) for s in w.shardings}
    for node in first.graph.graph.nodes:
        used.update(_axes(node, mesh, groups))
    idle = [axis for axis in mesh.names if mesh.axis_size(axis) > 1 and axis not in used]
    if not idle:
        return
    axis = idle[0]
    given = next((type(p).__name__ for p in parallels if axis in axes_of(joined(p.axis))), "")
    why = f"{given}({axis!r}) splits nothing of the model" if given else "nothing is parallel along it"
    raise MeshError(
        f"all {mesh.axis_size(axis)} ranks along axis {axis!r} of {mesh} would do the same work: {why}",
        fix=f"name in the plan what is split; or leave {axis!r} out of the mesh; or pass parallel=[..., "
        f'DataParallel("{axis}")] where each rank along it gets data of its own'
        if given
        else f'pass parallel=TensorParallel("{axis}") or ContextParallel("{axis}"); or leave {axis!r} out of the mesh;'
        f' or pass DataParallel("{axis}") where each rank along it gets data of its own',
    )


def _axes(node: Node, mesh: Mesh, groups: Mapping[str, str]) -> Iterator[str]:
    """The axes that a node communicates or splits along; all, where its group is none that is known here."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    names = {argument.name for argument in node.target._schema.arguments}
    if node.target.namespace == "torchtrt_md" and "axis" in names:
        yield from axes_of(bound_args(node)["axis"])
    elif "group_name" in names:  # of a collective that the model calls itself; lowering says where it cannot be
        group = bound_args(node)["group_name"]
        name = groups.get(getattr(group, "group_name", group))
        yield from mesh.names if name is None else [name]
