"""Steps that wait for other ranks: two processes, one of which fails before it comes there."""

import contextlib
import ctypes
import os
import threading
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from rank_processes import warm
from torch import nn

import torchtrt_md as md
from torchtrt_md import launch
from torchtrt_md.errors import CommunicatorError, LaunchError
from torchtrt_md.launch import Launch
from torchtrt_md.launch.watchdog import EXIT_CODE

LONG, SHORT = 600.0, 3.0


def be_quick() -> None:
    """Where Python's lock is held, the watchdog cannot end the process first, so nothing need wait for that."""
    launch._LOCKED_SECONDS = 1.0


def meet(rank: int, size: int, store: str, locked: bool, told: Any, output: str) -> None:
    """Rank 1 is refused; the others wait for it in a call that nothing ends, as in NCCL."""
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 2)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    if locked:
        be_quick()
    mine = Launch.join(SHORT if locked else LONG, cpu=True)

    def bind() -> None:
        if rank == 1:
            raise CommunicatorError("NCCL has no memory", fix="free some")
        if locked:
            ctypes.PyDLL("libc.so.6").sleep(int(LONG))  # holds Python's lock, so that no thread of Python runs
        threading.Event().wait()

    start = time.monotonic()
    try:
        mine.meet("binding", bind)
    except LaunchError as error:
        told.put((rank, str(error), time.monotonic() - start))


def met(folder: Path, size: int, *, locked: bool) -> tuple[list[tuple[int, str]], str, float]:
    """Exit code and output of each rank; the message of the one that is left, and when it came."""
    context = warm()
    told = context.Queue()
    processes = [
        context.Process(target=meet, args=(r, size, str(folder / "store"), locked, told, str(folder / f"{r}")))
        for r in range(size)
    ]
    for process in processes:
        process.start()
    rank, message, seconds = told.get(timeout=120)
    assert rank == 1
    for process in processes:
        process.join(60)
    return [(p.exitcode or 0, (folder / f"{r}").read_text()) for r, p in enumerate(processes)], message, seconds


@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_that_fails_before_it_comes_ends_the_wait_of_the_others(tmp_path: Path, size: int) -> None:
    ranks, message, seconds = met(tmp_path, size, locked=False)
    assert "NCCL has no memory" in message
    assert seconds < 60, "not the timeout of 600 s"
    for code, output in (ranks[0], *ranks[2:]):
        assert code == EXIT_CODE
        assert "binding" in output
        assert "rank 1 has failed: NCCL has no memory" in output


def test_a_wait_that_holds_the_lock_of_python_ends_too(tmp_path: Path) -> None:
    ranks, message, _ = met(tmp_path, 2, locked=True)
    assert "NCCL has no memory" in message
    code, output = ranks[0]
    assert code == 1
    assert "in bind" in output, "where it waited"


def both_come(rank: int, size: int, store: str, told: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    launch = Launch.join(LONG, cpu=True)
    with contextlib.suppress(LaunchError):  # an earlier failure is not one of this step
        launch.together("reading", lambda: 1 // (1 - rank))
    launch.meet("binding", lambda: time.sleep(7))
    told.put(rank)


def test_an_earlier_failure_ends_no_wait(tmp_path: Path) -> None:
    context = warm()
    told = context.Queue()
    processes = [context.Process(target=both_come, args=(r, 2, str(tmp_path / "store"), told)) for r in range(2)]
    for process in processes:
        process.start()
    assert {told.get(timeout=120) for _ in processes} == {0, 1}
    for process in processes:
        process.join(30)
        assert process.exitcode == 0


def close(store: str, locked: bool, output: str) -> None:
    """Close a runner of which something waits without end where it is let go of, as TensorRT's engines may."""
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 2)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    if locked:
        be_quick()
    how: Any = {"compute": "inductor", "mesh": md.Mesh(d=1), "report": False, "timeout": SHORT}
    runner = md.compile(nn.ReLU(), (torch.ones(2),), **how)

    class Waits:
        def __del__(self) -> None:
            (ctypes.PyDLL if locked else ctypes.CDLL)("libc.so.6").sleep(int(LONG))

    cast(list[Any], runner.executor.steps).append(Waits())
    runner.close()


@pytest.mark.parametrize("locked", [False, True])
def test_a_close_that_does_not_end_ends_the_process(tmp_path: Path, locked: bool) -> None:
    output = tmp_path / "output"
    process = warm().Process(target=close, args=(str(tmp_path / "store"), locked, str(output)))
    process.start()
    process.join(60)
    assert process.exitcode == (1 if locked else EXIT_CODE)
    assert ("in __del__" if locked else "the end of program 1") in output.read_text()


def close_within(store: str, output: str) -> None:
    """Close a runner, as Python's collector may, in a wait that holds Python's lock for too long behind that."""
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 2)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    be_quick()
    mine = Launch.join(SHORT, cpu=True)

    def step() -> None:
        with mine.bounded("another's end"):
            pass
        ctypes.PyDLL("libc.so.6").sleep(int(LONG))

    mine.meet("binding", step)


def test_a_wait_is_bounded_behind_another_within_it(tmp_path: Path) -> None:
    output = tmp_path / "output"
    process = warm().Process(target=close_within, args=(str(tmp_path / "store"), str(output)))
    process.start()
    process.join(60)
    assert process.exitcode == 1
    assert "in step" in output.read_text()
