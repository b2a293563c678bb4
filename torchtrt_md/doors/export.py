"""``export``: the whole road in one call, from a model to a bundle."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import nn

from torchtrt_md.build.engine import BuiltEngine
from torchtrt_md.bundle import check_destination, manifest, write_bundle
from torchtrt_md.bundle.from_program import check_keys, even, manifest_of
from torchtrt_md.bundle.weights import save_weights
from torchtrt_md.bundle.write import workspace, writing
from torchtrt_md.capture import capture
from torchtrt_md.capture.model import own_mesh
from torchtrt_md.checkpoint import Given
from torchtrt_md.checks import check_export
from torchtrt_md.choices import Choices, Transport
from torchtrt_md.doors.agreed import check_fit
from torchtrt_md.doors.triton import check_new, triton
from torchtrt_md.errors import BuildError
from torchtrt_md.graph.json import graph_to_json
from torchtrt_md.lowering.rank_constant import with_constants
from torchtrt_md.mesh import Mesh
from torchtrt_md.options import Options
from torchtrt_md.parallel import Parallel
from torchtrt_md.place import Kept
from torchtrt_md.program import ShardedProgram, Weight
from torchtrt_md.road import Built, Road
from torchtrt_md.runtime.weights import ModelWeights
from torchtrt_md.segment import Part, Segment
from torchtrt_md.serve.config import check_flavour, check_values
from torchtrt_md.verification import Report, verify
from torchtrt_md.whole_file import link_or_copy
from torchtrt_md.wrappers import plain

Progress = Callable[[str, str, float | None], None]


@dataclass
class Exported:
    """What ``export`` made.

    Attributes:
        folder: the bundle, or the model's folder in another format.
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
    engines: tuple[BuiltEngine, ...]
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
    compute: Literal["tensorrt", "inductor"] = "tensorrt",
    transport: Transport = "nccl",
    exchange_dtype: Literal["model", "float8"] = "model",
    choices: Choices | None = None,
    dense: nn.Module | None = None,
    weights: Given = None,
    coordinates_inside: bool = False,
    format: Literal["bundle", "triton-python", "triton"] = "bundle",
    weight_streaming: bool = False,
    strip_weights: bool = False,
    dump: Path | None = None,
    progress: Progress = lambda stage, detail, seconds: None,
) -> Exported:
    """Capture, lower, verify, build and bundle.

    Args:
        model, args, kwargs, mesh, parallel: as for :func:`torchtrt_md.capture`.
        out: the bundle's folder; an older bundle there is replaced.  In another ``format`` the model's folder, which
            must be new or empty.
        target: as for :func:`torchtrt_md.build`.
        check: prove the program against the dense model before anything is built.  It needs the dense model,
            and memory for its weights in fp64.
        placement: where attention runs: in the engine, or in PyTorch between engines (``"split"``); ``"auto"`` takes
            the engine, unless a strategy, ``compute="inductor"`` or the kernels for the target need the other.
        compute: what runs all that is not attention or a collective.
        transport: what does the exchanges between engines when the bundle runs: NCCL's kernels, or ``"store"``, a
            kernel that stores into the other GPUs' memory (GPUs of one host only).
        exchange_dtype: ``"float8"`` sends queries, keys and values as rows in float8 between engines; see
            :class:`~torchtrt_md.options.Options`.
        choices: what ``md.compile`` found on GPUs: its ``runner.choices``.  It takes precedence over ``placement``,
            ``compute``, ``transport`` and ``exchange_dtype``.
        dense: the dense model, where ``model`` is one that ``parallelize_module`` has sharded already: it has the
            weights of all ranks, and is what the program is compared with.
        weights: of a model whose parameters are on meta: the folder of its checkpoint in safetensors files, one file,
            an index (``model.safetensors.index.json``), or tensors by name.  They are read as they are needed, a
            rank's part of each.  With ``strip_weights`` and no ``check`` none are needed.
        coordinates_inside: build each rank's place in the mesh into its engines, so that all ranks can be given the
            same inputs, at the price of engines of its own for each rank.  By default it is an input that the runner
            fills in.
        format: a bundle, or what :func:`torchtrt_md.triton` makes of one.  ``"triton"`` has ``coordinates_inside``.
        weight_streaming: build engines whose weights can stay in host memory: ``md.load(..., weight_budget=bytes)``.
            For programs that are one engine.
        strip_weights: leave the model's weights out of the bundle: ``md.load(..., weights=checkpoint)`` is given them.
            Engines take them as inputs.  What is not in ``state_dict()``, such as a table that the model made, stays.
        dump: a folder for the graphs before and after each lowering pass.
        progress: called with (stage, detail, None) when a stage begins or goes on, and with its seconds at its end.

    Raises:
        MDError: of the stage that failed; nothing is written then.
    """
    check_export(
        model=model,
        args=args,
        kwargs=kwargs,
        mesh=mesh,
        parallel=parallel,
        out=out,
        check=check,
        compute=compute,
        transport=transport,
        choices=choices,
        dense=dense,
        weights=weights,
        coordinates_inside=coordinates_inside,
        format=format,
        weight_streaming=weight_streaming,
        strip_weights=strip_weights,
        dump=dump,
        progress=progress,
    )
    options = Options(
        mesh=mesh,
        parallel=parallel,
        placement=placement,
        compute=compute,
        transport=transport,
        exchange_dtype=exchange_dtype,
        target=target,
    )
    out = Path(out)
    if format == "bundle":
        check_destination(out)
    else:
        check_new(out)
    where = check_fit(options, choices)
    if format == "triton" and compute == "tensorrt":
        from torchtrt_md.build.flavour import flavour

        check_flavour(flavour().name, flavour().version)
    elif format == "triton":
        check_flavour("", "")
    elif weight_streaming and compute == "inductor":
        raise BuildError("weight_streaming is TensorRT's, and compute is 'inductor'", fix="leave one of them out")
    if weight_streaming and strip_weights:
        raise BuildError("weights that are not in an engine cannot be streamed by it", fix="leave one of them out")
    if weight_streaming and where == "split":
        raise BuildError(
            "weight_streaming is for programs that are one engine with its weights inside, and placement 'split' makes"
            " several parts, whose weights are inputs",
            fix='use placement="engine" and a strategy that an engine can hold, or leave weight_streaming out',
        )
    coordinates_inside |= format == "triton"
    stages = Stages(progress)
    with workspace(out) as folder:
        later = set(plain((dense or model).state_dict().items())) if strip_weights else set()
        how = (check, choices, dense, weights, later, coordinates_inside, dump, stages)
        proven = _prove(model, args, kwargs, options, *how)
        road, lowered, chosen = proven.road, proven.lowered, proven.choices
        check_keys(lowered)
        if format == "triton":  # what can be told of before hours of building
            check_values(lowered.mesh, lowered.inputs, lowered.outputs)
        if strip_weights:
            _check_given(lowered, later)
        road.inside, road.progress = folder, stages.say
        road.streaming, road.strip = weight_streaming, strip_weights
        with stages("build") as say, writing(out):
            built = road.build(lowered, chosen)
            ranks, tests, files = _segments(built, folder)
            say(f"{_told(built)}, {target}")
        with stages("bundle") as say, writing(out):
            given = _given(built, later)
            held = _weights(built, folder, files, given)
            described = manifest_of(lowered, ranks, chosen, target=target, weights=held, self_tests=tests, given=given)
            # Not in the folder itself, whose lock says that this process lives.
            bundle = out if format == "bundle" else folder / "whole" / "bundle"
            written = write_bundle(bundle, described, files)
            if format != "bundle":
                triton(bundle, out, format=format)
            say(f"{_count(len(written.files) + 1, 'file')} in {out}")
    return Exported(out, lowered, proven.report, built.engines, written, stages.seconds, built.placed.kept)


@dataclass(frozen=True)
class Proven:
    """A program before anything is built: lowered, and what verification measured, None where it was not asked for."""

    road: Road
    lowered: ShardedProgram
    choices: Choices
    report: Report | None


def prove(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    mesh: Mesh,
    parallel: Parallel | Sequence[Parallel] = (),
    placement: Literal["auto", "engine", "split"] = "auto",
    compute: Literal["tensorrt", "inductor"] = "tensorrt",
    exchange_dtype: Literal["model", "float8"] = "model",
    check: bool = True,
    weights: Given = None,
    coordinates_inside: bool = False,
    dump: Path | None = None,
    stages: Stages | None = None,
) -> Proven:
    """:func:`export` up to where something would be built: capture, lower, verify.

    Raises:
        MDError: of the stage that failed.
    """
    options = Options(mesh=mesh, parallel=parallel, placement=placement, compute=compute, exchange_dtype=exchange_dtype)
    how = (check, None, None, weights, None, coordinates_inside, dump, stages or Stages())
    return _prove(model, args, kwargs, options, *how)


def _prove(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    options: Options,
    check: bool,
    choices: Choices | None,
    dense: nn.Module | None,
    weights: Given,
    later: Collection[str] | None,
    coordinates_inside: bool,
    dump: Path | None,
    stages: Stages,
) -> Proven:
    """As :func:`prove`.  ``later`` are the weights that are given at load; None where nothing will be built."""
    assert isinstance(options.mesh, Mesh)
    size = options.mesh.size
    with stages("capture") as say:
        if dense is not None and weights is None and own_mesh(model) is not None:
            named = [*dense.named_parameters(remove_duplicate=False), *dense.named_buffers(remove_duplicate=False)]
            weights = dict(named)
        captured = capture(model, args, kwargs, mesh=options.mesh, parallel=options.parallels, weights=weights)
        if check or later is not None:  # before hours of building
            needed = [w for w in captured.read() if check or w.name not in (later or ())]
            captured.weights.check_values(needed)
        nodes = sum(node.op == "call_function" for node in captured.graphs[0].graph.nodes)
        say(f"{nodes} nodes, {_count(len(captured.distinct()), 'graph')} for {size} ranks")
    road = Road(captured, options, ranks=range(size))
    choices = choices or road.default()
    with stages("lower") as say:
        lowered = road.lower(choices, dump)
        if coordinates_inside:
            lowered = with_constants(lowered)
        say(", ".join(f"{name} {count}" for name, count in lowered.counts.items() if count) or "nothing to rewrite")
    if not check:
        return Proven(road, lowered, choices, None)
    with stages("verify") as say:
        say(f"{size} ranks in lockstep against {type(model).__name__}")
        report = verify(lowered, dense or model, args, kwargs)
        say(f"error {report.error:.2e}, the dense model's own {report.dense_error:.2e}")
    return Proven(road, lowered, choices, report)


class Stages:
    """Tells of stages, and takes their times."""

    def __init__(self, progress: Progress = lambda stage, detail, seconds: None) -> None:
        self.progress, self.seconds = progress, dict[str, float]()
        self._name = self._detail = ""

    @contextmanager
    def __call__(self, name: str) -> Iterator[Callable[[str], None]]:
        self._name, self._detail = name, ""
        self.progress(name, "", None)
        start = time.perf_counter()
        yield self.say
        self.seconds[name] = time.perf_counter() - start
        self.progress(name, self._detail, self.seconds[name])

    def say(self, text: str) -> None:
        self._detail = text
        self.progress(self._name, text, None)


def _segments(built: Built, folder: Path) -> tuple[list[list[Segment]], list[Segment], dict[str, Path]]:
    """For each rank its segments, the self-tests, and the files that they name."""
    files: dict[str, Path] = {}
    made: dict[int, Path] = {}

    def file_of(part: Part) -> str:
        if id(part) not in made:
            made[id(part)] = _graph_file(part, folder) if part.engine is None else _engine_file(part.engine, folder)
        files[made[id(part)].name] = made[id(part)]
        return made[id(part)].name

    def named(parts: Sequence[Part]) -> list[Segment]:
        return [msgspec.structs.replace(part.segment, file=file_of(part)) for part in parts]

    return [named(parts) for parts in built.parts], named(built.self_tests), files


def _check_given(program: ShardedProgram, saved: Collection[str]) -> None:
    """Refuse what the manifest would, of weights that are to be given at load."""
    for source in program.sources.values():
        if isinstance(source, Weight) and source.name in saved:
            even(source)


def _given(built: Built, saved: Collection[str]) -> set[str]:
    """The weights that segments read and that the model's own checkpoint has, or of which it has all parts."""
    read = {w for parts in built.parts for part in parts for w in part.segment.weights}
    sources = [s for s in built.placed.program.sources.values() if isinstance(s, Weight) and s.name in read]
    return {s.name for s in sources if all(leaf.name in saved for leaf in s.parts or (s,))}


def _weights(built: Built, folder: Path, files: dict[str, Path], given: Collection[str]) -> list[str | None]:
    """For each rank the file of its weights but those that are given at load, written once for equal ones.

    They are added to ``files``.
    """
    program = built.placed.program
    held: list[str | None] = [None] * program.mesh.size
    classes = [equal for _, ranks in built.placed.distinct() for equal in program.equal_ranks(ranks)]
    for members in classes:
        read = dict.fromkeys(w for part in built.parts[members[0]] for w in part.segment.weights)
        names = [name for name in read if name not in given]
        if names:
            file = folder / f"weights{members[0]}.safetensors"
            weights = ModelWeights(program, members[0])
            bindings = {b.weight: b for part in built.parts[members[0]] for b in part.segment.inputs}
            forms = {
                name: torch.empty(bindings[name].source_shape, dtype=bindings[name].dtype, device="meta")
                for name in names
            }
            save_weights(forms, file, weights.local)
            files[file.name] = file
            for rank in members:
                held[rank] = file.name
    return held


def _graph_file(part: Part, folder: Path) -> Path:
    assert part.graph is not None
    data = graph_to_json(part.graph)
    file = folder / f"{hashlib.sha256(data).hexdigest()}.json"
    file.write_bytes(data)
    return file


def _engine_file(engine: Path, folder: Path) -> Path:
    """The engine in this folder, from which it is moved into the bundle: the cache keeps its own."""
    file = folder / engine.name
    link_or_copy(engine, file)
    return file


def _told(built: Built) -> str:
    engines = {part.engine for parts in built.parts for part in parts if part.engine is not None}
    if built.engines:
        return f"{_count(len(engines), 'engine')}, {sum(e.stat().st_size for e in engines) // 10**6} MB"
    return f"{len(built.parts[0])} parts a rank, {_count(len(engines), 'different engine')}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")
