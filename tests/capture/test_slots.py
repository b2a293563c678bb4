"""What a model's modules call beside each other is watched, as attention processors are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import torchtrt_md as md


class Scale:
    """A processor, which is no module."""

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.by


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.processor = nn.Linear(4, 4), Scale(2.0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.processor(self.linear(x))
        return y


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.done = Block(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.done(self.block(x))
        return y


def larger(model: Model) -> None:
    model.block.processor = Scale(3.0)


def a_function(model: Model) -> None:
    model.block.processor = torch.tanh  # type: ignore[assignment]


def gone(model: Model) -> None:
    del model.block.processor


@pytest.mark.parametrize("change", [larger, a_function, gone])
def test_another_processor_is_noticed(change: Callable[[Model], None]) -> None:
    model = Model().eval()
    program = md.capture(model, (torch.randn(2, 4),), mesh=md.Mesh(tp=1))
    assert list(program.weights.replaced()) == []
    change(model)
    ((name, was, _),) = program.weights.replaced()
    assert (name, was) == ("block.processor", None)


def test_what_is_bound_anew_is_the_same() -> None:
    model = Model().eval()
    model.block.own = model.block.forward  # type: ignore[assignment]
    model.block.bound = partial(Block.forward, model.block)  # type: ignore[assignment]
    program = md.capture(model, (torch.randn(2, 4),), mesh=md.Mesh(tp=1))
    model.block.own, model.block.bound = model.block.forward, partial(Block.forward, model.block)  # type: ignore[assignment]
    assert list(program.weights.replaced()) == []
    model.block.bound = partial(Block.forward, Block())  # type: ignore[assignment]
    assert len(list(program.weights.replaced())) == 1


def test_an_equal_processor_is_none() -> None:
    model = Model().eval()
    program = md.capture(model, (torch.randn(2, 4),), mesh=md.Mesh(tp=1))
    model.block.processor = Scale(2.0)
    assert list(program.weights.replaced()) == []
    model.block.processor = Scale(4.0)
    assert len(list(program.weights.replaced())) == 1
