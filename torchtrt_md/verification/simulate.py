"""Run the program of all ranks in one process, in lockstep: no process group, no GPU, deterministic.

Each rank's graph is interpreted until it reaches a collective; when all ranks of that group stand at the
same one, it is computed from all their operands.  Ranks that stand at different ones would hang on GPUs;
here that is an error that names both nodes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from torchtrt_md.errors import RankMismatchError, VerificationError
from torchtrt_md.graph.source import source_line
from torchtrt_md.lowering.float8_rows import rounded
from torchtrt_md.lowering.ops import bound_args, is_collective, seen_by
from torchtrt_md.mesh import Mesh
from torchtrt_md.program import Coordinate, ShardedProgram, Value, Weight, Weights, dtype_name, placeholders

md = torch.ops.torchtrt_md


@dataclass(frozen=True)
class Precision:
    """Compute in ``wide`` wherever the program says some floating dtype, and in complex numbers of it likewise.

    All of them, not the model's own alone: where a model mixes dtypes, by casts or by promotion, the narrow ones would
    round and those that were widened would meet them in ops that take one dtype.  Plain numbers stay what they were
    when the model was traced: an eps or a ``torch.finfo(x.dtype).min`` is that of the model's own dtype.  What
    is held in float8 is rounded to it, and held in ``wide``: that is the grid to which a model is quantized.

    Attributes:
        wide: None for the program as it is.
        float8_exchanges: round what is sent in float8 (:mod:`torchtrt_md.lowering.float8_rows`), where ``wide`` is
            None.
        jitter: change this share of the elements of each weight and input by one rounding, at random: what that changes
            of a result is what rounding may change.
    """

    wide: torch.dtype | None
    jitter: float = 0.0
    float8_exchanges: bool = True

    def of(self, x: Any) -> Any:
        """A tensor or dtype in the precision that is computed in; all else as it is."""
        if self.wide is None or not isinstance(x, (Tensor, torch.dtype)):
            return x
        if isinstance(x, Tensor):
            dtype = self.of(x.dtype)
            return x if x.dtype == dtype else x.to(dtype)
        return self.wide if x.is_floating_point else self.wide.to_complex() if x.is_complex else x

    def results(self, results: Any) -> Any:
        """What an op returns: some make their result in PyTorch's default dtype, as a quotient of integers."""
        if self.wide is None or isinstance(results, Tensor):
            return self.of(results)
        return pytree.tree_map(self.of, results)

    def given(self, x: Tensor, name: str) -> Tensor:
        """A weight or an input, laid out as it is when the program runs."""
        x = self.of(x.contiguous().resolve_conj().resolve_neg())
        if not self.jitter or x.dtype.itemsize == 1 or not (x.is_floating_point() or x.is_complex()):
            return x  # float8 has no arithmetic
        generator = torch.Generator(x.device).manual_seed(zlib.crc32(name.encode()))
        drawn = torch.randint(
            0, round(2 / self.jitter), x.shape, generator=generator, dtype=torch.int8, device=x.device
        )
        signs = (drawn == 0).to(torch.int8) - (drawn == 1).to(torch.int8)
        return (x + x * signs * torch.finfo(x.dtype).eps).to(x.dtype)


EXACT = Precision(None)


@dataclass(frozen=True)
class Request:
    """A rank stands at a collective."""

    node: Node
    args: Mapping[str, Any]

    @property
    def operands(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.args.items() if isinstance(value, Tensor)}

    @property
    def rest(self) -> dict[str, Any]:
        """The arguments that are not tensors."""
        return {name: value for name, value in self.args.items() if not isinstance(value, Tensor)}

    def signature(self) -> tuple[Any, ...]:
        operands = tuple((name, tuple(x.shape), x.dtype) for name, x in self.operands.items())
        return (str(self.node.target), operands, tuple(self.rest.items()))

    def __str__(self) -> str:
        at = source_line(self.node)
        operands = [f"{dtype_name(x.dtype)}{list(x.shape)}" for x in self.operands.values()]
        arguments = ", ".join([*operands, *(f"{n}={v}" for n, v in self.rest.items() if v is not None)])
        return f"{self.node.name} = {self.node.target}({arguments})" + (f" at {at}" if at else "")


Rank: TypeAlias = Generator[Request, Tensor, tuple[Tensor, ...]]


def simulate(
    program: ShardedProgram,
    inputs: Mapping[str, Tensor],
    *,
    weights: Weights | None = None,
    precision: Precision = EXACT,
) -> list[tuple[Tensor, ...]]:
    """The outputs of every rank.

    Args:
        program: a lowered program.
        inputs: name of each of ``program.inputs`` -> the global tensor.
        weights: taken instead of the program's own.
        precision: compute more precisely than the program says, to tell its structure from its rounding.

    Raises:
        RankMismatchError: ranks reach different collectives.
        VerificationError: an op cannot be run.
    """
    assert program.lowered, "simulate takes a lowered program"
    ranks = {
        rank: _run(graph, _feed(program, inputs, weights or program.weights, rank, precision), precision)
        for rank, graph in enumerate(program.graphs)
    }
    waiting: dict[int, Request] = {}
    done: dict[int, tuple[Tensor, ...]] = {}
    for rank in ranks:
        _advance(rank, ranks, None, waiting, done)
    while waiting:
        group = _ready_group(program.mesh, waiting, done)
        results = _compute([waiting.pop(rank) for rank in group], precision)
        for rank, result in zip(group, results, strict=True):
            _advance(rank, ranks, result, waiting, done)
    return [done[rank] for rank in sorted(done)]


def interpret(
    program: ShardedProgram, inputs: Mapping[str, Tensor], *, weights: Weights, precision: Precision = EXACT
) -> tuple[Tensor, ...]:
    """The outputs of a program of one rank, as it was captured.

    Raises:
        VerificationError: an op cannot be run.
    """
    (graph,) = program.graphs
    return _alone(_run(graph, _feed(program, inputs, weights, 0, precision), precision))


def compute(graph: GraphModule, operands: Sequence[Tensor], precision: Precision = EXACT) -> tuple[Tensor, ...]:
    """The outputs of a graph without collectives.

    Args:
        graph: of a part; see :class:`torchtrt_md.segment.Part`.
        operands: for its placeholders, in order.

    Raises:
        VerificationError: an op cannot be run.
    """
    given = {node.name: operand for node, operand in zip(placeholders(graph), operands, strict=True)}
    return _alone(_run(graph, lambda name: precision.given(given[name], name), precision))


def _alone(rank: Rank) -> tuple[Tensor, ...]:
    done: dict[int, tuple[Tensor, ...]] = {}
    _advance(0, {0: rank}, None, {}, done)
    return done[0]


def _feed(
    program: ShardedProgram, inputs: Mapping[str, Tensor], weights: Weights, rank: int, precision: Precision
) -> Callable[[str], Tensor]:
    device = next((tensor.device for tensor in inputs.values()), torch.device("cpu"))

    def feed(placeholder: str) -> Tensor:
        source = program.sources[placeholder]
        if isinstance(source, Weight):
            tensor = weights.local(source, program.mesh, rank).to(device)  # what was read is on the CPU
        elif isinstance(source, Value):
            tensor = inputs[source.name]
        else:
            assert isinstance(source, Coordinate)
            return torch.tensor([program.mesh.coordinate(rank, source.axis)], dtype=torch.int32, device=device)
        return precision.given(tensor, source.name)

    return feed


def _run(graph: GraphModule, feed: Callable[[str], Tensor], precision: Precision) -> Rank:
    last_use = {operand: node for node in graph.graph.nodes for operand in node.all_input_nodes}
    env: dict[Node, Any] = {}

    def value(node: Node) -> Any:
        # Widened weights of all ranks at once would not fit either, so each is made when it is used.
        if node.op == "placeholder" and node not in env:
            env[node] = feed(node.name)
        return env[node]

    for node in graph.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "get_attr":
            env[node] = precision.of(getattr(graph, str(node.target)).detach())
        elif is_collective(node) or node.target is md.context_attention.default:
            args = map_arg(bound_args(node), value)
            env[node] = yield Request(node, args)
        elif node.op == "output":
            return tuple(map_arg(node.args[0], value))
        else:
            args, kwargs = map_arg((node.args, node.kwargs), value)
            env[node] = _computed(node, args, kwargs, precision)
        for operand in node.all_input_nodes:  # activations of all ranks at once would not fit for long
            if last_use[operand] is node:
                env.pop(operand, None)
    raise AssertionError("the graph has no output node")


def _computed(node: Node, args: tuple[Any, ...], kwargs: Mapping[str, Any], precision: Precision) -> Any:
    target: Any = node.target
    try:
        if precision.wide is not None:
            target = _WIDE.get(target, target)
        result = target(*map(precision.of, args), **{k: precision.of(a) for k, a in kwargs.items()})
    except Exception as error:  # of any kernel, of any library
        reason = next(iter(str(error).strip().splitlines()), "")
        of = "its own dtype" if precision.wide is None else dtype_name(precision.wide)
        raise VerificationError(
            f"{node.name} = {node.target} could not be run on {_devices(args)} in {of}: {type(error).__name__}:"
            f" {reason}",
            fix="give the op a kernel for what it is called with, or leave verification out: check=False, --no-verify",
            at=source_line(node),
        ) from error
    return _on_grid(node, precision.results(result)) if precision.wide is not None else result


def _on_grid(node: Node, result: Any) -> Any:
    """What the program holds in float8, rounded to it.

    By way of float32: a number that is a tie but for the rounding of ``wide`` is a tie, whatever the order of sums.
    """
    made = node.meta.get("val")
    if not isinstance(made, Tensor) or made.dtype.itemsize > 1 or not made.is_floating_point():
        return result
    return result.float().to(made.dtype).to(result.dtype)


def _scaled_mm(
    x: Tensor,
    y: Tensor,
    scale_x: Tensor,
    scale_y: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """``aten._scaled_mm`` in a dtype that its kernels do not take."""
    if not {scale_x.numel(), 1} <= {1, len(x)} or not {scale_y.numel(), 1} <= {1, y.shape[1]}:
        raise NotImplementedError("it has scales of blocks")
    result = x @ y * scale_x * scale_y
    result = result if bias is None else result + bias
    return result if scale_result is None else result * scale_result


def _round(x: Tensor) -> Tensor:
    """By way of float32, as in :func:`_on_grid`: a symmetric quantization puts the largest of a row on a tie, 127.5."""
    return torch.where(x.abs() < 2**23, x.float().round().to(x.dtype), x.round())


# What is computed otherwise where it is computed wider than the program says.
_WIDE: Mapping[Any, Callable[..., Tensor]] = {
    torch.ops.aten._scaled_mm.default: _scaled_mm,
    torch.ops.aten.round.default: _round,
}


def _devices(args: tuple[Any, ...]) -> str:
    return ", ".join(sorted({str(leaf.device) for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)}))


def _advance(
    rank: int,
    ranks: Mapping[int, Rank],
    result: Tensor | None,
    waiting: dict[int, Request],
    done: dict[int, tuple[Tensor, ...]],
) -> None:
    try:
        with torch.no_grad():
            waiting[rank] = next(ranks[rank]) if result is None else ranks[rank].send(result)
    except StopIteration as stop:
        done[rank] = stop.value


def _ready_group(mesh: Mesh, waiting: Mapping[int, Request], done: Mapping[int, Any]) -> tuple[int, ...]:
    """A group whose ranks all stand at one collective over it."""
    for rank, request in waiting.items():
        axis = request.args["axis"]
        group = mesh.ranks(axis, rank)
        if not all(member in waiting and waiting[member].args["axis"] == axis for member in group):
            continue
        for member in group:
            if waiting[member].signature() != request.signature():
                raise RankMismatchError(
                    f"ranks {rank} and {member} of axis {axis!r} stand at different collectives:\n"
                    f"    rank {rank}: {request}\n    rank {member}: {waiting[member]}",
                    fix="make every rank call the same collectives, in the same order, on the same shapes",
                )
        return group
    lines = [f"    rank {rank} waits in {request}" for rank, request in sorted(waiting.items())]
    lines += [f"    rank {rank} has finished" for rank in sorted(done)]
    raise RankMismatchError(
        "no group of ranks stands at one collective; on GPUs this would hang:\n" + "\n".join(lines),
        fix="make every rank call the same collectives in the same order",
    )


def _compute(requests: Sequence[Request], precision: Precision) -> list[Tensor]:
    operands = [[request.operands[name] for request in requests] for name in requests[0].operands]
    rest = requests[0].rest
    if rest.pop("exchange_dtype", "") and precision.float8_exchanges and precision.wide is None:
        operands = [[rounded(x) for x in xs] for xs in operands]
    for name in ("axis", "size"):
        rest.pop(name)
    rule = _RULES[str(requests[0].node.target).split(".")[1]]
    return [result.clone(memory_format=torch.contiguous_format) for result in rule(*operands, **rest)]


_REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "product": torch.mul,
    "max": torch.maximum,
    "min": torch.minimum,
}


def _reduced(xs: list[Tensor], op: str) -> Tensor:
    if op == "avg":
        return reduce(_REDUCTIONS["sum"], xs) / len(xs)
    return reduce(_REDUCTIONS[op], xs)


def _all_to_all(xs: list[Tensor], split_dim: int, concat_dim: int) -> list[Tensor]:
    parts = [x.chunk(len(xs), split_dim) for x in xs]
    return [torch.cat([part[rank] for part in parts], concat_dim) for rank in range(len(xs))]


def _context_attention(
    qs: list[Tensor],
    ks: list[Tensor],
    vs: list[Tensor],
    mask: list[Tensor] | None = None,
    *,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    strategy: str,
    lengths: list[int] | None,
) -> list[Tensor]:
    k, v = torch.cat(ks, 2), torch.cat(vs, 2)
    masks: Sequence[Tensor | None] = mask or [None] * len(qs)
    seen = [seen_by(q, k, is_causal, masks[rank], lengths, rank, len(qs)) for rank, q in enumerate(qs)]
    return [md.attention(q, k, v, rows, False, scale, enable_gqa) for q, rows in zip(qs, seen, strict=True)]


# Each rule takes the operands of the group's ranks, in order, and returns their results.
_RULES: dict[str, Callable[..., Sequence[Tensor]]] = {
    "all_reduce": lambda xs, op: [_reduced(xs, op)] * len(xs),
    "all_gather": lambda xs, dim: [torch.cat(xs, dim)] * len(xs),
    "reduce_scatter": lambda xs, op, dim: _reduced(xs, op).chunk(len(xs), dim),
    "all_to_all": _all_to_all,
    "broadcast": lambda xs, src: [xs[src]] * len(xs),
    "permute_tensor": lambda xs, shift: [xs[(rank - shift) % len(xs)] for rank in range(len(xs))],
    "context_attention": _context_attention,
}
