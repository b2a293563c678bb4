"""Operands for a part alone, which nobody has called yet, and the graphs that say nothing with them.

Floating ones are normal.  Whole numbers may be indices, and an index that is too large ends a GPU's context.  So they
are drawn below the extents that they index, as the graph has it, each once where that is enough: places that are
written twice have the value of either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.verification.compare import is_inexact

aten = torch.ops.aten
_NUMBERS = 2  # zeros and ones, as of a mask, where nothing is indexed
_MOVES = (
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default, aten.clone.default),
    *(aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.slice.Tensor),
    *(aten.select.int, aten.permute.default, aten.transpose.int, aten.t.default, aten._to_copy.default),
)
_SHAPES = (aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default)
_SORTS = (aten.sort.default, aten.sort.stable, aten.topk.default)  # their indices are each there once, and in bounds
# What does nothing, or one thing only, as long as numbers stay on one side of a bound or of each other.
_BOUNDS = {aten.clamp, aten.clamp_min, aten.clamp_max, aten.minimum, aten.maximum, aten.gt, aten.ge, aten.lt, aten.le}
_BOUNDS |= {aten.hardtanh, aten.hardswish, aten.hardsigmoid, aten.threshold, aten.softshrink, aten.hardshrink}
_BOUNDS |= {aten.eq, aten.ne, aten.isinf, aten.isnan, aten.isfinite}
_BOUNDS |= {aten.fmin, aten.fmax, torch.ops.torchtrt_md.fake_quantize}
_WRITES = (aten.index_put.default, aten._unsafe_index_put.default, aten.index_copy.default, aten.scatter.src)


def draw(shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int, below: int = 1) -> Tensor:
    """An operand: normal where it is floating; whole numbers below that, each once if there are as many."""
    generator = torch.Generator(device).manual_seed(seed)
    if dtype.is_floating_point or dtype.is_complex:
        drawn = torch.randn(shape, generator=generator, device=device, dtype=dtype if dtype.is_complex else None)
        return drawn.to(dtype)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator, device=device) < 0.5
    count, below = math.prod(shape), min(below, torch.iinfo(dtype).max)
    if count <= below:
        return torch.randperm(below, generator=generator, device=device)[:count].reshape(tuple(shape)).to(dtype)
    return torch.randint(below, tuple(shape), generator=generator, device=device).to(dtype)


def has_bounds(graph: GraphModule) -> bool:
    """Are floating numbers compared with bounds, or each other, or rounded to a range, which they may stay inside?"""
    for node in graph.graph.nodes:
        if getattr(node.target, "overloadpacket", None) in _BOUNDS:
            first = next(iter(node.all_input_nodes), None)
            if first is not None and _is_floating(first):
                return True
    return False


def limit(node: Node) -> int:
    """Below what the whole numbers of a value are to be: the smallest extent that they index.

    2 where they index nothing, and 1 where an index is computed of them, which zeros are the safest for.
    """
    users = [user for user in node.users if user.op != "output" and user.target not in _SHAPES]
    return min((_limit_of(node, user) for user in users), default=_NUMBERS)


def _limit_of(node: Node, user: Node) -> int:
    extents = [extent for index, extent in _indexed(user) if index is node]
    if extents:
        return min(extents)
    value = user.meta.get("val")
    if isinstance(value, Tensor) and not _is_whole(user):
        return _NUMBERS
    return limit(user) if user.target in _MOVES else 1


def unsaid(graph: GraphModule) -> str:
    """Why the graph does not say what comes of drawn operands; "" where it does."""
    repeated: set[Node] = set()  # whole numbers of which several may be equal
    drawn: set[Node] = set()  # what depends on operands
    free: set[Node] = set()  # whole numbers that were floating: of any size
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            drawn.add(node)
            if _is_whole(node) and limit(node) < node.meta["val"].numel():
                repeated.add(node)
        if node.op != "call_function":
            continue
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return f"{node.target} draws at random"
        for index, _ in _indexed(node):
            if index in free:
                return f"{node.target} is at places that follow from floating numbers"
            if index in repeated and _writes(node):
                return f"{node.target} may write to a place twice"
        if drawn.isdisjoint(node.all_input_nodes):
            continue
        drawn.add(node)
        if not _is_whole(node) or node.target in _SORTS:
            continue
        if not repeated.isdisjoint(node.all_input_nodes):
            repeated.add(node)
        cast = node.target is aten._to_copy.default and _is_floating(node.all_input_nodes[0])
        if (cast or not free.isdisjoint(node.all_input_nodes)) and node.target is not aten.clamp.default:
            free.add(node)
            repeated.add(node)
    return ""


def _indexed(node: Node) -> Iterator[tuple[Node, int]]:
    """The indices that an op takes, each with the extent that it is of."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return
    args = bound_args(node)
    table = args.get("weight") if node.target is aten.embedding.default else args.get("self")
    if not isinstance(table, Node):
        return
    shape = table.meta["val"].shape
    if isinstance(args.get("index"), Node) and shape:
        yield args["index"], shape[args.get("dim", 0)]
    indices = args.get("indices")
    for dim, index in enumerate(indices if isinstance(indices, (list, tuple)) else [indices]):
        if isinstance(index, Node) and dim < len(shape):
            yield index, shape[dim]


def _writes(node: Node) -> bool:
    """Does an op write different values to places by index, the last of several staying?"""
    return node.target in _WRITES and not bound_args(node).get("accumulate")


def _is_whole(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype != torch.bool and not is_inexact(value)


def _is_floating(node: Node) -> bool:
    return any(isinstance(v, Tensor) and is_inexact(v) for v in pytree.tree_leaves(node.meta.get("val")))
