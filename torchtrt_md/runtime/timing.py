"""How long each step of a call takes: engines and their layers, collectives, and what PyTorch runs between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec
import torch
from torch import Tensor

from torchtrt_md.build.flavour import flavour
from torchtrt_md.runtime.executor import Executor
from torchtrt_md.runtime.steps import Key, Step

WARM_UP = 3


class StepTime(msgspec.Struct, frozen=True):
    """One step of a call, in the order in which they run.

    ``ms`` is the mean over the iterations of its time on this rank, alone on the stream; that of a collective holds the
    wait for the other ranks.  ``layers`` are those of an engine, as TensorRT's profiler names and times them.
    """

    name: str
    kind: str  # engine, collective, or op for all else
    ms: float
    layers: dict[str, float] = {}


def time_steps(executor: Executor, inputs: Mapping[Key, Tensor], iterations: int) -> list[StepTime]:
    """Run calls with all steps in a row on the current stream, and time each.  Every rank does the same.

    The layers of engines are timed in calls of their own, for profiling makes them wait.  The engines keep TensorRT's
    profilers, which slow them down: let the runner go afterwards.

    Args:
        executor: of a runner.
        inputs: by their wires, as :meth:`Executor.run` takes them.
        iterations: timed calls, at least 1; a few more warm up.
    """
    clock = _Clock(executor.device)
    for number in range(WARM_UP + iterations):
        if number == WARM_UP:
            clock.forget()
        executor.run_each(inputs, clock.around)
        clock.end_call()
    profilers = _profile(executor, inputs, iterations)
    found = []
    for index, step in enumerate(executor.steps):
        if not step.looks:
            kind = "collective" if step.communicates else "op" if step.engine is None else "engine"
            layers = profilers[index].means(iterations) if index in profilers else {}
            found.append(StepTime(step.name, kind, clock.total(index) / iterations, layers))
    return found


def call_times(
    call: Callable[[], object], calls: int, *, warm_up: int, begin: Callable[[], object], device: torch.device
) -> list[float]:
    """Milliseconds of each of some calls that are enqueued back to back, by events on a stream of their own.

    Args:
        call: enqueues one on the current stream.
        warm_up: calls before these.
        begin: called when those are done, to bring the ranks together.
        device: a GPU.
    """
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            call()
        stream.synchronize()
        begin()
        for _ in range(calls):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            first.record(stream)
            call()
            last.record(stream)
            events.append((first, last))
        stream.synchronize()
    return [first.elapsed_time(last) for first, last in events]


class _Clock:
    """Sums the time of each step: by events on a GPU, by the host's clock on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._totals: dict[int, float] = {}
        self._pairs: list[tuple[int, Any, Any]] = []

    @contextmanager
    def around(self, index: int, step: Step) -> Iterator[None]:
        if self._gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            yield
            end.record()
            self._pairs.append((index, begin, end))
        else:
            start = time.perf_counter()
            yield
            self._add(index, (time.perf_counter() - start) * 1e3)

    def end_call(self) -> None:
        if self._gpu:
            torch.cuda.current_stream().synchronize()
        for index, begin, end in self._pairs:
            self._add(index, begin.elapsed_time(end))
        self._pairs.clear()

    def forget(self) -> None:
        self._totals.clear()

    def total(self, index: int) -> float:
        return self._totals[index]

    def _add(self, index: int, ms: float) -> None:
        self._totals[index] = self._totals.get(index, 0.0) + ms


def _profile(executor: Executor, inputs: Mapping[Key, Tensor], iterations: int) -> dict[int, Any]:
    """Step -> the profiler that its engine reported to, in calls of their own."""
    engines = {index: step.engine for index, step in enumerate(executor.steps) if step.engine is not None}
    if not engines:
        return {}
    profilers: dict[int, Any] = {}
    for index, engine in engines.items():
        profilers[index] = engine.context.profiler = profiler()
    for _ in range(iterations):
        executor.run(inputs)
    torch.cuda.current_stream().synchronize()
    return profilers


def profiler() -> Any:
    """A TensorRT profiler that sums what it is told, by layer."""
    base = flavour().trt.IProfiler

    class Profiler(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            base.__init__(self)  # pybind11 asks for this very form
            self.totals: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.totals[layer_name] = self.totals.get(layer_name, 0.0) + ms

        def means(self, runs: int) -> dict[str, float]:
            return {name: total / runs for name, total in self.totals.items()}

    return Profiler()
