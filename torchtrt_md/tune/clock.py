"""What times candidates: the GPUs, by replays of CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from torchtrt_md.choices import Transport
from torchtrt_md.runtime.executor import Executor
from torchtrt_md.runtime.graphs import Budget, Graphs
from torchtrt_md.runtime.steps import Key

if TYPE_CHECKING:
    from torchtrt_md.session import Session

WARM_UP, REPEATS, FEWEST = 3, 20, 5
SECONDS = 0.3  # for each candidate, where the fewest repeats leave it
TRANSPORTS: dict[Transport, str] = {"nccl": "NCCL", "store": "stores"}


class Clock(Protocol):
    """What times candidates."""

    @property
    def transports(self) -> Sequence[Transport]:
        """What exchanges are tried by: ``nccl``, ``store``."""

    def now(self) -> float:
        """Seconds, monotonic."""

    def milliseconds(self, executor: Executor, inputs: Mapping[Key, Tensor]) -> list[float]:
        """Of some calls.  Collective."""


class GpuClock:
    """Times replays of CUDA graphs between events."""

    transports = tuple(TRANSPORTS)

    def __init__(self, session: Session) -> None:
        self.device, self.agreement = session.launch.device, session.launch.agreement

    def now(self) -> float:
        return time.monotonic()

    def milliseconds(self, executor: Executor, inputs: Mapping[Key, Tensor]) -> list[float]:
        stream: torch.cuda.Stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.device(self.device), torch.cuda.stream(stream), torch.no_grad():
            run = Graphs(executor.run, Budget(1), self.device)
            for _ in range(WARM_UP):
                run(inputs)
            first = self._timed(run, inputs, stream, 1)
            # the slowest's, so that all ranks repeat equally often
            slowest = max(self.agreement.gather(first[0], "a first time"))
            repeats = min(REPEATS, max(FEWEST, int(SECONDS * 1e3 / max(slowest, 1e-3))))
            return self._timed(run, inputs, stream, repeats)

    def _timed(self, run: Graphs, inputs: Mapping[Key, Tensor], stream: torch.cuda.Stream, repeats: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]  # type: ignore[no-untyped-call]
        for begin, end in events:
            begin.record(stream)
            run(inputs)
            end.record(stream)
        stream.synchronize()
        return [begin.elapsed_time(end) for begin, end in events]
