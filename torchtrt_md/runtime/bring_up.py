"""The one way up: a launch, parts and weights -> what runs them, for a bundle and for what was just built.

Each step is voted on by all ranks; no engine runs before all ranks' engines took their communicators.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import GraphModule

from torchtrt_md.graph.functional import copied
from torchtrt_md.launch import Launch, communicator
from torchtrt_md.launch.watchdog import named
from torchtrt_md.mesh import Mesh
from torchtrt_md.program import placeholders
from torchtrt_md.runtime.access import check_access
from torchtrt_md.runtime.engine import Engine, deserialize, runtime_cache, scratch_bytes, trt_runtime
from torchtrt_md.runtime.executor import Executor
from torchtrt_md.runtime.kernels import KernelCache, kernel_file
from torchtrt_md.runtime.memory import MemoryLayout, check_room, lay_out
from torchtrt_md.runtime.offers import NOTHING, Offers, stream_weights
from torchtrt_md.runtime.order import overlapped
from torchtrt_md.runtime.push import Shared
from torchtrt_md.runtime.steps import Key, Step, Values, call_step, eager_steps, engine_step, source_key, to_device
from torchtrt_md.runtime.two_steps import sum_in_two
from torchtrt_md.runtime.weights import Stored, WeightOf, laid_out
from torchtrt_md.segment import Part, Segment, Wire
from torchtrt_md.verification.compiled import Operands, check_compiled
from torchtrt_md.verification.operands import draw, limit

log = logging.getLogger(__name__)
_LARGER = 64.0  # times what is drawn: beyond what it is compared with, or quantized by


@dataclass
class Known:
    """What is done once for all programs of one model that are brought up one after another, as where it is tuned.

    Attributes:
        compiled: what Inductor made of graphs, by their digests.
        checked: the digests of graphs whose engines were compared with them.
        seconds: what compiling and comparing took.
    """

    compiled: dict[str, Callable[..., Sequence[Tensor]]] = field(default_factory=dict)
    checked: set[str] = field(default_factory=set)
    seconds: float = 0.0

    @contextmanager
    def working(self) -> Iterator[None]:
        """Count the seconds of this."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - start


def bring_up(
    launch: Launch,
    mesh: Mesh,
    parts: Sequence[Part],
    weight_of: WeightOf,
    outputs: Sequence[Wire],
    *,
    self_tests: Sequence[Part],
    target: str,
    transport: str = "nccl",
    overlap: bool = True,
    stored: Stored | None = None,
    offers: Offers = NOTHING,
    known: Known | None = None,
) -> Executor:
    """What runs this rank's parts.  Collective.

    Args:
        parts: in order, their engines built.
        weight_of: gives this rank's part of a weight that a segment reads, on any device.
        stored: is told of weights that lie on the device in another layout; see :func:`laid_out`.
        outputs: what a call returns: of the program, or what a part writes.
        self_tests: of all engines of the program, the same on all ranks.
        target: what the engines were built for.
        transport: what does the exchanges between segments; see :class:`~torchtrt_md.options.Options`.
        overlap: run collectives of PyTorch on a stream of their own.
        offers: what is asked of TensorRT.
        known: of programs that were brought up before.

    Raises:
        MDError: on every rank, naming the ranks that failed.
    """
    if transport == "store":
        check_access(launch, mesh)
    groups = launch.connect(mesh)
    check_communication(launch, mesh, groups, self_tests, target)
    loaded = launch.together("loading the engines", lambda: _load_engines(parts, launch.device, target, offers))
    kernels = launch.together("the engines' kernels", lambda: _kernels(loaded, launch.device, offers))
    engines = launch.together(
        "making the engines' contexts", lambda: _make_engines(parts, loaded, launch.device, kernels)
    )
    _return_freed_memory()
    meet_to_bind(launch, "the communicators", engines, groups)
    steps, fixed = launch.together(
        "assembling the program",
        lambda: assemble(
            parts,
            engines,
            mesh=mesh,
            rank=launch.rank,
            groups=groups,
            device=launch.device,
            weights=laid_out([part.segment for part in parts], weight_of, launch.device, stored),
            known=known or Known(),
            store=transport == "store",
        ),
    )
    if overlap:
        steps = overlapped(steps)

    def share(axis: str, size: int) -> Shared:
        return Shared(size, groups[axis], launch.device)

    make = partial(Executor, steps, fixed=fixed, outputs=outputs, device=launch.device, overlap=overlap)
    save = kernels.save if kernels is not None else None
    shares, layout = None, lay_out(steps, outputs, push=transport == "store")
    if transport == "store" and _agree_where_to_store(launch, steps, layout):
        shares = share
    elif transport == "store":
        layout = lay_out(steps, outputs)
    launch.together("the memory of the program", lambda: check_room(layout, launch.device))
    return launch.meet("the memory of the program", lambda: make(share=shares, after_first=save, layout=layout))


def _agree_where_to_store(launch: Launch, steps: Sequence[Step], layout: MemoryLayout) -> bool:
    """Does each collective land in the same place on all ranks?  Where graphs differ it may not; NCCL does them then.

    A rank stores into the memory of the others at offsets of its own layout.
    """
    lands = []
    for step in steps:
        if step.communicates:
            slot = step.landing
            lands.append((step.axis, slot and (layout.shared_of.get(slot.name), slot.bytes)))
    told = repr((lands, sorted(layout.shared.items())))
    alike = len(set(launch.agreement.gather(told, "where collectives land"))) == 1
    if not alike:
        log.info("rank %d: the ranks' programs differ, so NCCL does their collectives", launch.rank)
    return alike


def _load_engines(
    parts: Sequence[Part], device: torch.device, target: str, offers: Offers = NOTHING
) -> dict[Path, Any]:
    """TensorRT's engines by their files, each loaded once."""
    files = dict.fromkeys(part.engine for part in parts if part.engine is not None)
    offers.check(len(files))
    if not files:
        return {}
    runtime, _ = trt_runtime(device)
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    built_for = f"{target} (this GPU: {torch.cuda.get_device_name(device)}, {capability})"
    with torch.cuda.device(device):
        engines = {file: deserialize(runtime, file, built_for) for file in files}
        for file, loaded in engines.items():
            stream_weights(loaded, offers.weight_budget, f"the engine {file.name}")
        return engines


def _kernels(engines: Mapping[Path, Any], device: torch.device, offers: Offers) -> KernelCache | None:
    """The kernels that were compiled for these engines before, where they are kept."""
    if offers.kernel_cache is None:
        return None
    from torchtrt_md.build.flavour import flavour

    gpu = f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"
    file = kernel_file(offers.kernel_cache, engines, flavour().version, gpu)
    with torch.cuda.device(device):
        return KernelCache(runtime_cache(next(iter(engines.values()))), file)


def _make_engines(
    parts: Sequence[Part], loaded: Mapping[Path, Any], device: torch.device, kernels: KernelCache | None = None
) -> dict[int, Engine]:
    """Contexts for the engines among these parts, by their place; several share the memory of their activations.

    Raises:
        LaunchError: no memory for them.
    """
    engines = {i: loaded[part.engine] for i, part in enumerate(parts) if part.engine is not None}
    scratch, cache = None, None if kernels is None else kernels.cache
    if len(engines) > 1:  # they run one after another
        size = max(map(scratch_bytes, engines.values()))
        scratch = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
        cache = runtime_cache(next(iter(engines.values()))) if cache is None else cache
    keep = trt_runtime(device) if engines else None
    return {
        i: Engine(parts[i].segment, engine, named(parts[i].segment, i), keep, scratch, cache)
        for i, engine in engines.items()
    }


def _return_freed_memory() -> None:
    """Give the host what was freed while engines were loaded.

    TensorRT-RTX compiles kernels when a context is made, and glibc keeps what that freed: 1.4 of 2.4 GiB of a process
    with a small FLUX (benchmarks/results/2026-11-21-memory-of-loads-h200-x2.md).
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def meet_to_bind(
    launch: Launch, what: str, engines: Mapping[int, Engine], groups: Mapping[str, dist.ProcessGroup]
) -> None:
    """Bind on all ranks together, once every GPU has memory for it.  Collective.

    Raises:
        CommunicatorError: on every rank that is left.
    """

    def check() -> None:
        if any(engine.segment.axis is not None for engine in engines.values()):
            communicator.check_memory(launch.device)

    launch.together(f"the memory for {what}", check)
    launch.meet(f"binding {what}", lambda: bind_engines(engines, groups, launch.device))


def bind_engines(engines: Mapping[int, Engine], groups: Mapping[str, dist.ProcessGroup], device: torch.device) -> None:
    """Give every engine that communicates its communicator.

    Raises:
        CommunicatorError: one refuses it.
    """
    for engine in engines.values():
        axis = engine.segment.axis
        if axis is not None:
            engine.communicator = communicator.bind(engine.context, groups[axis], device, engine=engine.name, axis=axis)


def check_communication(
    launch: Launch, mesh: Mesh, groups: Mapping[str, dist.ProcessGroup], tests: Sequence[Part], target: str
) -> None:
    """See that engines communicate along the axes as they must, before one of the program's does.  Collective.

    What passed once in a launch is not run again.

    Raises:
        MDError: on every rank: a self-test cannot be run, or its result is wrong.
    """
    from torchtrt_md.runtime.selftest import run_self_test

    tests = [test for test in tests if (mesh, test.segment.name, target) not in launch.tested]
    if not tests:
        return
    device = launch.device
    loaded = launch.together("loading the self-tests", lambda: _load_engines(tests, device, target))
    engines = launch.together("making the self-tests' contexts", lambda: _make_engines(tests, loaded, device))
    meet_to_bind(launch, "the self-tests' communicators", engines, groups)
    for test, engine in zip(tests, engines.values(), strict=True):
        assert test.segment.axis is not None
        run_self_test(engine, groups[test.segment.axis], launch)
        launch.tested.add((mesh, test.segment.name, target))


def assemble(
    parts: Sequence[Part],
    engines: Mapping[int, Engine],
    *,
    mesh: Mesh,
    rank: int,
    groups: Mapping[str, dist.ProcessGroup],
    device: torch.device,
    weights: Mapping[Key, Tensor],
    known: Known,
    store: bool = False,
) -> tuple[list[Step], dict[Key, Tensor]]:
    """The steps of these parts, and what is the same in every call: weights and coordinates.

    Args:
        engines: of the parts that are engines, by their place, bound to their communicators.
        groups: axis -> this rank's group along it.
        weights: as segments read them, of :func:`laid_out`.
        store: ranks are to store into each other's memory.
    """
    coordinates = {axis: mesh.coordinate(rank, axis) for axis in mesh.names}
    fixed: dict[Key, Tensor] = {**weights}
    for axis, at in coordinates.items():
        fixed[Wire("coordinate", axis)] = torch.tensor([at], dtype=torch.int32, device=device)
    steps: list[Step] = []
    for index, part in enumerate(parts):
        name = named(part.segment, index)
        examples, larger = (partial(_examples, part, fixed, device, factor) for factor in (1.0, _LARGER))
        if index in engines:
            steps.append(engine_step(part.segment, engines[index]))
            if part.graph is not None and part.segment.axis is None and part.digest not in known.checked:
                with known.working():
                    _check_engine(name, part.segment, part.graph, steps[-1], examples, larger, device)
                known.checked.add(part.digest)
            continue
        assert part.graph is not None, f"{name} has nothing that runs it"
        if part.runs == "inductor":
            if part.digest not in known.compiled:
                from torchtrt_md.runtime.inductor import compile_graph

                with known.working():
                    known.compiled[part.digest] = compile_graph(name, part.graph, examples, device, larger=larger)
            steps.append(call_step(part.segment, known.compiled[part.digest]))
        else:
            graph = copied(part.graph)
            if store:
                sum_in_two(graph)
            steps += eager_steps(
                part.segment, graph, groups=groups, coordinates=coordinates, device=device, index=index
            )
    return steps, fixed


def _examples(
    part: Part, fixed: Mapping[Key, Tensor], device: torch.device, factor: float, number: int
) -> list[Tensor]:
    """Operands for a part with a graph: weights as they are, all else drawn, otherwise for another number.

    Floating ones that are drawn are multiplied by ``factor``.
    """
    assert part.graph is not None
    found = []
    for place, (node, b) in enumerate(zip(placeholders(part.graph), part.segment.inputs, strict=True)):
        held = fixed.get(source_key(b))
        if held is None:
            held = draw(b.shape, b.dtype, device, 1000 * number + place, limit(node))
            held = held * factor if b.dtype.is_floating_point and b.dtype.itemsize > 1 else held
        found.append(held)
    return found


def _check_engine(
    name: str,
    segment: Segment,
    graph: GraphModule,
    step: Step,
    examples: Operands,
    larger: Operands,
    device: torch.device,
) -> None:
    """Compare an engine without collectives with the graph that it was built of.

    Raises:
        VerificationError: it computes something else.
    """
    graph = copied(graph)
    to_device(graph, device)

    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(*operands: Tensor) -> list[Tensor]:
        values: Values = dict(zip(map(source_key, segment.inputs), operands, strict=True))
        values |= {s.name: torch.empty(s.shape, dtype=s.dtype, device=device) for s in step.slots}
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # not the default one, on which TensorRT adds synchronizations
            step.run(values)
        stream.synchronize()
        return [values[slot.name] for slot in step.slots]

    check_compiled(name, graph, run, examples, by="TensorRT", larger=larger)
