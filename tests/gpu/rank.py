"""One process of a launch of the suite, which starts it: ``rank.py JSON``.

It runs the cases in order, all ranks together, and writes what it finds to a file.  Where all ranks raise the same they
go on; else they leave, and the suite runs what is left in a new launch.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import json
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from gpu.case import Call, Case, Found, Rank
from torchtrt_md.launch.shared_gpu import own_gpu

RANKS_DIFFER = 3  # exit code: the ranks are not where each other are
ENOUGH_SECONDS = 10.0  # for a case to be begun before the deadline


class Cases(Protocol):
    """A module of cases."""

    def cases(self, device: str, ranks: int) -> list[Case]: ...

    def make(self, name: str) -> Call: ...

    def export(self, device: str, ranks: int, folder: Path) -> None: ...


def join(device: str) -> torch.device:
    """Join the launch, on a GPU, of this rank's own unless NCCL may share it, or on the CPU."""
    if device == "cpu":
        dist.init_process_group("gloo", timeout=timedelta(seconds=120))
        return torch.device("cpu")
    own = own_gpu(int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(own)
    dist.init_process_group("nccl", device_id=own, timeout=timedelta(seconds=120))
    return own


def nccl_version() -> str:
    """Of the library that runs; PyTorch tells with which it was compiled."""
    number = ctypes.c_int()
    ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(number))  # which PyTorch has loaded
    major, rest = divmod(number.value, 10000)
    return f"{major}.{rest // 100}.{rest % 100}"


def versions() -> dict[str, str]:
    """Of what ran."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__), "CUDA": torch.version.cuda or ""}
    if torch.cuda.is_available():
        found["NCCL"] = nccl_version()
    try:
        from torchtrt_md.build.flavour import flavour

        found[flavour().name] = flavour().version
    except Exception as error:  # told in the report; the cases that need it fail by themselves
        found["TensorRT"] = f"{type(error).__name__}: {error}"
    return found


class Steps:
    """Keeps the ranks at the same case, by the store of the launch."""

    def __init__(self, rank: Rank, until: float) -> None:
        self.rank, self.until = rank, until
        self.store = PrefixStore("suite", _get_default_store())

    def begin(self, number: int, case: Case) -> bool:
        """Whether there is time for another case, as rank 0 sees it."""
        key = f"go {number}"
        if self.rank.rank == 0:
            self.store.set(key, "go" if time.time() + ENOUGH_SECONDS < self.until else "stop")
        self.store.wait([key], timedelta(seconds=case.seconds))
        go = self.store.get(key) == b"go"
        # No rank runs the case, and perhaps ends, before all have read this: rank 0's process is the store.
        self._meet(f"begun {number}", "-", range(self.rank.size), case)
        return bool(go)

    def end(self, number: int, case: Case, raised: str) -> bool:
        """Whether the ranks that are left came to the end of the case, and raised the same or nothing."""
        left = [rank for rank in range(self.rank.size) if rank not in case.ends]
        return len(self._meet(f"end {number}", raised or "-", left, case)) == 1

    def _meet(self, step: str, say: str, ranks: Iterable[int], case: Case) -> set[bytes]:
        """Wait until these ranks have come to the step; what they said.  Rank 0 is the last to go on."""
        self.store.set(f"{step} {self.rank.rank}", say)
        keys = [f"{step} {rank}" for rank in ranks]
        self.store.wait(keys, timedelta(seconds=case.seconds))
        said = {self.store.get(key) for key in keys}
        self.store.add(f"{step} read", 1)
        while self.rank.rank == 0 and self.store.add(f"{step} read", 0) < len(keys):
            time.sleep(0.01)  # the suite cuts off a case that takes too long
        return said


def run_cases(rank: Rank, cases: list[Case], until: float) -> int:
    """Run the cases; the exit code."""
    steps = Steps(rank, until)
    for number, case in enumerate(cases):
        if not steps.begin(number, case):
            return 0
        rank.tell(begin=case.name)
        start, found, raised = time.perf_counter(), Found(), ""
        try:
            found = case.run(rank)
        except Exception as error:  # the case fails, and says so
            traceback.print_exc()
            raised = f"{type(error).__name__}: {error}"
        rank.end(case.name, found, raised, time.perf_counter() - start)
        same = steps.end(number, case, raised)
        if case.ends:  # there is a rank less
            return 0
        if not same:
            return RANKS_DIFFER
        rank.clean_up()
    return 0


def main() -> None:
    given = json.loads(sys.argv[1])
    faulthandler.register(signal.SIGUSR1)  # the suite asks a process that hangs where it is
    module: Cases = importlib.import_module(given["module"])
    work = Path(given["work"])
    if given.get("export"):
        module.export(given["device"], given["ranks"], work)
        return
    rank = Rank(join(given["device"]), work, Path(given["record"]), module.make)
    if rank.rank == 0:
        rank.tell(versions=versions())
    named = {case.name: case for case in module.cases(given["device"], rank.size)}
    code = RANKS_DIFFER
    try:
        code = run_cases(rank, [named[name] for name in given["cases"]], given["until"])
    except Exception:  # another rank did not come
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the destructors of CUDA and NCCL may wait on peers that are gone


if __name__ == "__main__":
    main()
