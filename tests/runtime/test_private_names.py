"""The private names of PyTorch that the runtime needs are there; each test says what goes without its name."""

from __future__ import annotations

import pytest
import torch
from torch.distributed import _symmetric_memory

from torchtrt_md.runtime import private
from torchtrt_md.runtime.inductor import prepare

nccl = pytest.importorskip("torch._C._distributed_c10d", reason="PyTorch without distributed")


@pytest.mark.parametrize("name", ["get_buffer", "barrier"])
def test_shared_memory_has(name: str) -> None:
    assert hasattr(nccl._SymmetricMemory, name), "exchanges would be NCCL's kernels only"
    assert {"empty", "rendezvous"} <= set(dir(_symmetric_memory))


def test_inductor_can_be_called_inside_dynamos_backend() -> None:
    with torch._guards.tracing(torch._guards.TracingContext(None)):
        assert torch._guards.TracingContext.try_get() is not None
        with private.outside_of_compilation():
            assert torch._guards.TracingContext.try_get() is None, "it would take the model's fake tensors for its own"


def test_cublas_workspaces_can_be_cleared() -> None:
    assert hasattr(torch._C, "_cuda_clearCublasWorkspaces"), "CUDA graphs of one stream would share a workspace"


def test_inductors_workers_can_be_started_early(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.async_compile import AsyncCompile

    called: list[str] = []
    for name in ("warm_pool", "wakeup"):
        assert hasattr(AsyncCompile, name), "the first kernels would be compiled one after the other"
        monkeypatch.setattr(AsyncCompile, name, lambda name=name: called.append(name))
    monkeypatch.setenv("TORCH_WARM_POOL", "0")
    private.start_compile_workers()
    assert not called
    monkeypatch.delenv("TORCH_WARM_POOL")
    prepare(torch.device("cpu"))
    assert not called
    prepare(torch.device("cuda"))
    assert called == ["warm_pool", "wakeup"]
