"""Graphs that other processes compile ahead are found in Inductor's cache; nothing but time depends on them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import graphs
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.fx import GraphModule

import torchtrt_md as md
from torchtrt_md.graph.json import graph_to_json
from torchtrt_md.runtime import ahead as module
from torchtrt_md.runtime.ahead import Ahead, Job, workers, working_ahead
from torchtrt_md.runtime.bring_up import Known, assemble
from torchtrt_md.runtime.inductor import compile_graph
from torchtrt_md.runtime.private import Operand, inductor_switches
from torchtrt_md.segment import Binding, Part, Segment, Wire

CPU = torch.device("cpu")
X, W = torch.randn(5, 7), torch.randn(3, 7).t()  # the second is not contiguous


@pytest.fixture(scope="module", autouse=True)
def own_cache_of_inductor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


def started(count: int) -> Ahead:
    ahead = Ahead(CPU)
    ahead.start(count)
    return ahead


@pytest.fixture(scope="module")
def one() -> Iterator[Ahead]:
    """One worker, which is ready."""
    worker = started(1)
    yield ready(worker)
    worker.close()


def graph(number: float = 2.0) -> GraphModule:
    return graphs.trace(lambda x, w: [torch.tanh(x @ w) + number], X, W)


def job(of: GraphModule, *operands: Tensor) -> Job:
    return Job(graph_to_json(of), [Operand.like(t) for t in operands or (X, W)], inductor_switches())


def ready(ahead: Ahead) -> Ahead:
    until = time.monotonic() + 60
    while not ahead._ready:
        assert time.monotonic() < until
        time.sleep(0.01)
    return ahead


def found(hit: str) -> int:
    return int(counters["inductor"][f"fxgraph_cache_{hit}"])


def test_what_a_worker_compiled_is_found(one: Ahead) -> None:
    compiled = one.compiled
    one.give(lambda: {"a": job(graph())})
    one.wait("a")
    assert one.compiled == compiled + 1
    before = found("hit"), found("miss")
    call = compile_graph("a part", graph(), lambda number: [X, W], CPU)
    assert (found("hit"), found("miss")) == (before[0] + 1, before[1])
    torch.testing.assert_close(call(X, W)[0], torch.tanh(X @ W) + 2)


def test_a_switch_of_this_process_is_one_of_the_worker(one: Ahead) -> None:
    """Of PyTorch, and of Inductor: else it would compile what nobody looks for."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch._inductor.config.patch(max_fusion_size=7):
            one.give(lambda: {"a": job(graph())})
            one.wait("a")
            hits = found("hit")
            compile_graph("a part", graph(), lambda number: [X, W], CPU)
            assert found("hit") == hits + 1
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_a_worker_fails_at_ends_nothing(one: Ahead) -> None:
    compiled = one.compiled
    one.give(lambda: {"bad": Job(b"no graph", [], inductor_switches()), "good": job(graph(3.0))})
    for name in ("bad", "good"):
        one.wait(name)
    assert one.compiled == compiled + 1


def test_a_worker_that_is_gone_is_not_waited_for() -> None:
    one = ready(started(1))
    (process,) = one._processes
    one.give(lambda: {"a": job(graph(4.0)), "b": job(graph(5.0))})
    while "a" not in one._begun:
        time.sleep(0.01)
    process.kill()
    start = time.monotonic()
    one.wait("a")
    one.wait("b")
    one.wait("never given")
    assert time.monotonic() - start < 5
    one.close()


@pytest.mark.parametrize("count", [0, 1])
def test_workers_that_are_not_ready_are_not_waited_for(count: int) -> None:
    ahead = started(count)
    assert bool(ahead) == bool(count)
    ahead.give(lambda: {"a": job(graph())})
    start = time.monotonic()
    ahead.wait("a")
    assert time.monotonic() - start < 1
    assert not ahead._waiting, "a worker would compile it once more"
    ahead.close()


def test_many_graphs_are_worth_waiting_for_a_worker() -> None:
    """Each takes this process longer than the first worker takes to get ready."""
    names = [f"early graph {number}" for number in range(5)]
    ahead = started(1)
    ahead.give(lambda: {name: job(graph(20.0 + number)) for number, name in enumerate(names)})
    ahead._until += 60  # this machine may be busy
    ahead.wait(names[0])
    assert ahead.compiled == 1
    ahead.close()


def test_a_worker_that_never_gets_ready_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    ahead = started(2)
    ahead.give(lambda: {f"no {number}": job(graph()) for number in range(5)})
    start = time.monotonic()
    ahead.wait("no 0")
    assert time.monotonic() - start < 5
    ahead.close()


def test_what_is_waited_for_is_next(one: Ahead) -> None:
    names = [f"graph {number}" for number in range(5)]
    one.give(lambda: {name: job(graph(10.0 + number)) for number, name in enumerate(names)})
    one.wait(names[-1])
    assert names[-2] in one._waiting
    for name in names:
        one.wait(name)


def test_no_worker_outlives_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "workers", lambda device, ranks, needs: 2)
    processes: list[Any] = []

    def fails() -> None:
        with working_ahead(CPU, 1, True) as ahead:
            processes.extend(ahead._processes)
            raise RuntimeError("of the caller")

    with pytest.raises(RuntimeError, match="of the caller"):
        fails()
    assert [process.poll() for process in processes] == [-9, -9]


def test_a_worker_ends_with_its_parent() -> None:
    code = (
        "import os, torch, torchtrt_md.runtime.ahead as a;"
        "b = a.Ahead(torch.device('cpu')); b.start(1); print(b._processes[0].pid, flush=True); os._exit(0)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    until = time.monotonic() + 60
    while Path(f"/proc/{int(told.stdout)}/cmdline").exists() and _runs(int(told.stdout)):
        assert time.monotonic() < until
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 << 30, 140 << 30))
    monkeypatch.delenv(module.THREADS)
    assert workers(CPU, 1) == 0
    assert workers(cuda, 4) == 5
    assert workers(cuda, 64) == 0
    assert workers(cuda, 4, 90 << 30) == 2
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (9 << 30, 140 << 30))
    assert workers(cuda, 4) == 2
    monkeypatch.setenv(module.THREADS, "1")
    assert workers(cuda, 4) == 0


def test_parts_are_compiled_ahead(one: Ahead, monkeypatch: pytest.MonkeyPatch) -> None:
    def part(number: float) -> Part:
        bindings = [Binding(n, Wire("input", n), t.dtype, tuple(t.shape)) for n, t in {"x": X, "w": W}.items()]
        contiguous = graphs.trace(lambda x, w: [torch.tanh(x @ w) + number], X, W.contiguous())
        result = Binding("y", Wire("output", f"y{number}"), X.dtype, (5, 3))
        return Part(Segment("inductor", "", None, tuple(bindings), (result,), ()), contiguous)

    given: dict[str, Job] = {}
    give = one.give

    def noted(jobs: Callable[[], Mapping[str, Job]]) -> None:
        given.update(jobs())
        give(jobs)

    monkeypatch.setattr(one, "give", noted)
    known, parts = Known(ahead=one), [part(float(number)) for number in (0, 1, 0, 2)]
    steps, _ = assemble(parts, {}, mesh=md.Mesh(cp=1), rank=0, groups={}, device=CPU, weights={}, known=known)
    assert len(steps) == 4
    assert set(given) == set(known.compiled) == {p.digest for p in parts}
    assert [tuple(o.shape) for o in given[parts[0].digest].operands] == [X.shape, W.shape]
    given.clear()
    assemble(parts, {}, mesh=md.Mesh(cp=1), rank=0, groups={}, device=CPU, weights={}, known=known)
    assert not given


def test_what_was_compiled_once_is_not_given_again(one: Ahead) -> None:
    """A later process finds it in Inductor's cache, and waits for no worker to get ready."""
    one.give(lambda: {"a": job(graph(30.0))})
    one.wait("a")
    compile_graph("a part", graph(30.0), lambda number: [X, W], CPU)
    one.compiled_here("a")
    later, compiled = started(1), one.compiled
    later._until += 60
    later.give(lambda: {name: job(graph(30.0)) for name in "abcde"})
    assert not later._waiting
    later.close()
    assert one.compiled == compiled


@pytest.mark.parametrize("raised", [TypeError("a Path in sys.path"), RuntimeError("can't start new thread")])
def test_where_no_worker_can_be_started_this_process_compiles(
    raised: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of one rank alone would leave the others waiting."""

    def fails(self: Ahead) -> Any:
        raise raised

    monkeypatch.setattr(module, "workers", lambda device, ranks, needs: 2)
    monkeypatch.setattr(Ahead, "_started", fails)
    with working_ahead(CPU, 1, True) as ahead:
        ahead.give(lambda: {"a": job(graph())})
        ahead.wait("a")
        assert not ahead


def test_paths_of_any_kind_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, Path("/somewhere")])  # which Python passes over
    ahead = started(1)
    assert len(ahead._processes) == 1
    ahead.close()


def test_what_cannot_be_given_is_compiled_by_this_process() -> None:
    ahead = started(1)

    def jobs() -> Mapping[str, Job]:
        raise TypeError("cannot pickle a lambda of Inductor's config")

    ahead.give(jobs)
    assert not ahead
    ahead.wait("a")


def test_a_worker_that_hangs_is_waited_for_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hangs = tmp_path / "python"
    hangs.write_text("#!/bin/sh\necho ready; exec sleep 1000\n")
    hangs.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hangs))
    monkeypatch.setattr(module, "_LONGEST", 1.0)
    ahead = ready(started(1))
    ahead.give(lambda: {f"graph {number}": job(graph(40.0 + number)) for number in range(5)})
    start = time.monotonic()
    for number in range(5):
        ahead.wait(f"graph {number}")
    assert time.monotonic() - start < 8
    assert not ahead


def test_a_worker_does_not_import_what_lies_in_the_current_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "msgspec.py").write_text("raise SystemExit('of the current folder')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    ready(started(1)).close()


def test_inference_mode_of_the_caller_is_no_matter(one: Ahead) -> None:
    one.give(lambda: {"a": job(graph(50.0))})
    one.wait("a")
    hits = found("hit")
    with torch.inference_mode():
        compile_graph("a part", graph(50.0), lambda number: [X, W], CPU)
    assert found("hit") == hits + 1
