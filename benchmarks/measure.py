"""Time calls side by side, and take one call apart into its kernels.

All ranks of the launch call these functions alike.  On a CPU they work as well, for a trial of the script: time is
then the host's, and there are no kernels to see.
"""

from __future__ import annotations

import faulthandler
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Timed = Callable[[], Tensor]

# First match counts; a kernel that matches none is "other".
_CLASSES = {
    "exchange": ("nccl", "barrier_kernel"),
    "attention": ("flash", "fmha", "sdpa", "mha", "attention", "attn"),
    "gemm": ("gemm", "nvjet", "cutlass", "cublas", "xmma", "matmul", "splitk", "cudatile"),
}
_STORES = ("_store", "_add", "_pack", "_unpack")  # the kernels of torchtrt_md/runtime/store.py
_MARK = "spin_kernel"  # torch.cuda._sleep's, which nothing else launches
_MARK_CYCLES = 200_000  # about 0.1 ms, in which the host gets ahead
_SMALLEST_GAP_US = 1.0


def end_after(seconds: float) -> None:
    """End this process after so long, with the stacks of its threads, and exit code 1.

    Not by faulthandler's own timer: a process has one, and each wait of torchtrt_md's ranks sets and clears it.
    """

    def end() -> None:
        faulthandler.dump_traceback()
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


class Clock:
    """Barriers and stamps on the current stream of this rank's device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self._token = torch.zeros(1, device=device)

    def barrier(self) -> None:
        """The stream goes on when all ranks' streams are here.  Queued, the host does not wait."""
        dist.all_reduce(self._token)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def stamp(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def milliseconds(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) if self.cuda else (end - begin) * 1e3

    def once(self, call: Timed, calls: int) -> tuple[Any, Any]:
        """Stamps around ``calls`` calls in a row, as blocks follow each other in a model.

        The host waits for the device first, so that launches which a call cannot hide count against it.
        """
        self.synchronize()
        self.barrier()
        begin = self.stamp()
        for _ in range(calls):
            call()
        return begin, self.stamp()


def quick(clock: Clock, call: Timed, calls: int = 5) -> float:
    """Milliseconds per call, the slowest rank's median of three; equal on all ranks."""
    clock.once(call, 1)
    stamps = [clock.once(call, calls) for _ in range(3)]
    clock.synchronize()
    local = statistics.median(clock.milliseconds(*s) / calls for s in stamps)
    worst = torch.tensor([local], device=clock.device, dtype=torch.float64)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)


def interleaved(clock: Clock, calls: Mapping[str, Timed], rounds: int, in_a_row: Mapping[str, int]) -> dict[str, Any]:
    """Time all calls in turn, round after round, so that a drift hits all alike.

    Args:
        calls: name -> what to call; the same names in the same order on all ranks.
        rounds: how often each is timed.
        in_a_row: name -> calls per timing (:meth:`Clock.once`).

    Returns:
        name -> milliseconds per call: ``median``, ``p10``, ``p90`` over the rounds, of each round's slowest rank.
    """
    names = list(calls)
    stamps: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}
    for turn in range(rounds):
        start = turn % len(names)  # so that none always follows the same other
        for name in names[start:] + names[:start]:
            stamps[name].append(clock.once(calls[name], in_a_row[name]))
    clock.synchronize()
    local = torch.tensor(
        [[clock.milliseconds(*s) / in_a_row[name] for s in stamps[name]] for name in names],
        device=clock.device,
        dtype=torch.float64,
    )
    dist.all_reduce(local, op=dist.ReduceOp.MAX)
    return {name: _spread(times.tolist()) for name, times in zip(names, local.cpu(), strict=True)}


def _spread(times: Sequence[float]) -> dict[str, Any]:
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return {"median": statistics.median(times), "p10": tenths[0], "p90": tenths[-1], "rounds": len(times)}


def timeline(clock: Clock, call: Timed) -> dict[str, Any]:
    """The kernels of one call on this rank; see :func:`analysed`.  Every rank profiles, to be slowed alike."""
    if not clock.cuda:
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(2):  # the first one is for the profiler to warm up
            clock.synchronize()
            clock.barrier()
            torch.cuda._sleep(_MARK_CYCLES)  # type: ignore[no-untyped-call]
            call()
        clock.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return analysed(json.loads(path.read_text())["traceEvents"])


def analysed(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the GPU did after the last mark of a trace.

    Args:
        events: a Chrome trace's.

    Returns:
        ``span_us`` from the first kernel's start to the last one's end; ``busy_us`` in which at least one ran;
        ``sum_us`` of all; ``class_us`` the same by class; ``exposed_us`` in which exchanges ran and nothing else did;
        ``gaps`` of idle time above 1 us, as start, duration and the kernels around; ``kernels`` as name, start,
        duration, stream.  Empty if nothing ran.
    """
    device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    mark = max((e["ts"] + e["dur"] for e in device if _MARK in e["name"]), default=0.0)
    ran = sorted((e for e in device if e["ts"] >= mark and _MARK not in e["name"]), key=lambda e: float(e["ts"]))
    if not ran:
        return {}
    begin = float(ran[0]["ts"])
    kernels = [
        {"name": e["name"], "start": e["ts"] - begin, "us": float(e["dur"]), "stream": e.get("args", {}).get("stream")}
        for e in ran
    ]
    by_class = dict.fromkeys([*_CLASSES, "other"], 0.0)
    gaps, idle, until, last = [], 0.0, 0.0, ""
    computing = _covered(k for k in kernels if classified(k["name"]) != "exchange")
    for kernel in kernels:
        by_class[classified(kernel["name"])] += kernel["us"]
        gap = kernel["start"] - until
        idle += max(gap, 0.0)
        if gap > _SMALLEST_GAP_US:
            gaps.append({"start": until, "us": gap, "after": last, "before": kernel["name"]})
        if kernel["start"] + kernel["us"] >= until:
            until, last = kernel["start"] + kernel["us"], kernel["name"]
    return {
        "span_us": until,
        "busy_us": until - idle,
        "sum_us": sum(by_class.values()),
        "class_us": by_class,
        "exposed_us": until - idle - computing,
        "gaps": gaps,
        "kernels": kernels,
    }


def _covered(kernels: Iterable[Mapping[str, Any]]) -> float:
    """Microseconds in which at least one of these ran; they are in the order in which they began."""
    covered = until = 0.0
    for kernel in kernels:
        end = kernel["start"] + kernel["us"]
        covered += max(end - max(kernel["start"], until), 0.0)
        until = max(until, end)
    return covered


def by_name(kernels: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """How often each kernel ran, and how long in all, in microseconds; the longest first."""
    found: dict[str, dict[str, float]] = {}
    for kernel in kernels:
        its = found.setdefault(kernel["name"], {"times": 0, "us": 0.0})
        its["times"] += 1
        its["us"] += kernel["us"]
    return dict(sorted(found.items(), key=lambda item: -item[1]["us"]))


def classified(kernel: str) -> str:
    """``gemm``, ``attention``, ``exchange`` or ``other``, by a kernel's name."""
    lowered = kernel.lower()
    if lowered in _STORES:
        return "exchange"
    if lowered.startswith("triton_"):  # Inductor's, named after all ops they come from; "tem" is a product's template
        return "gemm" if lowered.startswith("triton_tem") else "other"
    return next((c for c, words in _CLASSES.items() if any(word in lowered for word in words)), "other")
