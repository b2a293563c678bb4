"""Every private name of PyTorch that the runtime needs, and what breaks without it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist


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
