"""The times of steps, on the CPU, and TensorRT's profiler, which needs no GPU to be told of times."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from torchtrt_md.runtime.executor import Executor
from torchtrt_md.runtime.report import show_steps, step_groups
from torchtrt_md.runtime.steps import Slot, Step, Values
from torchtrt_md.runtime.timing import WARM_UP, StepTime, profiler, time_steps
from torchtrt_md.segment import Wire

CPU = torch.device("cpu")
X, Y = Wire("input", "x"), Wire("output", "y")
A, B = Wire("value", "a"), Wire("value", "b")


def executor(calls: list[str]) -> Executor:
    def sleeping(name: str, seconds: float, source: Wire, target: Wire) -> Step:
        def run(values: Values) -> None:
            calls.append(name)
            time.sleep(seconds)
            values[target].copy_(values[source] + 1)

        slot = Slot(target, (4,), torch.float32)
        return Step(name, (source,), run, slots=(slot,), communicates=name.startswith("all_reduce"))

    steps = [sleeping("short_1", 0.0, X, A), sleeping("all_reduce_2", 0.03, A, B), sleeping("short_3", 0.0, B, Y)]
    return Executor(steps, fixed={}, outputs=[Y], device=CPU)


def test_each_step_has_its_time_and_calls_stay_right() -> None:
    calls: list[str] = []
    made, x = executor(calls), torch.arange(4.0)
    steps = time_steps(made, {X: x}, 4)
    assert calls == ["short_1", "all_reduce_2", "short_3"] * (WARM_UP + 4)
    assert [(step.name, step.kind) for step in steps] == [
        ("short_1", "op"),
        ("all_reduce_2", "collective"),
        ("short_3", "op"),
    ]
    assert steps[1].ms >= 30
    assert 0 < min(step.ms for step in steps) < steps[1].ms
    assert all(not step.layers for step in steps)
    found: Tensor = made.run({X: x})[Y]
    assert torch.equal(found, x + 3)


def test_a_step_that_fails_is_an_error_and_no_time() -> None:
    def fails(values: Values) -> None:
        raise RuntimeError("no")

    made = Executor([Step("bad", (X,), fails, writes=(Y,))], fixed={}, outputs=[Y], device=CPU)
    with pytest.raises(RuntimeError, match="no"):
        time_steps(made, {X: torch.ones(4)}, 1)


def test_the_profiler_sums_what_tensorrt_tells_it() -> None:
    told = profiler()
    for ms in (1.0, 2.0):
        told.report_layer_time("matmul", ms)
        told.report_layer_time("all_reduce", 4 * ms)
    assert told.means(2) == {"matmul": 1.5, "all_reduce": 6.0}


def test_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    steps = [
        StepTime("block 0", "engine", 2.0, {"fused_matmul": 1.5}),
        StepTime("all_to_all_1", "collective", 1.0),
        StepTime("all_to_all_12", "collective", 3.0),
    ]
    assert step_groups(steps) == {("collective", "all_to_all"): [1.0, 3.0], ("engine", "block"): [2.0]}
    show_steps(steps)
    said = capsys.readouterr().out
    for part in ("all_to_all", "4.000", "2.0000", "6.000", "Layers of block 0", "fused_matmul", "1.5000"):
        assert part in said
