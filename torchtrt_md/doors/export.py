"""``export``: the whole road in one call, from a model to a bundle."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from torchtrt_md.build import build
from torchtrt_md.build.builder import equal_ranks
from torchtrt_md.build.cache import EngineCache
from torchtrt_md.build.engine import Engine
from torchtrt_md.build.flavour import flavour
from torchtrt_md.build.parts import BuiltPart, build_parts, engine_boundary, unconvertible
from torchtrt_md.bundle import check_destination, manifest, write_bundle
from torchtrt_md.bundle.from_program import engine_segment, manifest_of, part_segment
from torchtrt_md.bundle.weights import save_weights
from torchtrt_md.capture import capture
from torchtrt_md.choices import Choices, chosen_runs
from torchtrt_md.graph.json import graph_to_json
from torchtrt_md.lowering import lower
from torchtrt_md.mesh import Mesh
from torchtrt_md.parallel import Parallel
from torchtrt_md.place import Kept, place
from torchtrt_md.place.choose import choose_placement
from torchtrt_md.program import ShardedProgram, Weight
from torchtrt_md.verification import Report, verify

Progress = Callable[[str, str, float | None], None]


@dataclass
class Exported:
    """What ``export`` made.

    Attributes:
        folder: the bundle.
        program: the lowered program that the engines were built from.
        report: what verification measured; None where it was not asked for.
        engines: one for each class of equal ranks, where the whole program is one; their files are in the bundle now.
        manifest: the bundle's.
        seconds: stage -> how long it took.
        kept: what stays in PyTorch although the placement would not put it there.
    """

    folder: Path
    program: ShardedProgram
    report: Report | None
    engines: list[Engine]
    manifest: manifest.Manifest
    seconds: dict[str, float] = field(default_factory=dict)
    kept: tuple[Kept, ...] = ()


def export(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    mesh: Mesh,
    parallel: Parallel | Sequence[Parallel] = (),
    out: str | Path,
    target: str = "portable",
    check: bool = True,
    placement: Literal["auto", "engine", "split"] = "auto",
    choices: Choices | None = None,
    dense: nn.Module | None = None,
    dump: Path | None = None,
    progress: Progress = lambda stage, detail, seconds: None,
) -> Exported:
    """Capture, lower, verify, build and bundle.

    Args:
        model, args, kwargs, mesh, parallel: as for :func:`torchtrt_md.capture`.
        out: the bundle's folder; an older bundle there is replaced.
        target: as for :func:`torchtrt_md.build`.
        check: prove the program against the dense model before anything is built.  It needs the dense model,
            and memory for its weights in fp64.
        placement: where attention runs: in the engine, or in PyTorch between engines (``"split"``); ``"auto"`` takes
            the engine, unless a strategy needs the other.
        choices: what ``md.compile(..., tune=True)`` found: its ``runner.choices``.  It goes before ``placement``.
        dense: the dense model, where ``model`` is one that ``parallelize_module`` has sharded already: it has the
            weights of all ranks, and is what the program is compared with.
        dump: a folder for the graphs before and after each lowering pass.
        progress: called with (stage, detail, None) when a stage begins or goes on, and with its seconds at its end.

    Raises:
        MDError: of the stage that failed; nothing is written then.
    """
    out = Path(out)
    check_destination(out)
    flavour().check_target(target)
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[Callable[[str], None]]:
        detail = [""]
        progress(name, "", None)
        start = time.perf_counter()

        def say(text: str) -> None:
            detail[0] = text
            progress(name, text, None)

        yield say
        seconds[name] = time.perf_counter() - start
        progress(name, detail[0], seconds[name])

    with stage("capture") as say:
        weights = None if dense is None else {**dict(dense.named_parameters()), **dict(dense.named_buffers())}
        captured = capture(model, args, kwargs, mesh=mesh, parallel=parallel, weights=weights)
        say(f"{_nodes(captured)} nodes, {_graphs(captured)} for {mesh.size} ranks")
    if choices is None:
        choices = _choices(placement, captured)
    with stage("lower") as say:
        program = lower(captured, placement=choices.placement, exchanges=choices.exchanges, dump=dump)
        say(", ".join(f"{name} {count}" for name, count in program.counts.items() if count) or "nothing to rewrite")
    report = None
    if check:
        with stage("verify") as say:
            say(f"{mesh.size} ranks in lockstep against {type(model).__name__}")
            report = verify(program, dense or model, args, kwargs)
            say(f"error {report.error:.2e}, the dense model's own {report.dense_error:.2e}")
    with tempfile.TemporaryDirectory(dir=_existing_parent(out), prefix=".torchtrt_md-") as folder:
        with stage("build") as say:
            made = _build(program, choices, Path(folder), target, say)
            say(f"{made.told}, {flavour().name} {flavour().version}, {target}")
        with stage("bundle") as say:
            described = manifest_of(
                program,
                made.ranks,
                placement=choices.placement,
                target=target,
                weights=made.weights,
                transport=choices.transport,
                decisions=choices.decisions,
                tuned_on=choices.tuned_on,
            )
            written = write_bundle(out, described, made.files)
            say(f"{_count(len(written.files) + 1, 'file')} in {out}")
    return Exported(out, program, report, made.engines, written, seconds, made.kept)


def _choices(placement: str, captured: ShardedProgram) -> Choices:
    chosen, why = choose_placement(
        placement,
        strategies=set(captured.strategies.values()),
        compute="tensorrt",
        flavour=flavour().name,
        capability=None,
        rings=False,
    )
    return Choices(chosen, decisions=(manifest.Decision("placement", chosen, why),))


@dataclass
class _Made:
    """What was built: for each rank its segments and its weights, and the files that they name."""

    ranks: list[list[manifest.Segment]]
    files: dict[str, Path]
    told: str
    weights: list[str | None] | None = None
    engines: list[Engine] = field(default_factory=list)
    kept: tuple[Kept, ...] = ()


def _build(program: ShardedProgram, choices: Choices, folder: Path, target: str, say: Callable[[str], None]) -> _Made:
    """One engine for each class of ranks, weights and all, where the whole program is one; else its parts."""
    if choices.placement == "engine" and not choices.runs and place(program, "engine").is_one_engine:
        engines = build(program, folder, target=target, progress=say)
        by_rank = {rank: engine for engine in engines for rank in engine.ranks}
        return _Made(
            ranks=[[engine_segment(by_rank[rank])] for rank in range(program.mesh.size)],
            files={engine.file.name: engine.file for engine in engines},
            told=f"{_count(len(engines), 'engine')}, {sum(e.file.stat().st_size for e in engines) // 10**6} MB",
            engines=engines,
        )
    return _build_parts(program, choices, folder, target, say)


def _build_parts(
    program: ShardedProgram, choices: Choices, folder: Path, target: str, say: Callable[[str], None]
) -> _Made:
    keep: dict[str, str] = {}
    for graph, _ in program.distinct() if choices.compute == "engine" else ():
        keep.update(unconvertible(graph))
    boundary = engine_boundary() if choices.compute == "engine" else None
    placed = chosen_runs(
        place(program, choices.placement, compute=choices.compute, keep=keep, boundary=boundary), choices
    )
    cache = EngineCache(folder / "engines")  # so that equal parts of different ranks are built once
    ranks: list[list[manifest.Segment]] = [[] for _ in range(program.mesh.size)]
    weights: list[str | None] = [None] * program.mesh.size
    files: dict[str, Path] = {}
    for parts, members in placed.distinct():
        segments = []
        for part in build_parts(parts, folder, target, cache=cache, progress=say):
            file = part.engine or _graph_file(part, folder)
            files[file.name] = file
            segments.append(part_segment(part, file.name))
        names = list(dict.fromkeys(name for part in parts for name in part.weights))
        sources = {s.name: s for s in program.sources.values() if isinstance(s, Weight)}
        for equal in equal_ranks(program, members):
            for rank in equal:
                ranks[rank] = segments
            if names:
                file = folder / f"weights{equal[0]}.safetensors"
                held = {name: program.weights.local(sources[name], program.mesh, equal[0]) for name in names}
                save_weights(held, file)
                files[file.name] = file
                for rank in equal:
                    weights[rank] = file.name
    engines = {s.file for segments in ranks for s in segments if s.runs == "engine"}
    told = f"{len(ranks[0])} parts a rank, {_count(len(engines), 'different engine')}"
    return _Made(ranks, files, told, weights, kept=placed.kept)


def _graph_file(part: BuiltPart, folder: Path) -> Path:
    assert part.graph is not None
    data = graph_to_json(part.graph)
    file = folder / f"{hashlib.sha256(data).hexdigest()}.json"
    file.write_bytes(data)
    return file


def _existing_parent(path: Path) -> Path:
    """Where the engines can be built so that moving them into the bundle is a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent


def _nodes(program: ShardedProgram) -> int:
    return sum(1 for node in program.graphs[0].graph.nodes if node.op == "call_function")


def _graphs(program: ShardedProgram) -> str:
    return _count(len(program.distinct()), "graph")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")
