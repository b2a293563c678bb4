"""``ShardedProgram``: what every stage before the build takes and returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import TreeSpec

from torchtrt_md.errors import CaptureError
from torchtrt_md.mesh import Mesh

_SAMPLED = 64  # rows

if TYPE_CHECKING:
    from torchtrt_md.checkpoint import Checkpoint


class Sharding(NamedTuple):
    """This rank holds chunk ``coordinate`` of ``dim`` along ``axis``."""

    dim: int
    axis: str


class UnevenSharding(NamedTuple):
    """As :class:`Sharding`, of a weight whose dim is cut in another way than into even chunks.

    The dim is made of ``blocks``, one after the other, given by their relative sizes, each of which is cut by itself,
    as where gate and up projections are joined.  Each is cut into as many chunks as there are groups of ``copies``
    ranks that hold the same; where it does not divide by these, it is filled up at its end: with copies of the last
    entry, of which no op makes what it makes of no other, or with ``zeros``.
    """

    dim: int
    axis: str
    blocks: tuple[int, ...] = (1,)
    copies: int = 1
    zeros: bool = False

    def extents(self, whole: int, size: int) -> list[int]:
        """How much of each block of a dim each of ``size`` ranks holds."""
        return [-(-block // (size // self.copies)) for block in self.sizes(whole)]

    def sizes(self, whole: int) -> list[int]:
        """How large the blocks of a dim are."""
        return [whole * block // sum(self.blocks) for block in self.blocks]


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer of the model, of which each rank may hold a part.

    ``shape`` is that of the whole weight; ``shardings`` apply in order.  Where it has ``parts``, it is those weights,
    each as the rank holds it, one after the other on dim 0.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    shardings: tuple[Sharding | UnevenSharding, ...] = ()
    parts: tuple[Weight, ...] = ()

    def local(self, whole: Tensor, mesh: Mesh, rank: int) -> Tensor:
        """This rank's part: a view of the whole, but for an :class:`UnevenSharding`, where it may be a copy."""
        return part(whole, self.shardings, mesh, rank)


class Value(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An input or output of the program, with the shape that the user sees: the global one.

    ``sharding`` is empty where every rank has the whole.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sharding: tuple[Sharding, ...] = ()


@dataclass(frozen=True)
class Coordinate:
    """An int32 input of shape [1] that holds this rank's coordinate along ``axis``."""

    axis: str


@dataclass(frozen=True)
class Output:
    """Stands for output ``index`` among the leaves of a model's result."""

    index: int


Source = Weight | Value | Coordinate


@dataclass(frozen=True)
class Constant:
    """A tensor that the model's code holds and that is no weight: the graphs have what it was when it was captured.

    ``read`` gives what is in its place now, where that is known.
    """

    name: str
    tensor: Tensor
    read: Callable[[], object] | None = None


def rows_of(whole: Tensor) -> Tensor:
    """A copy of rows of a tensor, as far apart as 64 can be; of one dim, all of it."""
    if whole.ndim < 2 or not whole.numel():
        return whole.clone()
    whole = whole.view(torch.uint8) if whole.dtype.itemsize == 1 else whole  # float8 cannot be indexed everywhere
    count = math.prod(whole.shape[:-1])
    at = sorted({i * (count - 1) // (_SAMPLED - 1) for i in range(_SAMPLED)})
    return whole[torch.unravel_index(torch.tensor(at), whole.shape[:-1])]


@dataclass
class Weights:
    """The model's weights by name, whole where this process has them, else as this process's DTensor shards.

    What is whole is the model's own parameter or buffer.  ``unrelated`` are names of weights of which nothing says that
    they are equal on all ranks: plain tensors of a model that communicates by itself.  ``given`` are the names of those
    that are in ``checkpoint``, and under which name there; each part of them is read when it is asked for.  ``holders``
    are of what a tensor subclass holds: which object, and as which attribute; ``outer`` are these subclasses, and the
    DTensors of shards.  ``constants`` are no weights, and may not change either.  ``replaced`` gives the weights in
    whose place the model has other objects since it was asked last: name, what was there, what is.
    """

    whole: Mapping[str, Tensor]
    shards: Mapping[str, Tensor] = field(default_factory=dict)
    rank: int = 0  # whose shards these are
    unrelated: frozenset[str] = frozenset()
    given: Mapping[str, str] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None
    holders: Mapping[str, tuple[Tensor, str]] = field(default_factory=dict)
    outer: Mapping[str, Tensor] = field(default_factory=dict)
    constants: Sequence[Constant] = ()
    replaced: Callable[[], Iterable[tuple[str, Tensor | None, object]]] = tuple

    def check_values(self, weights: Iterable[Weight]) -> None:
        """Refuse weights on meta of which nothing says what they are.  Ask before they are wanted one by one.

        Raises:
            CaptureError: naming them.
        """
        leaves = [leaf.name for weight in weights for leaf in weight.parts or (weight,)]
        held = {**self.whole, **self.shards}
        if lacking := [name for name in dict.fromkeys(leaves) if name not in self.given and held[name].is_meta]:
            raise self._valueless(lacking)

    def _valueless(self, names: Sequence[str]) -> CaptureError:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        if self.checkpoint is None:
            return CaptureError(
                f"the weight {names[0]!r}{more} of the model is on meta and has no value",
                fix="pass weights=..., the folder of the model's checkpoint",
            )
        return CaptureError(
            f"the weight {names[0]!r}{more} of the model is on meta, and is not in {self.checkpoint.where}",
            fix="let the model's constructor make what no checkpoint has, such as tables, with values: put only the"
            " parameters on meta, as accelerate's init_empty_weights() does, or assign it a tensor",
        )

    def sample(self, name: str) -> Tensor | None:
        """Some rows of the whole of a weight (:func:`rows_of`); None where the process has a shard only."""
        if name in self.given:
            assert self.checkpoint is not None
            return self.checkpoint.sample(self.given[name])
        return rows_of(self.whole[name].detach()) if name in self.whole else None

    def local(self, weight: Weight, mesh: Mesh, rank: int) -> Tensor:
        """This rank's part of a weight, without a copy unless it is cut unevenly, read, or joined of several.

        Joined parts are not copied either if they already lie one after the other in memory.

        Raises:
            CaptureError: the process has only another rank's shard, or it has no value.
            WeightsError: it cannot be read any more.
        """
        if weight.parts:
            return _joined([self.local(part, mesh, rank) for part in weight.parts])
        if weight.name in self.given:
            assert self.checkpoint is not None
            return self.checkpoint.part(self.given[weight.name], weight.shardings, mesh, rank)
        self.check_values([weight])
        if weight.name in self.whole:
            return weight.local(self.whole[weight.name].detach(), mesh, rank)
        if weight.shardings and rank != self.rank:
            raise CaptureError(
                f"weight {weight.name!r} is a DTensor of which this process holds rank {self.rank}'s shard only,"
                f" and rank {rank}'s is needed",
                fix="pass the dense weights: md.capture(..., weights=dense_model.state_dict()); "
                "or let each launched rank export its own engine",
            )
        return self.shards[weight.name]


@dataclass(frozen=True)
class ShardedProgram:
    """One graph per rank, the same object where ranks are equal, and what its placeholders stand for.

    Attributes:
        mesh: the mesh; ``len(graphs) == mesh.size``.
        graphs: rank's graph: aten ops and, in order of need, functional collectives (captured) or the
            collective IR (lowered).  Placeholders come in the order of ``sources``.
        sources: placeholder name -> what it stands for.
        outputs: the tensors that the graph returns, in order.
        weights: where the weights are.
        constants: arguments that are not tensors, by name; they are part of the graph.
        opaque: the names of arguments that are part of the graph and that no call can be compared with.
        positional: the arguments that may be passed by position, in order, whether tensors, nested or built in.
        strategies: context-parallel axis -> strategy.
        groups: process-local name of a group in the graphs -> mesh axis; only captured programs need it.
        out_spec: how the flat outputs nest in the model's own result, other leaves (None, numbers) included.
        out_leaves: for each leaf of ``out_spec`` its :class:`Output`, or the constant that it is.
        lowered: whether the graphs are in the collective IR.
        counts: lowering pass -> number of rewrites.
        alike: the axes along which ranks differ by what ``sources`` say only: one graph was captured of a dense model
            for all of them, and all are given the same.  None where a rank's own graph was captured.
    """

    mesh: Mesh
    graphs: tuple[GraphModule, ...]
    sources: Mapping[str, Source]
    outputs: tuple[Value, ...]
    weights: Weights
    constants: Mapping[str, object]
    strategies: Mapping[str, str]
    groups: Mapping[str, str]
    out_spec: TreeSpec
    out_leaves: tuple[object, ...]
    positional: tuple[str, ...] = ()
    opaque: tuple[str, ...] = ()
    lowered: bool = False
    counts: Mapping[str, int] = field(default_factory=dict)
    alike: frozenset[str] = frozenset()

    def read(self) -> list[Weight]:
        """The weights that the graph of some rank reads."""
        nodes = {node.name for graph, _ in self.distinct() for node in placeholders(graph) if node.users}
        return [s for name, s in self.sources.items() if isinstance(s, Weight) and name in nodes]

    @property
    def inputs(self) -> tuple[Value, ...]:
        """What the user passes, in order."""
        return tuple(s for s in self.sources.values() if isinstance(s, Value))

    def distinct(self) -> list[tuple[GraphModule, tuple[int, ...]]]:
        """The different graphs, each with the ranks that have it."""
        ranks: dict[int, list[int]] = {}
        for rank, graph in enumerate(self.graphs):
            ranks.setdefault(id(graph), []).append(rank)
        return [(self.graphs[members[0]], tuple(members)) for members in ranks.values()]

    def equal_ranks(self, members: Sequence[int]) -> list[tuple[int, ...]]:
        """Some ranks, grouped by equal weights: by their coordinates on the axes that split a weight."""
        axes = sorted({s.axis for w in self.sources.values() if isinstance(w, Weight) for s in w.shardings})
        classes: dict[tuple[int, ...], list[int]] = {}
        for rank in members:
            classes.setdefault(tuple(self.mesh.coordinate(rank, axis) for axis in axes), []).append(rank)
        return [tuple(ranks) for ranks in classes.values()]

    def with_graphs(self, graphs: Mapping[int, GraphModule], **changes: object) -> ShardedProgram:
        """A copy with other graphs, given as ``id`` of the old graph -> new graph."""
        return replace(self, graphs=tuple(graphs[id(g)] for g in self.graphs), **changes)  # type: ignore[arg-type]


def part(whole: Tensor, shardings: Iterable[Sharding | UnevenSharding], mesh: Mesh, rank: int) -> Tensor:
    """What a rank holds of a tensor with these shardings, applied in order; a view where all are even."""
    for s in shardings:
        if isinstance(s, UnevenSharding):
            whole = _uneven_part(whole, s, mesh.axis_size(s.axis), mesh.coordinate(rank, s.axis))
            continue
        extent = whole.shape[s.dim] // mesh.axis_size(s.axis)
        whole = whole.narrow(s.dim, mesh.coordinate(rank, s.axis) * extent, extent)
    return whole


def _uneven_part(whole: Tensor, s: UnevenSharding, size: int, coordinate: int) -> Tensor:
    length = whole.shape[s.dim]
    found = []
    for block, extent in zip(torch.split(whole, s.sizes(length), s.dim), s.extents(length, size), strict=True):
        first = coordinate // s.copies * extent
        there = max(0, min(extent, block.shape[s.dim] - first))
        found.append(block.narrow(s.dim, first if there else 0, there))
        if there < extent:
            missing = list(whole.shape)
            missing[s.dim] = extent - there
            last = block.narrow(s.dim, block.shape[s.dim] - 1, 1)
            found.append(whole.new_zeros(missing) if s.zeros else last.expand(missing))
    return found[0] if len(found) == 1 else torch.cat(found, s.dim)


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Where its storage begins, and its bytes."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts on dim 0; a view where they lie in a row, as another program of the model has left them."""
    first, end = parts[0], parts[0].storage_offset()
    for each in parts:
        alike = (each.dtype, each.shape[1:], each.stride()) == (first.dtype, first.shape[1:], first.stride())
        plain = not (each.is_meta or each.is_conj() or each.is_neg())
        if not alike or not plain or _memory(each) != _memory(first) or each.storage_offset() != end:
            return torch.cat(list(parts))
        end += each.shape[0] * each.stride(0)
    return first.as_strided((sum(len(each) for each in parts), *first.shape[1:]), first.stride())


def dtype_name(dtype: torch.dtype) -> str:
    """PyTorch's name of a dtype, as manifests and messages have it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def placeholders(graph: GraphModule) -> list[Node]:
    """The graph's placeholders, in order."""
    return list(graph.graph.find_nodes(op="placeholder"))


def value_of(node: Node) -> Tensor:
    """The fake tensor that capture or a pass recorded for this node: its shape and dtype."""
    value = node.meta["val"]
    assert isinstance(value, Tensor), f"{node.name} is not one tensor"
    return value


def outputs_of(graph: GraphModule) -> Iterable[Node]:
    """The nodes that the graph returns, in order."""
    (node,) = graph.graph.find_nodes(op="output")
    returned = node.args[0]
    assert isinstance(returned, (tuple, list))
    return [n for n in returned if isinstance(n, Node)]
