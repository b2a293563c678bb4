"""Build whole programs, weights and all: for each class of equal ranks one engine, or one for each cut."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Collection
from pathlib import Path

import msgspec

from torchtrt_md.build.builder import build_engine
from torchtrt_md.build.decompose import bind_weights, decompose
from torchtrt_md.build.engine import BuiltEngine
from torchtrt_md.build.flavour import boundary_dtypes, flavour
from torchtrt_md.errors import BuildError
from torchtrt_md.place import PlacedProgram, place
from torchtrt_md.program import ShardedProgram, Weight, placeholders
from torchtrt_md.segment import Binding, Part, Segment

_LONGEST_NAME = 1024  # bytes; TensorRT's own limit is 4096


def build_program(
    program: ShardedProgram, folder: Path, target: str, ranks: Collection[int], progress: Callable[[str], None]
) -> list[BuiltEngine]:
    """Build a lowered program, all of which must be engines; see :func:`torchtrt_md.build`."""
    flavour().check_target(target)
    _check_dtypes(program)
    return build_whole(place(program, "engine", ranks=ranks), folder, target, ranks, progress)


def build_whole(
    placed: PlacedProgram,
    folder: Path,
    target: str,
    ranks: Collection[int],
    progress: Callable[[str], None],
    *,
    streaming: bool = False,
) -> list[BuiltEngine]:
    """Build the parts of each rank with their weights inside.  One part's, of one class, are in memory at a time.

    Args:
        placed: of which all parts are engines: one, or those that a program over several axes is cut into.
        folder: for the engine files.
        ranks: whose engines are wanted.
        streaming: let their weights be streamed from host memory when they run.

    Raises:
        ConversionError: naming the node of the lowered graph that cannot be converted.
        BuildError: TensorRT cannot build an engine.
    """
    program, engines = placed.program, []
    for parts, members in placed.distinct():
        classes = [c for c in program.equal_ranks(members) if set(ranks).intersection(c)]
        if not classes:
            continue
        sources = {s.name: s for s in program.sources.values() if isinstance(s, Weight)}
        for number, part in enumerate(parts):
            assert part.graph is not None
            decomposed = decompose(part.graph)
            ops = sum(n.op == "call_function" for n in decomposed.graph.nodes)
            weights = {
                node.name: binding.source.name
                for node, binding in zip(placeholders(part.graph), part.segment.inputs, strict=True)
                if binding.weight is not None
            }
            segment = without_weights(part) if len(parts) == 1 else _one_of_several(part)
            for equal in classes:
                what = f"rank{'s' if len(equal) > 1 else ''} {', '.join(map(str, equal))}"
                what += f", engine {number + 1} of {len(parts)}" if len(parts) > 1 else ""
                progress(f"{what}: {ops} ops")
                held = {node: program.weights.local(sources[w], program.mesh, equal[0]) for node, w in weights.items()}
                file = folder / (f"rank{equal[0]}.{number}.engine" if len(parts) > 1 else f"rank{equal[0]}.engine")
                layers, seconds = build_engine(
                    bind_weights(decomposed, held), segment, file, target, what=what, streaming=streaming
                )
                engines.append(BuiltEngine(equal, file, segment, target, layers, seconds))
                del held
                _release_memory()
    return engines


def _one_of_several(part: Part) -> Segment:
    """The segment of an engine that holds its weights, its bindings named by position: what passes between engines may
    have the name of an input."""
    return msgspec.structs.replace(part.segment, inputs=tuple(b for b in part.segment.inputs if b.weight is None))


def without_weights(part: Part) -> Segment:
    """The segment of an engine that holds its weights, its bindings named as the program's inputs and outputs are.

    A rank's coordinate has a name that none of these has; what TensorRT would not take as a name is counted instead.
    """
    s = part.segment
    inputs = [b for b in s.inputs if b.weight is None]
    taken = {b.source.name for b in (*inputs, *s.outputs) if b.source.kind != "coordinate"}

    def named(binding: Binding) -> Binding:
        kind, name = binding.source
        if kind == "coordinate" or not name.isprintable() or len(name.encode()) > _LONGEST_NAME:
            name = f"coordinate_{name}" if kind == "coordinate" else binding.name
            while name in taken:
                name += "_"
            taken.add(name)
        return msgspec.structs.replace(binding, name=name)

    return msgspec.structs.replace(s, inputs=tuple(map(named, inputs)), outputs=tuple(map(named, s.outputs)), name="")


def _release_memory() -> None:
    """Give one rank's weights back to the system before the next rank's are made; glibc would keep them."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _check_dtypes(program: ShardedProgram) -> None:
    supported = boundary_dtypes(flavour())
    for what, values in (("input", program.inputs), ("output", program.outputs)):
        for value in values:
            if value.dtype not in supported:
                raise BuildError(
                    f"{what} {value.name!r} is {value.dtype}, which TensorRT does not have at an engine's boundary",
                    fix=f"cast it inside or outside the model; supported are {', '.join(map(str, supported))}",
                )
