"""Cut a lowered graph into parts.

Each node is *compute*, which runs in an engine or in an Inductor kernel, or *eager*, which runs op by op in PyTorch:
collectives and attention where the placement is ``split``, and what cannot be converted.  The graph is put in a new
order, part after part:

    for each eager op, in the graph's order:
        a compute part of all that the op needs and that was not computed yet; of several axes, the fewest that
            communicate along one axis each (:mod:`torchtrt_md.place.fewest`)
        the op itself, together with the eager ops next to it

Compute is put off until something needs it, and the eager ops stay in their order: it is the same on all ranks.  So a
collective is enqueued as early as its operand allows, and what does not need its result comes behind it, which is what
lets the two overlap.  Where a compute part would wait for a collective although a matrix product in it need not, the
part is cut there.

Views belong to nobody: they are repeated in each part that reads through them, so that what passes between parts are
whole, contiguous tensors, in the shape in which they are read.  Attention reads queries and returns its result as
[B, S, H, D], in which its kernels write.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from torchtrt_md.graph.functional import RESHAPES, copied
from torchtrt_md.graph.private import FakeTensor, lazy_module
from torchtrt_md.graph.quantized import QUANTIZED
from torchtrt_md.graph.rewrite import emit, permute, substitute
from torchtrt_md.lowering.layout import slices
from torchtrt_md.lowering.ops import bound_args, is_collective
from torchtrt_md.lowering.rank_input import PREFIX
from torchtrt_md.lowering.schedule import schedule
from torchtrt_md.place.fewest import fewest_engines
from torchtrt_md.program import ShardedProgram, outputs_of, placeholders, value_of
from torchtrt_md.segment import Binding, Part, Runs, Segment, Wire

aten, md = torch.ops.aten, torch.ops.torchtrt_md
ATTENTION = (md.attention.default, md.ring_attention.default)
VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
}
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)
_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.convolution.default}
_PRODUCTS |= {aten._scaled_mm.default, aten._int_mm.default}
_BSHD = [0, 2, 1, 3]
_PASSES = "passes"  # in a view's meta: it is a value of its own, which parts pass on or return


def partition(
    program: ShardedProgram, graph: GraphModule, *, is_eager: Callable[[Node], bool], compute: Runs
) -> tuple[Part, ...]:
    """The parts of one graph of a lowered program, in order.

    Args:
        graph: one of the program's graphs; it is left as it was.
        is_eager: which ops run op by op in PyTorch; views need not be told.
        compute: what the compute parts run as.
    """
    graph = copied(graph)
    _pieces_as_views(graph, is_eager)
    _pass_as_read(graph, is_eager)
    _pass_attention_as_written(graph, is_eager)
    for node in outputs_of(graph):
        node.meta[_PASSES] = True
    return _Cut(program, graph, is_eager, compute).parts()


def _pieces_as_views(graph: GraphModule, is_eager: Callable[[Node], bool]) -> None:
    """Let pieces of what is split be slices of it, where each lies in one piece: parts then pass on the whole.

    As the shifts and scales that a product makes of the time step, which would each be copied.  What stays in PyTorch
    or is returned keeps its node, by whose name it is known.
    """
    returned = set(outputs_of(graph))
    for node in list(graph.graph.nodes):
        if node.target not in _SPLITS or not returned.isdisjoint(node.users) or any(map(is_eager, (node, *node.users))):
            continue
        args = bound_args(node)
        whole, dim = args["self"], args["dim"]
        outer = value_of(whole).shape[: dim % value_of(whole).ndim]
        if math.prod(outer) != 1 or any(user.target is not operator.getitem for user in node.users):
            continue
        views = slices(node, whole, dim, [piece.shape[dim] for piece in node.meta["val"]])
        for pick in list(node.users):
            substitute(pick, views[pick.args[1]])
        graph.graph.erase_node(node)


def _pass_as_read(graph: GraphModule, is_eager: Callable[[Node], bool]) -> None:
    """Let a value that is only read in another shape pass in that shape.

    So a block that reads what embeds its input is the same as one that reads another block's result, and is built once.
    """
    for node in graph.graph.nodes:
        computed = node.op == "call_function" and not is_view(node) and not is_eager(node) and not is_collective(node)
        if computed and len(node.users) == 1:
            (reader,) = node.users
            if reader.target in RESHAPES and value_of(node).is_contiguous():
                reader.meta[_PASSES] = True


def _pass_attention_as_written(graph: GraphModule, is_eager: Callable[[Node], bool]) -> None:
    """Let attention read queries, and others its result, as [B, S, H, D], in which neither has to be copied.

    q -> q' = q as [B, S, H, D], which attention sees as [B, H, S, D], where an engine or Inductor makes q.
    y = attention(...) -> y' = y as [B, S, H, D], which readers see as [B, H, S, D]: kernels lay it out like q.
    """
    queries: dict[Node, Node] = {}  # as they are passed
    for node in list(graph.graph.nodes):
        if node.target is not md.attention.default or not is_eager(node) or value_of(node).ndim != 4:
            continue
        q = node.args[0]
        assert isinstance(q, Node)
        maker = base_of(q)
        if maker.op == "call_function" and not (is_eager(maker) or is_collective(maker)):
            if q not in queries:
                queries[q] = _as_bshd(node, q)
                queries[q].meta[_PASSES] = True
            node.args = (permute(node, queries[q], _BSHD), *node.args[1:])
        behind = node.next
        passed = emit(behind, aten.permute.default, node, _BSHD)
        seen = permute(behind, passed, _BSHD)
        for user in [user for user in node.users if user is not passed]:
            user.replace_input_with(node, seen)
        passed.meta[_PASSES] = True


def _as_bshd(before: Node, x: Node) -> Node:
    """[B, H, S, D] as [B, S, H, D], of what is joined part by part: compilers would copy the joined."""
    if x.target is not aten.cat.default:
        return emit(before, aten.permute.default, x, _BSHD)
    args = bound_args(x)
    parts = [emit(before, aten.permute.default, part, _BSHD) for part in args["tensors"]]
    return emit(before, aten.cat.default, parts, _BSHD.index(args["dim"] % len(_BSHD)))


def is_own_row(node: Node) -> bool:
    """Does this node pick this rank's part of an input, by the coordinate?  Lowering writes ``shard`` so.

    Over several axes it picks along one after the other.
    """
    if node.target is not aten.index_select.default:
        return False
    x, _, index = node.args
    assert isinstance(x, Node)
    assert isinstance(index, Node)
    base = base_of(x)
    return str(index.target).startswith(PREFIX) and (base.op == "placeholder" or is_own_row(base))


def axis_of(node: Node) -> str | None:
    """The axis along which a node of a lowered graph communicates; None where it does not."""
    communicates = is_collective(node) or node.target is md.context_attention.default  # a ring in the engine
    return bound_args(node)["axis"] if communicates else None


def _is_passed_in_8_bits(node: Node) -> bool:
    """Is this an input, a weight, a constant or a view of one, in a dtype that TensorRT takes for quantized numbers?"""
    return base_of(node).op != "call_function" and value_of(node).dtype in QUANTIZED


def is_view(node: Node) -> bool:
    """Does this node only look at its operand, so that any part may repeat it?"""
    return node.target in VIEWS and _PASSES not in node.meta


class _Cut:
    """The walk over one graph."""

    def __init__(
        self, program: ShardedProgram, graph: GraphModule, is_eager: Callable[[Node], bool], compute: Runs
    ) -> None:
        self.program, self.graph, self.compute = program, graph, compute
        self.order = {node: index for index, node in enumerate(graph.graph.nodes)}
        self.eager = {n for n in self.order if n.op == "call_function" and not is_view(n) and is_eager(n)}
        for node in self.order:  # what picks one of several results, or looks at one, goes where that is made
            follows = node.target is operator.getitem or (node.target in VIEWS and not is_view(node))
            if follows and base_of(node.all_input_nodes[0]) in self.eager:
                self.eager.add(node)
        self.sources = {node: Wire.of(program.sources[node.name]) for node in placeholders(graph)}
        self.returned = outputs_of(graph)
        self.done: set[Node] = set()
        self.pending: set[Node] = set()  # collectives whose results nothing was enqueued behind yet
        self.groups: list[tuple[Runs, list[Node]]] = []

    def parts(self) -> tuple[Part, ...]:
        for node in self.order:
            if node in self.eager and node not in self.done:
                self._compute(self._needs(node.all_input_nodes))
                self._add_eager(node)
        self._compute(self._needs(self.returned))
        # What is returned as it was given comes out of the last part, and an engine would take these for quantized.
        if self.compute == "engine" and any(map(_is_passed_in_8_bits, self.returned)):
            self._group("eager", [])
        if not self.groups:  # nothing is computed: inputs are returned
            self._group(self.compute, [])
        return self._wired()

    def _needs(self, nodes: Iterable[Node]) -> list[Node]:
        """The compute that these depend on and that is not done, in the graph's order."""
        found: set[Node] = set()
        stack = list(nodes)
        while stack:
            node = stack.pop()
            if node in found or node in self.done or node.op in ("placeholder", "get_attr"):
                continue
            if not is_view(node):
                found.add(node)
            stack.extend(node.all_input_nodes)
        return sorted(found, key=self.order.__getitem__)

    def _compute(self, nodes: Sequence[Node]) -> None:
        if not nodes:
            return
        along = [(node, axis) for node in nodes if (axis := axis_of(node)) is not None]
        if len({axis for _, axis in along}) > 1:  # an engine has one communicator
            engines = fewest_engines(along, nodes, lambda node: list(map(base_of, node.all_input_nodes)))
            for collectives in engines[:-1]:
                self._group(self.compute, self._needs(collectives))
            nodes = [node for node in nodes if node not in self.done]
        waiting = self._behind_pending(nodes)
        free = [n for n in nodes if n not in waiting]
        if waiting and any(n.target in _PRODUCTS for n in free):
            for apart in _last_apart(free):
                self._group(self.compute, apart)
            nodes = [n for n in nodes if n in waiting]
        if waiting:
            self.pending.clear()
        self._group(self.compute, nodes)

    def _behind_pending(self, nodes: Sequence[Node]) -> set[Node]:
        waiting: set[Node] = set()
        for node in nodes:
            if any(base in self.pending or base in waiting for base in map(base_of, node.all_input_nodes)):
                waiting.add(node)
        return waiting

    def _add_eager(self, node: Node) -> None:
        if any(base_of(x) in self.pending for x in node.all_input_nodes) and not is_collective(node):
            self.pending.clear()
        if is_collective(node):
            self.pending.add(node)
        if not self.groups or self.groups[-1][0] != "eager":
            self.groups.append(("eager", []))
        self._add(self.groups[-1][1], [node])

    def _group(self, runs: Runs, nodes: Sequence[Node]) -> None:
        self.groups.append((runs, []))
        self._add(self.groups[-1][1], nodes)

    def _add(self, group: list[Node], nodes: Sequence[Node]) -> None:
        """Put nodes in a part, and with them what picks one of their several results: parts pass single tensors."""
        picks = [user for node in nodes for user in node.users if user.target is operator.getitem]
        group += sorted({*nodes, *picks} - self.done, key=self.order.__getitem__)
        self.done.update(group)

    def _wired(self) -> tuple[Part, ...]:
        home = {node: index for index, (_, nodes) in enumerate(self.groups) for node in nodes}
        read = self._read_elsewhere(home)
        names: dict[Node, Wire] = {}
        for node, value in zip(self.returned, self.program.outputs, strict=True):
            names.setdefault(node, Wire("output", value.name))
        last = len(self.groups) - 1
        if not last:  # the whole program, which takes and gives what the program does, in its order
            ((runs, nodes),) = self.groups
            whole = [(n, Wire("output", v.name)) for n, v in zip(self.returned, self.program.outputs, strict=True)]
            return (self._part(0, runs, nodes, whole, names),)
        parts = []
        for index, (runs, nodes) in enumerate(self.groups):
            outputs = [(n, names.get(n, Wire("value", n.name))) for n in nodes if n in read or n in names]
            for node, value in zip(self.returned, self.program.outputs, strict=True):
                name = Wire("output", value.name)
                here = home.get(node, last) == index
                if here and (node, name) not in outputs:  # returned twice, or nobody's: an input, a weight
                    outputs.append((node, name))
            parts.append(self._part(index, runs, nodes, outputs, names))
        return tuple(parts)

    def _read_elsewhere(self, home: Mapping[Node, int]) -> set[Node]:
        """The values that another part reads, directly or through views."""
        read = set()
        for node, index in home.items():
            for base in map(base_of, node.all_input_nodes):
                if base in home and home[base] != index:
                    read.add(base)
        return read

    def _part(
        self,
        index: int,
        runs: Runs,
        nodes: Sequence[Node],
        outputs: Sequence[tuple[Node, Wire]],
        names: Mapping[Node, Wire],
    ) -> Part:
        """A graph of these nodes, with a placeholder for each value of another part."""
        mine, graph = set(nodes), Graph()
        env: dict[Node, Node] = {}
        inputs: dict[Node, Wire] = {}
        read = _reading_order([*nodes, *(n for n, _ in outputs)], mine)
        for node in read if len(self.groups) > 1 else sorted(read, key=self.order.__getitem__):
            inputs[node] = self.sources.get(node) or names.get(node, Wire("value", node.name))
            env[node] = graph.placeholder(f"read{len(env)}")  # no node of a traced graph has such a name
            env[node].meta = _contiguous_meta(node)

        def copied(node: Node) -> Node:
            if node not in env:
                for operand in node.all_input_nodes:
                    copied(operand)
                env[node] = graph.node_copy(node, env.__getitem__)
                if node.target in RESHAPES:
                    # what it looks at may lie otherwise now; only what surely is a view waits for nothing
                    sure = runs == "eager" and _is_surely_view(node, mine)
                    env[node].target = aten.view.default if sure else aten.reshape.default
            return env[node]

        for node in nodes:
            copied(node)
        graph.output(tuple(_contiguous(graph, copied(n), runs, own=base_of(n).op == "get_attr") for n, _ in outputs))
        module = lazy_module(self.graph, graph)
        collectives = tuple(schedule(module))
        segment = Segment(
            runs=runs,
            file="",
            axis=next((c.axis for c in collectives), None) if runs == "engine" else None,
            inputs=_bindings("in", placeholders(module), inputs.values()),
            outputs=_bindings("out", outputs_of(module), [wire for _, wire in outputs]),
            collectives=collectives,
            name=f"part {index}",
        )
        return Part(segment, module)


def _last_apart(nodes: Sequence[Node]) -> list[list[Node]]:
    """The same nodes in two lists, if the last products have no values in common with the others.

    As what a block makes of the time step beside the half of the block before that needs no attention.  Each can run
    beside another collective.
    """
    mine = set(nodes)
    reached = {next(n for n in reversed(nodes) if n.target in _PRODUCTS)}
    stack = list(reached)
    while stack:
        node = stack.pop()
        near = {*map(base_of, node.all_input_nodes), *readers(node)}
        stack += (near & mine) - reached
        reached |= near & mine
    others = [node for node in nodes if node not in reached]
    if not any(node.target in _PRODUCTS for node in others):
        return [list(nodes)]
    return [others, [node for node in nodes if node in reached]]


def _bindings(name: str, nodes: Iterable[Node], wires: Iterable[Wire]) -> tuple[Binding, ...]:
    """By position: equal parts then are equal, whatever they are wired to."""
    return tuple(
        Binding(f"{name}{i}", wire, value_of(node).dtype, tuple(value_of(node).shape))
        for i, (node, wire) in enumerate(zip(nodes, wires, strict=True))
    )


def base_of(node: Node) -> Node:
    """What a chain of views looks at."""
    while is_view(node):
        node = node.all_input_nodes[0]
    return node


def readers(node: Node) -> Iterator[Node]:
    """What reads a value, directly or through views, which are repeated wherever they are read."""
    for user in node.users:
        if is_view(user):
            yield from readers(user)
        else:
            yield user


def _is_surely_view(node: Node, mine: set[Node]) -> bool:
    """Is this reshape no copy, however what it looks at lies: contiguous, or as attention may write it?

    What comes from another part or a collective is contiguous.  Other ops of this part may keep any layout.
    """
    base = base_of(node.all_input_nodes[0])
    if base in mine and not is_collective(base) and base.target not in ATTENTION:
        return False
    chain: list[Node] = []
    while node is not base:
        chain.append(node)
        node = node.all_input_nodes[0]
    shape = list(value_of(base).shape)
    layouts = [torch.empty(shape, device="meta")]
    if base.target in ATTENTION and len(shape) == 4:
        layouts.append(torch.empty([shape[d] for d in _BSHD], device="meta").permute(_BSHD))
    for seen in layouts:
        for step in reversed(chain):
            look: Any = aten.view.default if step.target in RESHAPES else step.target
            try:
                seen = look(seen, *step.args[1:], **step.kwargs)
            except RuntimeError:  # it would have to be copied
                return False
    return True


def _reading_order(nodes: Iterable[Node], mine: set[Node]) -> list[Node]:
    """What these nodes read of others, in the order of reading: equal parts then have equal signatures."""
    found: dict[Node, None] = {}
    for node in nodes:
        operands = node.all_input_nodes if node in mine else [node]
        for base in map(base_of, operands):
            if base not in mine and base.op != "get_attr":
                found.setdefault(base)
    return list(found)


def _contiguous_meta(node: Node) -> dict[str, Any]:
    return {"val": _contiguous_like(value_of(node)), "stack_trace": node.meta.get("stack_trace")}


def _contiguous_like(value: Tensor) -> Tensor:
    # Not by an op in the fake mode, which takes ten times as long; this is asked for each value that parts pass.
    shape_only = torch.empty(value.shape, dtype=value.dtype, device="meta")
    return FakeTensor(value.fake_mode, shape_only, value.device)  # type: ignore[attr-defined]


def _contiguous(graph: Graph, node: Node, runs: Runs, *, own: bool) -> Node:
    """What a part returns, as it passes: contiguous.

    Args:
        own: it is a constant of the graph, of which the user gets a copy, to write to as to any result.
    """
    value = value_of(node)
    if is_collective(node) or (runs != "eager" and value.is_contiguous() and not own):
        return node
    if runs == "eager" and not own:
        # Its ops keep layouts, of which the record may be wrong; where it lies so, this is no copy.
        new = graph.call_function(aten.contiguous.default, (node,))
    else:
        new = graph.call_function(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
    new.meta = {"val": _contiguous_like(value)}
    if "stack_trace" in node.meta:
        new.meta["stack_trace"] = node.meta["stack_trace"]
    return new
