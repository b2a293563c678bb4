"""Tuning with a clock of its own: what is timed, what is chosen, and when it stops; on two real ranks."""

from __future__ import annotations

import gc
import importlib
import unittest.mock
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import models
import pytest
import torch
from rank_processes import Ranks
from torch import Tensor, nn

import torchtrt_md as md
from torchtrt_md.build.flavour import Flavour
from torchtrt_md.choices import Choices, Decision, Transport
from torchtrt_md.errors import ConversionError
from torchtrt_md.launch import Launch
from torchtrt_md.launch.agree import Alone, _verdict
from torchtrt_md.launch.board import Ballot, Failure
from torchtrt_md.lowering.passes import Exchange
from torchtrt_md.options import Options
from torchtrt_md.program import ShardedProgram
from torchtrt_md.road import Built, Road
from torchtrt_md.runtime.executor import Executor
from torchtrt_md.runtime.steps import Key
from torchtrt_md.segment import Part
from torchtrt_md.session import Session
from torchtrt_md.tune import candidates, keep, kept, tune
from torchtrt_md.tune.search import Search

PLAN = {"": {"x": md.Split(1)}, "out": md.Gather(1)}


class Ticking:
    """Runs each candidate once, and tells times by a rule; each takes a second of its time."""

    transports: Sequence[Transport] = ("nccl",)

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
    chosen = Options(mesh=md.Mesh(cp=2), cache=cache, report=False, **{"compute": "inductor", **options})
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
    with unittest.mock.patch.object(session.road.lowering, "lower", wraps=session.road.lowering.lower) as lower:
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
        keep(found[-1], session)
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
    assert len(choices.decisions[0].times_ms) == 2, "one second each, and what would end too late is not begun"
    assert choices.decisions[-1].what == "a whole step"


class Engines:
    """Stands for TensorRT, and runs graphs op by op: an engine takes ``seconds`` of a clock to build."""

    def __init__(self, folder: Path, clock: Ticking, seconds: int, rank: int) -> None:
        self.folder, self.clock, self.seconds, self.rank = folder, clock, seconds, rank
        self.begun: list[float] = []
        self.folder.mkdir(exist_ok=True)

    def is_built(self, part: Part, *rest: Any, **named: Any) -> bool:
        return (self.folder / part.digest).exists()

    def build_part(self, part: Part, *rest: Any, **named: Any) -> Part:
        if not self.is_built(part):
            self.begun.append(self.clock.now())
            self.clock.ticks += self.seconds
            (self.folder / part.digest).write_text(str(self.rank))
        return part

    def patched(self) -> Any:
        new: dict[str, Any] = {
            "is_built": self.is_built,
            "build_part": self.build_part,
            "unconvertible": lambda graph: {},
        }
        return unittest.mock.patch.multiple("torchtrt_md.build.part", **new)


class Searched(NamedTuple):
    """What a search did: what it chose, the seconds that it took, and when and by which rank engines were begun."""

    choices: Choices
    seconds: float
    begun: list[float]
    builders: dict[str, int]


SECONDS = 10  # for an engine; all else takes one for each candidate


def searched(rank: int, folder: str, allowed: Sequence[float], engines_ms: float) -> list[Searched]:
    """With TensorRT and Inductor as candidates, each time with as many seconds as are allowed."""
    found = []
    for number, seconds in enumerate(allowed):
        cache = Path(folder) / str(number)
        session, _, _ = session_of(4, str(cache / "cache"), compute="auto", tune=True, tune_seconds=seconds)
        clock = Ticking(lambda executor: 50.0)
        engines = Engines(cache, clock, SECONDS, rank)

        def cost(session: Session, window: Sequence[Part], times: Ticking = clock) -> None:
            times.cost = lambda executor: engines_ms if any(p.runs == "engine" for p in window) else 50.0

        executor = session.executor

        def told(built: Built, parts: Sequence[Part] | None = None, *rest: Any) -> Executor:
            cost(session, built.parts[rank] if parts is None else parts)  # noqa: B023
            return executor(built, parts, *rest)  # noqa: B023

        compiled = "torchtrt_md.runtime.inductor.compile_graph"
        with (
            engines.patched(),
            unittest.mock.patch(compiled, lambda name, graph, *rest, **named: graph),
            unittest.mock.patch.object(session, "executor", told),
        ):
            choices = tune(session, Choices("split", "engine"), clock)
        builders = {file.name: int(file.read_text()) for file in cache.iterdir() if file.is_file()}
        found.append(Searched(choices, clock.now(), engines.begun, builders))
    return found


def test_with_time_for_all_segments_are_compared_and_the_ranks_share_the_engines(ranks: Ranks, tmp_path: Path) -> None:
    for outcome in ranks(searched, str(tmp_path), [1000.0], 10.0):
        assert not outcome.error, outcome.message
        (search,) = outcome.value
        segments = [d for d in search.choices.decisions if d.what.startswith("segment")]
        assert len(segments) == 3, "into the first attention, between two, and out of the last"
        assert segments[0].what == "segment 0 (3 of them)", "of which most is computed"
        assert {d.chosen for d in segments} == {"TensorRT"}
        assert all(d.times_ms == {"TensorRT": 10.0, "Inductor": 50.0} for d in segments)
        assert search.choices.compute == "engine"
        assert set(search.builders.values()) == {0, 1}, "each rank builds some"
        assert len(search.begun) < len(search.builders)
        assert min(search.begun) >= len(candidates("auto")) + 1, "first what no engine has to be built for"
        step = search.choices.decisions[-1]
        assert next(iter(step.times_ms)) == "Inductor, attention in PyTorch"
        assert "no time was left" not in step.why


def test_the_seconds_that_are_allowed_are_a_bound(ranks: Ranks, tmp_path: Path) -> None:
    """What was begun may end later, by itself only; engines are not begun where they would end too late."""
    allowed = [0.5, 6.0, 12.0, 40.0]
    first, second = ranks(searched, str(tmp_path), allowed, 10.0)
    assert not first.error, first.message
    for seconds, search, other in zip(allowed, first.value, second.value, strict=True):
        assert search.choices == other.choices, "the ranks decide alike"
        assert search.choices.decisions[-1].chosen
        assert len(search.choices.decisions[0].times_ms) <= max(1, seconds / 2), "half of it is for exchanges"
        # The first is begun by what engines of other models take.
        assert all(begun + SECONDS <= seconds for begun in search.begun[1:])
        assert search.seconds <= max(seconds, 2.0) + (SECONDS + 4 if search.begun else 0)
    assert [len(search.begun) for search in first.value[:2]] == [0, 0], "no time for one"
    assert any(d.what.startswith("segment") for d in first.value[-1].choices.decisions)
    assert first.value[-1].seconds <= allowed[-1]
    said = first.value[0].choices.decisions[-1].why
    assert all(name in said for name in ("no time was left for", "ring", "segment", "TensorRT")), said


def collected(rank: int, cache: str) -> list[int]:
    session, _, _ = session_of(3, cache)
    seen: list[int] = []

    def count(phase: str, info: Mapping[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            seen.append(len(gc.get_objects()))

    gc.callbacks.append(count)
    try:
        tune(session, EAGER, Ticking(exchanges_of))
    finally:
        gc.callbacks.remove(count)
    return [*seen, gc.get_freeze_count()]


def test_the_garbage_collector_does_not_look_at_all_there_is_for_each_candidate(ranks: Ranks, tmp_path: Path) -> None:
    for outcome in ranks(collected, str(tmp_path)):
        assert not outcome.error, outcome.message
        all_there_is, *each, frozen = outcome.value
        assert len(each) >= len(candidates("auto"))
        assert max(each) < all_there_is / 2
        assert not frozen, "it is as before afterwards"


def without_a_gpu(rank: int, cache: str) -> None:
    session, _, _ = session_of(1, cache)
    tune(session, EAGER)


def test_without_a_gpu_it_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    for outcome in ranks(without_a_gpu, str(tmp_path)):
        assert outcome.error == "LaunchError"
        assert "tune=True times candidates on GPUs" in outcome.message


class Told(Search):
    """Whole steps take what a rule says; attentions take as long in each way."""

    def __init__(self, cost: Callable[[Choices], float], parallel: Any = None, **options: Any) -> None:
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), torch.randn(4, 8)
        parallel = parallel or md.TensorParallel("tp", {"0": "colwise", "2": "rowwise"})
        mesh = md.Mesh({parallel.axis: 2})
        program = md.capture(model, (x,), mesh=mesh, parallel=parallel)
        asked = Options(mesh=mesh, **{"compute": "inductor", **options})
        launch = SimpleNamespace(rank=0, hosts=[0, 0], device=torch.device("cpu"), agreement=Alone(), shares_gpus=False)
        placed = SimpleNamespace(parts=[(), ()])
        session: Any = SimpleNamespace(
            program=program,
            options=asked,
            launch=launch,
            road=Road(program, asked, ranks=[0]),
            placed=lambda choices: placed,
        )
        clock = Ticking(lambda executor: 0.0)
        clock.transports = ("nccl", "store")
        super().__init__(session, clock, 0.0)
        self.cost, self.default = cost, session.road.default()
        self.timed: list[Choices] = []

    def _whole_step(self, choices: Choices, ops: int) -> float:
        self.timed.append(choices)
        return self.cost(choices)

    def _ops_to_build(self, parts: Sequence[Part]) -> int:
        return 0

    def _segments(self, choices: Choices) -> tuple[Choices, list[Decision]]:
        return choices, [Decision("segment 0", "Inductor", "the faster", {"Inductor": 1.0})]


@pytest.mark.parametrize("compute", ["inductor", "auto"])
@pytest.mark.parametrize("faster", ["nccl", "store"])
def test_without_an_attention_the_transports_are_timed_in_whole_steps(faster: Transport, compute: str) -> None:
    search = Told(lambda choices: 1.0 if choices.transport == faster else 2.0, compute=compute)
    found = search.choose(search.default)
    assert found.transport == faster
    assert {choices.transport for choices in search.timed} == {"nccl", "store"}


def test_what_sends_nothing_is_left_with_nccl() -> None:
    search = Told(lambda choices: 1.0 if choices.transport == "store" else 2.0, md.DataParallel("dp"), compute="auto")
    assert search.choose(search.default).transport == "nccl"
    assert {choices.transport for choices in search.timed} == {"nccl"}


def test_when_its_time_is_up_candidates_that_fail_are_no_reason_to_go_on() -> None:
    def fails(choices: Choices) -> float:
        search.clock.ticks += 100  # type: ignore[attr-defined]
        raise md.BuildError("no engine", fix="")

    search = Told(fails, compute="auto", tune_seconds=50.0)
    assert search.choose(search.default) == search.default
    assert len(search.timed) == 1


def test_what_failed_before_is_no_reason_to_time_no_step() -> None:
    """A strategy that the heads do not allow, say; the time may be up by then."""

    def late(choices: Choices, until: float) -> tuple[Choices, list[Decision]]:
        search.left_out.append("ring")
        search.clock.ticks += 100  # type: ignore[attr-defined]
        return replace(choices, transport="store"), [Decision("attention", "ulysses by stores", "", {"a": 1.0})]

    search = Told(lambda choices: 1.0, compute="auto", tune_seconds=50.0)
    search._exchanges = late  # type: ignore[method-assign]
    assert search.choose(search.default).transport == "store"
    assert len(search.timed) == 1


def test_segments_are_those_of_the_transport_that_was_chosen() -> None:
    """Which parts there are may depend on it."""
    search = Told(lambda choices: 1.0 if choices.transport == "store" else 2.0, compute="auto")
    asked = []

    def segments(choices: Choices) -> tuple[Choices, list[Decision]]:
        asked.append(choices.transport)
        return choices, []

    search._segments = segments  # type: ignore[method-assign]
    search.choose(search.default)
    assert asked == ["store"]


def test_choices_are_of_gpus_that_have_the_same_access_and_of_these_sources(
    deep_program: ShardedProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    keys = []
    for pairs, sources in (([], "a"), ([], "a"), (["rank 0 to rank 1"], "a"), ([], "b")):
        monkeypatch.setattr("torchtrt_md.tune.kept.pairs_without_access", lambda launch, mesh, pairs=pairs: pairs)
        monkeypatch.setattr("torchtrt_md.tune.kept._sources", lambda sources=sources: sources)
        keys.append(key_of(deep_program, device="cuda"))
    assert keys[0] == keys[1]
    assert len({*keys}) == 3


@pytest.mark.parametrize("asked", ["nccl", "store"])
def test_a_transport_that_was_asked_for_is_kept_and_where_nothing_is_left_to_choose_nothing_is_timed(
    asked: Transport,
) -> None:
    search = Told(lambda choices: 2.0 if choices.transport == asked else 1.0, transport=asked)
    assert search.choose(search.default) == search.default
    assert search.default.transport == asked
    assert not search.timed


def test_gpus_without_access_to_each_other_are_left_with_nccl() -> None:
    def cost(choices: Choices) -> float:
        if choices.transport == "store":
            raise md.LaunchError("these GPUs have no access", fix="")
        return 1.0

    search = Told(cost)
    found = search.choose(search.default)
    assert found.transport == "nccl"
    assert "by stores" in found.decisions[-1].why


def test_what_cannot_be_kept_is_a_warning(tmp_path: Path) -> None:
    """A tuning of minutes is not lost because the disk is full."""
    choices = Choices("split", "inductor", {}, {})
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(UserWarning, match=r"what was tuned cannot be kept in .*file"):
        kept.write(choices, tmp_path / "file" / "choices.json")
    kept.write(choices, tmp_path / "kept" / "choices.json")
    assert kept.read(tmp_path / "kept" / "choices.json") == choices
    assert [p.name for p in (tmp_path / "kept").iterdir()] == ["choices.json"]


class Lgamma(nn.Module):
    """Blocks around an op that TensorRT turns out not to convert."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = models.Deep(2), models.Deep(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x + torch.lgamma(x.abs() + 1))  # type: ignore[no-any-return]


class Failing(Engines):
    """What has an lgamma cannot be built, which nobody knows before."""

    def build_part(self, part: Part, *rest: Any, **named: Any) -> Part:
        graph = part.graph if part.runs == "engine" else None
        for node in graph.graph.nodes if graph is not None else ():
            if node.target is torch.ops.aten.lgamma.default:
                raise ConversionError("lgamma could not be converted", node=node.name)
        return super().build_part(part, *rest, **named)


def searched_in_spite(rank: int, folder: str, how: Any) -> Choices:
    torch.manual_seed(0)
    model, x = Lgamma().eval(), torch.randn(1, 8, 32)
    parallel = md.ContextParallel("cp", "auto", {"": {"x": md.Split(1)}, "second.out": md.Gather(1)})
    program = md.capture(model, (x,), mesh=md.Mesh(cp=2), parallel=parallel)
    options = Options(mesh=md.Mesh(cp=2), cache=folder, report=False, compute=how, tune=True, tune_seconds=10_000.0)
    session, clock = Session(Launch.join(60.0, cpu=True), program, options), Ticking(lambda executor: 50.0)
    engines, compiled = Failing(Path(folder), clock, 1, rank), "torchtrt_md.runtime.inductor.compile_graph"
    with engines.patched(), unittest.mock.patch(compiled, lambda name, graph, *rest, **named: graph):
        return tune(session, Choices("split"), clock)


@pytest.mark.parametrize("how", ["tensorrt", "auto"])
def test_an_op_that_cannot_be_converted_takes_nothing_else_along(how: Any, ranks: Ranks, tmp_path: Path) -> None:
    for outcome in ranks(searched_in_spite, str(tmp_path), how):
        assert not outcome.error, outcome.message
        told = {decision.what.split(" q")[0]: decision for decision in outcome.value.decisions}
        assert "attention" in told, "all ways of exchange are around the op"
        if how == "auto":
            (left,) = [name for name in told["a whole step"].why.split(", ") if "in TensorRT" in name]
            timed = [name for name in told if name.startswith("segment ")]
            assert len(timed) >= 2, "a segment that can be built was built together with that one"
            assert not any(name.startswith(left.split(" in ")[0].split("for ")[-1] + " ") for name in timed)


def test_a_rank_that_is_gone_ends_the_search() -> None:
    gone = _verdict([Ballot(0, "a step"), Ballot(0, "ended before it came to a step")])
    apart = _verdict([Ballot(0, "a step"), Ballot(1, "another")])
    failed = _verdict([Ballot(0, "a step"), Ballot(1, "a step", Failure("BuildError", "no engine", "", ""))])
    search = object.__new__(Search)
    search.left_out = []
    for error in (gone, apart):
        assert error is not None
        with pytest.raises(md.LaunchError):
            search._leave_out("a candidate", error)
    assert failed is not None
    search._leave_out("a candidate", failed)
    assert search.left_out == ["a candidate"]


def test_choices_of_a_transport_that_there_is_no_more_are_a_miss(tmp_path: Path) -> None:
    kept.write(Choices("split", transport="store"), tmp_path / "choices")
    assert kept.read(tmp_path / "choices") is not None
    (tmp_path / "choices").write_text((tmp_path / "choices").read_text().replace('"store"', '"copy"'))
    assert kept.read(tmp_path / "choices") is None


def searched_again_with_more_time(rank: int, cache: str) -> list[int]:
    counts = []
    for seconds in (60.0, 600.0, 60.0):
        session, _, _ = session_of(2, cache, tune_seconds=seconds)
        clock = Ticking(exchanges_of)
        keep(tune(session, EAGER, clock), session)
        counts.append(clock.ticks)
    return counts


def test_what_a_short_search_found_is_not_taken_for_that_of_a_long_one(ranks: Ranks, tmp_path: Path) -> None:
    for outcome in ranks(searched_again_with_more_time, str(tmp_path)):
        assert not outcome.error, outcome.message
        short, long, short_again = outcome.value
        assert short > 0
        assert long > 0
        assert short_again == 0


class Hosts(Alone):
    """Ranks on these hosts, one behind the other."""

    def __init__(self, hosts: Sequence[int]) -> None:
        self.hosts = hosts

    def gather(self, value: Any, about: str, /) -> list[Any]:
        return [(host, value[1]) for host in self.hosts]


@pytest.fixture(scope="module")
def deep_program() -> ShardedProgram:
    parallel = md.ContextParallel("cp", "auto", PLAN)
    return md.capture(models.Deep(1).eval(), (torch.randn(1, 8, 32),), mesh=md.Mesh(cp=2), parallel=parallel)


def key_of(
    program: ShardedProgram, hosts: Sequence[int] = (0, 0), device: str = "cpu", shares: bool = False, **options: Any
) -> str:
    asked = Options(mesh=md.Mesh(cp=2), **options)
    launch = SimpleNamespace(
        hosts=hosts, rank=0, device=torch.device(device), agreement=Hosts(hosts), shares_gpus=shares
    )
    session: Any = SimpleNamespace(program=program, options=asked, launch=launch, road=Road(program, asked, ranks=[0]))
    return kept.key(session, EAGER)


@pytest.mark.parametrize(
    "options",
    [
        {"hosts": (0, 1)},
        {"shares": True},
        {"transport": "store"},
        {"overlap": False},
        {"placement": "split"},
        {"target": "sm120"},
        {"tune_seconds": 30.0},
        {"compute": "inductor"},
        {"fullgraph": True},
        {"transpose_weights": False},
        {"exchange": Exchange("ulysses")},
    ],
    ids=lambda options: next(iter(options)),
)
def test_choices_are_of_what_was_asked_for_and_of_where_the_ranks_are(
    options: dict[str, Any], deep_program: ShardedProgram
) -> None:
    assert key_of(deep_program) == key_of(deep_program)
    assert key_of(deep_program) != key_of(deep_program, **options)


@pytest.mark.parametrize(
    ("home", "name", "value"),
    [
        ("torch", "__version__", "9.9"),
        ("torchtrt_md", "__version__", "9.9"),
        ("torchtrt_md.build.cache", "torch_tensorrt_version", lambda: "9.9"),
        ("torchtrt_md.build.cache", "user_converters", lambda: {"aten.addmm.default"}),
        ("torchtrt_md.build.cache", "_sources", lambda: "other"),
        ("torchtrt_md.build.flavour", "flavour", lambda: Flavour("TensorRT-RTX", "9.9", torch)),
    ],
)
def test_choices_are_of_these_versions(
    home: str, name: str, value: Any, deep_program: ShardedProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = key_of(deep_program)
    without = key_of(deep_program, compute="inductor")
    monkeypatch.setattr(importlib.import_module(home), name, value)  # md.build is a function, too
    assert key_of(deep_program) != before
    assert (key_of(deep_program, compute="inductor") != without) == (home in ("torch", "torchtrt_md"))
