"""Launches of real processes over gloo, for faults that end some of them.

Processes are forked, so that a launch takes a second and not ten.  As under torchrun, the store is in a process of its
own, unless rank 0 is to hold it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rank_processes import free_port, warm
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from torchtrt_md.errors import MDError

TIMEOUT = 10.0  # seconds of silence after which a rank is given up, in every launch here
SLACK = 30.0  # for the machine: starts, compiles and ends of processes that share its cores with others
MARK = "TORCHTRT_MD_FAULT_LAUNCH"
Told = dict[str, Any]


@dataclass
class Ended:
    """A rank's process, after its end.

    Attributes:
        code: its exit code; negative, the signal that ended it.
        error: class and message of what it raised; "" where nothing was raised.
        output: stdout and stderr.
        seconds: from the fault to its end; from its start where it told of no fault.
        value: what its function returned.
        killed: by this module, because it did not end.
    """

    code: int | None
    error: str
    output: str
    seconds: float
    value: Any
    killed: bool


@dataclass
class Launch:
    """``size`` ranks that each run ``function(rank, *args)``.

    Args:
        store: who holds it: ``agent``, as with torchrun, or ``rank 0``.
        stopped: a rank that a fault stops, and that is killed when the others have ended.
        patience: seconds until those that have not ended are killed.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    folder: Path
    size: int = 2
    store: str = "agent"
    stopped: int | None = None
    patience: float = TIMEOUT + SLACK
    env: dict[str, str] = field(default_factory=dict)

    def start(self) -> None:
        """Start the processes."""
        self.folder.mkdir(parents=True)
        self.mark = uuid.uuid4().hex
        context = warm()
        agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = agent.port
        if self.store == "rank 0":
            port = free_port()
        self._agent = agent  # it serves for as long as this lives
        env = {
            **{name: value for name, value in os.environ.items() if name.startswith(("TORCHINDUCTOR_", "OMP_"))},
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(self.size),
            "TORCHELASTIC_USE_AGENT_STORE": str(self.store == "agent"),
            "OMP_NUM_THREADS": "1",
            MARK: self.mark,
            **self.env,
        }
        self.started, self.struck = time.time(), 0.0
        self.processes: list[BaseProcess] = []
        for rank in range(self.size):
            own = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(target=_main, args=(str(self.folder), own, self.function, self.args))
            process.start()
            self.processes.append(process)

    def wait(self) -> list[Ended]:
        """The ranks in order, once all have ended."""
        ends: dict[int, float] = {}
        killed: set[int] = set()
        while len(ends) < self.size:
            for rank, process in enumerate(self.processes):
                if rank not in ends and process.exitcode is not None:
                    ends[rank] = time.time()
                if rank not in ends and time.time() - self.started > self.patience:
                    killed.add(rank)
                    process.kill()
            if set(range(self.size)) - set(ends) == {self.stopped}:
                self.processes[self.stopped or 0].kill()
            time.sleep(0.02)
        struck = [line["strike"] for rank in range(self.size) for line in self.told(rank) if "strike" in line]
        since = self.struck or min(struck, default=self.started)
        found = []
        for rank, process in enumerate(self.processes):
            lines = self.told(rank)
            error = next((line["error"] for line in lines if "error" in line), "")
            value = next((line["value"] for line in lines if "value" in line), None)
            output = (self.folder / f"{rank}.log").read_text(errors="replace")
            found.append(Ended(process.exitcode, error, output, ends[rank] - since, value, rank in killed))
        return found

    def told(self, rank: int) -> list[Told]:
        """What a rank has told."""
        file = self.folder / f"{rank}.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def wait_for(self, what: str, rank: int) -> None:
        """Until a rank has told of something."""
        until = time.time() + self.patience
        while not any(what in line for line in self.told(rank)):
            assert time.time() < until, f"rank {rank} did not come to {what!r}"
            time.sleep(0.02)

    def left(self) -> list[int]:
        """Processes of the launch that still run, whoever started them."""
        sessions = [line["session"] for rank in range(self.size) for line in self.told(rank) if "session" in line]
        return running(self.mark, sessions)


def running(mark: str, sessions: Sequence[int] = ()) -> list[int]:
    """The processes that have the mark in the environment that they were started with, or are of a session."""
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ValueError, IndexError):
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            of_session = int(stat[3]) in sessions
            if stat[0] != "Z" and (of_session or mark.encode() in (folder / "environ").read_bytes()):
                found.append(int(folder.name))
    return found


def tell(**what: Any) -> None:
    """Tell the test."""
    with (Path(os.environ["FAULT_FOLDER"]) / f"{os.environ['RANK']}.jsonl").open("a") as file:
        file.write(json.dumps(what) + "\n")


def strike(number: int) -> None:
    """Send this process a signal, and tell when."""
    tell(strike=time.time())
    os.kill(os.getpid(), number)


def _main(folder: str, env: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.setsid()
    os.environ.update(env, FAULT_FOLDER=folder)
    rank = int(env["RANK"])
    log = os.open(Path(folder) / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored in what it starts
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    tell(session=os.getsid(0))
    dist.init_process_group("gloo", timeout=timedelta(seconds=600))  # longer than any test: it must not be what helps
    try:
        tell(value=function(rank, *args))
    except MDError as error:
        traceback.print_exc()
        tell(error=f"{type(error).__name__}: {error}")
        sys.exit(1)
    dist.destroy_process_group()
