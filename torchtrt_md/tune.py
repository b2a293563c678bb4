"""Choose by timing on the GPUs: how attentions exchange, and what each segment runs as.

    1. each different compute segment alone, in TensorRT and compiled by Inductor: which of them 2 is timed with
    2. each different attention: every way of exchange, in a whole step                 -> the fastest
    3. each different compute segment between these, as in 1                            -> the faster
    4. whole steps: the mixture of 3, TensorRT alone, Inductor alone, one engine        -> the fastest

Every time is a median over CUDA graph replays, and the largest of any rank; so all ranks decide alike, and the tuned
program is at least as fast, as measured here, as the best of TensorRT alone and Inductor alone.
"""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING

import msgspec
import torch
from torch import Tensor

import torchtrt_md
from torchtrt_md.build.flavour import flavour
from torchtrt_md.choices import Choices, Decision
from torchtrt_md.errors import LaunchError, MDError
from torchtrt_md.graph.text import graph_digest
from torchtrt_md.lowering import attention_keys
from torchtrt_md.lowering.passes import Exchange
from torchtrt_md.runtime.executor import Executor
from torchtrt_md.runtime.graphs import Budget, Graphs
from torchtrt_md.runtime.steps import Key
from torchtrt_md.segment import Part, Runs, Wire

if TYPE_CHECKING:
    from torchtrt_md.doors.compile import Session
    from torchtrt_md.road import Built

WARM_UP, REPEATS, FEWEST = 3, 20, 5
SECONDS = 1.0  # for each candidate, where the fewest repeats leave it
_STEP = "a whole step"
_TENSORRT, _INDUCTOR = "TensorRT", "Inductor"
_TRANSPORTS = {"nccl": "NCCL", "copy": "copy engines"}


def candidates(strategy: str) -> dict[str, Exchange]:
    """The ways of exchange that are tried, by name.

    Args:
        strategy: the axis's: ``auto`` tries all.
    """
    found = {
        "ulysses": Exchange("ulysses"),
        "ulysses, values first": Exchange("ulysses", values_first=True),
        "ulysses, 2 groups of heads": Exchange("ulysses", head_groups=2),
        "ulysses, 2 groups of heads, values first": Exchange("ulysses", head_groups=2, values_first=True),
        "allgather_kv": Exchange("allgather_kv"),
        "ring": Exchange("ring"),
    }
    return {name: e for name, e in found.items() if strategy in ("auto", e.strategy)}


def tune(session: Session, plan: Choices) -> Choices:
    """The fastest choices that are found, or were found for this program on these GPUs before.  Collective.

    Raises:
        LaunchError: there is no GPU to time on.
    """
    if session.launch.device.type != "cuda":
        raise LaunchError("tune=True times candidates on GPUs, and there is none", fix="leave out tune")
    file = session.road.cache.folder / "choices" / f"{_key(session, plan)}.json"
    # What rank 0 has counts for all: they must not choose differently.
    held = session.launch.agreement.gather(file.read_bytes() if file.exists() else b"", "choices made before")[0]
    if held:
        return msgspec.json.decode(held, type=Choices)
    tuned = _timed(session, plan)
    if session.launch.rank == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        unfinished.write_bytes(msgspec.json.encode(tuned))
        unfinished.replace(file)
    return tuned


def _key(session: Session, plan: Choices) -> str:
    """All that the choices depend on, in hexadecimal."""
    options = session.options
    parts = (
        graph_digest(session.road.lower(replace(plan, placement="split")).graphs[session.launch.rank]),
        sorted(session.program.strategies.items()),
        list(session.program.mesh.axes.items()),
        torch.cuda.get_device_name(session.launch.device),
        (flavour().name, flavour().version, str(torch.__version__), torchtrt_md.__version__),
        (options.tune, options.placement, options.target, str(options.exchange), options.transpose_weights),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _timed(session: Session, plan: Choices) -> Choices:
    mixed = session.options.tune is True
    timer = _Timer(session)
    split = replace(plan, placement="split", compute="engine", decisions=())
    if mixed:  # so that exchanges are compared around segments that run as they will
        _, decisions = _segments(session, split)
        total = {name: sum(d.times_ms[name] for d in decisions) for name in (_TENSORRT, _INDUCTOR)}
        if total[_INDUCTOR] < total[_TENSORRT]:
            split = replace(split, compute="inductor")
    split, decisions = _exchanges(session, split, timer)
    split = replace(split, compute="engine")
    if mixed:
        split, decided = _segments(session, split)
        decisions += decided
    steps: dict[str, Choices] = {"TensorRT, attention in PyTorch": replace(split, runs={})}
    if session.options.placement != "split":
        steps["TensorRT, one engine"] = replace(split, placement="engine", exchanges={}, runs={})
    if mixed:
        steps["TensorRT and Inductor, as timed"] = split
        steps["Inductor, attention in PyTorch"] = replace(split, compute="inductor", runs={})
    if session.options.placement == "engine":
        steps = {name: p for name, p in steps.items() if p.placement == "engine"}
    times = {name: timer.step(candidate) for name, candidate in steps.items()}
    possible = {name: ms for name, ms in times.items() if ms is not None}
    if not possible:
        return plan
    best = min(possible, key=lambda name: possible[name])
    decisions.append(Decision(_STEP, best, "the fastest", possible))
    return replace(steps[best], decisions=tuple(decisions), tuned_on=torch.cuda.get_device_name(session.launch.device))


def _exchanges(session: Session, plan: Choices, timer: _Timer) -> tuple[Choices, list[Decision]]:
    """The fastest way of exchange of each attention in turn, the others being as they are."""
    decisions = []
    if session.options.exchange is not None or session.options.placement == "engine":
        return plan, []
    for key in attention_keys(session.program):
        axis = key.rsplit(" ", 1)[1].split("=")[0]
        times = {}
        tried = {
            f"{name} by {_TRANSPORTS[transport]}": replace(
                plan, exchanges={**plan.exchanges, key: exchange}, transport=transport
            )
            for name, exchange in candidates(session.program.strategies[axis]).items()
            for transport in ("nccl", "copy")
        }
        for name, candidate in tried.items():
            ms = timer.step(candidate)
            if ms is not None:
                times[name] = ms
        if times:
            best = min(times, key=lambda name: times[name])
            plan = tried[best]
            decisions.append(Decision(f"attention {key}", best, "the fastest whole step", times))
    return plan, decisions


def _segments(session: Session, plan: Choices) -> tuple[Choices, list[Decision]]:
    """The faster of TensorRT and Inductor for each different compute segment."""
    in_trt = session.built(replace(plan, runs={}, compute="engine"))
    in_inductor = session.built(replace(plan, runs={}, compute="inductor"))
    texts = _texts(session, in_trt, in_inductor)
    if texts is None:  # an op that no engine can hold cuts the two differently
        return plan, []
    runs: dict[str, Runs] = {}
    decisions = []
    for number, (text, (engine_part, inductor_part, count)) in enumerate(texts.items()):
        times = {
            _TENSORRT: _segment_ms(session, in_trt, engine_part),
            _INDUCTOR: _segment_ms(session, in_inductor, inductor_part),
        }
        faster = min(times, key=lambda name: times[name])
        runs[text] = "inductor" if faster == _INDUCTOR else "engine"
        why = "the faster" + (f": {flavour().name} is slower at it on this GPU" if faster == _INDUCTOR else "")
        decisions.append(Decision(f"segment {number} ({count} of them)", faster, why, times))
    return replace(plan, runs=runs), decisions


def _texts(session: Session, in_trt: Built, in_inductor: Built) -> dict[str, tuple[Part, Part, int]] | None:
    """Text of the graph of a compute part -> the part as an engine, as Inductor has it, and how many are equal."""
    rank = session.launch.rank
    if len(in_trt.parts[rank]) != len(in_inductor.parts[rank]):
        return None
    found: dict[str, tuple[Part, Part, int]] = {}
    for a, b in zip(in_trt.parts[rank], in_inductor.parts[rank], strict=True):
        if (a.runs == "eager") != (b.runs == "eager"):
            return None
        if a.runs == "engine":
            before = found.get(b.digest)
            found[b.digest] = (a, b, before[2] + 1 if before else 1)
    return found


def _segment_ms(session: Session, built: Built, part: Part) -> float:
    """The median of one segment alone; its inputs are random."""
    segment = part.segment
    outputs = [b.source for b in segment.outputs]
    executor = session.executor(built, [part], outputs=outputs)
    inputs: dict[Key, Tensor] = {
        b.source: _random(b.shape, b.dtype, session.launch.device)
        for b in segment.inputs
        if b.source.kind not in ("weight", "coordinate")
    }
    return _agreed(session, lambda: _median_ms(session, executor, inputs))


class _Timer:
    """Times whole steps, each plan once."""

    def __init__(self, session: Session) -> None:
        self.session = session
        generator = torch.Generator(device=session.launch.device).manual_seed(0)
        self.inputs: dict[Key, Tensor] = {
            Wire("input", value.name): _random(value.shape, value.dtype, session.launch.device, generator)
            for value in session.program.inputs
        }

    def step(self, plan: Choices) -> float | None:
        """Milliseconds; None where this plan cannot be built, on any rank."""
        session = self.session
        try:
            executor = session.executor(session.built(plan))
        except MDError:  # the same on every rank
            return None
        ms = _agreed(session, lambda: _median_ms(session, executor, self.inputs))
        executor.close()
        gc.collect()
        torch.cuda.empty_cache()
        return ms


def _agreed(session: Session, measure: Callable[[], float]) -> float:
    """The largest of all ranks' times; the ranks begin together."""

    def watched() -> float:
        with session.launch.watchdog.waiting("a candidate that is timed"):
            return measure()

    mine = session.launch.agreement.together("timing a candidate", watched)
    return max(session.launch.agreement.gather(mine, "the candidate's times"))


def _median_ms(session: Session, executor: Executor, inputs: Mapping[Key, Tensor]) -> float:
    device = session.launch.device
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(stream), torch.no_grad():
        run = Graphs(executor.run, Budget(1), device)
        for _ in range(WARM_UP):
            run(inputs)
        begin, end = _events()
        begin.record(stream)
        run(inputs)
        end.record(stream)
        stream.synchronize()
        slowest = max(
            session.launch.agreement.gather(begin.elapsed_time(end), "a first time")
        )  # ranks repeat equally often
        repeats = min(REPEATS, max(FEWEST, int(SECONDS * 1e3 / max(slowest, 1e-3))))
        events = [_events() for _ in range(repeats)]
        for begin, end in events:
            begin.record(stream)
            run(inputs)
            end.record(stream)
        stream.synchronize()
    return float(median(begin.elapsed_time(end) for begin, end in events))


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _random(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Equal on all ranks where the generators are; of whole numbers 0, which any table can be asked for."""
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, device=device).to(dtype)
    return torch.zeros(shape, dtype=dtype, device=device)
