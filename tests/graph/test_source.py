"""The user's line that an error cites."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchtrt_md as md
from torchtrt_md.errors import CaptureError
from torchtrt_md.graph.source import error_line, source_line

HERE = Path(__file__).name
ONE = md.Mesh(tp=1)


def line_of(function: Callable[..., object], offset: int = 1) -> int:
    return function.__code__.co_firstlineno + offset


def shared(x: Tensor) -> Tensor:
    return torch.rand_like(x)


class CallsShared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + shared(x)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = CallsShared()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)
        return result


def test_the_innermost_line_and_the_forward_that_led_to_it() -> None:
    with pytest.raises(CaptureError, match="draws random numbers") as caught:
        md.capture(Outer(), (torch.randn(2),), mesh=ONE)
    file = __file__
    assert caught.value.at == (
        f"{file}:{line_of(shared)} in shared: return torch.rand_like(x)"
        f" (called from {file}:{line_of(CallsShared.forward)} in forward)"
    )


def test_a_line_in_a_forward_is_cited_alone() -> None:
    class Draws(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    with pytest.raises(CaptureError) as caught:
        md.capture(Draws(), (torch.randn(2),), mesh=ONE)
    assert caught.value.at.endswith("in forward: return x + torch.rand_like(x)")


def viewed(x: Tensor) -> Tensor:
    return x.view(3, 7)


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return viewed(x)


def test_the_line_of_an_error_that_the_model_raised() -> None:
    with pytest.raises(CaptureError, match="could not be traced") as caught:
        md.capture(Fails(), (torch.randn(2),), mesh=ONE)
    assert f"{HERE}:{line_of(viewed)} in viewed: return x.view(3, 7) (called from" in caught.value.at
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    "parallel",
    [
        md.ContextParallel("tp", plan={"": {"x": md.Split(0)}}),
        md.TensorParallel("tp", plan={"inner": "colwise"}),
    ],
)
def test_a_model_that_is_broken_by_itself_is_not_told_to_mend_its_plan(parallel: md.parallel.Parallel) -> None:
    model = Fails()
    model.inner = nn.Linear(2, 2)
    with pytest.raises(CaptureError, match="could not be traced") as caught:
        md.capture(model, (torch.randn(2),), mesh=ONE, parallel=parallel)
    assert "it fails without a plan, too" in caught.value.fix
    assert "ColwiseParallel" not in caught.value.fix
    assert f"{HERE}:{line_of(viewed)} in viewed" in caught.value.at
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_code_of_pytorch_and_of_python_is_no_users() -> None:
    import copy

    class Uncopied:
        def __deepcopy__(self, memo: object) -> object:
            return torch.zeros(2).view(7)

    with pytest.raises(RuntimeError) as caught:
        copy.deepcopy([Uncopied()])
    assert " in __deepcopy__: return torch.zeros(2).view(7)" in error_line(caught.value)
    with pytest.raises(TypeError) as raised:
        copy.deepcopy([sys])  # raised in Python's own files
    assert f"{HERE}:" in error_line(raised.value)


def test_frames_without_code_do_not_swallow_the_next() -> None:
    frames = [
        traceback.FrameSummary("<stdin>", 3, "forward", line=""),
        traceback.FrameSummary("<stdin>", 1, "helper", line=""),
    ]
    node = torch.fx.Graph().placeholder("x")
    node.stack_trace = "".join(traceback.StackSummary.from_list(frames).format())
    assert source_line(node) == "<stdin>:1 in helper (called from <stdin>:3 in forward)"
    node.stack_trace = ""
    assert source_line(node) == ""


class Mismatched(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.mm(x, x)


def test_what_pytorch_logs_of_a_failing_trace_does_not_reach_the_user() -> None:
    records: list[logging.LogRecord] = []

    class Collects(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    handler = Collects()
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(handler)
    try:
        with pytest.raises(CaptureError, match="same reduction dim"):
            md.capture(Mismatched(), (torch.randn(2, 8),), mesh=ONE)
        assert not records
        with torch._subclasses.FakeTensorMode() as mode, pytest.raises(RuntimeError):
            Mismatched()(mode.from_tensor(torch.randn(2, 8)))
        assert records  # outside of a trace all is as it was
    finally:
        logger.removeHandler(handler)
