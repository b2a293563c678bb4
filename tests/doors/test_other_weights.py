"""Modules that share what ``torch.compile`` made of one: their weights are compared too, and watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import torch
from in_pytorch import message_of
from rank_processes import Ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import torchtrt_md as md
from torchtrt_md.verification.compare import relative_error

OPTIONS: dict[str, Any] = {"compute": "inductor", "report": False, "timeout": 120.0}
PLAN = md.TensorParallel("tp", {"up": "colwise", "down": "rowwise"})


def of_two_checkpoints(rank: int) -> tuple[float, str]:
    """The error of the first module, and what comes of a second, of which this rank has loaded other weights."""
    options = {**OPTIONS, "mesh": md.Mesh(tp=2), "parallel": PLAN}
    first, (x,), _ = models.mlp()
    second: Any = models.mlp()[0]
    torch.compiler.reset()
    with torch.no_grad():
        second.up.weight.mul_(1 + rank)
        compiled: list[Any] = [torch.compile(m, backend="torchtrt_md", options=options) for m in (first, second)]
        error = relative_error(compiled[0](x), first(x))
        return error, message_of(lambda: compiled[1](x))


def test_the_weights_of_another_module_are_compared_among_the_ranks(ranks: Ranks) -> None:
    for outcome in ranks(of_two_checkpoints):
        assert not outcome.error, outcome.message
        error, refused = outcome.value
        assert error < 1e-5
        assert refused.startswith("RankMismatchError: ")
        assert "up.weight' is not the same" in refused


def swapped(rank: int) -> tuple[float, str]:
    """The error of a sharded module, and what comes of it with the weight of another."""
    torch.compiler.reset()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    made = [models.mlp() for _ in range(2)]
    x = made[0][1][0]
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    sharded: list[Any] = [parallelize_module(m, mesh, plan) for m, _, _ in made]
    one, other = sharded
    with torch.no_grad():
        compiled: Any = torch.compile(one, backend="torchtrt_md", options=OPTIONS)
        error = relative_error(compiled(x), one(x))
        torch.utils.swap_tensors(one.up.weight, other.up.weight)  # type: ignore[no-untyped-call]
        return error, message_of(lambda: compiled(x))


def test_a_sharded_weight_that_another_is_swapped_for_is_noticed(ranks: Ranks) -> None:
    for outcome in ranks(swapped):
        assert not outcome.error, outcome.message
        error, refused = outcome.value
        assert error < 1e-5
        assert refused.startswith("InputError: ")
        assert "was changed" in refused


def moved(rank: int) -> tuple[list[float], str]:
    """The errors of a sharded module before and behind a move to where it is, and what comes of a write then."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model, (x,), _ = models.mlp()
    sharded: Any = parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    with torch.no_grad(), md.compile(sharded, (x,), **OPTIONS) as runner:
        errors = [relative_error(runner(x), sharded(x))]
        moves: list[Callable[[], object]] = [lambda: sharded.to("cpu"), sharded.float]
        for move in moves:
            move()
            errors.append(relative_error(runner(x), sharded(x)))
        sharded.up.weight.mul_(2)
        return errors, message_of(lambda: runner(x))


def test_a_sharded_model_that_is_moved_to_where_it_is_runs_on(ranks: Ranks) -> None:
    for outcome in ranks(moved):
        assert not outcome.error, outcome.message
        errors, refused = outcome.value
        assert max(errors) < 1e-5
        assert "up.weight' was changed after the model was compiled" in refused
