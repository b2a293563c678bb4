"""Steps that wait for other ranks: two processes, one of which fails before it comes there."""

import contextlib
import multiprocessing
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from torchtrt_md.errors import CommunicatorError, LaunchError
from torchtrt_md.launch import Launch
from torchtrt_md.launch.watchdog import EXIT_CODE

LONG = 600.0


def meet(rank: int, size: int, store: str, timeout: float, told: Any, output: str) -> None:
    """Rank 1 is refused; the others wait for it in a call that nothing ends, as in NCCL."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    launch = Launch.join(timeout, cpu=True)

    def step() -> None:
        if rank == 1:
            raise CommunicatorError("NCCL has no memory", fix="free some")
        threading.Event().wait()

    start = time.monotonic()
    with Path(output).open("w") as file, contextlib.redirect_stderr(file):
        try:
            launch.meet("binding", step)
        except LaunchError as error:
            told.put((rank, str(error), time.monotonic() - start))


@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_that_fails_before_it_comes_ends_the_wait_of_the_others(tmp_path: Path, size: int) -> None:
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    processes = [
        context.Process(target=meet, args=(r, size, str(tmp_path / "store"), LONG, told, str(tmp_path / f"{r}")))
        for r in range(size)
    ]
    for process in processes:
        process.start()
    rank, message, seconds = told.get(timeout=120)
    for process in processes:
        process.join(30)
    assert rank == 1
    assert "NCCL has no memory" in message
    assert seconds < 60, "not the timeout of 600 s"
    for other, process in enumerate(processes):
        if other != 1:
            assert process.exitcode == EXIT_CODE
            output = (tmp_path / f"{other}").read_text()
            assert "binding" in output
            assert "rank 1 has failed: NCCL has no memory" in output


def both_come(rank: int, size: int, store: str, told: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    launch = Launch.join(LONG, cpu=True)
    with contextlib.suppress(LaunchError):  # an earlier failure is not one of this step
        launch.together("reading", lambda: 1 // (1 - rank))
    launch.meet("binding", lambda: time.sleep(7))
    told.put(rank)


def test_an_earlier_failure_ends_no_wait(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    processes = [context.Process(target=both_come, args=(r, 2, str(tmp_path / "store"), told)) for r in range(2)]
    for process in processes:
        process.start()
    assert {told.get(timeout=120) for _ in processes} == {0, 1}
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
