"""The watchdog, with a clock of the test's and in a process that it really ends."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import TypeAlias

import pytest
import torch

from torchtrt_md.launch.watchdog import EXIT_CODE, Watchdog, describe
from torchtrt_md.segment import Collective


class Work:
    """Work that is done when the test says so."""

    def __init__(self) -> None:
        self.done = False

    def query(self) -> bool:
        return self.done


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


Dog: TypeAlias = tuple[Watchdog, Clock, list[object], threading.Event]


@pytest.fixture
def dog() -> Iterator[Dog]:
    """A watchdog with 100 s of patience, its clock, and what it ended the process with."""
    clock, stopped = Clock(), threading.Event()
    ended: list[object] = []

    def end(code: int) -> None:
        ended.append(code)
        stopped.set()

    watchdog = Watchdog(100.0, rank=3, abort=lambda: ended.append("abort"), exit_process=end, clock=clock, poll=0.01)
    yield watchdog, clock, ended, stopped
    watchdog.close()


def test_work_that_is_done_in_time(dog: Dog) -> None:
    watchdog, clock, ended, stopped = dog
    work = Work()
    watchdog.watch(work, "a call")
    clock.now = 99.0
    assert not stopped.wait(0.1)
    assert watchdog.settle() == 1
    work.done = True
    assert watchdog.settle() == 0
    clock.now = 1000.0
    assert not stopped.wait(0.1)
    assert ended == []


def test_work_that_is_not(dog: Dog, capsys: pytest.CaptureFixture[str]) -> None:
    watchdog, clock, ended, stopped = dog
    watchdog.watch(Work(), "segment 0 on axis 'tp'")
    clock.now = 101.0
    assert stopped.wait(5)
    assert ended == ["abort", EXIT_CODE]
    said = capsys.readouterr().err
    assert "rank 3 waited 101.0 s (at most 100) for segment 0 on axis 'tp'" in said


def test_a_long_queue_is_no_fault(dog: Dog) -> None:
    """100 calls of 60 s each, all handed over at once: the last is done 6000 s later."""
    watchdog, clock, _, stopped = dog
    queue = [Work() for _ in range(100)]
    for work in queue:
        watchdog.watch(work, "a call")
    for work in queue:
        clock.now += 60.0
        work.done = True
        watchdog.settle()
    assert not stopped.wait(0.05)
    watchdog.watch(Work(), "a call that hangs")
    clock.now += 101.0
    assert stopped.wait(5)


def test_work_that_failed_is_not_waited_for(dog: Dog, capsys: pytest.CaptureFixture[str]) -> None:
    watchdog, clock, _, stopped = dog

    class Failed:
        def query(self) -> bool:
            raise RuntimeError("CUDA error: an illegal memory access")

    watchdog.watch(Failed(), "segment 1")
    assert watchdog.settle() == 0
    clock.now = 1000.0
    assert not stopped.wait(0.05)
    assert "segment 1\nfailed: CUDA error: an illegal memory access" in capsys.readouterr().err


def test_blocking_waits(dog: Dog) -> None:
    watchdog, clock, _, stopped = dog
    with watchdog.waiting("the communicators"):
        assert watchdog.settle() == 1
    assert watchdog.settle() == 0
    with pytest.raises(KeyError), watchdog.waiting("the communicators"):
        raise KeyError
    assert watchdog.settle() == 0
    with watchdog.waiting("the communicators"):
        clock.now = 500.0
        assert stopped.wait(5)


def test_what_needs_all_ranks_is_not_waited_for_when_one_has_ended(capsys: pytest.CaptureFixture[str]) -> None:
    clock, stopped, gone = Clock(), threading.Event(), [""]
    watchdog = Watchdog(
        100.0, rank=3, lost=lambda: gone[0], exit_process=lambda code: stopped.set(), clock=clock, poll=0.01
    )
    gone[0] = "rank 1 has ended"
    with watchdog.waiting("a call"):  # another rank may be done with it and gone
        clock.now = 50.0
        assert not stopped.wait(0.1)
    with watchdog.waiting("the communicators", on_all=True):
        assert not stopped.wait(0.1), "an error of its own comes first"
        clock.now = 60.0
        assert stopped.wait(5)
    assert "for the communicators\nrank 1 has ended; see its output." in capsys.readouterr().err


def test_a_closed_watchdog_watches_nothing(dog: Dog) -> None:
    watchdog, clock, _, stopped = dog
    watchdog.watch(Work(), "a call")
    watchdog.close()
    clock.now = 1000.0
    assert not stopped.wait(0.05)
    assert not watchdog._thread.is_alive()


def test_the_process_ends_although_its_main_thread_hangs_and_the_abort_too() -> None:
    code = """
import threading, time
from torchtrt_md.launch import watchdog
watchdog._ABORT_SECONDS = 0.2

class Hangs:
    def query(self) -> None:
        return False

dog = watchdog.Watchdog(0.3, rank=1, abort=lambda: time.sleep(3600))
dog.watch(Hangs(), "segment 0 on axis 'cp'")
threading.Event().wait()
"""
    start = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == EXIT_CODE == 70
    assert time.monotonic() - start < 200, "most of it to import PyTorch"
    assert "torchtrt_md: rank 1 waited 0." in ended.stderr
    assert "for segment 0 on axis 'cp'" in ended.stderr
    assert "exit code 70" in ended.stderr


def test_what_an_engine_may_be_waiting_in() -> None:
    collectives = [Collective("all_to_all", "cp", 2, torch.float16, 64, 32)] * 3
    collectives += [Collective("all_gather", "cp", 2, torch.float16, 64, 32)]
    said = describe("segment 0", "cp", (1, 3), collectives)
    assert said.splitlines() == [
        "segment 0 on axis 'cp' (ranks 1, 3); it is in one of, in this order:",
        "  all_to_all of 64 x float16, 3 times",
        "  all_gather of 64 x float16",
    ]


def test_a_long_schedule_is_shortened() -> None:
    collectives = [Collective("all_reduce", "tp", 2, torch.float16, n, n) for n in range(30)]
    lines = describe("segment 0", "tp", (0, 1), collectives).splitlines()
    assert len(lines) == 9
    assert lines[-1] == "  ... and 23 more"


def test_without_collectives() -> None:
    assert "has no collectives" in describe("segment 2", None, (), [])
