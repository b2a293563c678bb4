"""The road from a captured program to what runs, for any set of ranks: lower, verify, place, build.

    export       all ranks, in one process; weights inside where a rank's program is one engine
    compile      this rank's, in a launch where the ranks vote after each stage; weights are inputs
    md.tune      the same, for one choice after another

What cannot be converted is found out in part by trying: an op whose converter fails is kept in PyTorch, the program
is cut again, and equal engines come from the cache.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from torchtrt_md.choices import Choices, Decision, Transport
from torchtrt_md.errors import BuildError, ConversionError
from torchtrt_md.launch.agree import Alone, Together
from torchtrt_md.lowering import Lowering
from torchtrt_md.lowering.schedule import listed
from torchtrt_md.options import Options
from torchtrt_md.place import PlacedProgram, place
from torchtrt_md.place.choose import Choice, choose_compute, choose_placement
from torchtrt_md.program import ShardedProgram, Weight
from torchtrt_md.segment import Part, Runs, Segment
from torchtrt_md.selftest import self_tests

if TYPE_CHECKING:
    from torchtrt_md.build.cache import EngineCache
    from torchtrt_md.build.engine import BuiltEngine
    from torchtrt_md.lowering.passes import Exchange
    from torchtrt_md.parallel import Placement

T = TypeVar("T")
Verify = Callable[[ShardedProgram], object]
log = logging.getLogger(__name__)
_ATTEMPTS = 50  # ops that turn out not to convert, one after another


@dataclass(frozen=True)
class Built:
    """A program of which some ranks' parts are built.

    Attributes:
        placed: the program, cut into parts.
        choices: how it was lowered, cut and built.
        parts: for each rank its parts in order, with what runs them; () for ranks that were not asked for.
        engines: where whole programs became engines with their weights inside: one for each class of equal ranks.
        hits, misses: different engines that were in the cache or that others built, and those that this rank built.
        self_tests: what all ranks' engines ask for, the same on all ranks.
    """

    placed: PlacedProgram
    choices: Choices
    parts: tuple[tuple[Part, ...], ...]
    engines: tuple[BuiltEngine, ...] = ()
    hits: int = 0
    misses: int = 0
    self_tests: tuple[Part, ...] = ()


class Turns(Protocol):
    """Does a step on some ranks before others."""

    def __call__(self, about: str, step: Callable[[], T], /) -> T: ...


class Road:
    """The stages from a captured program on.

    Args:
        program: captured.
        options: how it is to be compiled.
        ranks: whose parts are wanted.
        agreement: of the ranks that walk together; :class:`~torchtrt_md.launch.agree.Alone` for one process.
        turns: takes the engines; in a launch one rank of a host after another, who share a cache.
        share: this rank's number among those who share its cache, and how many they are: each builds some engines.

    Attributes:
        inside: a folder for engines that hold their weights, which a program that is one engine becomes.  None where
            all weights are to be inputs.
        strip: let all weights be inputs of engines, also where ``inside`` is a folder.
        streaming: let the weights inside engines be streamed from host memory when they run.
        progress: called with a line for each engine that is begun.
    """

    def __init__(
        self,
        program: ShardedProgram,
        options: Options,
        *,
        ranks: Collection[int],
        agreement: Together | None = None,
        turns: Turns | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.program, self.options, self.ranks = program, options, tuple(ranks)
        self.agreement: Together = agreement or Alone()
        self.inside: Path | None = None
        self.streaming = self.strip = False
        self.progress: Callable[[str], None] = lambda message: None
        self.lowering = Lowering(program)
        self._cache: EngineCache | None = None
        self._lowered: dict[tuple[Placement, frozenset[tuple[str, Exchange]], bool, str], ShardedProgram] = {}
        self._turns = turns or self.agreement.together
        self._share = share
        self._refused: dict[str, dict[int, str]] = {}  # digest of a part -> its nodes that no engine can hold, and why

    @property
    def cache(self) -> EngineCache:
        """Where engines are.  It loads TensorRT."""
        if self._cache is None:
            from torchtrt_md.build.cache import EngineCache, usable

            self._cache = EngineCache(None if self.options.cache is None else Path(self.options.cache))
            if self.inside is not None:
                self._cache = usable(self._cache, self.inside)
        return self._cache

    def default(self, capability: tuple[int, int] | None = None) -> Choices:
        """What is chosen without timing anything.

        Args:
            capability: of the GPU that it will run on; None where that is not known, or is no GPU.

        Raises:
            PlanError: options that do not go together.
        """
        (compute, why_compute), (placement, why) = by_default(
            self.options, set(self.program.strategies.values()), capability
        )
        exchange = self.options.exchange
        exchanges = {} if exchange is None else dict.fromkeys(self.lowering.attention_keys(), exchange)
        decisions = [Decision("placement", placement, why)]
        if why_compute:
            decisions.append(Decision("compute", "Inductor", why_compute))
        transport: Transport = "nccl" if self.options.transport == "auto" else self.options.transport
        return Choices(placement, compute, exchanges, {}, transport, self.options.exchange_dtype, tuple(decisions))

    def lower(self, choices: Choices, dump: Path | None = None) -> ShardedProgram:
        """The program in the collective IR; in a launch, the same collectives on all ranks.

        For choices that are lowered alike it is the same program: ``tune`` makes many.

        Raises:
            MDError: of the pass that refused; RankMismatchError where ranks would wait in different collectives.
        """
        asks = partial(self.lowering.asks_for_transport, choices.placement)
        stores = choices.transport == "store" and self._stage("the analysis for stores", asks)
        key = (choices.placement, frozenset(choices.exchanges.items()), stores, choices.exchange_dtype)
        if key in self._lowered and dump is None:
            return self._lowered[key]

        def step() -> ShardedProgram:
            return self.lowering.lower(
                placement=choices.placement,
                exchanges=choices.exchanges,
                stores=stores,
                exchange_dtype=choices.exchange_dtype,
                dump=dump,
            )

        lowered = self._stage("lowering", step)
        told = listed(lowered.graphs[self.agreement.rank])
        self.agreement.same(_digest(told), "the hash of their programs' collectives")
        if self.options.parallels:  # one dense model, of which each rank has a part: other models may meet all the same
            held = {source for source in lowered.sources.values() if isinstance(source, Weight)}
            forms = sorted(f"{w.name} {w.dtype} {w.shape}" for w in held)
            forms += [f"{v.name} {v.dtype} {v.shape}" for v in (*lowered.inputs, *lowered.outputs)]
            self.agreement.same(_digest("\n".join(forms)), "the hash of their models' weights, inputs and outputs")
        self._lowered[key] = lowered
        return lowered

    def verify(self, lowered: ShardedProgram, check: Verify) -> None:
        """Compare the lowered program with the model.

        Raises:
            VerificationError: it computes something else.
        """
        self._stage("the comparison with the model", lambda: check(lowered))

    def build(self, lowered: ShardedProgram, choices: Choices) -> Built:
        """Place and build.

        Raises:
            BuildError: TensorRT cannot build a part, or ``fullgraph`` and an op that no engine can hold.
        """
        placed, keep = self._stage("placing", lambda: self._cut(lowered, choices, {}))
        start = time.perf_counter()
        if choices.with_engines:
            before = self.cache.stored
            self._build_share([part for cut, _ in placed.distinct() for part in cut])
            built = self._turns("building", lambda: self._built(lowered, choices, placed, keep))
            if not built.engines:
                misses, different = self.cache.stored - before, _different(p for parts in built.parts for p in parts)
                built = replace(built, hits=max(len(different) - misses, 0), misses=misses)
        else:
            built = Built(placed, choices, placed.parts)
        mine = [str(c) for part in built.parts[self.agreement.rank] for c in part.segment.collectives]
        # A cut may change their order.
        self.agreement.same(_digest("\n".join(mine)), "the hash of their parts' collectives")
        built = replace(built, self_tests=self._self_tests(part.segment for parts in built.parts for part in parts))
        log.info("rank %d: building took %.2f s", self.agreement.rank, time.perf_counter() - start)
        return built

    def place(self, lowered: ShardedProgram, choices: Choices) -> Built:
        """Place, and build nothing: see :meth:`engines`."""
        placed, _ = self._stage("placing", lambda: self._cut(lowered, choices, {}))
        return Built(placed, choices, placed.parts)

    def engines(self, parts: Sequence[Part]) -> tuple[Part, ...]:
        """Some parts of this rank with their engines.  Collective, the ranks' parts in one order.

        Raises:
            BuildError: TensorRT cannot build one.
        """
        self._build_share(parts)
        return self._turns("building some engines", lambda: self._with_engines(parts))

    def ops_to_build(self, parts: Iterable[Part]) -> int:
        """The ops of engines that these parts lack in the cache, of the largest share that one rank builds."""
        from torchtrt_md.build.part import is_built

        turned, target = self.options.transpose_weights, self.options.target
        ops = []
        for part in _different(parts):
            assert part.graph is not None
            there = is_built(part, target, self.cache, transpose_weights=turned)
            ops.append(0 if there else len(part.graph.graph.nodes))
        count = self._share[1]
        return max(sum(ops[number::count]) for number in range(count))

    def _self_tests(self, segments: Iterable[Segment]) -> tuple[Part, ...]:
        """Those of all ranks: what one has in an engine another may have in PyTorch, where their graphs differ."""
        mine = self_tests(segments)
        every = {test.name: test for tests in self.agreement.gather(mine, "the self-tests") for test in tests}
        if not every:
            return ()
        from torchtrt_md.build.selftest import build_self_tests

        tests = [every[name] for name in sorted(every)]
        cache, target = self.cache, self.options.target
        return tuple(self._turns("building the self-tests", lambda: build_self_tests(tests, target, cache)))

    def _stage(self, about: str, step: Callable[[], T]) -> T:
        start = time.perf_counter()
        result = self.agreement.together(about, step)
        log.info("rank %d: %s took %.2f s", self.agreement.rank, about, time.perf_counter() - start)
        return result

    def _cut(
        self, lowered: ShardedProgram, choices: Choices, keep: Mapping[str, str]
    ) -> tuple[PlacedProgram, dict[str, str]]:
        """The program in parts, of which engines can hold those that are to be such, and what is kept from them."""
        keep = dict(keep)
        if not choices.with_engines:
            return self._placed(lowered, choices, keep, None), keep
        from torchtrt_md.build.flavour import boundary_dtypes, flavour

        flavour().check_target(self.options.target)
        while True:  # each time more is kept, and a part that is cut has less to refuse
            placed = self._placed(lowered, choices, keep, boundary_dtypes(flavour()))
            found = self._unconvertible(part for cut, _ in placed.distinct() for part in cut)
            if found.keys() <= keep.keys():
                return placed, keep
            keep.update(found)

    def _unconvertible(self, parts: Iterable[Part]) -> dict[str, str]:
        """Node -> why no engine can hold it.  Of equal parts one is asked: a model has many equal blocks."""
        from torchtrt_md.build.part import unconvertible

        keep: dict[str, str] = {}
        for part in parts:
            if part.runs != "engine":
                continue
            assert part.graph is not None
            names = [node.name for node in part.graph.graph.nodes]
            if part.digest not in self._refused:
                refused = unconvertible(part.graph)
                self._refused[part.digest] = {
                    names.index(name): reason for name, reason in refused.items() if name in names
                }
            keep |= {names[index]: reason for index, reason in self._refused[part.digest].items()}
        return keep

    def _built(
        self, lowered: ShardedProgram, choices: Choices, placed: PlacedProgram, keep: Mapping[str, str]
    ) -> Built:
        last, keep = "", dict(keep)
        for _ in range(_ATTEMPTS):
            try:
                if self.inside is not None and not self.strip and placed.is_one_engine:
                    return self._whole(placed, choices, self.inside)
                if self.streaming:
                    raise BuildError(
                        "weight_streaming is for programs that are one engine with its weights inside, and this one is"
                        f" {len(placed.parts[0])} parts, whose weights are inputs",
                        fix='use placement="engine" and a strategy that an engine can hold, or leave it out',
                    )
                return self._parts(placed, choices)
            except ConversionError as error:
                if self.options.fullgraph or not error.node or error.node in keep:
                    raise
                last = keep[error.node] = error.problem
                log.info("kept in PyTorch: %s", last)
                placed, keep = self._cut(lowered, choices, keep)
        raise BuildError(
            f"more than {_ATTEMPTS} ops turned out not to convert; of the last: {last}",
            fix="use compute='inductor'",
        )

    def _placed(
        self,
        lowered: ShardedProgram,
        choices: Choices,
        keep: Mapping[str, str],
        boundary: Collection[torch.dtype] | None,
    ) -> PlacedProgram:
        return place(
            lowered,
            choices.placement,
            compute=choices.compute,
            runs=choices.runs,
            keep=keep,
            boundary=boundary,
            fullgraph=self.options.fullgraph,
            ranks=self.ranks,
        )

    def _whole(self, placed: PlacedProgram, choices: Choices, folder: Path) -> Built:
        from torchtrt_md.build.program import build_whole

        engines = build_whole(
            placed, folder, self.cache, self.options.target, self.ranks, self.progress, streaming=self.streaming
        )
        parts: list[tuple[Part, ...]] = [()] * placed.program.mesh.size
        for engine in engines:
            for rank in engine.ranks:
                parts[rank] = (Part(engine.segment, engine=engine.file),)
        return Built(placed, choices, tuple(parts), tuple(engines))

    def _parts(self, placed: PlacedProgram, choices: Choices) -> Built:
        parts: list[tuple[Part, ...]] = [()] * placed.program.mesh.size
        for cut, members in placed.distinct():
            built = self._with_engines(cut)
            for rank in members:
                parts[rank] = built
        return Built(placed, choices, tuple(parts))

    def _with_engines(self, parts: Sequence[Part]) -> tuple[Part, ...]:
        from torchtrt_md.build.part import as_built

        engines = {_engine_of(part): self._with_engine(part) for part in _different(parts)}
        return tuple(as_built(part, engines[_engine_of(part)]) if part.runs == "engine" else part for part in parts)

    def _with_engine(self, part: Part) -> Part:
        from torchtrt_md.build.part import build_part

        turned = self.options.transpose_weights
        return build_part(part, self.options.target, self.cache, transpose_weights=turned, progress=self.progress)

    def _build_share(self, parts: Iterable[Part]) -> None:
        """Build this rank's share of the engines, while others build theirs, so that all find all in the cache.

        What cannot be built, or is another on other ranks, is left to the one whose turn it is to build the rest.
        """
        number, count = self._share

        def step() -> None:
            mine = _different(parts)[number::count] if count > 1 else []  # one alone builds them in its turn
            for part in mine:
                with suppress(BuildError):
                    self._with_engine(part)

        self._stage("building a share of the engines", step)


def by_default(
    options: Options, strategies: Collection[str], capability: tuple[int, int] | None
) -> tuple[tuple[Runs, str], Choice]:
    """What compute parts run as and where attention runs, each with why, where nothing is timed.

    Args:
        strategies: of the context-parallel axes.
        capability: of the GPU that it will run on; None where that is not known, or is no GPU.

    Raises:
        PlanError: options that do not go together.
    """
    name, rings = "", False
    if options.engines:
        from torchtrt_md.build.flavour import flavour

        name, rings = flavour().name, capability is not None and flavour().rings(options.target)
    compute = choose_compute(options.compute, options.placement, flavour=name, capability=capability)
    placement = choose_placement(
        options.placement,
        strategies=strategies,
        compute=compute[0],
        flavour=name,
        capability=capability,
        rings=rings,
        float8=options.exchange_dtype == "float8",
    )
    return compute, placement


def _different(parts: Iterable[Part]) -> list[Part]:
    """The parts that become engines, of equal ones the first."""
    found: dict[object, Part] = {}
    for part in parts:
        if part.runs == "engine":
            found.setdefault(_engine_of(part), part)
    return list(found.values())


def _engine_of(part: Part) -> object:
    """Equal for parts that get one engine: they compute the same, and what they read are weights at the same places."""
    return part.digest, tuple(binding.weight is None for binding in part.segment.inputs)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def summary_of(name: str, built: Built, rank: int) -> str:
    """What runs where on a rank, and why, for people."""
    placed, parts, choices = built.placed, built.parts[rank], built.choices
    counts = {runs: sum(p.runs == runs for p in parts) for runs in ("engine", "inductor", "eager")}
    told = ", ".join(f"{count} {runs}" for runs, count in counts.items() if count)
    different = len({p.engine for p in parts if p.runs == "engine"})
    lines = [
        f"{name} on {placed.program.mesh}, placement {placed.placement}: {len(parts)} parts ({told});"
        f" {different} different engine{'s' if different != 1 else ''}, {built.hits} of them from the cache",
    ]
    if choices.tuned_on:
        lines.append(f"  timed on {choices.tuned_on}")
    for decision in choices.decisions:
        times = ", ".join(f"{candidate} {ms:.3f} ms" for candidate, ms in decision.times_ms.items())
        lines.append(f"  {decision.what}: {decision.chosen}, {decision.why}" + (f" ({times})" if times else ""))
    return "\n".join([*lines, *(f"  {line}" for line in kept_lines(placed))])


def kept_lines(placed: PlacedProgram) -> list[str]:
    """A line for each kind of op that stays in PyTorch although the placement would not put it there."""
    return [
        f"in PyTorch: {kept.count} x {kept.op}: {kept.reason}" + (f", at {kept.at}" if kept.at else "")
        for kept in placed.kept
    ]
