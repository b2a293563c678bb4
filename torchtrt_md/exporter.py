"""``export``: the whole road in one call, from a model to a bundle."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import torchtrt_md
from torchtrt_md.build import build
from torchtrt_md.build.engine import Binding, Engine
from torchtrt_md.build.flavour import flavour
from torchtrt_md.bundle import check_destination, manifest, write_bundle
from torchtrt_md.capture import capture
from torchtrt_md.errors import BundleError
from torchtrt_md.lowering import lower
from torchtrt_md.lowering.schedule import ScheduledCollective
from torchtrt_md.mesh import Mesh
from torchtrt_md.parallel import Parallel
from torchtrt_md.program import Coordinate, Output, ShardedProgram, Value, dtype_name
from torchtrt_md.verification import Report, verify

Progress = Callable[[str, str, float | None], None]


@dataclass
class Exported:
    """What ``export`` made.

    Attributes:
        folder: the bundle.
        program: the lowered program that the engines were built from.
        report: what verification measured; None where it was not asked for.
        engines: one for each class of equal ranks; their files are in the bundle now.
        manifest: the bundle's.
        seconds: stage -> how long it took.
    """

    folder: Path
    program: ShardedProgram
    report: Report | None
    engines: list[Engine]
    manifest: manifest.Manifest
    seconds: dict[str, float] = field(default_factory=dict)


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
    with stage("lower") as say:
        program = lower(captured, dump=dump)
        say(", ".join(f"{name} {count}" for name, count in program.counts.items() if count) or "nothing to rewrite")
    report = None
    if check:
        with stage("verify") as say:
            say(f"{mesh.size} ranks in lockstep against {type(model).__name__}")
            report = verify(program, dense or model, args, kwargs)
            say(f"error {report.error:.2e}, the dense model's own {report.dense_error:.2e}")
    with tempfile.TemporaryDirectory(dir=_existing_parent(out), prefix=".torchtrt_md-") as folder:
        with stage("build") as say:
            engines = build(program, folder, target=target, progress=say)
            made = f"{_count(len(engines), 'engine')}, {_megabytes(engines)} MB"
            say(f"{made}, {flavour().name} {flavour().version}, {target}")
        with stage("bundle") as say:
            files = {engine.file.name: engine.file for engine in engines}
            written = write_bundle(out, manifest_of(program, engines, target), files)
            say(f"{_count(len(written.files) + 1, 'file')} in {out}")
    return Exported(out, program, report, engines, written, seconds)


def manifest_of(program: ShardedProgram, engines: Sequence[Engine], target: str) -> manifest.Manifest:
    """The manifest of these engines, with the files' names in place of paths."""
    by_rank = {rank: engine for engine in engines for rank in engine.ranks}
    return manifest.Manifest(
        schema=manifest.SCHEMA,
        mesh=dict(program.mesh.axes),
        inputs=[_tensor(value) for value in program.inputs],
        outputs=[_tensor(value) for value in program.outputs],
        constants={name: _scalar(value) for name, value in program.constants.items()},
        positional=list(program.positional),
        result=_result(program),
        ranks=[[_segment(by_rank[rank])] for rank in range(program.mesh.size)],
        target=target,
        versions=manifest.Versions(
            torchtrt_md=torchtrt_md.__version__,
            torch=str(torch.__version__),
            flavour=flavour().name,
            tensorrt=flavour().version,
        ),
        files={},
    )


def _segment(engine: Engine) -> manifest.Segment:
    return manifest.Segment(
        engine=engine.file.name,
        axis=engine.axis,
        inputs=[_binding(b, "input") for b in engine.inputs],
        outputs=[_binding(b, "output") for b in engine.outputs],
        collectives=[_collective(c) for c in engine.collectives],
    )


def _binding(binding: Binding, kind: str) -> manifest.Binding:
    source = binding.source
    name = f"coordinate:{source.axis}" if isinstance(source, Coordinate) else f"{kind}:{source.name}"
    return manifest.Binding(binding.name, name, dtype_name(binding.dtype), list(binding.shape))


def _collective(c: ScheduledCollective) -> manifest.Collective:
    return manifest.Collective(c.op, c.axis, c.size, dtype_name(c.dtype), c.elements, c.bytes_sent)


def _tensor(value: Value) -> manifest.Tensor:
    return manifest.Tensor(
        value.name, dtype_name(value.dtype), list(value.shape), [(s.dim, s.axis) for s in value.sharding]
    )


def _scalar(value: object) -> bool | int | float | str | None:
    assert value is None or isinstance(value, (bool, int, float, str))
    return value


def _result(program: ShardedProgram) -> dict[str, Any]:
    """How the outputs nest in what the model returns; a model output of its own class becomes a dict."""
    leaves = [{"output": leaf.index} if isinstance(leaf, Output) else {"constant": leaf} for leaf in program.out_leaves]
    nested = pytree.tree_unflatten([_Leaf(leaf) for leaf in leaves], program.out_spec)
    return _nested(nested)


class _Leaf:
    def __init__(self, value: dict[str, Any]) -> None:
        self.value = value


def _nested(node: Any) -> dict[str, Any]:
    if isinstance(node, _Leaf):
        constant = node.value.get("constant")
        if not isinstance(constant, (type(None), bool, int, float, str)):
            raise BundleError(
                f"the model returns a {type(constant).__name__}, which a bundle cannot hold",
                fix="return tensors and plain values only",
            )
        return node.value
    if isinstance(node, Mapping):
        return {"dict": {str(key): _nested(value) for key, value in node.items()}}
    if isinstance(node, (tuple, list)):
        return {"list" if isinstance(node, list) else "tuple": [_nested(value) for value in node]}
    raise BundleError(
        f"the model returns a {type(node).__name__}, whose parts a bundle cannot name",
        fix="return a tensor, tuple, list or dict (return_dict=False in diffusers)",
    )


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


def _megabytes(engines: Sequence[Engine]) -> int:
    return sum(engine.file.stat().st_size for engine in engines) // 10**6
