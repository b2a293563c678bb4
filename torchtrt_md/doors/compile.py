"""``compile``: from a model to a runner in the process group of a launch, with nothing written but a cache."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchtrt_md.build.cache import EngineCache
from torchtrt_md.build.flavour import flavour
from torchtrt_md.build.parts import BuiltPart, build_parts, engine_boundary, unconvertible
from torchtrt_md.bundle.from_program import manifest_of, part_segment
from torchtrt_md.bundle.manifest import Decision
from torchtrt_md.capture import capture
from torchtrt_md.choices import Choices, chosen_runs
from torchtrt_md.errors import BuildError, ConversionError, InputError, LaunchError, RankMismatchError
from torchtrt_md.lowering import attention_keys, lower
from torchtrt_md.lowering.passes import Exchange
from torchtrt_md.lowering.schedule import schedule
from torchtrt_md.mesh import Mesh
from torchtrt_md.options import Options
from torchtrt_md.place import PlacedProgram, Runs, place
from torchtrt_md.place.choose import choose_placement
from torchtrt_md.program import Output, ShardedProgram, Weight
from torchtrt_md.runtime import communicator, private
from torchtrt_md.runtime.agree import Agreement, grouped
from torchtrt_md.runtime.assemble import Loaded, assemble, bind_engines, make_engines, test_rings, waits_for
from torchtrt_md.runtime.executor import Executor
from torchtrt_md.runtime.graphs import Budget
from torchtrt_md.runtime.loading import deserializer, find_device
from torchtrt_md.runtime.runner import Runner
from torchtrt_md.runtime.watchdog import Watchdog

_ATTEMPTS = 50  # ops that turn out not to convert, one after another
Verify = Callable[[ShardedProgram], object]


def compile(
    model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any
) -> Runner:
    """Compile a model in a launched process group, ahead of time.  Collective: every rank calls it.

    Args:
        model: dense, the same on every rank, or as ``parallelize_module`` left it.  It is not changed, and where
            engines take weights as inputs they read the model's own.
        args: example positional arguments; tensors give the shapes and dtypes, all else is built in.
        kwargs: example keyword arguments.
        options: as :class:`torchtrt_md.options.Options` has them; ``mesh`` is needed, and ``parallel`` where the
            model is dense.

    Returns:
        A runner that is called like the model and returns what the model returns.

    Raises:
        OptionError: an unknown option, or a value that one cannot have.
        MDError: of the stage that failed, the same on every rank.
    """
    chosen = Options.of(options)
    if chosen.mesh is None:
        raise LaunchError("compile needs a mesh", fix="pass mesh=md.Mesh(cp=4), or the DeviceMesh of the launch")

    mesh = chosen.mesh if isinstance(chosen.mesh, Mesh) else Mesh.from_device_mesh(chosen.mesh)

    def captured() -> ShardedProgram:
        return capture(model, args, kwargs, mesh=mesh, parallel=chosen.parallels)

    def verify(program: ShardedProgram) -> None:
        from torchtrt_md.verification import verify

        if dist.get_rank() == 0:  # it runs the graphs of all ranks
            verify(program, model, args, kwargs)

    dense = not any(hasattr(p, "device_mesh") for p in model.parameters())
    return compile_program(captured, chosen, verify=verify if dense else None, name=type(model).__name__)


def compile_program(
    captured: Callable[[], ShardedProgram] | ShardedProgram,
    options: Options,
    *,
    verify: Verify | None = None,
    name: str = "the program",
    budget: Budget | None = None,
) -> Runner:
    """Compile a captured program.  Collective.

    Args:
        captured: the program of which this rank's graph is compiled, or what makes it.
        options: how.
        verify: compares a lowered program with the model, where ``options.check`` is on.  Every rank calls it.
        name: of the model, for the summary.
        budget: of CUDA graphs, shared with other programs.

    Raises:
        MDError: of the stage that failed, the same on every rank.
    """
    agreement = Agreement(options.timeout)
    watchdog: Watchdog | None = None
    groups: dict[str, dist.ProcessGroup] = {}
    try:
        device = find_device(agreement, options.compute)
        program = agreement.together("capturing the model", captured if callable(captured) else lambda: captured)
        program.mesh.check_launch(agreement.size)
        watchdog = Watchdog(
            options.timeout, rank=agreement.rank, abort=lambda: private.abort({**groups}.values(), device)
        )
        guard = watchdog
        axes = [axis for axis in program.mesh.names if program.mesh.axis_size(axis) > 1]
        groups.update(
            agreement.together("the communicators", lambda: communicator.connect(program.mesh, axes, device, guard))
        )
        session = Session(program, options, agreement, device, groups, verify, watchdog)
        choices = session.tuned() if options.tune else session.default()
        built = session.built(choices, checked=True)
        runner = session.runner(built, budget, summary_of(name, built, choices), choices)
        if options.report and agreement.rank == 0:
            print(runner.summary, flush=True)
        return runner
    except BaseException:
        if watchdog is not None:
            watchdog.close()
        agreement.close()
        raise


@dataclass(frozen=True)
class Built:
    """A program of which this rank's parts are built."""

    placed: PlacedProgram
    parts: list[BuiltPart]
    transport: str
    hits: int
    misses: int


class WeightGuard:
    """Tells when a weight was written to in place, of which engines may hold a copy laid out for them."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._versions = [(name, w, w._version) for name, w in weights.items() if not w.is_inference()]

    def check(self) -> None:
        """Raises InputError: a weight was changed.  What is written through ``.data`` is not seen."""
        for name, weight, version in self._versions:
            if weight._version != version:
                raise InputError(
                    f"the weight {name!r} was changed after the model was compiled, and engines may hold what it was",
                    fix="compile the model again",
                )


class Session:
    """The stages of one compilation, each voted on."""

    def __init__(
        self,
        program: ShardedProgram,
        options: Options,
        agreement: Agreement,
        device: torch.device,
        groups: Mapping[str, dist.ProcessGroup],
        verify: Verify | None,
        watchdog: Watchdog,
    ) -> None:
        self.program, self.options, self.agreement, self.watchdog = program, options, agreement, watchdog
        self.device, self.groups, self.verify = device, groups, verify
        self.rank = agreement.rank
        folder = None if options.cache is None else Path(options.cache)
        self.cache = EngineCache(folder)
        held = {
            s.name: program.weights.local(s, program.mesh, self.rank)
            for s in program.sources.values()
            if isinstance(s, Weight)
        }
        self.weights = {name: weight.to(device) for name, weight in held.items()}  # joined ones come when they are read
        self.guard = WeightGuard(held)

    def default(self) -> Choices:
        """What is chosen without timing anything."""
        capability = torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else None
        placement, why = choose_placement(
            self.options.placement,
            strategies=set(self.program.strategies.values()),
            compute=self.options.compute,
            flavour=flavour().name,
            capability=capability,
            rings=flavour().rings(self.options.target),
        )
        compute: Runs = "engine" if self.options.compute == "tensorrt" else "inductor"
        exchanges: dict[str, Exchange] = {}
        if self.options.exchange is not None:
            exchanges = dict.fromkeys(attention_keys(self.program), self.options.exchange)
        return Choices(
            placement, compute, exchanges, {}, self.options.transport, (Decision("placement", placement, why),)
        )

    def tuned(self) -> Choices:
        """What is fastest on these GPUs."""
        from torchtrt_md.tune import tune

        return tune(self, self.default())

    def lowered(self, plan: Choices) -> ShardedProgram:
        return lower(self.program, placement=plan.placement, exchanges=plan.exchanges)

    def built(self, plan: Choices, *, checked: bool = False) -> Built:
        """Lower, verify, place and build; the ranks vote after each."""
        lowered = self.agreement.together("lowering", lambda: self.lowered(plan))
        self._same_schedule(lowered)
        if checked and self.options.check and self.verify is not None:
            check = self.verify
            self.agreement.together("the comparison with the model", lambda: check(lowered))

        def build() -> Built | None:
            return self._build(lowered, plan, Path(folder))

        with tempfile.TemporaryDirectory(prefix="torchtrt_md-") as folder:
            # Ranks that share a cache find there what the first of their host has built.
            local = self.rank % max(1, torch.cuda.device_count()) if self.device.type == "cuda" else self.rank
            turns = [build if mine else _nothing for mine in (local == 0, local != 0)]
            made = [self.agreement.together("building", turn) for turn in turns]
        return next(filter(None, made))

    def _build(self, lowered: ShardedProgram, plan: Choices, folder: Path) -> Built:
        keep: dict[str, str] = {}
        boundary = None
        if plan.compute == "engine" or "engine" in plan.runs.values():
            keep.update(unconvertible(lowered.graphs[self.rank]))
            boundary = engine_boundary()
        hits, misses = self.cache.hits, self.cache.misses
        last = ""
        for _ in range(_ATTEMPTS):
            placed = self._placed(lowered, plan, keep, boundary)
            try:
                parts = build_parts(
                    placed.parts[self.rank],
                    folder,
                    self.options.target,
                    cache=self.cache,
                    transpose_weights=self.options.transpose_weights,
                )
            except ConversionError as error:
                if self.options.fullgraph or not error.node or error.node in keep:
                    raise
                last = keep[error.node] = error.problem
                continue
            return Built(placed, parts, plan.transport, self.cache.hits - hits, self.cache.misses - misses)
        raise BuildError(
            f"more than {_ATTEMPTS} ops turned out not to convert; of the last: {last}",
            fix="use compute='inductor'",
        )

    def _placed(self, lowered: ShardedProgram, plan: Choices, keep: Mapping[str, str], boundary: Any) -> PlacedProgram:
        placed = place(
            lowered,
            plan.placement,
            compute=plan.compute,
            keep=keep,
            boundary=boundary,
            fullgraph=self.options.fullgraph,
            rank=self.rank,
        )
        return chosen_runs(placed, plan)

    def _same_schedule(self, lowered: ShardedProgram) -> None:
        """Refuse ranks that would wait in different collectives."""
        listed = "\n".join(map(str, schedule(lowered.graphs[self.rank])))
        digest = hashlib.sha256(listed.encode()).hexdigest()[:12]
        found = self.agreement.gather(digest, "the schedule of collectives")
        if len(set(found)) > 1:
            raise RankMismatchError(
                f"the ranks' programs have different collectives: by the hash of their schedules, {grouped(found)}",
                fix="compile the same model with the same arguments on every rank",
            )

    def executor(
        self, built: Built, parts: Sequence[BuiltPart] | None = None, outputs: Sequence[str] | None = None
    ) -> Executor:
        """What runs the program, or only these parts of it, which return ``outputs``; engines have communicators."""
        loaded = self.agreement.together("loading the engines", lambda: self._loaded(parts or built.parts))
        keep = loaded[1]
        engines = self.agreement.together("making contexts", lambda: make_engines(loaded[0], self.device, keep))
        self.agreement.together("binding the communicators", lambda: bind_engines(engines, self.groups, self.device))
        test_rings(
            [item.segment for item in loaded[0]],
            agreement=self.agreement,
            groups=self.groups,
            device=self.device,
            watchdog=self.watchdog,
            target=self.options.target,
        )
        return self.agreement.together(
            "assembling the program",
            lambda: assemble(
                loaded[0],
                engines,
                mesh=self.program.mesh,
                rank=self.rank,
                groups=self.groups,
                device=self.device,
                weights=self._weights_of(built.placed),
                outputs=outputs or [f"output:{value.name}" for value in built.placed.program.outputs],
                overlap=self.options.overlap,
                transport=built.transport,
            ),
        )

    def _weights_of(self, placed: PlacedProgram) -> Mapping[str, Tensor]:
        """The weights by name, those that lowering joined among them."""
        program = placed.program
        joined = {s.name: s for s in program.sources.values() if isinstance(s, Weight) and s.parts}
        read = {name for part in placed.parts[self.rank] for name in part.weights}
        # Not kept: while tuning, other cuts join others.
        copies = {
            name: program.weights.local(joined[name], program.mesh, self.rank).to(self.device)
            for name in read - self.weights.keys()
        }
        return {**self.weights, **copies}

    def _loaded(self, parts: Sequence[BuiltPart]) -> tuple[list[Loaded], object]:
        load, keep = deserializer(self.options.target, self.device) if any(p.engine for p in parts) else (None, None)
        loaded = []
        for part in parts:
            what = part.graph
            if part.engine is not None:
                assert load is not None
                what = load(part.engine)
            loaded.append(Loaded(part_segment(part, part.engine.name if part.engine else ""), what, part.text))
        return loaded, keep

    def runner(self, built: Built, budget: Budget | None, summary: str, choices: Choices) -> Runner:
        executor = self.executor(built)
        lowered = built.placed.program
        segments = [part_segment(part, part.engine.name if part.engine else "") for part in built.parts]
        ranks = [segments if rank == self.rank else [] for rank in range(lowered.mesh.size)]
        return Runner(
            manifest_of(
                lowered,
                ranks,
                placement=built.placed.placement,
                target=self.options.target,
                transport=choices.transport,
                decisions=choices.decisions,
                tuned_on=choices.tuned_on,
            ),
            executor,
            waits_for(segments, lowered.mesh, self.rank),
            agreement=self.agreement,
            watchdog=self.watchdog,
            check=self.options.votes,
            cuda_graph=self.options.cuda_graph,
            static_outputs=self.options.static_outputs,
            budget=budget or Budget(self.options.max_graphs),
            nest=lambda outputs: _nested(lowered, outputs),
            guard=self.guard.check,
            summary=summary,
            choices=choices,
        )


def _nothing() -> None:
    """What a rank does while others build."""


def _nested(program: ShardedProgram, outputs: Mapping[str, Tensor]) -> Any:
    """The outputs as the model itself returns them, in a class of its own where it has one."""
    tensors = [outputs[value.name] for value in program.outputs]
    leaves = [tensors[leaf.index] if isinstance(leaf, Output) else leaf for leaf in program.out_leaves]
    return pytree.tree_unflatten(leaves, program.out_spec)


def summary_of(name: str, built: Built, choices: Choices) -> str:
    """What runs where, and why, for people."""
    placed, parts = built.placed, built.parts
    counts = [f"{sum(p.runs == runs for p in parts)} {runs}" for runs in ("engine", "inductor", "eager")]
    different = len({p.text for p in parts if p.runs == "engine"})
    lines = [
        f"{name} on {placed.program.mesh}, placement {placed.placement}: {len(parts)} parts"
        f" ({', '.join(c for c in counts if not c.startswith('0 '))});"
        f" {different} different engine{'s' if different != 1 else ''}, {built.hits} of them from the cache",
    ]
    if choices.tuned_on:
        lines.append(f"  timed on {choices.tuned_on}")
    for decision in choices.decisions:
        times = ", ".join(f"{candidate} {ms:.3f} ms" for candidate, ms in decision.times_ms.items())
        lines.append(f"  {decision.what}: {decision.chosen}, {decision.why}" + (f" ({times})" if times else ""))
    for kept in placed.kept:
        where = f", at {kept.at}" if kept.at else ""
        lines.append(f"  in PyTorch: {kept.count} x {kept.op}: {kept.reason}{where}")
    return "\n".join(lines)
