"""Context-parallel plans: what they insert, and what is refused."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from torch import nn

import torchtrt_md as md
from torchtrt_md.errors import CaptureError, MeshError, PlanError
from torchtrt_md.program import ShardedProgram, value_of

ops = torch.ops.torchtrt_md
CP2 = md.Mesh(cp=2)


def _nodes(program: ShardedProgram, op: Any) -> list[torch.fx.Node]:
    return list(program.graphs[0].graph.find_nodes(op="call_function", target=op))


def test_flux_by_its_own_plan() -> None:
    model, args, kwargs = models.flux()
    program = md.capture(model, args, kwargs, mesh=md.Mesh(cp=4), parallel=md.ContextParallel("cp"))
    shards = _nodes(program, ops.split_sequence.default)
    assert [tuple(value_of(n).shape) for n in shards] == [(1, 32, 16), (1, 16, 32), (32, 3), (16, 3)]
    assert len(_nodes(program, ops.gather_sequence.default)) == 1
    assert len(_nodes(program, ops.attention.default)) == 3
    assert len(program.distinct()) == 1
    assert {v.name for v in program.inputs} == set(kwargs) - {"return_dict"}
    assert program.constants == {"return_dict": False}


def test_the_model_is_left_as_it_was() -> None:
    model, args, kwargs = models.flux()
    before = {name: id(p) for name, p in model.named_parameters()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    md.capture(model, args, kwargs, mesh=CP2, parallel=md.ContextParallel("cp"))
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks


class TwoResults(nn.Module):
    def forward(
        self, x: torch.Tensor, pair: list[torch.Tensor], flag: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return x + pair[0], x * pair[1]


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([TwoResults(), TwoResults()])

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, b = self.blocks[0](x, [y, y])
        c, d = self.blocks[1](a, pair=[b, y], flag=False)
        result: torch.Tensor = c + d
        return result


def test_results_lists_wildcards_and_positions() -> None:
    plan = {
        "": {"y": md.Split(-2)},
        "blocks.0": {"x": md.Split(1, ndim=3)},
        "blocks.1": {"x": md.Split(1, ndim=2)},  # another number of dims: not split
        "blocks.*": [md.Gather(1), None],
    }
    x, y = torch.randn(2, 8, 4), torch.randn(2, 8, 4)
    program = md.capture(
        Outer(), (x, y), mesh=CP2, parallel=md.ContextParallel("cp", plan={k: plan[k] for k in ("", "blocks.0")})
    )
    assert [value_of(n).shape[1] for n in _nodes(program, ops.split_sequence.default)] == [8, 8]
    program = md.capture(
        TwoResults(),
        (x, [y, y]),
        mesh=CP2,
        parallel=md.ContextParallel("cp", plan={"": {"x": md.Split(1), "pair": [md.Split(1), md.Split(1)]}}),
    )
    assert len(_nodes(program, ops.split_sequence.default)) == 3
    assert [v.name for v in program.inputs] == ["x", "pair.0", "pair.1"]  # though one tensor
    program = md.capture(
        TwoResults(),
        (x, [y, y]),
        mesh=CP2,
        parallel=md.ContextParallel("cp", plan={"": {0: md.Split(1, output=True)}}),
    )
    assert len(_nodes(program, ops.split_sequence.default)) == 1
    assert program.constants == {}


@pytest.mark.parametrize(
    ("plan", "problem", "fix"),
    [
        ({"block.0": {"x": md.Split(1)}}, "module 'block.0'", "'blocks.0'"),
        ({"blocks.0": {"z": md.Split(1)}}, "argument 'z' of module 'blocks.0', which takes x, pair, flag", "name one"),
        ({"": {"x": md.Split(3)}}, "argument 'x' of the model has 3 dims", "correct the plan"),
        ({"": {"x": "split"}}, "'split' for argument 'x' of the model, which does not say how", "md.Split"),
        ({"blocks.0": "gather"}, "'gather' for module 'blocks.0', which does not say where to gather", "md.Gather"),
    ],
)
def test_plans_that_do_not_fit(plan: dict[str, Any], problem: str, fix: str) -> None:
    with pytest.raises(PlanError, match=problem) as error:
        md.capture(
            Outer(),
            (torch.randn(2, 8, 4), torch.randn(2, 8, 4)),
            mesh=CP2,
            parallel=md.ContextParallel("cp", plan=plan),
        )
    assert fix in error.value.fix


def test_a_model_without_a_plan() -> None:
    model, args, kwargs = models.attention()
    with pytest.raises(PlanError, match="SelfAttention has no context-parallel plan"):
        md.capture(model, args, kwargs, mesh=CP2, parallel=md.ContextParallel("cp"))


def test_an_axis_that_the_mesh_lacks() -> None:
    model, args, kwargs = models.flux()
    with pytest.raises(MeshError, match="no axis 'tp'; it has 'cp'"):
        md.capture(model, args, kwargs, mesh=CP2, parallel=md.ContextParallel("tp"))


def test_an_unknown_strategy() -> None:
    with pytest.raises(PlanError, match="no context-parallel strategy 'rong'"):
        md.ContextParallel("cp", strategy="rong")  # type: ignore[arg-type]


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x
        return -x


class Draws(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


class Writes(nn.Module):
    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.calls


@pytest.mark.parametrize(
    ("model", "problem", "line"),
    [
        (Branches(), "what is done next, depends on the values of tensors", "if x.sum() > 0:"),
        (Draws(), "draws random numbers", "return x + torch.rand_like(x)"),
        (Writes(), "writes to an input or a buffer", "self.calls += 1"),
        (nn.Dropout(), "draws random numbers", ""),
    ],
)
def test_models_that_are_no_graph_are_refused_with_their_line(model: nn.Module, problem: str, line: str) -> None:
    with pytest.raises(CaptureError, match=problem) as error:
        md.capture(model, (torch.randn(2, 8),), mesh=CP2)
    if line:
        assert line in error.value.at
        assert "test_context_parallel.py" in error.value.at


def test_arguments_that_the_model_does_not_take() -> None:
    with pytest.raises(CaptureError, match="cannot be called with the example arguments"):
        md.capture(models.MLP(), (), {"y": torch.ones(1)}, mesh=CP2)
    with pytest.raises(CaptureError, match="no argument is a tensor"):
        md.capture(nn.Identity(), (3,), mesh=CP2)


class Box:
    """A class that PyTorch does not know the parts of."""


class Returns(nn.Module):
    def __init__(self, what: object) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: torch.Tensor) -> object:
        return self.what


@pytest.mark.parametrize(("what", "problem"), [(3, "returns no tensor"), (None, "returns no tensor"), (Box(), "a Box")])
def test_results_that_are_no_tensors(what: object, problem: str) -> None:
    with pytest.raises(CaptureError, match=problem):
        md.capture(Returns(what), (torch.randn(2),), mesh=CP2)
