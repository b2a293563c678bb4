"""Every private name of PyTorch that the runtime needs, and what breaks without it."""

from __future__ import annotations

import importlib
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

_MATMUL = (
    "fp32_precision",
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
)


class Operand(NamedTuple):
    """What a graph that is compiled will be given."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def like(cls, tensor: torch.Tensor) -> Self:
        """One like this tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)


@contextmanager
def compiling(operands: Sequence[Operand], device: torch.device) -> Iterator[list[torch.Tensor]]:
    """Compile with Inductor as if nothing else was being compiled, for fake tensors like these.

    A Dynamo backend is called inside Dynamo's tracing context, whose fake tensors and parameters are those of the
    whole model; Inductor would take them for those of the part that it is given.  And without fake tensors that have a
    ``ShapeEnv`` Inductor keeps nothing that it compiles, and compiles it again in each process.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with torch._guards.tracing(torch._guards.TracingContext(mode)):
        with mode:
            fakes = [_empty(operand, device) for operand in operands]
        yield fakes


def _empty(operand: Operand, device: torch.device) -> torch.Tensor:
    shape, stride, offset, dtype = operand
    if not offset:
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1
    return torch.empty(last, dtype=dtype, device=device).as_strided(shape, stride, offset)


def inductor_switches() -> bytes:
    """What beside a graph decides what Inductor makes of it in this process, for another process to be alike.

    Without it, one that compiles ahead would compile something that nobody looks for.
    """
    from torch._inductor import config

    matmul = {name: getattr(torch.backends.cuda.matmul, name) for name in _MATMUL}
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    return pickle.dumps((config.save_config(), matmul, deterministic, filled))


def inductor_keeps() -> bool:
    """Does Inductor keep what it compiles on disk, and look there?"""
    from torch._inductor import config

    return bool(config.fx_graph_cache and not config.force_disable_caches)


def inductor_folder() -> Path:
    """Where Inductor keeps what it compiled.  Without it nothing is known of what it has."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def set_inductor_switches(switches: bytes) -> None:
    """Be as the process that told these."""
    from torch._inductor import config

    inductor, matmul, (deterministic, warn_only), filled = pickle.loads(switches)
    config.load_config(inductor)
    for name, value in matmul.items():
        if getattr(torch.backends.cuda.matmul, name) != value:
            setattr(torch.backends.cuda.matmul, name, value)
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def load_inductor() -> None:
    """Import what Inductor needs to find a graph in its caches, which takes seconds."""
    importlib.import_module("torch._inductor.compile_fx")


def import_inductor(device: torch.device) -> None:
    """Have Inductor import what it does while it compiles its first graph, which takes seconds.

    It takes nothing from its caches: what finds its graph there imports next to nothing.
    """
    with torch._functorch.config.patch(enable_autograd_cache=False), torch.no_grad():
        graph = make_fx(lambda x, y: [torch.nn.functional.gelu(torch.mm(x, y)).softmax(-1)])(*torch.ones(2, 8, 8))
        operands = [Operand((8, 8), (8, 1), 0, torch.float32)] * 2
        with compiling(operands, device) as fakes:
            torch._inductor.compile(graph, [*fakes], options={"fx_graph_cache": False})


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
