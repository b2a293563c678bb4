"""Functions over split inputs for the tests: traced, analyzed, and run on all ranks in lockstep."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from torchtrt_md.lowering import sequence
from torchtrt_md.lowering.ops import bound_args, seen_by
from torchtrt_md.lowering.passes import PassContext
from torchtrt_md.lowering.sharding import Sharded
from torchtrt_md.mesh import Mesh

md = torch.ops.torchtrt_md
SIZE = 2


def trace(function: Callable[..., Any], *tensors: Tensor, pre_dispatch: bool = False) -> GraphModule:
    return make_fx(function, tracing_mode="fake", record_stack_traces=True, pre_dispatch=pre_dispatch)(*tensors)


def analyze(graph: GraphModule, mesh: Mesh | None = None, strategy: str = "ulysses") -> int:
    """Run the pass with every axis of the mesh (``cp=2`` by default) context-parallel."""
    mesh = mesh or Mesh(cp=SIZE)
    count = sequence.run(graph, PassContext(mesh, dict.fromkeys(mesh.names, strategy), {}))
    graph.graph.lint()
    return count


def shard(x: Tensor, dim: int = 1, axis: str = "cp") -> Tensor:
    result: Tensor = md.split_sequence(x, dim, axis, SIZE)
    return result


def gather(x: Tensor, dim: int = 1, axis: str = "cp") -> Tensor:
    result: Tensor = md.gather_sequence(x, dim, axis, SIZE)
    return result


def returned(graph: GraphModule) -> list[Node]:
    (output,) = graph.graph.find_nodes(op="output")
    return [output.args[0]] if isinstance(output.args[0], Node) else list(output.args[0])


def targets(graph: GraphModule) -> list[str]:
    """Names of the IR's ops in the graph, in order."""
    return [
        n.target.__name__.split(".")[0]
        for n in graph.graph.nodes
        if getattr(n.target, "namespace", "") == "torchtrt_md"
    ]


def run_ranks(graph: GraphModule, tensors: Sequence[Tensor], size: int = SIZE) -> list[list[Tensor]]:
    """For each output of the graph, what each rank has."""
    env: dict[Node, list[Any]] = {}
    inputs = iter(tensors)
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            env[node] = [next(inputs)] * size
        elif node.op == "get_attr":
            env[node] = [getattr(graph, node.target)] * size
        elif node.op == "call_function" and getattr(node.target, "namespace", "") == "torchtrt_md":
            ranks = [map_arg(bound_args(node), _of_rank(env, r)) for r in range(size)]
            env[node] = _IR[node.target.__name__.split(".")[0]](ranks)
        elif node.op == "call_function":
            calls = [map_arg((node.args, node.kwargs), _of_rank(env, r)) for r in range(size)]
            env[node] = [node.target(*args, **kwargs) for args, kwargs in calls]
    return [env[node] for node in returned(graph)]


def _of_rank(env: dict[Node, list[Any]], rank: int) -> Callable[[Node], Any]:
    return lambda node: env[node][rank]


def _shard(ranks: list[dict[str, Any]]) -> list[Tensor]:
    return [args["x"].chunk(args["size"], args["dim"])[r].contiguous() for r, args in enumerate(ranks)]


def _all_gather(ranks: list[dict[str, Any]]) -> list[Tensor]:
    return [torch.cat([args["x"] for args in ranks], ranks[0]["dim"])] * len(ranks)


def _attention(ranks: list[dict[str, Any]]) -> list[Tensor]:
    return [md.attention(**args) for args in ranks]


def _fake_quantize(ranks: list[dict[str, Any]]) -> list[Tensor]:
    return [md.fake_quantize(**args) for args in ranks]


def _context_attention(ranks: list[dict[str, Any]]) -> list[Tensor]:
    k, v = (torch.cat([args[name] for args in ranks], 2) for name in ("k", "v"))
    masks = [
        seen_by(args["q"], k, args["is_causal"], args["mask"], args["lengths"], r, len(ranks))
        for r, args in enumerate(ranks)
    ]
    return [
        md.attention(args["q"], k, v, mask, False, args["scale"], args["enable_gqa"])
        for args, mask in zip(ranks, masks, strict=True)
    ]


_IR: dict[str, Callable[[list[dict[str, Any]]], list[Tensor]]] = {
    "shard": _shard,
    "all_gather": _all_gather,
    "attention": _attention,
    "context_attention": _context_attention,
    "fake_quantize": _fake_quantize,
}


def part(whole: Tensor, state: Sharded, rank: int, size: int = SIZE) -> Tensor:
    """What a rank holds of the whole, by the definition of ``Sharded``."""
    shape, dim = whole.shape, state.dim
    parts = state.parts(size)
    split = whole.reshape(*shape[:dim], state.outer, sum(p.total for p in parts), state.inner, *shape[dim + 1 :])
    mine = []
    for held, piece in zip(parts, torch.split(split, [p.total for p in parts], dim + 1), strict=True):
        positions = torch.arange(held.held) + (0 if held.is_whole else rank * held.held)
        mine.append(piece.index_select(dim + 1, positions.clamp(max=held.total - 1)))  # the last is repeated
    return torch.cat(mine, dim + 1).flatten(dim, dim + 2)


def check_claims(graph: GraphModule, tensors: Sequence[Tensor], whole: Sequence[Tensor]) -> list[Sharded | None]:
    """Every rank's outputs are the parts of the whole that the analysis says; these claims."""
    claims = [node.meta["sharding"].get("cp") for node in returned(graph)]
    for claim, results, expected in zip(claims, run_ranks(graph, tensors), whole, strict=True):
        for rank, result in enumerate(results):
            torch.testing.assert_close(result, part(expected, claim, rank) if claim else expected)
    return claims
