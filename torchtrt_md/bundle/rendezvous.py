"""Do the ranks of a manifest meet at their collectives?  If not, a call would hang."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torchtrt_md.errors import BundleError
from torchtrt_md.mesh import Mesh
from torchtrt_md.program import dtype_name
from torchtrt_md.segment import Collective, Segment

_REBUILD = "export the bundle again; do not edit manifest.json by hand"


def check_rendezvous(mesh: Mesh, ranks: Sequence[Sequence[Segment]]) -> None:
    """Walk all ranks through their collectives, in order: each is entered by all of its group, or nobody leaves it.

    Args:
        mesh: the manifest's.
        ranks: its segments by rank; their collectives are on axes of the mesh.

    Raises:
        BundleError: naming two ranks and where they stand.
    """
    todo = [[c for segment in segments for c in segment.collectives] for segments in ranks]
    axes = {c.axis for collectives in todo for c in collectives}
    groups = {axis: _groups(mesh, axis) for axis in axes}
    at = [0] * mesh.size
    waiting: dict[tuple[str, int], list[int]] = {}
    moving = list(range(mesh.size))
    while moving:
        rank = moving.pop()
        if at[rank] == len(todo[rank]):
            continue
        mine = todo[rank][at[rank]]
        group = (mine.axis, groups[mine.axis][rank])
        there = waiting.setdefault(group, [])
        if there and todo[there[0]][at[there[0]]] != mine:
            _refuse(mesh, rank, there[0], todo, at)
        there.append(rank)
        if len(there) == mesh.axis_size(mine.axis):
            for member in waiting.pop(group):
                at[member] += 1
                moving.append(member)
    for (axis, _), there in sorted(waiting.items()):
        absent = next(rank for rank in mesh.ranks(axis, there[0]) if rank not in there)
        _refuse(mesh, there[0], absent, todo, at)


def _groups(mesh: Mesh, axis: str) -> list[int]:
    """For each rank a number that those of its group along the axis have, too."""
    size, stride = mesh.axis_size(axis), math.prod(mesh.shape[mesh.names.index(axis) + 1 :])
    return [rank // (stride * size) * stride + rank % stride for rank in range(mesh.size)]


def _refuse(mesh: Mesh, rank: int, other: int, todo: Sequence[Sequence[Collective]], at: Iterable[int]) -> None:
    steps = list(at)
    first, second = (_where(r, todo[r], steps[r]) for r in sorted((rank, other)))
    raise BundleError(f"the ranks of {mesh} would wait for each other: {first}, and {second}", fix=_REBUILD)


def _where(rank: int, collectives: Sequence[Collective], step: int) -> str:
    if step == len(collectives):
        return f"rank {rank} has finished after {step} collectives"
    c = collectives[step]
    return (
        f"rank {rank} stands at its collective {step}, {c.op} on axis {c.axis!r} of {c.elements} {dtype_name(c.dtype)}"
    )
