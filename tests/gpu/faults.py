"""Faults on GPUs, in launches of their own: ``python tests/gpu/suite.py --cases gpu.faults --ranks 2 --out FOLDER``.

With ``--device cpu`` a few of them, over gloo.  tests/faults/ has many more that need no GPU.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from faults.cases import GROWTH, numbers
from faults.injections import before, status

import torchtrt_md as md
from gpu.bundles import BUNDLES, CPU_BUNDLES, SHORT, Bundle, bundle_of, export_all, loaded
from gpu.case import Case, Found, Rank, first_tensor
from gpu.networks import make
from torchtrt_md.bundle.read import read_manifest
from torchtrt_md.errors import LaunchError, MDError
from torchtrt_md.launch.watchdog import EXIT_CODE
from torchtrt_md.runtime import bring_up
from torchtrt_md.runtime.engine import deserialize, trt_runtime
from torchtrt_md.runtime.executor import Executor
from torchtrt_md.runtime.graphs import Captured

__all__ = ["cases", "export", "make"]

# What is called on the victim next when the signal strikes.
PLACES = {
    "while binding": (bring_up, "bind_engines", 1),
    "in a step": (Executor, "run", 3),
    "in a replayed graph": (Captured, "replay", 3),
}
# Nothing between its segments is NCCL's: who waits for a rank that is gone waits in a kernel of ours.
STORES = Bundle("llama", "tp", transport="store")
SIGNALS = {signal.SIGKILL: "killed", signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
_FULL, _LITTLE = 2**21, 2**26  # bytes that are left on a GPU that somebody holds
_HOLD = """
import sys, torch
held = []
for size in (2**30, 2**26, 12 * 2**20, 2**20):  # PyTorch takes 2 MiB for the last
    while torch.cuda.mem_get_info()[0] > max(size, 2**21) + int(sys.argv[1]):
        held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
print("held", flush=True)
sys.stdin.read()
"""


def cases(device: str, ranks: int) -> list[Case]:
    """All cases, in the order in which they run."""
    gpu = device == "cuda"
    bundle = (BUNDLES if gpu else CPU_BUNDLES)[0]
    calls, loads = numbers()
    found = [Case(f"{calls} calls and {loads} loads", functools.partial(endures, bundle), "faults", 600)]
    if gpu:
        for by, left in (("this process", _FULL), ("another process", _FULL), ("this process", _LITTLE)):
            about = f"is held by {by}" if left == _FULL else "has too little left for NCCL"
            run = functools.partial(held, bundle, by, left)
            found.append(Case(f"rank 1: its GPU's memory {about}", run, "faults"))
    for place in PLACES if gpu else ("in a step",):
        for number, name in SIGNALS.items() if gpu else [(signal.SIGKILL, "killed")]:
            run = functools.partial(struck, bundle, place, number)
            # A process that Ctrl-C ends has a clean-up, in which it may stay until its peers have ended.
            code = None if gpu and number == signal.SIGINT else -int(number)
            ends, says = {1: code}, ("rank 1",)
            if gpu and place != "while binding":
                ends, says = {0: EXIT_CODE, 1: code}, ("rank 0 waited",) if code is None else ("rank 1 has ended",)
            launch = f"{name} {place}" if gpu else "faults"
            found.append(Case(f"rank 1: {name} {place}", run, launch, ends=ends, says=says))
    if gpu:
        place, number = "in a replayed graph", signal.SIGKILL
        run, name = functools.partial(struck, STORES, place, number), f"killed {place} of stores"
        ends, says = {0: EXIT_CODE, 1: -int(number)}, ("rank 1 has ended",)
        found.append(Case(f"rank 1: {name}", run, name, ends=ends, says=says))
    return found


def export(device: str, ranks: int, folder: Path) -> None:
    """Export the bundle of these cases."""
    wanted = CPU_BUNDLES[:1] if device == "cpu" else [BUNDLES[0], STORES]
    export_all([(bundle, bundle.name, ranks) for bundle in wanted], folder)


def struck(bundle: Bundle, place: str, number: int, at: Rank) -> Found:
    """A signal strikes rank 1; in a collective on GPUs the others are ended by their watchdogs, else they raise."""
    found = Found()
    if at.rank == 1:
        owner, name, visit = PLACES[place]
        before(owner, name, lambda: os.kill(os.getpid(), number), visit)

    def serve() -> None:
        with loaded(at, bundle, timeout=SHORT, cuda_graph="graph" in place) as (runner, (_, args, kwargs)):
            for _ in range(10):
                runner(*args, **kwargs)
                at.synchronize()

    start = time.perf_counter()
    found.must_refuse(LaunchError, serve, "rank 1", "ended")
    print(found.refused, flush=True)
    found.message = f"{time.perf_counter() - start:.1f} s with the load"
    return found


def held(bundle: Bundle, by: str, left: int, at: Rank) -> Found:
    """No memory on one GPU is an error on all ranks that live on; once it is there again, so are the results."""
    found = Found()
    with loaded(at, bundle) as (runner, (_, args, kwargs)):
        expected = first_tensor(runner(*args, **kwargs)).clone()
    at.clean_up()
    with (_held_here(left) if by == "this process" else _held_by_another(at, left)) if at.rank == 1 else _nothing():
        found.must_refuse(MDError, lambda: md.load(bundle_of(at, bundle.name), timeout=SHORT), "rank 1")
    at.clean_up()
    with loaded(at, bundle) as (runner, (_, args, kwargs)):
        found.compare([first_tensor(runner(*args, **kwargs)), expected], *at.reference(bundle.model))
    return found


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _held_here(left: int) -> Iterator[None]:
    blocks = []
    for size in (2**30, 2**26, 12 * 2**20, 2**20):  # PyTorch takes 2 MiB for the last
        while torch.cuda.mem_get_info()[0] > max(size, 2**21) + left:
            blocks.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    yield
    blocks.clear()


@contextmanager
def _held_by_another(at: Rank, left: int) -> Iterator[None]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    own = visible[at.device.index or 0] if len(visible) > 1 else str(at.device.index or 0)
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(left)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": own},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        yield
    finally:
        holder.kill()
        holder.wait()


def endures(bundle: Bundle, at: Rank) -> Found:
    """Many loads and many calls: memory of the host and of the GPU stays, and so do the bits.

    TensorRT-RTX itself keeps some memory of each context that was ever made, so loads are compared with as many
    contexts of the same engine, made and dropped by its API alone.
    """
    calls, loads = numbers()
    found, results = Found(), list[torch.Tensor]()

    def memory() -> tuple[int, int]:
        at.clean_up()
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free, and kept by the allocator, is not held
        free, whole = torch.cuda.mem_get_info() if at.device.type == "cuda" else (0, 0)
        return status("VmRSS"), whole - free

    marks: dict[str, list[tuple[int, int]]] = {"loads": [], "calls": [], "contexts": [memory()] * 2}
    for number in range(loads):
        with loaded(at, bundle) as (runner, (_, args, kwargs)):
            result = first_tensor(runner(*args, **kwargs)).clone()
        results = results or [result]
        found.expect(torch.equal(result, results[0]), f"load {number} gave other bits than the first")
        if number in (loads // 2 - 1, loads - 1):
            marks["loads"].append(memory())
    if at.device.type == "cuda":
        marks["contexts"] = [memory()]
        _make_contexts(bundle_of(at, bundle.name), loads - loads // 2, at)
        marks["contexts"].append(memory())
    with loaded(at, bundle, cuda_graph=at.device.type == "cuda") as (runner, (_, args, kwargs)):
        for number in range(calls):
            result = first_tensor(runner(*args, **kwargs))
            if number % 50 == 0:
                found.expect(torch.equal(result, results[0]), f"call {number} gave other bits than the first load")
            if number in (calls // 2 - 1, calls - 1):
                marks["calls"].append(memory())
    grown = {what: [b - a for a, b in zip(half, whole, strict=True)] for what, (half, whole) in marks.items()}
    told = "; ".join(
        f"{what} {h / 2**20:+.1f} MiB of the host, {g / 2**20:+.1f} of the GPU" for what, (h, g) in grown.items()
    )
    for what, (host, gpu) in grown.items():
        own_host, own_gpu = grown["contexts"] if what == "loads" else (0, 0)
        if what != "contexts":
            fine = host <= 2 * own_host + 8 * GROWTH and gpu <= 2 * own_gpu + 2 * GROWTH
            found.expect(fine, f"memory of {what} grew in the second half: {told}")
    found.message = f"in the second half: {told}"
    return found


def _make_contexts(folder: Path, count: int, at: Rank) -> None:
    """Make and drop contexts of the first engine, by TensorRT's API alone."""
    manifest = read_manifest(folder)
    file = next(segment.file for segment in manifest.ranks[at.rank] if segment.runs == "engine")
    runtime, _ = trt_runtime(at.device)
    for _ in range(count):
        engine = deserialize(runtime, folder / file, manifest.target)
        context = engine.create_execution_context()
        del context, engine
