"""Equal blocks of diffusers' models are traced twice, and written down again for the others.

    for block in self.blocks:               57 blocks of two kinds: four are traced
        x = block(x, temb)

Tracing runs Python for each op, which is most of what a capture takes.  The trace of an equal block has one op in its
place, and :meth:`RepeatedBlocks.expand` puts the nodes of the earlier one there, with this block's weights and inputs.

    traced      block_begins([x, temb, w0]); y = mul(x, w0); block_ends([y])
    again       y1, = block_again([y, temb, w1])
    expanded    y = mul(x, w0); y1 = mul(y, w1)

What Python code does may depend on anything, as on a count that it keeps where nobody looks.  So this is done only
where all code that the model can name is that of libraries which were tried, diffusers' above all: where it meets a
class, a function or a hook of the user's, everything is traced.  Two blocks are then equal where what they hold, what
they are called with, and what the code could write to is.  Two of a kind are traced, and what they recorded is
compared.  Where it differs, or has what no list of inputs says (a constant, a value from outside), the caller captures
everything anew.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import has_side_effect, map_arg
from torch.utils import _pytree as pytree

from torchtrt_md.capture.alike import alike, is_atom, same
from torchtrt_md.capture.kept_state import KeptState, State, identical, same_state
from torchtrt_md.capture.known_values import KnownValues
from torchtrt_md.capture.torch_private import FakeTensor, has_global_hooks
from torchtrt_md.graph.functional import base, is_fresh, mutates
from torchtrt_md.wrappers import is_wrapper, named_weights

# Packages whose blocks do what follows from their arguments and what they hold, and those that these name.
KNOWN = frozenset({"diffusers", "packaging", "torchao"})
_TRACED = 2  # of each kind
_KINDS = 4  # with which a block is compared: the last ones that were met
# A block without parts of its own is traced as fast as it is compared.
_FEWEST_PARTS = 4


class UnrepeatedError(Exception):
    """What equal blocks recorded is not equal, or not all there is: they are to be traced, each by itself."""


@dataclass(frozen=True)
class _Call:
    """What a block was called with.

    Attributes:
        tensors: each once: of the arguments, then the block's weights.
        form: all else about them, and what holds around the call; equal for equal calls.
        state: of what the model's code can write to.
    """

    block: nn.Module
    tensors: list[Tensor]
    form: list[object]
    state: State


@dataclass(eq=False)
class _Kind:
    """Equal calls of equal blocks, and what the first returned."""

    call: _Call
    records: list[int]
    sound: bool = True
    alone: bool = False  # it returns a tensor and no tuple
    places: list[_Place | None] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class _Place:
    """A tensor among the results: which of those that were passed in, or of those that were made."""

    passed: bool
    index: int


class RepeatedBlocks:
    """The modules in lists of a model's copy, for one trace of it.

    Attributes:
        has_some: are there any that may be written down again?
    """

    def __init__(self, shadow: nn.Module, kept: KeptState) -> None:
        self._kept = kept
        known = kept.packages <= KNOWN and not has_global_hooks()
        self._blocks = {id(block): block for block in _blocks(shadow)} if known else {}
        self.has_some = bool(self._blocks)
        self._kinds: list[_Kind] = []
        self._again: list[_Kind] = []
        self._inside = False

    @contextmanager
    def traced(self, known: KnownValues) -> Iterator[None]:
        """Let equal blocks be written down again in here, where a trace is under way."""
        global _now
        outer, _now = _now, self
        own: dict[type[nn.Module], Any] = {}
        try:
            # On their classes, where KeptState takes it for code; other objects of these classes go past.
            for cls in {type(block) for block in self._blocks.values()}:
                was = vars(cls).get("forward")
                cls.forward = self._recording(cls, cls.forward, known)
                own[cls] = was
            yield
        finally:
            _now = outer
            for cls, forward in own.items():
                if forward is None:
                    del cls.forward
                else:
                    cls.forward = forward

    def expand(self, graph: GraphModule) -> None:
        """Put the nodes of the earlier block wherever one was written down again.

        Raises:
            UnrepeatedError: see above.
        """
        records = _records(graph)
        for kind in dict.fromkeys(self._again):
            first, *others = (records[index] for index in kind.records)
            if not first.is_whole() or not all(map(first.equals, others)):
                raise UnrepeatedError
        for node in graph.graph.find_nodes(op="call_function", target=_again_op):
            tensors, index = node.args
            copies = records[self._again[index].records[0]].copied(graph, node, tensors)
            for taken in list(node.users):
                taken.replace_all_uses_with(copies[taken.args[1]])
                graph.graph.erase_node(taken)
            graph.graph.erase_node(node)
        for marker in (_begins_op, _ends_op):
            for node in graph.graph.find_nodes(op="call_function", target=marker):
                graph.graph.erase_node(node)
        graph.recompile()

    def outputs(self, index: int) -> list[Tensor]:
        """Tensors as the block returned that the index-th was written down after."""
        return [_like(t) for t in self._again[index].outputs]

    def _recording(self, cls: type[nn.Module], forward: Callable[..., Any], known: KnownValues) -> Callable[..., Any]:
        @functools.wraps(forward)
        def recorded(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            one_of = not self._inside and id(block) in self._blocks and type(block) is cls
            call = self._call(block, args, kwargs, known) if one_of else None
            if call is None:
                return forward(block, *args, **kwargs)
            kind = next((k for k in self._kinds[-_KINDS:] if _same(k.call, call)), None)
            if kind is not None and kind.sound and len(kind.records) == _TRACED:
                return self._write_again(kind, call)
            if kind is None:
                kind = _Kind(call, [])
                self._kinds.append(kind)
            return self._record(kind, call, forward, args, kwargs, known)

        return recorded

    def _call(self, block: nn.Module, args: Any, kwargs: Any, known: KnownValues) -> _Call | None:
        """What this call is; None where it is no call that could be written down again."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        weights = named_weights(block).values()
        tensors = [leaf for leaf in (*leaves, *weights) if isinstance(leaf, Tensor)]
        if not all(is_atom(leaf) or isinstance(leaf, Tensor) for leaf in leaves):
            return None
        if not all(type(t) is FakeTensor and t.layout == torch.strided and known.is_unknown(t) for t in tensors):
            return None
        distinct = {id(t): t for t in tensors}
        place = {key: i for i, key in enumerate(distinct)}
        form: list[object] = [spec, _around(), *_wrappers(block)]
        for leaf in (*leaves, *weights):
            if isinstance(leaf, Tensor):
                form.append((place[id(leaf)], _memory(leaf)))
            else:
                form.append((type(leaf), leaf, str(leaf)))  # 0.0 == -0.0
        state = self._kept.state()
        return _Call(block, list(distinct.values()), form, state) if distinct and state is not None else None

    def _record(
        self, kind: _Kind, call: _Call, forward: Callable[..., Any], args: Any, kwargs: Any, known: KnownValues
    ) -> Any:
        index = sum(len(k.records) for k in self._kinds)
        kind.records.append(index)
        given, given_spec = pytree.tree_flatten((args, kwargs))
        _begins(call.tensors, index)
        self._inside = True
        try:
            result = forward(call.block, *args, **kwargs)
        finally:
            self._inside = False
        after, after_spec = pytree.tree_flatten((args, kwargs))
        untouched = after_spec == given_spec and identical(after, given)
        state = self._kept.state()
        pure = state is not None and same_state(call.state, state)
        results = result if type(result) is tuple else (result,)  # a list or dict could be the one that was passed
        tensors = [r for r in results if r is not None]
        ordinary = all(type(t) is FakeTensor and _is_ordinary(t) and known.is_unknown(t) for t in tensors)
        places: list[_Place | None] = []
        outputs: list[Tensor] = []
        if not (untouched and pure and ordinary and tensors):
            kind.sound = False
        else:
            passed = {id(t): i for i, t in enumerate(call.tensors)}
            made = {id(t): t for t in tensors if id(t) not in passed}
            index_of = passed | {key: i for i, key in enumerate(made)}
            outputs = list(made.values())
            places = [None if r is None else _Place(id(r) in passed, index_of[id(r)]) for r in results]
        if len(kind.records) == 1:
            kind.alone, kind.places, kind.outputs = type(result) is not tuple, places, outputs
        elif (kind.places, [*map(_memory, kind.outputs)]) != (places, [*map(_memory, outputs)]):
            kind.sound = False
        _ends(outputs, index)
        return result

    def _write_again(self, kind: _Kind, call: _Call) -> Any:
        self._again.append(kind)
        made = _again(call.tensors, len(self._again) - 1) if kind.outputs else []
        results = [p and (call.tensors if p.passed else made)[p.index] for p in kind.places]
        return results[0] if kind.alone else tuple(results)


class _Record:
    """The nodes of one traced block, between its two marks."""

    def __init__(self, begins: Node, ends: Node, nodes: Sequence[Node]) -> None:
        self._begins, self._ends, self._nodes = begins, ends, nodes

    # Asked for again where they are used: what is put in place of an earlier block's results may be among them.
    @property
    def _inputs(self) -> list[Node]:
        return list(self._begins.args[0])  # type: ignore[arg-type]

    @property
    def _outputs(self) -> list[Node]:
        return list(self._ends.args[0])  # type: ignore[arg-type]

    def is_whole(self) -> bool:
        """Does it read its inputs and what it makes only, and write to nothing else?"""
        inside = set(self._nodes)
        known = inside | set(self._inputs)
        return (
            all(node.op == "call_function" and known.issuperset(node.all_input_nodes) for node in self._nodes)
            and known.issuperset(self._outputs)
            and all(_writes_to_fresh(node, inside) for node in self._nodes if mutates(node))
        )

    def equals(self, other: _Record) -> bool:
        """Do both compute the same of their inputs?"""
        return self._text() == other._text()

    def copied(self, graph: GraphModule, at: Node, inputs: Sequence[Node]) -> list[Node]:
        """The nodes again before ``at``, on other inputs; the outputs among them."""
        to = dict(zip(self._inputs, inputs, strict=True))
        with graph.graph.inserting_before(at):
            for node in self._nodes:
                args, kwargs = map_arg((node.args, node.kwargs), to.__getitem__)
                # Named after its op: node_copy would try the names of all that were copied before.
                to[node] = graph.graph.create_node(node.op, node.target, args, kwargs)
                to[node].meta = dict(node.meta)
        return [to[output] for output in self._outputs]

    def _text(self) -> list[object]:
        number: dict[Node, int] = {}
        for node in (*self._inputs, *self._nodes):
            number.setdefault(node, len(number))

        def named(argument: Any) -> Any:
            leaves, spec = pytree.tree_flatten(argument)
            return [(type(leaf), number.get(leaf, leaf) if isinstance(leaf, Node) else leaf) for leaf in leaves], spec

        lines: list[object] = [[number.get(node) for node in self._inputs], [number.get(n) for n in self._outputs]]
        for node in self._nodes:
            made = [_memory(t) for t in pytree.tree_leaves(node.meta.get("val")) if isinstance(t, Tensor)]
            lines.append((node.op, node.target, named((node.args, node.kwargs)), made))
        return lines


def _records(graph: GraphModule) -> dict[int, _Record]:
    found: dict[int, _Record] = {}
    begins: Node | None = None
    nodes: list[Node] = []
    for node in graph.graph.nodes:
        if node.target is _begins_op:
            begins, nodes = node, []
        elif node.target is _ends_op:
            assert begins is not None
            found[node.args[1]] = _Record(begins, node, nodes)
            nodes = []
        else:
            nodes.append(node)
    return found


def _writes_to_fresh(node: Node, inside: Collection[Node]) -> bool:
    """Does an op write to its first operand alone, and to memory that one of these nodes made?"""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    if any(a.alias_info is not None and a.alias_info.is_write for a in arguments[1:]):
        return False
    written = node.args[0]
    return isinstance(written, Node) and (made := base(written)) in inside and is_fresh(made)


def _blocks(shadow: nn.Module) -> Iterator[nn.Module]:
    """The modules in lists that have more than two alike; none where an object has a forward of its own."""
    if any("forward" in vars(module) for module in shadow.modules()):
        return
    listed = {id(block): block for m in shadow.modules() if isinstance(m, nn.ModuleList) for block in m}
    kinds: list[list[nn.Module]] = []
    for block in listed.values():
        if len(list(block.modules())) > _FEWEST_PARTS:
            kind = next((kind for kind in kinds[-_KINDS:] if alike(kind[0], block)), None)
            if kind is None:
                kinds.append([block])
            else:
                kind.append(block)
    for kind in kinds:
        if len(kind) > _TRACED:
            yield from kind


def _same(a: _Call, b: _Call) -> bool:
    return a.form == b.form and same_state(a.state, b.state) and alike(a.block, b.block)


class _Itself:
    """Equal to nothing but what is this very object."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self._value is other._value


class _Alike:
    """Equal to what cannot be told from it."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Alike) and same(self._value, other._value)


def _wrappers(block: nn.Module) -> Iterator[object]:
    """What the wrappers among the weights are, beside the plain tensors that they hold."""
    for module in block.modules():
        for name, t in module.named_parameters(recurse=False):
            if is_wrapper(t):
                yield name, type(t), _Alike(t.__tensor_flatten__())  # type: ignore[attr-defined]


def _around() -> list[object]:
    """What holds around a call, beside what the model keeps."""
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    variables = {variable: _Itself(value) for variable, value in contextvars.copy_context().items()}
    return [autocast, torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(), variables]


def _memory(t: Tensor) -> tuple[object, ...]:
    whole = t.untyped_storage().nbytes()
    return t.shape, t.stride(), t.storage_offset(), whole, t.dtype, t.device, t.requires_grad, t.is_conj(), t.is_neg()


def _is_ordinary(t: Tensor) -> bool:
    """Can :func:`_like` make one that nothing tells from it?"""
    return t.layout == torch.strided and not (t.requires_grad or t.is_conj() or t.is_neg())


def _like(t: Tensor) -> Tensor:
    """A tensor without values of the same place in memory of its own."""
    memory = t.new_empty(t.untyped_storage().nbytes() // t.element_size())
    return memory.as_strided(t.shape, t.stride(), t.storage_offset())


_now: RepeatedBlocks | None = None


@torch.library.custom_op("torchtrt_md::block_begins", mutates_args=())
def _begins(tensors: list[Tensor], index: int) -> None:
    raise NotImplementedError("a mark of a trace")


@torch.library.custom_op("torchtrt_md::block_ends", mutates_args=())
def _ends(tensors: list[Tensor], index: int) -> None:
    raise NotImplementedError("a mark of a trace")


@torch.library.custom_op("torchtrt_md::block_again", mutates_args=())
def _again(tensors: list[Tensor], index: int) -> list[Tensor]:
    raise NotImplementedError("a mark of a trace")


@_begins.register_fake
@_ends.register_fake
def _nothing(tensors: list[Tensor], index: int) -> None:
    return None


@_again.register_fake
def _returned(tensors: list[Tensor], index: int) -> list[Tensor]:
    assert _now is not None
    return _now.outputs(index)


_begins_op, _ends_op, _again_op = (
    getattr(torch.ops.torchtrt_md, f"block_{what}").default for what in ("begins", "ends", "again")
)
# PyTorch takes what returns nothing for dead code.
has_side_effect(_begins_op)
has_side_effect(_ends_op)
