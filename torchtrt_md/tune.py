"""Choose by timing: how attentions exchange, and what each segment runs as, in bounded time.

    1. each way of exchange, for each different attention: one block around it, by each transport   -> the fastest
    2. a whole step compiled by Inductor, for which no engine has to be built
    3. the different compute segments alone, in TensorRT and compiled by Inductor                   -> the faster
    4. whole steps: what 1 and 3 chose, what is chosen without timing, and TensorRT alone           -> the fastest
    5. where 1 had no attention to time: a whole step by each other transport, in front of 3        -> the fastest

What an option says is not tried otherwise, and where nothing is left to choose, nothing is timed: one engine is what
``placement="engine"`` asks for.
Equal blocks are timed once, so that the time does not grow with a model's depth.  Every time is the largest of any
rank's median, so all ranks decide alike.  A candidate is begun where it is expected to end within the seconds that are
allowed: as those of its kind before did, and where engines are to be built, by their ops.  What there is no time for is
left out, and said.  Ways of exchange get half of the time where segments are to be timed, too.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

import msgspec
import torch
from torch import Tensor

import torchtrt_md
from torchtrt_md.choices import Choices, Decision, Transport
from torchtrt_md.errors import ConversionError, LaunchError, MDError
from torchtrt_md.graph.text import graph_digest
from torchtrt_md.lowering.passes import Exchange
from torchtrt_md.lowering.schedule import schedule
from torchtrt_md.place.partition import ATTENTION
from torchtrt_md.program import Value
from torchtrt_md.runtime.access import pairs_without_access
from torchtrt_md.runtime.executor import Executor
from torchtrt_md.runtime.graphs import Budget, Graphs
from torchtrt_md.runtime.steps import Key
from torchtrt_md.segment import Binding, Part, Runs, Wire
from torchtrt_md.whole_file import write_whole

if TYPE_CHECKING:
    from torchtrt_md.road import Built
    from torchtrt_md.session import Session

T = TypeVar("T")
log = logging.getLogger(__name__)
WARM_UP, REPEATS, FEWEST = 3, 20, 5
SECONDS = 0.3  # for each candidate, where the fewest repeats leave it
_SECONDS_PER_OP = 0.05  # of an engine; taken for the first, after which it is measured
_EXCHANGE, _SEGMENTS, _STEP = "an exchange", "segments", "a whole step"
_TENSORRT, _INDUCTOR = "TensorRT", "Inductor"
_TRANSPORTS: dict[Transport, str] = {"nccl": "NCCL", "store": "stores"}
_Way: TypeAlias = tuple[str, Transport]  # of exchange
# Digest -> a segment as an engine, as Inductor has it, and how many are equal.
_Pair: TypeAlias = tuple[str, tuple[Part, Part, int]]


class Clock(Protocol):
    """What times candidates."""

    @property
    def transports(self) -> Sequence[Transport]:
        """What exchanges are tried by: ``nccl``, ``store``."""

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
    """The ways of exchange that are tried, by name, those that differ the most first.

    Args:
        strategy: the axis's: ``auto`` tries all.
    """
    found = {
        "ulysses": Exchange("ulysses"),
        "allgather_kv": Exchange("allgather_kv"),
        "ring": Exchange("ring"),
        "ulysses, values first": Exchange("ulysses", values_first=True),
        "ulysses, 2 groups of heads": Exchange("ulysses", head_groups=2),
        "ulysses, 2 groups of heads, values first": Exchange("ulysses", head_groups=2, values_first=True),
    }
    return {name: e for name, e in found.items() if strategy in ("auto", e.strategy)}


def tune(session: Session, default: Choices, clock: Clock | None = None) -> Choices:
    """The fastest choices that are found, or were found for this program on these GPUs before.  Collective.

    What it finds is kept by :func:`keep`, once it was built.

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
    if session.options.placement == "engine":
        return default
    clock = clock or GpuClock(session)
    start = clock.now()
    file = session.choices_file = session.road.cache.folder / "choices" / f"{_key(session, default)}.json"
    # What rank 0 has counts for all: they must not choose differently.
    held = launch.agreement.gather(_read(file), "choices made before")[0]
    if held is not None:
        return held
    gc.collect()
    gc.freeze()  # the next collections, of which there is one for each candidate, look at what was made since
    try:
        return _Tuner(session, clock, start).choose(default)
    finally:
        gc.unfreeze()


def keep(choices: Choices, session: Session) -> None:
    """Keep what :func:`tune` found for later launches; nothing where nothing was timed."""
    file = session.choices_file
    if session.launch.rank == 0 and file is not None and choices.tuned_on and _read(file) != choices:
        _keep(choices, file)


def _keep(choices: Choices, file: Path) -> None:
    """Where they cannot be kept, warn: for this launch they hold as they are."""
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
    if options.engines:
        from torchtrt_md.build.cache import versions
        from torchtrt_md.build.flavour import flavour as installed

        # As an engine's key has them: other converters leave other ops to PyTorch, and make other engines.
        flavour = (installed().name, installed().version, *versions())
    parts = (
        graph_digest(session.road.lower(replace(default, placement="split")).graphs[launch.rank]),
        sorted(session.program.strategies.items()),
        list(session.program.mesh.axes.items()),
        # where the ranks are: what is sent between hosts is another matter
        launch.agreement.gather((launch.hosts[launch.rank], gpu), "the ranks' GPUs"),
        pairs_without_access(launch, session.program.mesh) if launch.device.type == "cuda" else [],
        (flavour, str(torch.__version__), torchtrt_md.__version__, _sources()),
        (options.tune_seconds, options.placement, options.target, str(options.exchange)),
        (options.transport, options.overlap, options.compute, options.fullgraph, options.transpose_weights),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@functools.cache
def _sources() -> str:
    """What lowers and runs programs, by its source: between releases the version stays while times change."""
    home = Path(torchtrt_md.__file__).parent
    files = sorted((*home.glob("*.py"), *home.glob("*/*.py")))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


class _Tuner:
    """One search, until its time is up.

    Args:
        start: when the seconds that are allowed began, by the clock.
    """

    def __init__(self, session: Session, clock: Clock, start: float) -> None:
        self.session, self.clock, self.rank = session, clock, session.launch.rank
        self.agreement = session.launch.agreement
        self.start, self.until = start, start + session.options.tune_seconds
        self.engines_at_once = min(Counter(session.launch.hosts).values())  # each rank of a host builds one
        self.built = (0.0, 0)  # seconds that building took, and the ops of the largest shares
        self.shortest: dict[str, float] = {}  # kind of candidate -> seconds that one took, what is done once aside
        self.once = 0.0  # seconds of the present candidate that later ones will not take
        asked = session.options.transport
        self.transports: Sequence[Transport] = clock.transports if asked == "auto" else (asked,)
        self.said = False  # that it takes time
        self.failed = 0  # whole steps
        self.no_time: list[str] = []  # what there was no time for
        self.left_out: list[str] = []  # what failed

    def choose(self, default: Choices) -> Choices:
        """What is fastest of what there was time for; ``default`` where nothing could be timed."""
        mixed = self.session.options.compute == "auto"
        compute: Runs = "inductor" if mixed else default.compute
        split = replace(default, placement="split", compute=compute, runs={}, decisions=())
        steps: dict[str, Choices] = {}
        times: dict[str, float] = {}
        first = "Inductor, attention in PyTorch"
        split, decisions = self._exchanges(split, self._half() if mixed else self.until)
        others = () if decisions or not self._communicates(split) else self.transports
        if mixed:  # first what no engine has to be built for
            steps[first] = split
            self._steps(steps, times)
            if first in times:  # parts are others by another transport, so it is chosen before they are
                split = self._by(others, first, steps, times)
                others = ()
            split, decided = self._segments(split)
            decisions += decided
        steps["each block and segment as timed"] = split
        steps["as without timing"] = replace(default, decisions=())
        if mixed or default.compute == "engine":
            steps["TensorRT, attention in PyTorch"] = replace(split, compute="engine", runs={})
        steps = {name: choices for name, choices in steps.items() if choices not in _before(steps, name)}  # each once
        if len(steps) == 1 and set(others) <= {default.transport}:
            return default
        self._steps({name: steps[name] for name in steps if name not in times and name != first}, times)
        if not times:
            return default
        best = min(times, key=lambda name: times[name])
        if steps[best].placement == "split":
            self._by(others, best, steps, times)
        best = min(times, key=lambda name: times[name])
        why = "the fastest" + (f"; no time was left for {', '.join(self.no_time)}" if self.no_time else "")
        why += f"; errors were raised for {', '.join(self.left_out)}" if self.left_out else ""
        decisions.append(Decision(_STEP, best, why, times))
        device = self.session.launch.device
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        return replace(steps[best], decisions=tuple(decisions), tuned_on=gpu)

    def _by(
        self, transports: Sequence[Transport], name: str, steps: dict[str, Choices], times: dict[str, float]
    ) -> Choices:
        """A whole step that was timed, by that of these transports with which it is the fastest, or by its own."""
        others = [t for t in transports if t != steps[name].transport]
        by = {f"{name}, by {_TRANSPORTS[t]}": replace(steps[name], transport=t) for t in others}
        self._steps(by, times)
        steps |= by
        return steps[min((n for n in (name, *by) if n in times), key=lambda n: times[n])]

    def _communicates(self, choices: Choices) -> bool:
        """Do the ranks send each other anything?  All of them the same, or lowering had refused it."""
        return bool(schedule(self.session.road.lower(choices).graphs[self.rank]))

    def _half(self) -> float:
        """Until when ways of exchange are tried where there is more to try, so that some time is left for that."""
        return (self.start + self.until) / 2

    def _is_over(self, until: float, seconds: float = 0.0) -> bool:
        """Would something that takes these seconds end too late?

        By rank 0's clock, so that all ranks stop at the same candidate.
        """
        return self.agreement.gather(self.clock.now() + seconds > until, "the time that is left")[0]

    def _begun(self) -> float:
        """When the next candidate is begun."""
        self.once = 0.0
        return self.clock.now()

    def _ended(self, kind: str, start: float) -> None:
        """A candidate of a kind was begun then, and has ended."""
        seconds = max(self.clock.now() - start - self.once, 0.0)
        self.shortest[kind] = min(seconds, self.shortest.get(kind, seconds))

    def _expected(self, kind: str) -> float:
        """The seconds that the next of a kind will take: those of the shortest before."""
        return self.shortest.get(kind, 0.0)

    def _steps(self, steps: Mapping[str, Choices], times: dict[str, float]) -> None:
        """Time some whole steps, as long as there is time."""
        for name, choices in steps.items():
            if (times or self.failed) and self._is_over(self.until, self._expected(_STEP)):
                self.no_time.append(name)
                continue
            start = self._begun()
            try:
                ops = self._ops_to_build(self.session.placed(choices).parts[self.rank]) if choices.with_engines else 0
                # The first is timed in any case: there has to be a result, which is built then.
                if times and ops and self._is_over(self.until, self._to_build(ops) + self._expected(_STEP)):
                    self.no_time.append(name)
                    continue
                times[name] = self._whole_step(choices, ops)
            except MDError as error:  # these choices cannot be built
                self._leave_out(name, error)
                self.failed += 1
                continue
            self._ended(_STEP, start)

    def _whole_step(self, choices: Choices, ops: int) -> float:
        built, compiled = self._building(ops, lambda: self.session.built(choices)), self.session.known.seconds
        executor = self.session.executor(built)
        self.once += self.session.known.seconds - compiled
        return self._timed(executor, {Wire("input", v.name): v for v in built.placed.program.inputs})

    def _leave_out(self, name: str, error: MDError) -> None:
        """Go on without a candidate that failed, as it did on every rank.

        Raises:
            MDError: a rank is gone, and there is nothing to go on with.
        """
        if error.lost:
            raise error
        log.info("%s is left out: %s", name, error.problem)
        self.left_out.append(name)

    def _ops_to_build(self, parts: Sequence[Part]) -> int:
        """The ops of the engines of these parts that are not in the cache, of the rank that has to build the most."""
        ops = self.agreement.together("looking for engines", lambda: self.session.road.ops_to_build(parts))
        return max(self.agreement.gather(ops, "the ops of the engines that are to be built"))

    def _to_build(self, ops: int) -> float:
        """The seconds that engines are expected to take, of which one rank builds so many ops."""
        seconds, before = self.built
        return ops * (seconds / before if before else _SECONDS_PER_OP)

    def _building(self, ops: int, build: Callable[[], T]) -> T:
        """Build engines of so many ops, and learn from the time that it takes."""
        start = self.clock.now()
        built = build()
        if ops:
            seconds = self.clock.now() - start
            self.once += seconds
            self.built = (self.built[0] + seconds, self.built[1] + ops)
        return built

    def _with_engines(self, parts: Sequence[Part]) -> tuple[Part, ...]:
        """These parts, their engines built."""
        return self._building(self._ops_to_build(parts), lambda: self.session.road.engines(parts))

    def _exchanges(self, choices: Choices, until: float) -> tuple[Choices, list[Decision]]:
        """The fastest way of exchange for each different attention, each timed in one block."""
        if self.session.options.exchange is not None:
            return choices, []
        order = self.session.road.lowering.attention_order("split")
        if not order:
            return choices, []
        times: dict[str, dict[_Way, float]] = {key: {} for key in order}
        made: dict[_Way, Exchange] = {}
        strategies = {self.session.program.strategies[key.rsplit(" ", 1)[1].split("=")[0]] for key in order}
        tried = {name: e for strategy in sorted(strategies) for name, e in candidates(strategy).items()}
        for number, (name, exchange) in enumerate(tried.items()):
            if number and self._is_over(until, self._expected(_EXCHANGE)):
                self.no_time += list(tried)[number:]
                break
            start, compiled = self._begun(), self.session.known.seconds
            try:
                of = replace(choices, exchanges=dict.fromkeys(order, exchange))
                placed = self.session.placed(of)
                windows = list(_windows(placed.parts[self.rank], order))
                if number and choices.with_engines:
                    ops = sum(self._ops_to_build(window) for _, window in windows)
                    if self._is_over(until, self._to_build(ops) + self._expected(_EXCHANGE)):
                        self.no_time += list(tried)[number:]
                        break
                if choices.with_engines:
                    placed, windows = self._built_windows(of, placed, windows, order)
                for transport in self.transports:
                    way, its, around = replace(of, transport=transport), placed, windows
                    if self.session.road.lower(way) is not self.session.road.lower(of):
                        its = self.session.built(way) if way.with_engines else self.session.placed(way)
                        around = list(_windows(its.parts[self.rank], order))
                    for key, window in around:
                        ms = self._window_ms(its, window, transport)
                        if ms is not None:
                            times[key][name, transport] = ms
                            made[name, transport] = exchange
            except MDError as error:  # a strategy that some attention cannot have
                self._leave_out(name, error)
                continue
            self.once += self.session.known.seconds - compiled
            self._ended(_EXCHANGE, start)
        return self._fastest(choices, order, times, made)

    def _built_windows(
        self, choices: Choices, placed: Built, windows: Sequence[tuple[str, Sequence[Part]]], order: Sequence[str]
    ) -> tuple[Built, list[tuple[str, Sequence[Part]]]]:
        """The windows with their engines."""
        try:
            return placed, [(key, self._with_engines(window)) for key, window in windows]
        except ConversionError:  # an op that has to stay in PyTorch, as is seen when the whole is built
            built = self.session.built(choices)
            return built, list(_windows(built.parts[self.rank], order))

    def _fastest(
        self,
        choices: Choices,
        order: Sequence[str],
        times: Mapping[str, Mapping[_Way, float]],
        made: Mapping[_Way, Exchange],
    ) -> tuple[Choices, list[Decision]]:
        """One transport serves a program: that with which the best of all blocks together are the fastest."""
        common = [t for t in self.transports if all(any(at == t for _, at in times[key]) for key in times)]
        if not common:
            return choices, []

        def best(key: str, transport: Transport) -> _Way:
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

    def _window_ms(self, built: Built, window: Sequence[Part], transport: Transport) -> float | None:
        """The median of some parts in a row; what they read of others is random."""
        made = {b.source for part in window for b in part.segment.outputs}
        read = {b.source for part in window for b in part.segment.inputs}
        inputs: dict[Key, Binding | Value] = {
            b.source: b
            for part in window
            for b in part.segment.inputs
            if b.source.kind not in ("weight", "coordinate") and b.source not in made
        }
        outputs = [b.source for part in window for b in part.segment.outputs if b.source not in read]
        of = replace(built, choices=replace(built.choices, transport=transport))
        try:
            executor = self.session.executor(of, window, outputs or [window[-1].segment.outputs[-1].source])
        except MDError as error:  # stores need GPUs with access to each other
            if error.lost:
                raise
            log.info("left out: %s", error.problem)
            return None
        return self._timed(executor, inputs)

    def _segments(self, choices: Choices) -> tuple[Choices, list[Decision]]:
        """The faster of TensorRT and Inductor for each different compute segment, where there is time for it.

        Those of which most is computed come first.  There are as many at once as ranks build engines, and there has to
        be time for a whole step afterwards, without which nothing of this is chosen.
        """
        runs: dict[str, Runs] = {}
        decisions: list[Decision] = []
        if self._is_over(self.until, self._expected(_STEP)):
            self.no_time.append("each segment")
            return choices, decisions
        try:
            in_trt = self.session.placed(replace(choices, compute="engine"))
        except MDError as error:  # an op that no engine can hold, and fullgraph
            self._leave_out("each segment", error)
            return choices, decisions
        in_inductor = self.session.placed(choices)
        pairs = sorted(_pairs(in_trt.parts[self.rank], in_inductor.parts[self.rank]).items(), key=_least_work)
        work = [_least_work(pair) for pair in pairs]
        if any(other != work for other in self.agreement.gather(work, "their segments")):
            return choices, decisions  # ranks have others, and cannot time theirs together
        for first in range(0, len(pairs), self.engines_at_once):
            batch, start = pairs[first : first + self.engines_at_once], self._begun()
            seconds = self._to_build(self._ops_to_build([engine for _, (engine, _, _) in batch]))
            if self._is_over(self.until, seconds + self._expected(_SEGMENTS) + self._expected(_STEP)):
                self.no_time.append(f"{len(pairs) - first} of {len(pairs)} segments")
                break
            for number, (built, (digest, (_, inductor, count))) in self._built_segments(batch, first):
                times = {
                    name: ms
                    for name, of, part in ((_TENSORRT, in_trt, built), (_INDUCTOR, in_inductor, inductor))
                    if (ms := self._window_ms(of, [part], choices.transport)) is not None
                }
                if not times:
                    continue
                faster = min(times, key=lambda name: times[name])
                if faster == _TENSORRT:
                    runs[digest] = "engine"
                decisions.append(Decision(f"segment {number} ({count} of them)", faster, "the faster", times))
            self._ended(_SEGMENTS, start)
        if pairs and len(runs) == len(pairs):
            return replace(choices, compute="engine"), decisions
        return replace(choices, runs=runs), decisions

    def _built_segments(self, batch: Sequence[_Pair], first: int) -> Iterator[tuple[int, tuple[Part, _Pair]]]:
        """The segments of which TensorRT builds an engine, counted from ``first``; Inductor has the others."""
        try:
            parts = self._with_engines([engine for _, (engine, _, _) in batch])
            yield from enumerate(zip(parts, batch, strict=True), first)
            return
        except MDError as error:  # of one of them
            if error.lost:
                raise
        for number, pair in enumerate(batch, first):
            try:
                (part,) = self._with_engines([pair[1][0]])
            except MDError as error:
                self._leave_out(f"segment {number} in TensorRT", error)
                continue
            yield number, (part, pair)

    def _timed(self, executor: Executor, inputs: Mapping[Key, Binding | Value]) -> float:
        """The largest of all ranks' medians, with random inputs; the ranks begin together."""
        options = self.session.options
        if not self.said and options.report and self.rank == 0:
            how_long = f"for about {options.tune_seconds:g} s, once (tune=False leaves it out)"
            print(f"timing what was left to choose, {how_long}", flush=True)
        self.said = True
        try:
            made = self.agreement.together(
                "the inputs of a candidate", lambda: {key: self._random(like) for key, like in inputs.items()}
            )
            times = self.session.launch.meet("timing a candidate", lambda: self.clock.milliseconds(executor, made))
        finally:  # a candidate that failed holds no memory of the next one
            executor.close()
            gc.collect()
            if self.session.launch.device.type == "cuda":
                torch.cuda.empty_cache()
        gc.freeze()  # what lives on, as graphs of many nodes do, is not looked at again
        return max(self.agreement.gather(float(median(times)), "the candidate's times"))

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


def _least_work(pair: _Pair) -> int:
    """Minus the ops of all segments that are equal to one."""
    _, (engine, _, count) = pair
    assert engine.graph is not None
    return -count * len(engine.graph.graph.nodes)


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
