"""The private names of PyTorch that the runtime needs are there; each test says what goes without its name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed import _symmetric_memory
from torch.fx.experimental.proxy_tensor import make_fx

from torchtrt_md.runtime import private
from torchtrt_md.runtime.inductor import compile_graph, prepare

nccl = pytest.importorskip("torch._C._distributed_c10d", reason="PyTorch without distributed")


@pytest.mark.parametrize("name", ["get_buffer", "barrier", "empty_strided_p2p"])
def test_shared_memory_has(name: str) -> None:
    assert hasattr(nccl._SymmetricMemory, name), "exchanges would be NCCL's kernels only"
    assert hasattr(_symmetric_memory, "rendezvous")


def test_inductor_can_be_called_inside_dynamos_backend() -> None:
    models = torch._guards.TracingContext(None)
    with torch._guards.tracing(models):
        x = torch.randn(3, 4)[:, 1:]
        with private.compiling([x]) as (like,):
            own = torch._guards.TracingContext.try_get()
            assert own is not None
            assert own is not models, "it would take the model's fake tensors for its own"
        assert (like.shape, like.stride(), like.storage_offset()) == (x.shape, x.stride(), x.storage_offset())
        assert not any(isinstance(size, torch.SymInt) for size in like.shape)
        assert torch._guards.TracingContext.try_get() is models


def test_inductor_keeps_what_it_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each process, and each program of a launch, compiles all of it again."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x, w = torch.randn(5, 7), nn.Parameter(torch.randn(7, 3))
    graph = make_fx(lambda x, w: [torch.tanh(x @ w) + 2, w.t()[1:]])(x, w)
    for found in ("miss", "hit"):
        before = counters["inductor"][f"fxgraph_cache_{found}"]
        call = compile_graph("a part", graph, lambda number: [x, w], torch.device("cpu"))
        assert counters["inductor"][f"fxgraph_cache_{found}"] == before + 1
        for other in (x, torch.randn(5, 7), torch.randn(41)[1:36].view(5, 7)):  # the last is not aligned
            for got, expected in zip(call(other, w), graph(other, w), strict=True):
                torch.testing.assert_close(got, expected)


def test_cublas_workspaces_can_be_cleared() -> None:
    assert hasattr(torch._C, "_cuda_clearCublasWorkspaces"), "CUDA graphs of one stream would share a workspace"


def test_a_swap_changes_the_body_of_a_tensor_and_nothing_else_does() -> None:
    one, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    body = private.body_of(one)
    one.data = torch.ones(2)
    assert private.body_of(one) == body
    torch.utils.swap_tensors(one, other)  # type: ignore[no-untyped-call]
    assert private.body_of(one) != body, "weights that were swapped would not be noticed"


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
