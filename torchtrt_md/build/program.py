"""Build whole programs, weights and all: for each class of equal ranks one engine, or one for each cut."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec

from torchtrt_md.build.cache import UNCACHED, EngineCache, usable
from torchtrt_md.build.engine import BuiltEngine
from torchtrt_md.build.flavour import boundary_dtypes, flavour
from torchtrt_md.build.part import build_part
from torchtrt_md.errors import BuildError
from torchtrt_md.place import PlacedProgram, place
from torchtrt_md.program import ShardedProgram, Weight
from torchtrt_md.segment import Binding, Part
from torchtrt_md.whole_file import link_or_copy

_LONGEST_NAME = 1024  # bytes; TensorRT's own limit is 4096
_ENGINES_KEPT = 4  # an engine whose weights would take more than this part of the cache does not go into it


def build_program(
    program: ShardedProgram, folder: Path, target: str, ranks: Collection[int], progress: Callable[[str], None]
) -> list[BuiltEngine]:
    """Build a lowered program, all of which must be engines; see :func:`torchtrt_md.build`."""
    flavour().check_target(target)
    _check_dtypes(program)
    return build_whole(
        place(program, "engine", ranks=ranks), folder, usable(EngineCache(), folder), target, ranks, progress
    )


def build_whole(
    placed: PlacedProgram,
    folder: Path,
    cache: EngineCache,
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
        cache: where engines of earlier builds are, and these will be, unless they would fill it.
        ranks: whose engines are wanted.
        streaming: let their weights be streamed from host memory when they run.

    Raises:
        ConversionError: naming the node of the lowered graph that cannot be converted.
        BuildError: TensorRT cannot build an engine.
    """
    program, engines = placed.program, []
    sources = {s.name: s for s in program.sources.values() if isinstance(s, Weight)}
    for parts, members in placed.distinct():
        classes = [c for c in program.equal_ranks(members) if set(ranks).intersection(c)]
        for number, part in enumerate(parts):
            named = named_as_the_program(part) if len(parts) == 1 else part
            for equal in classes:
                start = time.perf_counter()
                what = f"rank{'s' if len(equal) > 1 else ''} {', '.join(map(str, equal))}"
                what += f", engine {number + 1} of {len(parts)}" if len(parts) > 1 else ""
                held = {w: program.weights.local(sources[w], program.mesh, equal[0]) for w in part.segment.weights}
                large = sum(w.nbytes for w in held.values()) > cache.max_bytes // _ENGINES_KEPT
                built = build_part(
                    named,
                    target,
                    EngineCache(folder / UNCACHED) if large else cache,
                    weights=held,
                    streaming=streaming,
                    what=what,
                    progress=progress,
                )
                file = folder / (f"rank{equal[0]}.{number}.engine" if len(parts) > 1 else f"rank{equal[0]}.engine")
                _put(built, file, keep=not large)
                engines.append(BuiltEngine(equal, file, built.segment, target, time.perf_counter() - start))
                del held
                _release_memory()
    return engines


def named_as_the_program(part: Part) -> Part:
    """A part that is a whole program, its bindings named as the program's inputs and outputs are.

    A rank's coordinate has a name that none of these has; what TensorRT would not take as a name is counted instead.
    """
    s = part.segment
    bindings = [b for b in (*s.inputs, *s.outputs) if b.weight is None]
    taken = {b.source.name for b in bindings if b.source.kind != "coordinate"}

    def named(binding: Binding) -> Binding:
        if binding.weight is not None:
            return binding
        kind, name = binding.source
        if kind == "coordinate" or not name.isprintable() or len(name.encode()) > _LONGEST_NAME:
            name = f"coordinate_{name}" if kind == "coordinate" else binding.name
            while name in taken:
                name += "_"
            taken.add(name)
        return msgspec.structs.replace(binding, name=name)

    segment = msgspec.structs.replace(
        s, inputs=tuple(map(named, s.inputs)), outputs=tuple(map(named, s.outputs)), name=""
    )
    return replace(part, segment=segment)


def _put(built: Part, file: Path, *, keep: bool) -> None:
    """Let the engine be this file, too, or move it there."""
    assert built.engine is not None
    if keep:
        link_or_copy(built.engine, file)
    else:
        built.engine.replace(file)
        with suppress(OSError):  # of another export, which is not done
            built.engine.parent.rmdir()


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
