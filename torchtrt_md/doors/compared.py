"""A graph of Dynamo's beside what was lowered of it, both run in PyTorch over the ranks of the launch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.fx import GraphModule, Interpreter
from torch.utils._python_dispatch import TorchDispatchMode

from torchtrt_md.capture.async_private import arrived
from torchtrt_md.capture.dynamo import GraphInput, Specialized
from torchtrt_md.capture.dynamo_private import local_tensor
from torchtrt_md.errors import VerificationError
from torchtrt_md.launch import communicator
from torchtrt_md.lowering import uninitialized
from torchtrt_md.lowering.ops import use_device_mesh
from torchtrt_md.program import Coordinate, ShardedProgram, Weight, placeholders, value_of
from torchtrt_md.verification.compare import relative_error

# Two runs of the same ops in the same dtype: what differs is the order of sums.
_TOLERANCE = 1e-5
_ROUNDINGS = 4


def run_graph(gm: GraphModule, inputs: Sequence[GraphInput]) -> list[Any]:
    """What Dynamo's graph gives in PyTorch, over the ranks of the launch where it communicates."""
    with _Initialized():  # type: ignore[no-untyped-call]
        return list(Specialized(gm).run(*(i.example for i in inputs)))


class _Initialized(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Memory is zero before it is written, as in a lowered graph; a graph may return it unwritten at a graph break."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.zero_() if func in uninitialized.FILLED else result


def compare_ranks(
    program: ShardedProgram,
    expected: Sequence[Tensor],
    inputs: Sequence[GraphInput],
    device_mesh: DeviceMesh | None,
) -> None:
    """Run the lowered program in PyTorch too, over the ranks of the launch.

    Raises:
        VerificationError: the outputs differ by more than rounding.
    """
    limit = limit_of(program)
    given = {i.name: arrived(local_tensor(i.example)) for i in inputs if i.kind == "value"}
    produced = run_rank(program, given, device_mesh)
    for value, ours, theirs in zip(program.outputs, produced, expected, strict=True):
        if not is_close(ours, theirs, limit):
            raise VerificationError(
                f"{value.name} of the lowered graph is not what the graph returns, by more than rounding",
                fix="report it, with the model",
            )


def run_rank(program: ShardedProgram, inputs: Mapping[str, Tensor], device_mesh: DeviceMesh | None) -> list[Tensor]:
    """This rank's lowered graph in PyTorch, over the process group of the launch."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    graph = program.graphs[rank]
    device = next((t.device for t in (*inputs.values(), *program.weights.shards.values())), torch.device("cpu"))
    flat: list[Tensor] = []
    for node in placeholders(graph):
        source = program.sources[node.name]
        if isinstance(source, Weight):
            flat.append(program.weights.local(source, program.mesh, rank))
        elif isinstance(source, Coordinate):
            flat.append(torch.tensor([program.mesh.coordinate(rank, source.axis)], dtype=torch.int32, device=device))
        else:
            given = inputs[source.name]
            # As a runner gives it, where that is how it was captured.
            flat.append(given.contiguous() if value_of(node).is_contiguous() else given)
    if device_mesh is None and not dist.is_initialized():
        return list(Interpreter(graph).run(*flat))
    with use_device_mesh(device_mesh or communicator.device_mesh(program.mesh, device.type)):
        return list(Interpreter(graph).run(*flat))


def limit_of(program: ShardedProgram) -> float:
    """How far two runs of the same ops may be apart, relative, which differ in the order of sums only."""
    values = [node.meta.get("val") for node in program.graphs[0].graph.nodes]
    dtypes = {v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()}
    return max([_TOLERANCE, *(_ROUNDINGS * torch.finfo(dtype).eps for dtype in dtypes)])


def is_close(a: Tensor, b: Tensor, limit: float) -> bool:
    """Equal up to ``limit`` in every part; what is not finite is equal in place and kind."""
    return relative_error(a, b) <= (limit if a.is_floating_point() or a.is_complex() else 0.0)
