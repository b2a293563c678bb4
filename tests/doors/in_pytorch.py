"""Programs of Dynamo's graphs that run in PyTorch, over real ranks, in place of engines; for the tests beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from torchtrt_md import MDError
from torchtrt_md.doors.compared import run_rank
from torchtrt_md.doors.dynamo import Verify, compile_graph
from torchtrt_md.doors.flat_call import Compiled
from torchtrt_md.launch.agree import Agreement
from torchtrt_md.lowering import lower
from torchtrt_md.options import Options
from torchtrt_md.program import ShardedProgram, Weights
from torchtrt_md.runtime.graphs import Budget

TP_PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


class InPyTorch:
    """Lowers, verifies and runs programs, all in PyTorch; ``programs`` are those that it was given, lowered."""

    def __init__(self, change: Callable[[ShardedProgram], None] = lambda program: None) -> None:
        self.programs: list[ShardedProgram] = []
        self.budgets: list[Budget | None] = []
        self.names: list[str] = []
        self.verified = self.closed = 0
        self.change = change

    def __call__(
        self,
        captured: Callable[[], ShardedProgram],
        options: Options,
        /,
        *,
        verify: Verify,
        name: str,
        budget: Budget | None,
    ) -> Compiled:
        program = together("capture", captured)
        if dist.is_initialized():
            Agreement(30.0).same(str(program.mesh), "the mesh that their groups make")
        lowered = lower(program)
        self.change(lowered)
        if options.check:
            together("comparison", partial(verify, lowered))
            self.verified += 1
        self.programs.append(lowered)
        self.budgets.append(budget)
        self.names.append(name)
        return _InPyTorch(lowered, self)


class _InPyTorch:
    def __init__(self, program: ShardedProgram, build: InPyTorch) -> None:
        self.program, self.build = program, build

    def call(
        self, bind: Callable[[], Mapping[str, Tensor]], /, *, weights: Any = None, about: str = ""
    ) -> dict[str, Tensor]:
        inputs = together(f"a call{about}", bind)
        assert set(inputs) == {value.name for value in self.program.inputs}
        names = [value.name for value in self.program.outputs]
        return dict(zip(names, run_rank(weights or self.program, inputs, None), strict=True))

    def with_weights(self, others: Callable[[], Mapping[str, Tensor]], /) -> ShardedProgram:
        """The program with these."""
        given, held = together("other weights", others), self.program.weights
        shards = {name: given[name] for name in (held.shards or held.whole)}
        rank = dist.get_rank() if dist.is_initialized() else 0
        new = Weights({}, shards, rank) if held.shards else Weights(shards)
        return replace(self.program, weights=new)

    def close(self) -> None:
        self.build.closed += 1


def together(about: str, step: Callable[[], Any]) -> Any:
    """A step whose failure on one rank is that of all."""
    if not dist.is_initialized():
        return step()
    return Agreement(30.0).together(about, step)


def compiled(model: Any, build: InPyTorch, **options: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(model, backend=partial(compile_graph, build=build), options=options)


def error(ours: Tensor, dense: Tensor) -> float:
    return float((ours - dense).norm() / dense.norm())


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except MDError as raised:
        return f"{type(raised).__name__}: {raised}"
    return ""
