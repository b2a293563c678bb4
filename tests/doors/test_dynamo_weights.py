"""Weights under torch.compile: replaced, written to, of several equal modules; and inputs that are still under way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import models
import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from in_pytorch import TP_PLAN, InPyTorch, compiled, error, message_of
from rank_processes import Ranks
from torch import Tensor, nn
from torch.distributed import _functional_collectives as funcol
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import torchtrt_md as md
from torchtrt_md.doors.dynamo import compile_graph
from torchtrt_md.errors import InputError


def blocks(count: int, mesh: Any) -> nn.Sequential:
    """Equal layers, each sharded by itself."""
    torch.manual_seed(0)
    return nn.Sequential(*(parallelize_module(models.MLP(), mesh, TP_PLAN) for _ in range(count))).eval()


def equal_modules(rank: int, how: str) -> tuple[list[float], int]:
    torch.compiler.reset()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    build, x = InPyTorch(), torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    backend = partial(compile_graph, build=build)
    model = blocks(3, mesh)
    with torch.no_grad():
        want = model(x)
        if how == "layer.compile()":
            for layer in model:
                layer.compile(backend=backend)
            calls: list[Callable[[], Any]] = [lambda: model(x)] * 2
            wants = [want] * 2
        elif how == "layers replaced":
            for i, layer in enumerate(model):
                model[i] = torch.compile(layer, backend=backend)  # type: ignore[assignment]
            calls, wants = [lambda: model(x)] * 2, [want] * 2
        else:
            wants = [layer(x) for layer in model] * 2
            compiled_layers = [torch.compile(layer, backend=backend) for layer in model]
            calls = [*(partial(c, x) for c in compiled_layers)] * 2
        return [error(call(), w) for call, w in zip(calls, wants, strict=True)], len(build.programs)


@pytest.mark.parametrize("how", ["layer.compile()", "layers replaced", "models"])
def test_equal_modules_share_a_program_and_keep_their_own_weights(ranks: Ranks, how: str) -> None:
    for outcome in ranks(equal_modules, how):
        assert not outcome.error, outcome.message
        errors, programs = outcome.value
        assert max(errors) < 1e-5
        assert programs == 1


def changed_on_one_rank(rank: int) -> str:
    torch.compiler.reset()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = parallelize_module(models.MLP(), mesh, TP_PLAN).eval()
    call = compiled(model, InPyTorch())
    x = torch.ones(2, 8, 32)
    with torch.no_grad():
        call(x)
        if rank == 1:
            model.get_submodule("down").get_parameter("bias").to_local().add_(1)  # type: ignore[attr-defined]
        return message_of(lambda: call(x))


def test_a_weight_that_changes_on_one_rank_is_an_error_on_all(ranks: Ranks) -> None:
    first, second = ranks(changed_on_one_rank)
    assert first == second
    assert first.value.startswith("InputError: rank 1: 'down.bias' was changed or replaced"), first


def in_flight(rank: int) -> tuple[list[float], list[float]]:
    """A graph that waits for an input, and one whose input is what an eager layer has still under way."""
    torch.compiler.reset()
    world: Any = dist.group.WORLD
    ops = torch.ops._c10d_functional

    def waits(reduced: Tensor, x: Tensor) -> Tensor:
        result: Tensor = ops.wait_tensor(reduced) + x
        return result

    call, errors = compiled(waits, InPyTorch(), check=False), []
    with torch.no_grad():
        for size in (256, 512):
            x = torch.ones(size, size) + rank
            want = waits(ops.all_reduce(x, "sum", world.group_name), x)
            errors.append(error(call(ops.all_reduce(x, "sum", world.group_name), x), want))
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        first, second = blocks(2, mesh)
        x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
        want = second(first(x))
        layer = compiled(second, InPyTorch())
        return errors, [error(layer(first(x)), want) for _ in range(2)]


def test_a_wait_is_a_wait(ranks: Ranks) -> None:
    for outcome in ranks(in_flight):
        assert not outcome.error, outcome.message
        waited, async_inputs = outcome.value
        assert max(*waited, *async_inputs) < 1e-5


def another_models_weights(rank: int, how: str) -> list[float]:
    """Two models of one class share a graph; of one of them the weights change."""
    torch.compiler.reset()
    torch.manual_seed(0)
    first, second = models.MLP(), models.MLP()
    parallel = md.TensorParallel("tp", {"up": "colwise", "down": "rowwise"})
    options: dict[str, Any] = {
        "compute": "inductor",
        "report": False,
        "timeout": 60.0,
        "mesh": md.Mesh(tp=2),
        "parallel": parallel,
    }
    a, b = (torch.compile(m.eval(), backend="torchtrt_md", options=options) for m in (first, second))
    x = torch.ones(2, 32)
    with torch.no_grad():
        a(x)
        b(x)
        if how == "written":
            first.down.weight.mul_(2)
            return [error(b(x), second(x))]
        first.load_state_dict({name: 2 * t for name, t in first.state_dict().items()}, assign=True)
        return [error(a(x), first(x)), error(b(x), second(x))]


@pytest.mark.parametrize("how", ["written", "replaced"])
def test_a_model_is_not_refused_for_the_weights_of_another(how: str, ranks: Ranks) -> None:
    for outcome in ranks(another_models_weights, how):
        assert not outcome.error, outcome.message
        assert max(outcome.value) < 1e-5


def views_of_inputs_that_shared_memory(rank: int) -> list[float]:
    torch.compiler.reset()

    world: Any = dist.group.WORLD

    def f(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return funcol.all_reduce(q, "sum", world), k[:, 1:]

    call = compiled(f, InPyTorch(), check=False)
    with torch.no_grad():
        call(*torch.randn(4, 16).chunk(2, 1))
        # Of the same shapes and strides, and of memory of their own.
        q, k = torch.zeros(8, 16)[:4, :8], torch.full((4, 16), 7.0)[:, :8]
        return list(call(q, k)[1].flatten().tolist())


def test_a_view_is_of_the_input_that_the_graph_looks_at(ranks: Ranks) -> None:
    """Not of another one that shared its memory in the first call."""
    for outcome in ranks(views_of_inputs_that_shared_memory):
        assert not outcome.error, outcome.message
        assert set(outcome.value) == {7.0}


# --- one process ---


def test_weights_that_were_replaced_are_used() -> None:
    model, other, x = models.MLP(), models.MLP(), torch.ones(2, 32)
    call = compiled(model, InPyTorch())
    with torch.no_grad():
        call(x)
        model.load_state_dict(other.state_dict(), assign=True)
        assert error(call(x), other(x)) < 1e-5


@pytest.mark.parametrize("change", ["written", "moved"])
def test_a_weight_that_changed_is_refused(change: str) -> None:
    model, x = models.MLP(), torch.ones(2, 32)
    call = compiled(model, InPyTorch())
    with torch.no_grad():
        call(x)
        if change == "written":
            model.load_state_dict(models.MLP().state_dict())
        else:
            model.up.weight.data = model.up.weight.data.clone()
        with pytest.raises(InputError, match="was changed or replaced after the model was compiled"):
            call(x)
