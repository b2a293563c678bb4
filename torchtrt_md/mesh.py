"""The mesh: named axes over the ranks of a launch.

Every collective of a program names an axis of the mesh, never a process group, so one graph serves
all ranks and can be stored.  Rank ``r`` sits at the row-major coordinate of ``r``, as in
:class:`torch.distributed.device_mesh.DeviceMesh`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torchtrt_md.errors import MeshError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


# Axis names become parts of the names of graph inputs and of engine bindings.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SIZE = re.compile(r"[0-9]{1,9}")


JOINED = "+"  # between the axes over which one sequence is split; no axis has it in its name
OF_A_CAPTURE = " of "  # between axis and mesh in the names of the fake meshes that captures make


def joined(axes: str | Sequence[str]) -> str:
    """One name for the axes over which one sequence is split: ``"ring+ulysses"``.

    Rank (r, u) of R x U has chunk ``r * U + u``: the last axis varies fastest, as in a mesh.
    """
    return axes if isinstance(axes, str) else JOINED.join(axes)


def axes_of(axis: str) -> tuple[str, ...]:
    """The axes of the mesh that a name stands for: one, or those that were :func:`joined`."""
    return tuple(axis.split(JOINED))


def shown(axis: str) -> str:
    """An axis, or several that were :func:`joined`, as the source of a program has them."""
    quoted = [f'"{one}"' for one in axes_of(axis)]
    return quoted[0] if len(quoted) == 1 else f"({', '.join(quoted)})"


def axis_names(device_mesh: DeviceMesh) -> tuple[str, ...]:
    """The names of a ``DeviceMesh``'s dims: its own, or ``dim0``, ``dim1`` and so on where it has none."""
    names = device_mesh.mesh_dim_names or tuple(f"dim{i}" for i in range(device_mesh.ndim))
    return tuple(name.partition(OF_A_CAPTURE)[0] for name in names)


class Mesh:
    """Ordered axis names and sizes: ``Mesh(cp=2, tp=2)`` has 4 ranks, ``tp`` varying fastest.

    ``Mesh({"cp": 2, "tp": 2})`` is the same, for names that are not written in the source.

    Raises:
        MeshError: no axis, a name that is no identifier, or a size that is not a positive integer.
    """

    def __init__(self, axes: Mapping[str, int] | None = None, /, **named: int) -> None:
        if axes is not None and not isinstance(axes, Mapping):
            text = isinstance(axes, str)
            raise MeshError(
                f"{axes!r} is not a mapping of axis names to sizes",
                fix=f"write Mesh.parse({axes!r})" if text else 'name the axes: Mesh(cp=4), or Mesh({"cp": 4})',
            )
        twice = next((name for name in named if name in (axes or {})), None)
        if twice is not None:
            raise MeshError(f"axis {twice!r} of the mesh is given twice", fix="name each axis once")
        axes = {**(axes or {}), **named}
        if not axes:
            raise MeshError("a mesh needs at least one axis", fix="name one, e.g. Mesh(cp=4)")
        for name, size in axes.items():
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise MeshError(
                    f"an axis of the mesh has the name {name!r}",
                    fix="use letters, digits and _, and begin with no digit: cp, tp_2",
                )
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise MeshError(
                    f"axis {name!r} of the mesh has size {size!r}",
                    fix="give the number of ranks along it, an integer of at least 1",
                )
        self.axes: dict[str, int] = dict(axes)

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """The mesh of a command line: ``"cp=4"``, ``"cp=2,tp=2"``.

        Raises:
            MeshError: the text is not of that form.
        """
        axes: dict[str, int] = {}
        for part in text.split(",") if isinstance(text, str) else [""]:
            name, _, size = (piece.strip() for piece in part.partition("="))
            if not _NAME.fullmatch(name) or not _SIZE.fullmatch(size) or name in axes:
                raise MeshError(f"{text!r} is not a mesh", fix="write each axis once, as name=size: cp=2,tp=2")
            axes[name] = int(size)
        return cls(axes)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.axes.values())

    @property
    def size(self) -> int:
        """Number of ranks."""
        return math.prod(self.axes.values())

    def axis_size(self, axis: str) -> int:
        """Number of ranks along one axis.

        Raises:
            MeshError: the mesh has no such axis.
        """
        if axis not in self.axes:
            raise MeshError(
                f"the mesh has no axis {axis!r}; it has {', '.join(map(repr, self.axes))}",
                fix=f"name one of these, or make the mesh with an axis {axis!r} too",
            )
        return self.axes[axis]

    def joined_size(self, axis: str) -> int:
        """Number of ranks over which a sequence is split along one axis, or along several that are :func:`joined`.

        Raises:
            MeshError: as :meth:`axis_size`.
        """
        return math.prod(map(self.axis_size, axes_of(axis)))

    def coordinate(self, rank: int, axis: str) -> int:
        """Where ``rank`` stands along ``axis``: 0 .. axis_size - 1.

        Raises:
            MeshError: no such rank or axis.
        """
        if not 0 <= rank < self.size:
            raise MeshError(f"rank {rank} is not in {self}", fix=f"ranks are 0 .. {self.size - 1}")
        return rank // self._stride(axis) % self.axis_size(axis)

    def ranks(self, axis: str, rank: int) -> tuple[int, ...]:
        """The ordered global ranks of the group along ``axis``, one or several :func:`joined`, that ``rank`` is in."""
        found = [rank]
        for one in axes_of(axis):
            stride = self._stride(one)
            firsts = [at - self.coordinate(at, one) * stride for at in found]
            found = [first + i * stride for first in firsts for i in range(self.axis_size(one))]
        return tuple(found)

    def groups(self, axis: str) -> tuple[tuple[int, ...], ...]:
        """All groups along ``axis``, in the order of their first rank."""
        return tuple(dict.fromkeys(self.ranks(axis, rank) for rank in range(self.size)))

    def _stride(self, axis: str) -> int:
        self.axis_size(axis)
        names = list(self.axes)
        return math.prod(self.shape[names.index(axis) + 1 :])

    @classmethod
    def from_device_mesh(cls, device_mesh: DeviceMesh) -> Mesh:
        """The mesh with a ``DeviceMesh``'s names, as :func:`axis_names` has them, and sizes.

        Raises:
            MeshError: its ranks are not 0 .. n-1 in row-major order.
        """
        ranks = device_mesh.mesh.flatten().tolist()
        if ranks != list(range(len(ranks))):
            raise MeshError(
                f"the DeviceMesh holds ranks {ranks}",
                fix="make it with init_device_mesh over the whole launch, so that they are 0 .. n-1 in order",
            )
        return cls(dict(zip(axis_names(device_mesh), device_mesh.mesh.shape, strict=True)))

    def to_device_mesh(self, device_type: str = "cuda") -> DeviceMesh:
        """A ``DeviceMesh`` of this shape over the initialized process group.

        Raises:
            MeshError: no process group, or one of another size.
        """
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        if not dist.is_initialized():
            raise MeshError(
                "there is no process group to make a DeviceMesh on",
                fix="launch with torchrun and call torch.distributed.init_process_group first",
            )
        self.check_launch(dist.get_world_size())
        return init_device_mesh(device_type, self.shape, mesh_dim_names=self.names)

    def check_launch(self, world_size: int) -> None:
        """Refuse a launch of another size.

        Raises:
            MeshError: saying both sizes.
        """
        if world_size != self.size:
            raise MeshError(
                f"{self} has {self.size} ranks and the launch has {world_size}",
                fix=f"launch {self.size} processes in all (on one host: torchrun --nproc_per_node={self.size}), or use"
                f" a mesh of {world_size} ranks",
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mesh) and list(self.axes.items()) == list(other.axes.items())

    def __hash__(self) -> int:
        return hash(tuple(self.axes.items()))

    def __repr__(self) -> str:
        return f"Mesh({', '.join(f'{name}={size}' for name, size in self.axes.items())})"
