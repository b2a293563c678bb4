"""Choose by timing: how attentions exchange, and what each segment runs as, in bounded time.

    1. each way of exchange, for each different attention: one block around it, by each transport   -> the fastest
    2. each different compute segment alone, in TensorRT and compiled by Inductor                   -> the faster
    3. whole steps: what 1 and 2 chose, what is chosen without timing, and each compute alone       -> the fastest

Equal blocks are timed once, so that the time does not grow with a model's depth.  Every time is the largest of any
rank's median, so all ranks decide alike.  Whole steps are timed in the order above: what the seconds that are allowed
do not suffice for is left out, and said.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Protocol

import msgspec
import torch
from torch import Tensor

import torchtrt_md
from torchtrt_md.choices import Choices, Decision
from torchtrt_md.errors import LaunchError, MDError
from torchtrt_md.graph.text import graph_digest
from torchtrt_md.lowering import attention_order
from torchtrt_md.lowering.passes import Exchange
from torchtrt_md.place.partition import ATTENTION
from torchtrt_md.program import Value
from torchtrt_md.runtime.executor import Executor
from torchtrt_md.runtime.graphs import Budget, Graphs
from torchtrt_md.runtime.steps import Key
from torchtrt_md.segment import Binding, Part, Runs, Wire
from torchtrt_md.whole_file import write_whole

if TYPE_CHECKING:
    from torchtrt_md.road import Built
    from torchtrt_md.session import Session

log = logging.getLogger(__name__)
WARM_UP, REPEATS, FEWEST = 3, 20, 5
SECONDS = 0.3  # for each candidate, where the fewest repeats leave it
_STEP = "a whole step"
_TENSORRT, _INDUCTOR = "TensorRT", "Inductor"
_TRANSPORTS = {"nccl": "NCCL", "store": "stores", "copy": "copy engines"}


class Clock(Protocol):
    """What times candidates."""

    @property
    def transports(self) -> Sequence[str]:
        """What exchanges are tried by: ``nccl``, ``store``, ``copy``."""

    def now(self) -> float:
        """Seconds, monotonic."""

    def milliseconds(self, executor: Executor, inputs: Mapping[Key, Tensor]) -> list[float]:
        """Of some calls.  Collective."""


class GpuClock:
    """Times replays of CUDA graphs between events."""

    transports = tuple(_TRANSPORTS)

    def __init__(self, session: Session) -> None:
        self.device, self.agreement = session.launch.device, session.launch.agreement

    def now(self) -> float:
        return time.monotonic()

    def milliseconds(self, executor: Executor, inputs: Mapping[Key, Tensor]) -> list[float]:
        stream: torch.cuda.Stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.device(self.device), torch.cuda.stream(stream), torch.no_grad():
            run = Graphs(executor.run, Budget(1), self.device)
            for _ in range(WARM_UP):
                run(inputs)
            first = self._timed(run, inputs, stream, 1)
            # the slowest's, so that all ranks repeat equally often
            slowest = max(self.agreement.gather(first[0], "a first time"))
            repeats = min(REPEATS, max(FEWEST, int(SECONDS * 1e3 / max(slowest, 1e-3))))
            return self._timed(run, inputs, stream, repeats)

    def _timed(self, run: Graphs, inputs: Mapping[Key, Tensor], stream: torch.cuda.Stream, repeats: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]  # type: ignore[no-untyped-call]
        for begin, end in events:
            begin.record(stream)
            run(inputs)
            end.record(stream)
        stream.synchronize()
        return [begin.elapsed_time(end) for begin, end in events]


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


def tune(session: Session, default: Choices, clock: Clock | None = None) -> Choices:
    """The fastest choices that are found, or were found for this program on these GPUs before.  Collective.

    Args:
        session: of the program.
        default: what is chosen without timing.
        clock: times candidates; by default the GPU's.

    Raises:
        LaunchError: there is no GPU to time on.
    """
    launch = session.launch
    if clock is None and launch.device.type != "cuda":
        raise LaunchError("tune=True times candidates on GPUs, and there is none", fix="leave out tune")
    file = session.road.cache.folder / "choices" / f"{_key(session, default)}.json"
    # What rank 0 has counts for all: they must not choose differently.
    held = launch.agreement.gather(_read(file), "choices made before")[0]
    if held is not None:
        return held
    tuned = _Tuner(session, clock or GpuClock(session)).choose(default)
    if launch.rank == 0:
        _keep(tuned, file)
    return tuned


def _keep(choices: Choices, file: Path) -> None:
    """Keep them for later launches; where that cannot be, warn: for this one they hold as they are."""
    try:
        write_whole(file, msgspec.json.encode(choices))
    except OSError as error:
        warnings.warn(f"what was tuned cannot be kept in {file.parent}: {error.strerror or error}", stacklevel=3)


def _read(file: Path) -> Choices | None:
    """Choices that were kept; None where there are none, or the file is damaged."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Choices)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def _key(session: Session, default: Choices) -> str:
    """All that the choices depend on, in hexadecimal."""
    options, launch = session.options, session.launch
    gpu = torch.cuda.get_device_name(launch.device) if launch.device.type == "cuda" else "cpu"
    flavour: tuple[str, ...] = ()
    if options.compute == "tensorrt":
        from torchtrt_md.build.flavour import flavour as installed

        flavour = (installed().name, installed().version)
    parts = (
        graph_digest(session.road.lower(replace(default, placement="split")).graphs[launch.rank]),
        sorted(session.program.strategies.items()),
        list(session.program.mesh.axes.items()),
        # where the ranks are: what is sent between hosts is another matter
        launch.agreement.gather((launch.hosts[launch.rank], gpu), "the ranks' GPUs"),
        (flavour, str(torch.__version__), torchtrt_md.__version__),
        (options.tune, options.placement, options.target, str(options.exchange), options.transpose_weights),
        (options.transport, options.overlap, options.compute, options.fullgraph),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


class _Tuner:
    """One search, until its time is up."""

    def __init__(self, session: Session, clock: Clock) -> None:
        self.session, self.clock, self.rank = session, clock, session.launch.rank
        self.agreement = session.launch.agreement
        self.until = clock.now() + session.options.tune_seconds

    def choose(self, default: Choices) -> Choices:
        """What is fastest of what there was time for; ``default`` where nothing could be timed."""
        mixed = self.session.options.tune is True and self.session.options.compute == "tensorrt"
        compute: Runs = "inductor" if mixed else default.compute
        split = replace(default, placement="split", compute=compute, runs={}, decisions=())
        decisions: list[Decision] = []
        if self.session.options.placement != "engine":
            split, decisions = self._exchanges(split)
        steps: dict[str, Choices] = {}
        if self.session.options.placement != "engine":
            if mixed:
                split, decided = self._segments(split)
                decisions += decided
            steps["each block and segment as timed"] = split
        steps["as without timing"] = replace(default, decisions=())
        if self.session.options.placement != "engine":
            if mixed:
                steps["Inductor, attention in PyTorch"] = replace(split, compute="inductor", runs={})
            if default.compute == "engine":
                steps["TensorRT, attention in PyTorch"] = replace(split, compute="engine", runs={})
        steps = {name: choices for name, choices in steps.items() if choices not in _before(steps, name)}  # each once
        times, left_out = self._steps(steps)
        if not times:
            return default
        best = min(times, key=lambda name: times[name])
        why = "the fastest" + (f"; no time was left for {', '.join(left_out)}" if left_out else "")
        decisions.append(Decision(_STEP, best, why, times))
        device = self.session.launch.device
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        return replace(steps[best], decisions=tuple(decisions), tuned_on=gpu)

    def _is_over(self) -> bool:
        """Is the time up?  By rank 0's clock, so that all ranks stop at the same candidate."""
        return self.agreement.gather(self.clock.now() > self.until, "the time that is left")[0]

    def _steps(self, steps: Mapping[str, Choices]) -> tuple[dict[str, float], list[str]]:
        times: dict[str, float] = {}
        for number, (name, choices) in enumerate(steps.items()):
            if number and self._is_over():
                return times, list(steps)[number:]
            ms = self._whole_step(choices)
            if ms is not None:
                times[name] = ms
        return times, []

    def _whole_step(self, choices: Choices) -> float | None:
        """Milliseconds; None where these choices cannot be built, on any rank."""
        try:
            built = self.session.built(choices)
            executor = self.session.executor(built)
        except MDError as error:  # the same on every rank
            log.info("left out: %s", error.problem)
            return None
        inputs: dict[Key, Tensor] = {Wire("input", v.name): self._random(v) for v in built.placed.program.inputs}
        return self._timed(executor, inputs)

    def _exchanges(self, choices: Choices) -> tuple[Choices, list[Decision]]:
        """The fastest way of exchange for each different attention, each timed in one block."""
        order = attention_order(self.session.program)
        if self.session.options.exchange is not None or not order:
            return choices, []
        times: dict[str, dict[tuple[str, str], float]] = {key: {} for key in order}
        made: dict[tuple[str, str], Exchange] = {}
        strategies = {self.session.program.strategies[key.rsplit(" ", 1)[1].split("=")[0]] for key in order}
        tried = {name: e for strategy in sorted(strategies) for name, e in candidates(strategy).items()}
        for number, (name, exchange) in enumerate(tried.items()):
            if number and self._is_over():
                break
            try:
                built = self.session.built(replace(choices, exchanges=dict.fromkeys(order, exchange)))
            except MDError as error:  # a strategy that some attention cannot have
                log.info("%s: left out: %s", name, error.problem)
                continue
            for key, window in _windows(built.parts[self.rank], order):
                for transport in self.clock.transports:
                    ms = self._window_ms(built, window, transport)
                    if ms is not None:
                        times[key][name, transport] = ms
                        made[name, transport] = exchange
        return self._fastest(choices, order, times, made)

    def _fastest(
        self,
        choices: Choices,
        order: Sequence[str],
        times: Mapping[str, Mapping[tuple[str, str], float]],
        made: Mapping[tuple[str, str], Exchange],
    ) -> tuple[Choices, list[Decision]]:
        """One transport serves a program: that with which the best of all blocks together are the fastest."""
        common = [t for t in self.clock.transports if all(any(at == t for _, at in times[key]) for key in times)]
        if not common:
            return choices, []

        def best(key: str, transport: str) -> tuple[str, str]:
            return min((at for at in times[key] if at[1] == transport), key=lambda at: times[key][at])

        transport = min(common, key=lambda t: sum(times[key][best(key, t)] for key in order))
        exchanges, decisions = dict(choices.exchanges), []
        for key, of in times.items():
            chosen = best(key, transport)
            exchanges[key] = made[chosen]
            told = {f"{name} by {_TRANSPORTS[by]}": ms for (name, by), ms in of.items()}
            decisions.append(
                Decision(f"attention {key}", f"{chosen[0]} by {_TRANSPORTS[transport]}", "the fastest block", told)
            )
        return replace(choices, exchanges=exchanges, transport=transport), decisions

    def _window_ms(self, built: Built, window: Sequence[Part], transport: str) -> float | None:
        """The median of some parts in a row; what they read of others is random."""
        made = {b.source for part in window for b in part.segment.outputs}
        read = {b.source for part in window for b in part.segment.inputs}
        inputs: dict[Key, Tensor] = {
            b.source: self._random(b)
            for part in window
            for b in part.segment.inputs
            if b.source.kind not in ("weight", "coordinate") and b.source not in made
        }
        outputs = [b.source for part in window for b in part.segment.outputs if b.source not in read]
        of = replace(built, choices=replace(built.choices, transport=transport))
        try:
            executor = self.session.executor(of, window, outputs or [window[-1].segment.outputs[-1].source])
        except MDError as error:  # copy engines need GPUs with access to each other
            log.info("left out: %s", error.problem)
            return None
        return self._timed(executor, inputs)

    def _segments(self, choices: Choices) -> tuple[Choices, list[Decision]]:
        """The faster of TensorRT and Inductor for each different compute segment."""
        in_trt = self.session.built(replace(choices, runs={}, compute="engine"))
        in_inductor = self.session.built(replace(choices, runs={}, compute="inductor"))
        pairs = _pairs(in_trt.parts[self.rank], in_inductor.parts[self.rank])
        runs: dict[str, Runs] = {}
        decisions = []
        for number, (digest, (engine, inductor, count)) in enumerate(pairs.items()):
            if self._is_over():
                break
            times = {
                name: ms
                for name, built, part in ((_TENSORRT, in_trt, engine), (_INDUCTOR, in_inductor, inductor))
                if (ms := self._window_ms(built, [part], choices.transport)) is not None
            }
            if not times:
                continue
            faster = min(times, key=lambda name: times[name])
            runs[digest] = "inductor" if faster == _INDUCTOR else "engine"
            decisions.append(Decision(f"segment {number} ({count} of them)", faster, "the faster", times))
        return replace(choices, compute="inductor", runs=runs), decisions

    def _timed(self, executor: Executor, inputs: Mapping[Key, Tensor]) -> float:
        """The largest of all ranks' medians; the ranks begin together."""
        times = self.session.launch.meet("timing a candidate", lambda: self.clock.milliseconds(executor, inputs))
        mine = float(median(times))
        executor.close()
        gc.collect()
        if self.session.launch.device.type == "cuda":
            torch.cuda.empty_cache()
        return max(self.agreement.gather(mine, "the candidate's times"))

    def _random(self, like: Binding | Value) -> Tensor:
        """Equal on all ranks; of whole numbers 0, which any table can be asked for."""
        device = self.session.launch.device
        if not like.dtype.is_floating_point:
            return torch.zeros(like.shape, dtype=like.dtype, device=device)
        generator = torch.Generator(device=device).manual_seed(0)
        return torch.randn(like.shape, generator=generator, device=device).to(like.dtype)


def _before(steps: Mapping[str, Choices], name: str) -> list[Choices]:
    names = list(steps)
    return [steps[n] for n in names[: names.index(name)]]


def _windows(parts: Sequence[Part], order: Sequence[str]) -> Iterator[tuple[str, Sequence[Part]]]:
    """For each different attention the parts around one of its kind: from the attention before it to the next.

    Args:
        parts: of a rank, in order.
        order: the key of each attention of the program, in order.
    """
    at = [i for i, part in enumerate(parts) if part.runs == "eager" and _attends(part)]
    if len(at) != len(order):  # one attention is in several parts: the program is timed as a whole
        return
    for key in dict.fromkeys(order):
        of = [i for i, k in enumerate(order) if k == key]
        middle = of[len(of) // 2]  # its neighbours are of its own kind, if any are
        first = at[middle - 1] + 1 if middle else 0
        last = at[middle + 1] if middle + 1 < len(at) else len(parts)
        yield key, parts[first:last]


def _attends(part: Part) -> bool:
    assert part.graph is not None
    return any(node.target in ATTENTION for node in part.graph.graph.nodes)


def _pairs(in_trt: Sequence[Part], in_inductor: Sequence[Part]) -> dict[str, tuple[Part, Part, int]]:
    """Digest of a compute part's graph -> the part as an engine, as Inductor has it, and how many are equal.

    Empty where an op that no engine can hold cuts the two differently.
    """
    found: dict[str, tuple[Part, Part, int]] = {}
    if [p.runs == "eager" for p in in_trt] != [p.runs == "eager" for p in in_inductor]:
        return {}
    for a, b in zip(in_trt, in_inductor, strict=True):
        if a.runs == "engine":
            found[b.digest] = (a, b, found[b.digest][2] + 1 if b.digest in found else 1)
    return found
