"""CUDA graphs of calls, on one GPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from torchtrt_md.runtime.graphs import Budget, Graphs
from torchtrt_md.runtime.steps import Key
from torchtrt_md.segment import Wire

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
X, Y = Wire("input", "x"), Wire("output", "y")


@pytest.fixture(autouse=True)
def own_stream() -> Iterator[None]:
    """Nothing can be captured on the default stream."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        yield
    torch.cuda.synchronize()


def double(inputs: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    return {Y: inputs[X] * 2}


def waits(inputs: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    torch.cuda.current_stream().synchronize()  # which no capture allows
    return double(inputs)


def x(*shape: int) -> dict[Key, Tensor]:
    return {X: torch.randn(*shape, device="cuda")}


def graphs_of(run: object, count: int = 2, *, static_outputs: bool = False) -> Graphs:
    device = torch.device("cuda", torch.cuda.current_device())
    return Graphs(run, Budget(count), device, static_outputs=static_outputs)  # type: ignore[arg-type]


def test_a_replay_computes_what_a_run_does_on_new_inputs() -> None:
    graphs = graphs_of(double)
    graphs(x(4))
    for _ in range(3):
        inputs = x(4)
        assert torch.equal(graphs(inputs)[Y], inputs[X] * 2)
    assert len(graphs.captured) == 1


def test_results_are_the_callers_own_unless_asked_otherwise() -> None:
    for static in (False, True):
        graphs = graphs_of(double, static_outputs=static)
        graphs(x(4))
        first, inputs = graphs(x(4))[Y], x(4)
        kept = first.clone()
        graphs(inputs)
        assert torch.equal(first, inputs[X] * 2 if static else kept)


def test_new_shapes_are_captured_up_to_the_budget_and_run_without_beyond_it() -> None:
    graphs = graphs_of(double, count=2)
    for size in (2, 3):
        graphs(x(size))
    with pytest.warns(UserWarning, match="max_graphs"):
        graphs(x(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one warning, not one for each call
        inputs = x(4)
        assert torch.equal(graphs(inputs)[Y], inputs[X] * 2)
    assert sum(c is not None for c in graphs.captured.values()) == 2


def test_a_capture_that_fails_is_told_once_with_its_cause_and_calls_go_on() -> None:
    graphs = graphs_of(waits)
    with pytest.warns(UserWarning, match=r"could not be captured.*"):
        graphs(x(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inputs = x(4)
        assert torch.equal(graphs(inputs)[Y], inputs[X] * 2)
