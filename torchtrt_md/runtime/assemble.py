"""From segments and what runs them to an :class:`Executor`: the same for a bundle and for a program just compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import GraphModule

from torchtrt_md.bundle.manifest import Segment
from torchtrt_md.graph.functional import copied
from torchtrt_md.mesh import Mesh
from torchtrt_md.runtime import communicator
from torchtrt_md.runtime.agree import Agreement
from torchtrt_md.runtime.engine import Engine, runtime_cache, scratch_bytes
from torchtrt_md.runtime.executor import Executor
from torchtrt_md.runtime.push import Shared
from torchtrt_md.runtime.signature import prepared
from torchtrt_md.runtime.steps import Step, call_step, eager_steps, engine_step
from torchtrt_md.runtime.tensors import dtype_of
from torchtrt_md.runtime.watchdog import Watchdog, describe

_RING = "ring_attention"  # in schedules: a ring that is one layer of an engine
_RING_SHAPE = (128, 8, 8, 256)  # head_dim, heads, key/value heads and tokens of each rank, in the self-test


@dataclass(frozen=True)
class Loaded:
    """A segment and what runs it.

    ``what`` is TensorRT's engine, or the graph that is compiled or run op by op.  ``text`` is equal where the graph is,
    "" where that is not known; equal graphs are compiled once.
    """

    segment: Segment
    what: Any
    text: str = ""


def make_engines(loaded: Sequence[Loaded], device: torch.device, keep: object) -> dict[int, Engine]:
    """Contexts for the engines among these, by their place; several share the memory of their activations.

    Raises:
        LaunchError: no memory for them.
    """
    engines = {i: item for i, item in enumerate(loaded) if item.segment.runs == "engine"}
    scratch = cache = None
    if len(engines) > 1:  # they run one after another
        size = max(scratch_bytes(item.what) for item in engines.values())
        scratch = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
        cache = runtime_cache(next(iter(engines.values())).what)
    return {
        i: Engine(item.segment, item.what, _name(item.segment, i), keep, scratch, cache) for i, item in engines.items()
    }


def bind_engines(engines: Mapping[int, Engine], groups: Mapping[str, dist.ProcessGroup], device: torch.device) -> None:
    """Give every engine that communicates its communicator.

    Raises:
        CommunicatorError: one refuses it.
    """
    for engine in engines.values():
        axis = engine.segment.axis
        if axis is not None:
            engine.communicator = communicator.bind(engine.context, groups[axis], device, engine=engine.name, axis=axis)


def test_rings(
    segments: Sequence[Segment],
    *,
    agreement: Agreement,
    groups: Mapping[str, dist.ProcessGroup],
    device: torch.device,
    watchdog: Watchdog,
    target: str,
) -> None:
    """Where an engine has ring attention in it, see on a small one that these GPUs compute it right.  Collective.

    Raises:
        MDError: on every rank: they do not.
    """
    from torchtrt_md.runtime.selftest import check_ring

    rings = {(c.axis, c.ranks, c.dtype) for s in segments if s.runs == "engine" for c in s.collectives if c.op == _RING}
    for axis, size, dtype in sorted(rings):
        check_ring(
            axis,
            size,
            dtype_of(dtype),
            *_RING_SHAPE,
            group=groups[axis],
            device=device,
            agreement=agreement,
            watchdog=watchdog,
            target=target,
        )


def axes_of(segments: Sequence[Segment], mesh: Mesh) -> list[str]:
    """The axes that these communicate on, in mesh order."""
    used = {c.axis for segment in segments for c in segment.collectives}
    return [axis for axis in mesh.names if axis in used]


def waits_for(segments: Sequence[Segment], mesh: Mesh, rank: int) -> str:
    """What a call may be waiting in, for the watchdog."""
    lines = []
    for index, segment in enumerate(segments):
        axes = dict.fromkeys(c.axis for c in segment.collectives)
        for axis in axes or ([None] if len(segments) == 1 else []):
            mine = [c for c in segment.collectives if c.axis == axis]
            ranks = () if axis is None else mesh.ranks(axis, rank)
            lines.append(describe(_name(segment, index), axis, ranks, mine))
    return "\n".join(lines) or "a program without collectives: its GPU hangs, or works for others"


def assemble(
    loaded: Sequence[Loaded],
    engines: Mapping[int, Engine],
    *,
    mesh: Mesh,
    rank: int,
    groups: Mapping[str, dist.ProcessGroup],
    device: torch.device,
    weights: Mapping[str, Tensor],
    outputs: Sequence[str],
    overlap: bool = True,
    transport: str = "nccl",
    progress: Callable[[str], None] = lambda message: None,
) -> Executor:
    """The executor of these segments.

    Args:
        engines: of :func:`make_engines`, bound.
        groups: axis -> this rank's group along it.
        weights: this rank's part of each weight that a segment reads, on ``device``.
        outputs: what a call returns: ``output:NAME``, or what a step writes.
        overlap: run collectives of PyTorch on a stream of their own.
        transport: what does the exchanges among them: ``nccl``, or the GPUs' ``copy`` engines, which is collective.
        progress: called with a line for each graph that is compiled.
    """
    coordinates = {axis: mesh.coordinate(rank, axis) for axis in mesh.names}
    fixed = fixed_values([item.segment for item in loaded], weights, coordinates, device)
    steps: list[Step] = []
    compiled: dict[str, Callable[..., Sequence[Tensor]]] = {}
    for index, item in enumerate(loaded):
        if item.segment.runs == "engine":
            steps.append(engine_step(item.segment, engines[index]))
        elif item.segment.runs == "inductor":
            text = item.text or f"segment {index}"
            if text not in compiled:
                progress(f"compiling {_name(item.segment, index)} with Inductor")
                compiled[text] = _compiled(item.segment, item.what, fixed, device)
            steps.append(call_step(item.segment, compiled[text]))
        else:
            steps += eager_steps(
                item.segment, copied(item.what), groups=groups, coordinates=coordinates, device=device, index=index
            )
    return Executor(
        steps,
        fixed=fixed,
        outputs=outputs,
        device=device,
        overlap=overlap,
        share=(lambda axis, size: Shared(size, groups[axis], device)) if transport == "copy" else None,
    )


def fixed_values(
    segments: Sequence[Segment], weights: Mapping[str, Tensor], coordinates: Mapping[str, int], device: torch.device
) -> dict[str, Tensor]:
    """What is the same in every call: coordinates, and weights laid out as segments take them."""
    fixed = {
        f"coordinate:{axis}": torch.tensor([at], dtype=torch.int32, device=device) for axis, at in coordinates.items()
    }
    for segment in segments:
        for b in segment.inputs:
            if not b.source.startswith("weight:"):
                continue
            weight = weights[b.source.removeprefix("weight:")]
            key = f"{b.source} transposed" if b.transposed else b.source
            if key not in fixed:
                fixed[key] = prepared(weight.t() if b.transposed else weight)
    return fixed


def _compiled(
    segment: Segment, graph: GraphModule, fixed: Mapping[str, Tensor], device: torch.device
) -> Callable[..., Sequence[Tensor]]:
    from torchtrt_md.runtime.inductor import compile_graph

    examples = [
        fixed[b.source] if b.source in fixed else torch.empty(tuple(b.shape), dtype=dtype_of(b.dtype), device=device)
        for b in segment.inputs
    ]
    return compile_graph(graph, examples, device)


def _name(segment: Segment, index: int) -> str:
    return f"segment {index} ({segment.name or segment.file})"
