"""Tuning with a clock of its own: what is timed, what is chosen, and when it stops; on two real ranks."""

from __future__ import annotations

import unittest.mock
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from rank_processes import Ranks
from torch import Tensor, nn

import torchtrt_md as md
from torchtrt_md.choices import Choices
from torchtrt_md.launch import Launch
from torchtrt_md.options import Options
from torchtrt_md.runtime.executor import Executor
from torchtrt_md.runtime.steps import Key
from torchtrt_md.session import Session
from torchtrt_md.tune import _keep, _read, candidates, tune

PLAN = {"": {"x": md.Split(1)}, "out": md.Gather(1)}


class Ticking:
    """Runs each candidate once, and tells times by a rule; each takes a second of its time."""

    transports = ("nccl",)

    def __init__(self, cost: Callable[[Executor], float]) -> None:
        self.cost, self.ticks = cost, 0
        self.steps: list[int] = []

    def now(self) -> float:
        return float(self.ticks)

    def milliseconds(self, executor: Executor, inputs: Mapping[Key, Tensor]) -> list[float]:
        self.ticks += 1
        self.steps.append(len(executor.steps))
        assert all(out.isfinite().all() for out in executor.run(inputs).values())
        return [self.cost(executor)] * 3


def exchanges_of(executor: Executor) -> int:
    return sum(step.communicates for step in executor.steps)


def session_of(depth: int, cache: str, **options: Any) -> tuple[Session, nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = models.Deep(depth).eval(), torch.randn(1, 8, 32)
    parallel = md.ContextParallel("cp", "auto", PLAN)
    program = md.capture(model, (x,), mesh=md.Mesh(cp=2), parallel=parallel)
    chosen = Options(mesh=md.Mesh(cp=2), compute="inductor", cache=cache, report=False, **options)
    return Session(Launch.join(60.0, cpu=True), program, chosen), model, x


EAGER = Choices("split", compute="eager")  # nothing is compiled, so that a candidate takes no time


def tuned(rank: int, cache: str, depth: int, sign: float) -> tuple[Choices, list[int], float]:
    session, model, x = session_of(depth, cache)
    clock = Ticking(lambda executor: 100 + sign * exchanges_of(executor))
    choices = tune(session, EAGER, clock)
    with torch.no_grad(), session.runner(session.built(choices), None, "Deep") as runner:
        return choices, clock.steps, float((runner(x) - model(x)).norm() / model(x).norm())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_fastest_block_decides_and_all_ranks_choose_it(sign: float, ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks(tuned, str(tmp_path), 3, sign)
    assert not first.error, first.message
    choices, _, error = first.value
    assert choices == second.value[0]
    assert error < 1e-5
    (block, step) = choices.decisions
    assert block.times_ms.keys() == {f"{name} by NCCL" for name in candidates("auto")}
    assert block.times_ms[block.chosen] == min(block.times_ms.values())
    (exchange,) = choices.exchanges.values()
    assert len(set(block.times_ms.values())) > 1, "the ways of exchange differ in what they send"
    assert exchange.strategy == block.chosen.split(",")[0].split(" by")[0]
    assert step.chosen == "each block and segment as timed" or step.times_ms[step.chosen] == min(step.times_ms.values())
    assert choices.tuned_on == "CPU"


def test_equal_blocks_are_timed_once_whatever_the_depth(ranks: Ranks, tmp_path: Path) -> None:
    timed = []
    for depth in (3, 6):
        outcome = ranks(tuned, str(tmp_path / str(depth)), depth, 1.0)[0]
        assert not outcome.error, outcome.message
        timed.append(outcome.value[1][: len(candidates("auto"))])
    assert timed[0] == timed[1], "a block of a deeper model has more steps"


def tuned_and_counted(rank: int, cache: str) -> tuple[int, int]:
    session, _, _ = session_of(3, cache)
    with unittest.mock.patch("torchtrt_md.road.lower", wraps=md.lower) as lower:
        session.road.lower(tune(session, EAGER, Ticking(exchanges_of)))
    ways = [(c.kwargs["placement"], tuple(c.kwargs["exchanges"].items())) for c in lower.call_args_list]
    return len(ways), len(set(ways))


def test_each_way_is_lowered_once(ranks: Ranks, tmp_path: Path) -> None:
    """A model of 57 blocks takes seconds each time."""
    for outcome in ranks(tuned_and_counted, str(tmp_path)):
        assert not outcome.error, outcome.message
        count, different = outcome.value
        assert count == different <= len(candidates("auto")) + 1


def tuned_twice(rank: int, cache: str) -> tuple[list[int], bool]:
    counts, found = [], []
    for damage in (False, False, True):
        session, _, _ = session_of(2, cache)
        if damage and rank == 0:
            (file,) = (Path(cache) / "choices").glob("*.json")
            file.write_bytes(file.read_bytes()[:-9])
        clock = Ticking(exchanges_of)
        found.append(tune(session, EAGER, clock))
        counts.append(clock.ticks)
    return counts, found[0] == found[1] == found[2]


def test_choices_are_kept_and_a_damaged_file_is_a_miss(ranks: Ranks, tmp_path: Path) -> None:
    for outcome in ranks(tuned_twice, str(tmp_path)):
        assert not outcome.error, outcome.message
        (first, second, third), same = outcome.value
        assert first == third > 0
        assert second == 0
        assert same


def short_of_time(rank: int, cache: str) -> tuple[int, Choices]:
    session, _, _ = session_of(2, cache, tune_seconds=2.5)
    clock = Ticking(exchanges_of)
    return clock.ticks, tune(session, EAGER, clock)


def test_it_stops_when_its_time_is_up_and_says_what_was_left_out(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks(short_of_time, str(tmp_path))
    assert not first.error, first.message
    assert first.value == second.value
    choices = first.value[1]
    assert len(choices.decisions[0].times_ms) == 3, "one second each"
    assert choices.decisions[-1].what == "a whole step"


def without_a_gpu(rank: int, cache: str) -> None:
    session, _, _ = session_of(1, cache)
    tune(session, EAGER)


def test_without_a_gpu_it_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    for outcome in ranks(without_a_gpu, str(tmp_path)):
        assert outcome.error == "LaunchError"
        assert "tune=True times candidates on GPUs" in outcome.message


def test_what_cannot_be_kept_is_a_warning(tmp_path: Path) -> None:
    """A tuning of minutes is not lost because the disk is full."""
    choices = Choices("split", "inductor", {}, {})
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(UserWarning, match=r"what was tuned cannot be kept in .*file"):
        _keep(choices, tmp_path / "file" / "choices.json")
    _keep(choices, tmp_path / "kept" / "choices.json")
    assert _read(tmp_path / "kept" / "choices.json") == choices
    assert [p.name for p in (tmp_path / "kept").iterdir()] == ["choices.json"]
