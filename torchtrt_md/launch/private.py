"""Every private name of PyTorch that a launch needs, and what breaks without it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store, _get_default_store


def default_store() -> Store:
    """The key-value store that the process group was made with.

    Without it the votes would need a store of their own, with a port that the user gives.
    """
    return _get_default_store()


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
