"""Small graphs for the tests of passes and of the simulator: traced, rewritten, and run on all ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from torchtrt_md.capture.torch_private import fake_ranks
from torchtrt_md.lowering import rank_input
from torchtrt_md.lowering.ops import bound_args, is_collective
from torchtrt_md.lowering.passes import Pass, PassContext, run_passes
from torchtrt_md.mesh import Mesh
from torchtrt_md.program import Coordinate, ShardedProgram, Sharding, Source, Weight, Weights, placeholders
from torchtrt_md.verification.simulate import EXACT, Precision, simulate

Input: TypeAlias = "Tensor | Sequence[Tensor]"
"""What a placeholder gets: the same on every rank, or a tensor for each rank."""
Results: TypeAlias = "list[tuple[Tensor, ...]]"
"""For each rank, its outputs."""


def trace(function: Callable[..., Any], *examples: Tensor) -> GraphModule:
    """The graph of a function of tensors, which returns a tensor or several."""

    def flat(*args: Tensor) -> list[Any]:
        return pytree.tree_leaves(function(*args))

    traced = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True, record_stack_traces=True)
    return traced(*examples)


@contextmanager
def fake_launch(mesh: Mesh) -> Iterator[DeviceMesh]:
    """The mesh over a process group that moves nothing: enough to trace DTensors and functional collectives."""
    with fake_ranks(mesh.size):
        yield mesh.to_device_mesh("cpu")


def groups_of(device_mesh: DeviceMesh) -> dict[str, str]:
    names = device_mesh.mesh_dim_names or ()
    return {device_mesh.get_group(name).group_name: name for name in names}


def rewrite(
    run: Pass,
    graph: GraphModule,
    mesh: Mesh,
    groups: Mapping[str, str] | None = None,
    strategies: Mapping[str, str] | None = None,
) -> int:
    """Run one pass as ``lower`` would; its number of rewrites."""
    return run_passes({"it": run}, graph, PassContext(mesh, strategies or {}, groups or {}))["it"]


def check(run: Pass, graph: GraphModule, mesh: Mesh, *inputs: Input, exact: bool = True) -> int:
    """Rewrite the graph; every rank computes what it did before, to the bit where data only moves."""
    before = run_ranks(graph, mesh, *inputs)
    count = rewrite(run, graph, mesh)
    assert_same(run_ranks(graph, mesh, *inputs), before, exact=exact)
    return count


def program(graphs: GraphModule | Sequence[GraphModule], mesh: Mesh, *inputs: Input) -> ShardedProgram:
    """A lowered program, with the inputs as its weights; one graph for all ranks, or a graph for each."""
    each = (graphs,) * mesh.size if isinstance(graphs, GraphModule) else tuple(graphs)
    by_rank = tuple(Sharding(0, axis) for axis in mesh.names)
    sources: dict[str, Source] = {}
    whole: dict[str, Tensor] = {}
    given = iter(inputs)
    for name in (node.name for node in placeholders(each[0])):
        if name.startswith(rank_input.PREFIX):
            sources[name] = Coordinate(name.removeprefix(rank_input.PREFIX))
            continue
        value = next(given)
        whole[name] = value if isinstance(value, Tensor) else torch.cat(list(value))
        shape, dtype = tuple(whole[name].shape), whole[name].dtype
        sources[name] = Weight(name, shape, dtype, () if isinstance(value, Tensor) else by_rank)
    assert next(given, None) is None, "more inputs than placeholders"
    return ShardedProgram(
        mesh=mesh,
        graphs=each,
        sources=sources,
        outputs=(),
        weights=Weights(whole),
        constants={},
        strategies={},
        groups={},
        out_spec=pytree.tree_structure(()),
        out_leaves=(),
        lowered=True,
    )


def run_ranks(graph: GraphModule, mesh: Mesh, *inputs: Input, precision: Precision = EXACT) -> Results:
    """Every rank's outputs of the graph, which may have ``shard`` still; the graph stays as it is."""
    graph = copy.deepcopy(graph)
    rewrite(rank_input.run, graph, mesh)
    return simulate(program(graph, mesh, *inputs), {}, precision=precision)


def assert_same(results: Results, expected: Sequence[tuple[Tensor, ...]], *, exact: bool = True) -> None:
    """Equal shapes, dtypes and values on all ranks; to rounding where not exact."""
    tolerance = 0.0 if exact else 1e-12
    for rank, (got, want) in enumerate(zip(results, expected, strict=True)):
        for number, (a, b) in enumerate(zip(got, want, strict=True)):
            torch.testing.assert_close(
                a,
                b,
                rtol=tolerance,
                atol=tolerance,
                equal_nan=True,
                msg=lambda text, where=f"output {number} of rank {rank}": f"{where}: {text}",  # type: ignore[misc]
            )


def ops(graph: GraphModule) -> list[str]:
    """The ops of the graph in order, as ``namespace.name``."""
    names = []
    for node in graph.graph.nodes:
        if node.op == "call_function":
            target = node.target
            overload = isinstance(target, torch._ops.OpOverload)
            names.append(str(target).rpartition(".")[0] if overload else target.__name__)
    return names


def collectives(graph: GraphModule) -> list[tuple[object, ...]]:
    """The collectives in order: name, and all arguments but the operand; none for what they send if it is that."""
    found: list[tuple[object, ...]] = []
    for node in graph.graph.nodes:
        if is_collective(node):
            args = bound_args(node)
            args.pop("x")
            if not args.get("exchange_dtype"):
                args.pop("exchange_dtype", None)
            found.append((str(node.target).split(".")[1], *args.values()))
    return found


def per_rank(mesh: Mesh, *shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Another tensor for each rank."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) * 10 for _ in range(mesh.size)]
    return [t > 0 if dtype is torch.bool else t.to(dtype) for t in tensors]


def group_of(mesh: Mesh, axis: str, rank: int, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of the ranks of a rank's group, in order."""
    return [tensors[member] for member in mesh.ranks(axis, rank)]


def attended(
    mesh: Mesh, axis: str, q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], is_causal: bool
) -> Results:
    """Dense attention over the sequence whose parts the ranks of each group have; each rank's part of it."""
    results: Results = []
    for rank in range(mesh.size):
        whole_q, whole_k, whole_v = (torch.cat(group_of(mesh, axis, rank, x), 2) for x in (q, k, v))
        dense = F.scaled_dot_product_attention(whole_q, whole_k, whole_v, is_causal=is_causal, enable_gqa=True)
        results.append((dense.chunk(mesh.axis_size(axis), 2)[mesh.coordinate(rank, axis)],))
    return results
