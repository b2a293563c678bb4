"""Large sums over the ranks in two halves of the tokens, so that one is summed while the other is computed.

    before    y = all_reduce(mm(x, w), "tp", 4)                   # [S, D], of a layer whose weights are cut by rows
              z = mm(act(h + y), u)
    after     a = all_reduce(mm(x[: S / 2], w), "tp", 4);  b = all_reduce(mm(x[S / 2 :], w), "tp", 4)
              c = mm(act(h[: S / 2] + a), u);  d = mm(act(h[S / 2 :] + b), u)
              z = cat(c, d)                                       # where something reads across tokens, as attention

The sum ``a`` is under way beside the product of ``b``, and ``b`` beside that of ``c``.  What keeps tokens apart is done
half by half from one sum to the next, by the rules of :mod:`torchtrt_md.lowering.sharding_rules`, for which a half is a
rank's part; all else gets both halves joined.  In the split placement only: an engine does one thing after the other.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from torchtrt_md.errors import ShardingError
from torchtrt_md.graph.rewrite import emit
from torchtrt_md.lowering.localize import on_a_rank
from torchtrt_md.lowering.ops import bound_args, is_collective
from torchtrt_md.lowering.passes import PassContext
from torchtrt_md.lowering.sharding import Call, Part, Result, Sharded, local_shape
from torchtrt_md.lowering.sharding_rules import infer
from torchtrt_md.program import value_of

aten, md = torch.ops.aten, torch.ops.torchtrt_md
_AXIS, _HALVES = "halves of the tokens", 2  # no axis of a mesh, as which the rules take it
_LEAST = 8 << 20  # bytes of a sum: what takes NVLink some tens of microseconds
_PRODUCTS = (aten.mm.default, aten.addmm.default)
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_Pair: TypeAlias = tuple[Node, Node]


def run(graph: GraphModule, context: PassContext) -> int:
    """Number of sums that became two."""
    if not context.overlap or context.placement != "split":
        return 0
    products = {product: node for node in graph.graph.nodes if (product := _summed_product(node)) is not None}
    return _Walk(graph, products).run() if products else 0


def _summed_product(node: Node) -> Node | None:
    """The product whose large result, of an even number of tokens, this node sums over ranks."""
    if node.target is not md.all_reduce.default or bound_args(node)["op"] != "sum":
        return None
    value = value_of(node)
    tokens = next((n for n in value.shape[:-1] if n > 1), 1)
    if value.nbytes < _LEAST or tokens % _HALVES:
        return None
    product = node.all_input_nodes[0]
    while product.target in _VIEWS and len(product.users) == 1:
        product = product.all_input_nodes[0]
    return product if product.target in _PRODUCTS and len(product.users) == 1 else None


class _Walk:
    """Over one graph, in which every node is done whole or in halves.

    Args:
        products: whose results are to be summed in halves.
    """

    def __init__(self, graph: GraphModule, products: Mapping[Node, Node]) -> None:
        self.graph, self.products = graph, products
        self.states: dict[Node, Result] = {}
        self.halves: dict[Node, _Pair] = {}  # of what is done so
        self.cut: dict[tuple[Node, Sharded], _Pair] = {}  # halves of what is done whole
        self.joined: dict[Node, Node] = {}
        self.leads = self._lead_to_sums()

    def run(self) -> int:
        count = 0
        for node in list(self.graph.graph.nodes):
            self.states[node] = None
            if node.op not in ("call_function", "output"):
                continue
            # One of several results follows them, wherever it leads.
            leads = node in self.leads or node.target is operator.getitem
            if leads and (pair := self._in_halves(node)) is not None:
                self.halves[node] = pair
                count += node in self.products.values()
            else:
                for operand in node.all_input_nodes:
                    if operand in self.halves:
                        node.replace_input_with(operand, self._whole(node, operand))
        return count

    def _lead_to_sums(self) -> set[Node]:
        """The sums, and what a sum depends on."""
        found: set[Node] = set()
        for node in reversed(self.graph.graph.nodes):
            if node in self.products.values() or any(user in found for user in node.users):
                found.add(node)
        return found

    def _in_halves(self, node: Node) -> _Pair | None:
        """The node's halves; None where it is done whole."""
        apart = node.target is md.all_reduce.default or not (is_collective(node) or _attends(node))
        if not apart or not (node in self.products or any(x in self.halves for x in node.all_input_nodes)):
            return None
        call = Call(node, _AXIS, _HALVES, dict(self.states))
        if node in self.products:
            rows = node.args[-2]
            assert isinstance(rows, Node)
            if rows not in self.halves:
                half = Part(value_of(rows).shape[0] // _HALVES, value_of(rows).shape[0])
                call.states[rows] = call.to_split[rows] = Sharded.of(0, [half], _HALVES)  # type: ignore[index]
        try:
            state = infer(call)
        except ShardingError:
            return None
        results = list(zip(pytree.tree_leaves(state, is_leaf=_is_state), _tensors(node), strict=True))
        if any(value.numel() and not (isinstance(its, Sharded) and its.is_chunk) for its, value in results):
            return None
        if not all(part.is_chunk for part in call.to_split.values()):
            return None
        call.states[node] = state  # type: ignore[index]
        target, args, kwargs = on_a_rank(call)
        pairs = {x: self._cut(node, x, part) for x, part in call.to_split.items()}
        pairs = {x: self.halves[x] for x in node.all_input_nodes if x in self.halves} | pairs
        made: list[Node] = []
        for number in range(_HALVES):
            mine = {x: pair[number] for x, pair in pairs.items()}
            try:
                made.append(_emitted(node, target, *map_arg((args, kwargs), partial(_replaced, mine))))
            except RuntimeError:  # PyTorch's, of a view that halves have no layout for
                return None
        if any(
            list(value.shape) != local_shape(whole.shape, its)
            for half in made
            for value, (its, whole) in zip(_tensors(half), results, strict=True)
        ):
            return None  # the halves are dead code
        self.states[node] = state
        return made[0], made[1]

    def _cut(self, before: Node, x: Node, part: Sharded) -> _Pair:
        if (x, part) not in self.cut:
            middle = part.extent
            ends = ((0, middle), (middle, _HALVES * middle))
            first, second = (emit(before, aten.slice.Tensor, x, part.dim, start, end) for start, end in ends)
            self.cut[x, part] = first, second
        return self.cut[x, part]

    def _whole(self, before: Node, x: Node) -> Node:
        if x not in self.joined:
            state = self.states[x]
            assert isinstance(state, Sharded), f"{x} has several results"
            self.joined[x] = emit(before, aten.cat.default, list(self.halves[x]), state.dim)
        return self.joined[x]


def _replaced(by: Mapping[Node, Node], x: Node) -> Node:
    return by.get(x, x)


def _attends(node: Node) -> bool:
    return node.target in (md.attention.default, md.context_attention.default, md.ring_attention.default)


def _is_state(found: object) -> bool:
    return found is None or isinstance(found, Sharded)


def _tensors(node: Node) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(node.meta.get("val")) if isinstance(value, Tensor)]


def _emitted(before: Node, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Node:
    if target is not operator.getitem:
        return emit(before, target, *args, **kwargs)
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args)
    source, index = args
    node.meta = {"val": source.meta["val"][index], "stack_trace": before.meta.get("stack_trace")}
    return node
