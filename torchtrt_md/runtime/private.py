"""Every private name of PyTorch that the runtime needs, and what breaks without it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

# A number that changes where torch.utils.swap_tensors puts another tensor into this object.  Without it that would not
# be noticed: a tensor counts its writes, and a swap is none.  It is asked of each weight in each call, and its getter
# takes two thirds of attrgetter's time.
body_of: Callable[[torch.Tensor], int] = torch._C.TensorBase._cdata.__get__  # type: ignore[attr-defined]


@contextmanager
def compiling(examples: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Compile with Inductor as if nothing else was being compiled, for fake tensors like these, of these shapes.

    A Dynamo backend is called inside Dynamo's tracing context, whose fake tensors and parameters are those of the
    whole model; Inductor would take them for those of the part that it is given.  And without fake tensors that have a
    ``ShapeEnv`` Inductor keeps nothing that it compiles, and compiles it again in each process.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with torch._guards.tracing(torch._guards.TracingContext(mode)):
        yield [mode.from_tensor(example, static_shapes=True) for example in examples]


def by_inductor(
    graph: GraphModule, examples: Sequence[torch.Tensor], options: dict[str, Any]
) -> Callable[..., Sequence[torch.Tensor]]:
    """The graph as Inductor compiles it for such tensors."""
    compiled: Callable[..., Sequence[torch.Tensor]] = torch._inductor.compile(graph, [*examples], options=options)
    return compiled


def start_compile_workers() -> None:
    """Start the processes in which Inductor compiles Triton kernels, several at a time; it does not wait for them.

    They are ready after they have imported PyTorch.  Inductor itself starts them where it compiles its first graph, and
    until they are ready it compiles one kernel after the other in this process, which is what happens without this.
    """
    from torch._inductor.async_compile import AsyncCompile  # it loads more than importing this package may

    if os.environ.get("TORCH_WARM_POOL", "1") == "1":  # PyTorch's own switch
        AsyncCompile.warm_pool()
        getattr(AsyncCompile, "wakeup", lambda: None)()  # of later versions than 2.11, which let idle ones sleep


@contextmanager
def own_cublas_workspaces() -> Iterator[None]:
    """Let a CUDA graph that is captured in here have cuBLAS's workspace in its own memory.

    PyTorch keeps one for each stream, whose address graphs hold.  Where several graphs are captured on a stream, it is
    freed with the first that is destroyed (PyTorch 2.11; pytorch/pytorch#193402), and the others write into memory
    that may be another tensor's.  Without this, results after a recompilation or a closed runner may be wrong.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def symmetric_memory(size: int, group: dist.ProcessGroup, device: torch.device) -> tuple[torch.Tensor, Any]:
    """Bytes on this GPU that the GPUs of the group can write, and the handle to theirs.  Collective.

    Without it exchanges run as NCCL's kernels only.  The memory is no part of PyTorch's pool of such memory, whose
    blocks are used again with the handle that they had: ranks that let go of them at different times, as garbage
    collectors do, would meet in handles of different blocks.

    Raises:
        RuntimeError: the GPUs have no access to each other's memory.
    """
    from torch.distributed import _symmetric_memory

    empty = torch._C._distributed_c10d._SymmetricMemory.empty_strided_p2p
    memory: torch.Tensor = empty((size,), (1,), torch.uint8, device)
    return memory, _symmetric_memory.rendezvous(memory, group.group_name)
