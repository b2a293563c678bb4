"""Every private name of PyTorch that the runtime needs, and what breaks without it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
import torch.distributed as dist


def nccl_backend(group: dist.ProcessGroup, device: torch.device) -> Any:
    """The group's ``ProcessGroupNCCL``.

    PyTorch's public API ends at collectives; the two functions below need the backend itself.

    Raises:
        RuntimeError: the group has no backend for CUDA tensors.
    """
    backend = group._get_backend(torch.device(device.type))
    return getattr(backend, "wrapped_pg", backend)  # TORCH_DISTRIBUTED_DEBUG=DETAIL wraps it


def communicator_pointer(group: dist.ProcessGroup, device: torch.device) -> int:
    """The group's ``ncclComm_t`` on this device as an integer; 0 until the group has run a collective.

    Without it an engine could not share PyTorch's communicator: the runtime would have to make its own with
    ``ncclCommInitRank`` and carry the unique id between the ranks.
    """
    with torch.cuda.device(device):  # the backend looks its communicator up by the current device
        return int(nccl_backend(group, device)._comm_ptr())


def abort(groups: Iterable[dist.ProcessGroup], device: torch.device) -> None:
    """Abort the groups' communicators, so that the GPU leaves the collective it is in.  Best effort.

    Without it an expired wait still ends the process; the GPU's kernels then end with its context.
    """
    for group in groups:
        with suppress(Exception):  # the process ends right after, whatever state the group is in
            nccl_backend(group, device).abort()


def outside_of_compilation() -> AbstractContextManager[Any]:
    """Compile with Inductor as if nothing else was being compiled.

    A Dynamo backend is called inside Dynamo's tracing context, whose fake tensors and parameters are those of the
    whole model; Inductor would take them for those of the part that it is given.
    """
    return torch._guards.tracing(None)


def symmetric_memory(size: int, group: dist.ProcessGroup, device: torch.device) -> tuple[torch.Tensor, Any]:
    """Bytes on this GPU that the GPUs of the group can write, and the handle to theirs.  Collective.

    Without it exchanges run as NCCL's kernels only, which take multiprocessors from what runs beside them.

    Raises:
        RuntimeError: the GPUs have no access to each other's memory.
    """
    from torch.distributed import _symmetric_memory

    memory: torch.Tensor = _symmetric_memory.empty(size, dtype=torch.uint8, device=device)
    return memory, _symmetric_memory.rendezvous(memory, group.group_name)
