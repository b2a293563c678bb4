"""One search for the fastest choices: ways of exchange, segments, whole steps, in the order that the package tells."""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from torchtrt_md.choices import Choices, Decision, Transport
from torchtrt_md.errors import ConversionError, MDError
from torchtrt_md.lowering.passes import Exchange
from torchtrt_md.lowering.schedule import schedule
from torchtrt_md.program import Value
from torchtrt_md.runtime.executor import Executor
from torchtrt_md.runtime.steps import Key
from torchtrt_md.segment import Binding, Part, Runs, Wire
from torchtrt_md.tune.allowance import Allowance
from torchtrt_md.tune.clock import TRANSPORTS, Clock
from torchtrt_md.tune.windows import Pair, least_work, pairs_of, windows_of

if TYPE_CHECKING:
    from torchtrt_md.road import Built
    from torchtrt_md.session import Session

log = logging.getLogger(__name__)
_EXCHANGE, _SEGMENTS, _STEP = "an exchange", "segments", "a whole step"
_TENSORRT, _INDUCTOR = "TensorRT", "Inductor"
_Way: TypeAlias = tuple[str, Transport]  # of exchange


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


class Search:
    """Goes on until its time is up.

    Args:
        start: when the seconds that are allowed began, by the clock.
    """

    def __init__(self, session: Session, clock: Clock, start: float) -> None:
        self.session, self.clock, self.rank = session, clock, session.launch.rank
        self.agreement = session.launch.agreement
        self.time = Allowance(clock, session.launch.agreement, start, session.options.tune_seconds)
        self.engines_at_once = min(Counter(session.launch.hosts).values())  # each rank of a host builds one
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
        split, decisions = self._exchanges(split, self.time.half if mixed else self.time.until)
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
        launch = self.session.launch
        gpu = torch.cuda.get_device_name(launch.device) if launch.device.type == "cuda" else "CPU"
        gpu += ", which ranks share" if launch.shares_gpus else ""
        return replace(steps[best], decisions=tuple(decisions), tuned_on=gpu)

    def _by(
        self, transports: Sequence[Transport], name: str, steps: dict[str, Choices], times: dict[str, float]
    ) -> Choices:
        """A whole step that was timed, by that of these transports with which it is the fastest, or by its own."""
        others = [t for t in transports if t != steps[name].transport]
        by = {f"{name}, by {TRANSPORTS[t]}": replace(steps[name], transport=t) for t in others}
        self._steps(by, times)
        steps |= by
        return steps[min((n for n in (name, *by) if n in times), key=lambda n: times[n])]

    def _communicates(self, choices: Choices) -> bool:
        """Do the ranks send each other anything?  All of them the same, or lowering had refused it."""
        return bool(schedule(self.session.road.lower(choices).graphs[self.rank]))

    def _steps(self, steps: Mapping[str, Choices], times: dict[str, float]) -> None:
        """Time some whole steps, as long as there is time."""
        for name, choices in steps.items():
            if (times or self.failed) and self.time.is_over(self.time.expected(_STEP)):
                self.no_time.append(name)
                continue
            start = self.time.begun()
            try:
                ops = self._ops_to_build(self.session.placed(choices).parts[self.rank]) if choices.with_engines else 0
                # The first is timed in any case: there has to be a result, which is built then.
                if times and ops and self.time.is_over(self.time.to_build(ops) + self.time.expected(_STEP)):
                    self.no_time.append(name)
                    continue
                times[name] = self._whole_step(choices, ops)
            except MDError as error:  # these choices cannot be built
                self._leave_out(name, error)
                self.failed += 1
                continue
            self.time.ended(_STEP, start)

    def _whole_step(self, choices: Choices, ops: int) -> float:
        built, compiled = self.time.building(ops, lambda: self.session.built(choices)), self.session.known.seconds
        executor = self.session.executor(built)
        self.time.once += self.session.known.seconds - compiled
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

    def _with_engines(self, parts: Sequence[Part]) -> tuple[Part, ...]:
        """These parts, their engines built."""
        return self.time.building(self._ops_to_build(parts), lambda: self.session.road.engines(parts))

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
            if number and self.time.is_over(self.time.expected(_EXCHANGE), until):
                self.no_time += list(tried)[number:]
                break
            start, compiled = self.time.begun(), self.session.known.seconds
            try:
                of = replace(choices, exchanges=dict.fromkeys(order, exchange))
                placed = self.session.placed(of)
                windows = list(windows_of(placed.parts[self.rank], order))
                if number and choices.with_engines:
                    ops = sum(self._ops_to_build(window) for _, window in windows)
                    if self.time.is_over(self.time.to_build(ops) + self.time.expected(_EXCHANGE), until):
                        self.no_time += list(tried)[number:]
                        break
                if choices.with_engines:
                    placed, windows = self._built_windows(of, placed, windows, order)
                for transport in self.transports:
                    way, its, around = replace(of, transport=transport), placed, windows
                    if self.session.road.lower(way) is not self.session.road.lower(of):
                        its = self.session.built(way) if way.with_engines else self.session.placed(way)
                        around = list(windows_of(its.parts[self.rank], order))
                    for key, window in around:
                        ms = self._window_ms(its, window, transport)
                        if ms is not None:
                            times[key][name, transport] = ms
                            made[name, transport] = exchange
            except MDError as error:  # a strategy that some attention cannot have
                self._leave_out(name, error)
                continue
            self.time.once += self.session.known.seconds - compiled
            self.time.ended(_EXCHANGE, start)
        return self._fastest(choices, order, times, made)

    def _built_windows(
        self, choices: Choices, placed: Built, windows: Sequence[tuple[str, Sequence[Part]]], order: Sequence[str]
    ) -> tuple[Built, list[tuple[str, Sequence[Part]]]]:
        """The windows with their engines."""
        try:
            return placed, [(key, self._with_engines(window)) for key, window in windows]
        except ConversionError:  # an op that has to stay in PyTorch, as is seen when the whole is built
            built = self.session.built(choices)
            return built, list(windows_of(built.parts[self.rank], order))

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
            told = {f"{name} by {TRANSPORTS[by]}": ms for (name, by), ms in of.items()}
            decisions.append(
                Decision(f"attention {key}", f"{chosen[0]} by {TRANSPORTS[transport]}", "the fastest block", told)
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
        if self.time.is_over(self.time.expected(_STEP)):
            self.no_time.append("each segment")
            return choices, decisions
        try:
            in_trt = self.session.placed(replace(choices, compute="engine"))
        except MDError as error:  # an op that no engine can hold, and fullgraph
            self._leave_out("each segment", error)
            return choices, decisions
        in_inductor = self.session.placed(choices)
        pairs = sorted(pairs_of(in_trt.parts[self.rank], in_inductor.parts[self.rank]).items(), key=least_work)
        work = [least_work(pair) for pair in pairs]
        if any(other != work for other in self.agreement.gather(work, "their segments")):
            return choices, decisions  # ranks have others, and cannot time theirs together
        for first in range(0, len(pairs), self.engines_at_once):
            batch, start = pairs[first : first + self.engines_at_once], self.time.begun()
            seconds = self.time.to_build(self._ops_to_build([engine for _, (engine, _, _) in batch]))
            if self.time.is_over(seconds + self.time.expected(_SEGMENTS) + self.time.expected(_STEP)):
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
            self.time.ended(_SEGMENTS, start)
        if pairs and len(runs) == len(pairs):
            return replace(choices, compute="engine"), decisions
        return replace(choices, runs=runs), decisions

    def _built_segments(self, batch: Sequence[Pair], first: int) -> Iterator[tuple[int, tuple[Part, Pair]]]:
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
