"""Products of the same operand that are needed at the same time -> one product with the weights joined.

    before    q = addmm(bias_q, x, t(w_q));  k = addmm(bias_k, x, t(w_k));  v = addmm(bias_v, x, t(w_v))
    after     y = addmm(bias, x, t(w))            # w [Nq + Nk + Nv, K], a weight joined of the three
              q, k, v = slices of y on dim 1      # views

One large product runs faster than three smaller ones.  Needed at the same time means that the same collectives and
attentions are the first to depend on them: a product that an exchange of its own waits for, or that can run beside one,
stays as it is.  In the split placement only: there the weights are inputs of the engines.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from torchtrt_md.graph.functional import RESHAPES
from torchtrt_md.graph.results import fake_result
from torchtrt_md.graph.rewrite import emit
from torchtrt_md.lowering.ops import is_collective
from torchtrt_md.lowering.passes import PassContext
from torchtrt_md.program import Weight, value_of

aten, md = torch.ops.aten, torch.ops.torchtrt_md
PREFIX = "joined_"
SOURCE = "source"  # in a captured placeholder's meta: what it stands for
JOINS = "joins"  # in a joined placeholder's meta: the names of those that it joins, in order
_BARRIERS = (md.attention.default, md.ring_attention.default)


def run(graph: GraphModule, context: PassContext) -> int:
    """Number of products that became part of another."""
    if context.placement != "split":
        return 0
    needed = _first_barriers(graph)
    groups: dict[Hashable, list[Node]] = {}
    for node in graph.graph.nodes:
        weight = _weight(node)
        if weight is not None:
            x = node.args[-2]
            assert isinstance(x, Node)
            key = (_origin(x), node.target, value_of(weight).dtype, value_of(weight).shape[1], needed[node])
            groups.setdefault(key, []).append(node)
    joined = [products for products in groups.values() if len(products) > 1]
    slices = {part for products in joined for part in _join(products)}
    if slices:
        _record_layouts(graph.graph, slices)
    return sum(map(len, joined))


def _weight(node: Node) -> Node | None:
    """The placeholder [N, K] of a linear layer's weight, where this is its product and all else is its own too.

    What the user passes in a call is no weight: it would have to be joined in every call.
    """
    if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
        return None
    transposed = node.args[-1]
    assert isinstance(transposed, Node)
    if transposed.target is not aten.t.default or len(transposed.users) > 1:
        return None
    weight = transposed.all_input_nodes[0]
    own = [weight, *([node.args[0]] if node.target is aten.addmm.default else [])]
    for operand in own:
        if not isinstance(operand, Node) or len(operand.users) > 1 or not isinstance(operand.meta.get(SOURCE), Weight):
            return None
    bias = own[1:]
    # A bias of one element would be broadcast, and cannot be joined with others.
    rows = value_of(weight).shape[:1]
    return weight if all(value_of(b).shape == rows for b in bias if isinstance(b, Node)) else None


def _origin(x: Node) -> Hashable:
    """What an operand looks at, and as what shape: each linear layer has a view of its own."""
    shape = tuple(value_of(x).shape)
    while x.target in RESHAPES:
        x = x.all_input_nodes[0]
    return x, shape


def _first_barriers(graph: GraphModule) -> dict[Node, frozenset[Node]]:
    """For each node the collectives, attentions and outputs that depend on it with none of these in between."""
    found: dict[Node, frozenset[Node]] = {}
    for node in reversed(graph.graph.nodes):
        reached: set[Node] = set()
        for user in node.users:
            stop = is_collective(user) or user.target in _BARRIERS or user.op == "output"
            reached |= {user} if stop else found[user]
        found[node] = frozenset(reached)
    return found


def _join(products: Sequence[Node]) -> list[Node]:
    """Put one product in the place of these; the slices of it that they were."""
    first = products[0]  # in the graph's order, so what the others multiply is there already
    weights = [weight for weight in map(_weight, products) if weight is not None]
    operands = [_joined([p.args[0] for p in products])] if first.target is aten.addmm.default else []  # type: ignore[misc]
    joined = emit(first, aten.t.default, _joined(weights))
    whole = emit(first, first.target, *operands, first.args[-2], joined)  # type: ignore[arg-type]
    start, slices = 0, []
    for product, weight in zip(products, weights, strict=True):
        end = start + value_of(weight).shape[0]
        part = emit(product, aten.slice.Tensor, whole, 1, start, end)
        product.replace_all_uses_with(part)
        product.graph.erase_node(product)
        slices.append(part)
        start = end
    return slices


def _record_layouts(graph: torch.fx.Graph, slices: set[Node]) -> None:
    """Let what looks at the slices record how it lies now: not contiguous, as it was on products of their own.

    By that the placement tells what a part must make contiguous.  A view that is impossible now becomes a copy.
    """
    changed = set(slices)
    for node in graph.nodes:
        if node.op != "call_function" or changed.isdisjoint(node.all_input_nodes):
            continue
        if node.target in RESHAPES:
            node.target = aten.reshape.default
        value = _evaluated(node)
        if _strides(value) != _strides(node.meta["val"]):
            changed.add(node)
        node.meta["val"] = value


def _evaluated(node: Node) -> Any:
    """The node's fake result, anew."""
    assert callable(node.target)
    operands: Any = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    args, kwargs = operands
    if node.target is operator.getitem:
        return operator.getitem(*args)
    mode = value_of(node.all_input_nodes[0]).fake_mode  # type: ignore[attr-defined]
    return fake_result(mode, node.target, args, kwargs)


def _strides(value: Any) -> list[tuple[int, ...]]:
    return [t.stride() for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def _joined(parts: Sequence[Node]) -> Node:
    """A placeholder for these weights, one after the other on dim 0."""
    graph = parts[0].graph
    last = list(graph.find_nodes(op="placeholder"))[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(f"{PREFIX}{parts[0].name}")
    values = [value_of(part) for part in parts]
    with values[0].fake_mode:  # type: ignore[attr-defined]
        node.meta["val"] = torch.cat(values)
    node.meta[JOINS] = tuple(part.name for part in parts)
    return node
