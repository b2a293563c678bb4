"""Tensors that a model's code holds and that are no weights: what they were is in the graphs, so they are watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import torchtrt_md as md
from torchtrt_md.program import ShardedProgram
from torchtrt_md.runtime.weights import WeightGuard

TABLE = torch.ones(8)
CP = md.ContextParallel("cp", plan={"": {"x": md.Split(1)}, "outer": md.Gather(1)})


class Model(nn.Module):
    shared = torch.ones(8)

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 16), nn.Linear(16, 8)
        self.plain, self.unused = torch.ones(8), torch.ones(8)
        self.mask = torch.ones(6, dtype=torch.bool)
        self.tables: dict[str, Any] = {"a": [torch.ones(8), torch.ones(8)], "b": 2}
        self.register_buffer("buffer", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.plain + self.tables["a"][1] * TABLE + self.shared + self.buffer + torch.tensor([1.0])
        positions = self.mask.nonzero()[:, 0]  # known: how many are true is asked
        y: Tensor = self.outer(self.inner(x))
        return y + positions.numel()


def captured(parallel: Any) -> tuple[Model, ShardedProgram]:
    model = Model().eval()
    axis = parallel.axis
    return model, md.capture(model, (torch.randn(1, 6, 8),), mesh=md.Mesh({axis: 2}), parallel=parallel)


PLANS = {
    "context": CP,
    "tensor": md.TensorParallel("tp", {"inner": "colwise", "outer": "rowwise"}),
    "DTensor": md.TensorParallel("tp", {"inner": ColwiseParallel(), "outer": RowwiseParallel()}),
}


@pytest.mark.parametrize("parallel", PLANS.values(), ids=PLANS)
def test_what_the_trace_met_is_watched(parallel: Any) -> None:
    model, program = captured(parallel)
    constants = {c.name: c.tensor for c in program.weights.constants}
    own = {"plain": model.plain, "mask": model.mask, "tables['a'][1]": model.tables["a"][1]}
    assert {name: id(t) for name, t in constants.items() if name in own} == {name: id(t) for name, t in own.items()}
    met = {id(c.tensor) for c in program.weights.constants}
    assert met >= {id(TABLE), id(Model.shared)}
    assert not met & {id(model.unused), id(model.buffer), id(model.tables["a"][0])}


def _replace(model: Model, value: Tensor) -> None:
    model.plain = value


CHANGES: dict[str, tuple[str, Callable[[Model], object]]] = {
    "written": ("'plain'", lambda m: m.plain.mul_(3)),
    "replaced": ("'plain'", lambda m: _replace(m, 5 * torch.ones(8))),
    "of another shape": ("'plain'", lambda m: _replace(m, torch.ones(1))),
    "gone": ("'plain'", lambda m: delattr(m, "plain")),
    "a mask that is known": ("'mask'", lambda m: m.mask[3:].fill_(False)),
    "nested": ("tables['a'][1]", lambda m: m.tables["a"][1].zero_()),
    "nested, replaced": ("tables['a'][1]", lambda m: m.tables.update(a=[torch.ones(8)])),
    "of a class": (r"float32 [8] of the model's code", lambda m: m.shared.add_(0)),
    "of a file": (r"float32 [8] of the model's code", lambda m: TABLE.add_(0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_is_refused_by_name(change: str) -> None:
    name, do = CHANGES[change]
    model, program = captured(CP)
    guard = WeightGuard({}, program.weights.holders, program.weights.constants)
    model.unused.zero_()
    model.tables["b"] = 3
    model.plain = model.plain.clone()  # with the values that it had
    guard.check()
    guard.check()
    do(model)
    with pytest.raises(md.InputError) as raised:
        guard.check()
    assert name in raised.value.problem
    assert "which is no parameter and no buffer, was changed after the model was compiled" in raised.value.problem


def _with_another(model: Model, name: str, module: nn.Module) -> None:
    model._modules[name] = module


def _another(value: float) -> nn.Linear:
    linear = nn.Linear(16, 8)
    nn.init.constant_(linear.weight, value)
    return linear


REPLACED: dict[str, tuple[str, Callable[[Model], object]]] = {
    "a parameter": ("'outer.weight'", lambda m: setattr(m.outer, "weight", nn.Parameter(torch.ones(8, 16)))),
    "by a state": ("'inner.", lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}, assign=True)),
    "a module": ("'outer.", lambda m: _with_another(m, "outer", _another(2.0))),
    "a module that has none": ("'outer.", lambda m: _with_another(m, "outer", nn.Identity())),
    "a buffer": ("'buffer'", lambda m: m.register_buffer("buffer", torch.full((8,), 7.0))),
    "of another dtype": ("'outer.weight'", lambda m: setattr(m.outer, "weight", nn.Parameter(m.outer.weight.double()))),
}


@pytest.mark.parametrize("change", REPLACED)
def test_weights_that_were_replaced_are_refused_by_name(change: str) -> None:
    name, do = REPLACED[change]
    model, program = captured(CP)
    guard = WeightGuard(program.weights.whole, replaced=program.weights.replaced)
    model.outer.weight = nn.Parameter(model.outer.weight.detach().clone())  # with the values that it had
    guard.check()
    guard.check()
    do(model)
    for _ in range(2):
        with pytest.raises(md.InputError, match=f"the weight {name}"):
            guard.check()


class Acting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 16, bias=False), nn.GELU(), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.act(self.up(x)))
        return y


OTHERWISE: dict[str, tuple[str, Callable[[Acting], object]]] = {
    "an activation": ("module 'act'", lambda m: setattr(m, "act", nn.ReLU())),
    "the same with another attribute": ("module 'act'", lambda m: setattr(m, "act", nn.GELU("tanh"))),
    "one that is longer": ("module 'act", lambda m: setattr(m, "act", nn.Sequential(m.act, nn.Identity()))),
    "with weights of its own": ("weight 'act.1.", lambda m: setattr(m, "act", nn.Sequential(m.act, nn.Linear(16, 16)))),
    "a bias where there was none": ("weight 'up.bias'", lambda m: setattr(m.up, "bias", nn.Parameter(torch.ones(16)))),
    "a buffer more": ("weight 'table'", lambda m: m.register_buffer("table", torch.ones(3))),
    "a module more": ("module 'more'", lambda m: m.add_module("more", nn.Identity())),
    "a module less": ("module 'act'", lambda m: delattr(m, "act")),
}


@pytest.mark.parametrize("change", OTHERWISE)
def test_modules_that_were_replaced_or_added_are_refused_by_name(change: str) -> None:
    name, do = OTHERWISE[change]
    model = Acting().eval()
    program = md.capture(model, (torch.randn(2, 8),), mesh=md.Mesh(cp=1))
    guard = WeightGuard(program.weights.whole, replaced=program.weights.replaced)
    guard.check()
    model.act = nn.GELU().eval()  # equal to the one that it had
    guard.check()
    do(model)
    for _ in range(2):
        with pytest.raises(md.InputError, match=f"the {name}"):
            guard.check()


def test_what_took_the_place_of_its_equal_is_watched() -> None:
    model, program = captured(CP)
    guard = WeightGuard(program.weights.whole, replaced=program.weights.replaced)
    first = model.outer.weight
    model.outer.weight = nn.Parameter(first.detach().clone())
    guard.check()
    with torch.no_grad():
        first.zero_()
    guard.check()
    with torch.no_grad():
        model.outer.weight.zero_()
    with pytest.raises(md.InputError, match=r"the weight 'outer\.weight'"):
        guard.check()
