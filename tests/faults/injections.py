"""What a rank of a launch does, and the places in it at which a fault strikes."""

from __future__ import annotations

import gc
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import torch
from torch import Tensor, nn

import torchtrt_md as md
from faults.processes import TIMEOUT, strike, tell
from torchtrt_md.bundle import read_manifest, weights, write_bundle
from torchtrt_md.doors import load as load_door
from torchtrt_md.launch import communicator
from torchtrt_md.runtime import bring_up
from torchtrt_md.runtime.executor import Executor

MANY = 10**9
PLAN: dict[str, str] = {"up": "colwise", "down": "rowwise"}
PLACES = ("before load", "while reading", "while connecting", "while binding", "in a vote", "in a step")


class Product(nn.Module):
    """Two products, the second summed over the ranks: nothing that Inductor needs a C++ compiler for."""

    def __init__(self, width: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.up(x))
        return result


def product(width: int = 64, hidden: int = 128, seed: int = 0) -> tuple[Product, Tensor]:
    """The model and its input, equal in every process."""
    torch.manual_seed(seed)
    return Product(width, hidden).eval(), torch.randn(8, width)


def export(folder: Path, width: int = 64, hidden: int = 128, *, size: int = 2, seed: int = 0) -> None:
    """A bundle that runs without a GPU."""
    model, x = product(width, hidden, seed)
    parallel = md.TensorParallel("tp", PLAN)
    md.export(model, (x,), mesh=md.Mesh(tp=size), parallel=parallel, compute="inductor", check=False, out=folder)


def export_until(folder: str, stage: str) -> None:
    """Export something else there, and be killed when the stage begins."""
    model, x = product(seed=1)

    def progress(name: str, detail: str, seconds: float | None) -> None:
        if name == stage:
            os.kill(os.getpid(), signal.SIGKILL)

    how: dict[str, Any] = {"mesh": md.Mesh(tp=2), "parallel": md.TensorParallel("tp", PLAN), "compute": "inductor"}
    md.export(model, (x,), **how, check=False, out=folder, progress=progress)


def eager(bundle: Path, out: Path) -> Path:
    """The same bundle with every part run op by op: Inductor takes seconds to start in each process."""
    manifest = read_manifest(bundle)
    files = {name: out.with_suffix(".files") / name for name in manifest.files}
    for name, file in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle / name, file)
    ranks = [[msgspec.structs.replace(s, runs="eager") for s in segments] for segments in manifest.ranks]
    write_bundle(out, msgspec.structs.replace(manifest, ranks=ranks), files)
    return out


def serve(rank: int, bundle: str, place: str = "", victim: int = 1, number: int = 0, calls: int = MANY) -> int:
    """Load a bundle and call it; at a place, a signal strikes the victim."""
    if place and rank == victim:
        prepare(place, number)
    if place == "before load" and rank == victim:
        strike(number)
    _, x = product()
    with md.load(bundle, timeout=TIMEOUT) as runner:
        first = runner(x)
        tell(serving=time.time())
        for _ in range(calls):
            assert torch.equal(runner(x), first)
    return calls


def before(owner: Any, name: str, strikes: Callable[[], None], visit: int = 1) -> None:
    """Let something happen when a function is called for the so-manyth time."""
    function: Callable[..., Any] = getattr(owner, name)
    visits = 0

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal visits
        visits += 1
        if visits == visit:
            strikes()
        return function(*args, **kwargs)

    setattr(owner, name, called)


def prepare(place: str, number: int) -> None:
    """Let the signal strike where this rank comes to the place."""

    def struck() -> None:
        strike(number)

    if place == "while reading":
        before(load_door, "rank_weights", struck)
    elif place == "while connecting":
        before(communicator, "connect", struck)
    elif place == "while binding":
        before(bring_up, "bind_engines", struck)
    elif place == "in a vote":
        before(md.Runner, "call", struck, 3)
    elif place == "in a step":
        before(Executor, "_communicate", struck, 3)


def silent(rank: int, bundle: str) -> int:
    """Rank 1 makes no second call, and lives on."""
    _, x = product()
    with md.load(bundle, timeout=TIMEOUT, votes="first") as runner:
        runner(x)
        if rank == 1:
            tell(strike=time.time())
            time.sleep(3600)
        runner(x)
    return os.getpid()


# --- one launch that goes on: bundles that are not right, many calls and many loads ---


def mislead(rank: int, folder: str) -> dict[str, tuple[str, float]]:
    """Load each of ``FOLDER/<name>/<rank>``, which is wrong on rank 1; name -> the error and how long it took."""
    found = {}
    for name in sorted(child.name for child in Path(folder).iterdir()):
        start = time.monotonic()
        try:
            with _little_memory() if rank == 1 and name == OUT_OF_MEMORY else nullcontext():
                md.load(Path(folder) / name / str(rank), timeout=TIMEOUT).close()
            error = ""
        except md.errors.MDError as raised:
            error = f"{type(raised).__name__}: {raised}"
        found[name] = (error, time.monotonic() - start)
    return found


OUT_OF_MEMORY = "out of memory at load"


@contextmanager
def _little_memory() -> Iterator[None]:
    """Let the system refuse this process more than some megabytes while it reads its weights."""
    before, read = resource.getrlimit(resource.RLIMIT_AS), weights.rank_weights

    def limited(*args: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + 16 * 2**20, before[1]))
        try:
            return read(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)

    with mock.patch.object(load_door, "rank_weights", limited):
        yield


def status(field: str) -> int:
    """Bytes, of a field of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def endure(rank: int, bundle: str, calls: int, loads: int) -> dict[str, Any]:
    """Many loads, and many calls; what they did to the host's memory and to the result's bits."""
    _, x = product()
    first: Tensor | None = None
    marks: dict[str, list[int]] = {"loads": [], "calls": []}
    same = True

    def mark(what: str) -> None:
        gc.collect()
        marks[what].append(status("VmRSS"))

    held: list[tuple[int, int]] = []  # open files and threads
    start = time.monotonic()
    for number in range(loads):
        with md.load(bundle, timeout=60.0) as runner:
            result = runner(x)
        first = result if first is None else first
        same = same and torch.equal(result, first)
        if number in (0, loads - 1):
            held.append((len(os.listdir("/proc/self/fd")), threading.active_count()))
        if number in (loads // 2 - 1, loads - 1):
            mark("loads")
    loading, start = time.monotonic() - start, time.monotonic()
    with md.load(bundle, timeout=60.0) as runner:
        for number in range(calls):
            same = same and torch.equal(runner(x), first if first is not None else x)
            if number in (calls // 2 - 1, calls - 1):
                mark("calls")
    seconds = [loading, time.monotonic() - start]
    files, threads = zip(*held, strict=True)
    return {"same": same, "rss": marks, "seconds": seconds, "files": files, "threads": threads}
