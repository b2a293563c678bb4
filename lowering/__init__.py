"""Lower: a captured ``ShardedProgram`` -> the same program in the collective IR, ready to build.

FX in, FX out: no TensorRT, no GPU, no process group.  The passes, in order:

    uninitialized            uninitialised memory -> zeros
    empty_operands           operands of cat that hold nothing are left out
    slice_bounds             ends of slices beyond the end of the dim -> the end of the dim
    functional_collectives   PyTorch's collectives -> the IR, groups -> mesh axes
    single_rank              nothing is communicated along an axis of one rank
    gather_dim               a gather with split and cat around it -> a gather on that dim
    mask_fill                writing one value where a mask is true -> where
    fold_mask                masks that depend on no input -> none, or causal
    parts_by_position        parts of a sequence that are joined again -> chosen by position
    repeat_kv                key/value heads repeated by hand -> grouped-query attention
    sequence                 the whole -> what a rank holds; attention over a split sequence -> context_attention
    choose_strategy          how each context_attention gets the keys that it lacks
    merge_identical          identical collectives are done once
    cancel_inverse           a collective right behind its inverse goes, and it
    zigzag                   the sequence in an order in which a causal ring has equal work on all ranks
    ulysses, allgather_kv, ring   context_attention -> collectives and local attention
    merge_products           products of one operand, needed at the same time -> one (split placement)
    merge_exchanged, cancel_exchanged   the same two, over what the strategies inserted
    scatter_sums             sums -> scattered, and gathered behind what reads tokens by themselves (where ranks store)
    gather_in_pieces         gathers on inner dims -> on dim 0 and a cat, large products' in pieces (split placement)
    leading_dim              collectives on other dims -> on dim 0, where TensorRT's act
    joined_axes              what is split or gathered over several axes -> along one after the other
    rank_input               shard -> a row of the value, by a rank input
    validate                 nothing is left that would have to be guessed at

``rank_constant`` is no pass: it makes the rank inputs of a lowered program constants, where an export asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import msgspec
import torch
from torch.fx import GraphModule, Node

from torchtrt_md.checks import check_lower
from torchtrt_md.errors import PlanError, ShardingError
from torchtrt_md.graph.functional import copied
from torchtrt_md.graph.source import source_line
from torchtrt_md.graph.uncollected import uncollected
from torchtrt_md.lowering import (
    allgather_kv,
    cancel_inverse,
    choose_strategy,
    empty_operands,
    fold_mask,
    functional_collectives,
    gather_dim,
    gather_in_pieces,
    joined_axes,
    leading_dim,
    mask_fill,
    merge_identical,
    merge_products,
    parts_by_position,
    rank_input,
    repeat_kv,
    ring,
    scatter_sums,
    sequence,
    single_rank,
    slice_bounds,
    ulysses,
    uninitialized,
    validate,
    zigzag,
)
from torchtrt_md.lowering.float8_rows import DTYPES
from torchtrt_md.lowering.passes import Exchange, Pass, PassContext, run_passes
from torchtrt_md.mesh import axes_of
from torchtrt_md.parallel import Placement
from torchtrt_md.program import (
    Coordinate,
    ShardedProgram,
    Sharding,
    Source,
    Value,
    Weight,
    dtype_name,
    outputs_of,
    placeholders,
    value_of,
)

PASSES: dict[str, Pass] = {
    "uninitialized": uninitialized.run,
    "empty_operands": empty_operands.run,
    "slice_bounds": slice_bounds.run,
    "functional_collectives": functional_collectives.run,
    "single_rank": single_rank.run,
    "gather_dim": gather_dim.run,
    "mask_fill": mask_fill.run,
    "fold_mask": fold_mask.run,
    "parts_by_position": parts_by_position.run,
    "repeat_kv": repeat_kv.run,
    "sequence": sequence.run,
    "choose_strategy": choose_strategy.run,
    "merge_identical": merge_identical.run,
    "cancel_inverse": cancel_inverse.run,
    "zigzag": zigzag.run,
    "ulysses": ulysses.run,
    "allgather_kv": allgather_kv.run,
    "ring": ring.run,
    "merge_products": merge_products.run,
    "merge_exchanged": merge_identical.run,
    "cancel_exchanged": cancel_inverse.run,
    "scatter_sums": scatter_sums.run,
    "gather_in_pieces": gather_in_pieces.run,
    "leading_dim": leading_dim.run,
    "joined_axes": joined_axes.run,
    "rank_input": rank_input.run,
    "validate": validate.run,
}
_ANALYSIS = "sequence"  # the last pass that asks nothing of exchanges
_Analyzed: TypeAlias = dict[int, tuple[GraphModule, dict[str, int]]]  # id of a captured graph -> new one, rewrites


def lower(
    program: ShardedProgram,
    *,
    placement: Placement = "engine",
    exchanges: Mapping[str, Exchange] | None = None,
    dump: str | Path | None = None,
) -> ShardedProgram:
    """The program in the collective IR; the captured one is left as it was.

    Args:
        program: what :func:`torchtrt_md.capture` returned.
        placement: where attention will run: in the engine, or in PyTorch between engines (``"split"``).
        exchanges: how attentions of some shapes are to get what they lack, by
            :func:`torchtrt_md.lowering.choose_strategy.attention_key`; others follow the axis's strategy.
        dump: a folder for the graph before and after each pass that rewrote something.

    Raises:
        OptionError: an argument of another type, or a value that it cannot have.
        CollectiveError: a collective in a form that is not understood.
        ShardingError: an op that mixes positions of a split sequence, or heads that do not divide.
    """
    return Lowering(program).lower(placement=placement, exchanges=exchanges, dump=dump)


class Lowering:
    """Lowers a program in several ways: the passes that are the same for all of them are run once for a placement.

    Those are the ones up to ``sequence``, which take most of the time; a pass behind them that asks how an attention
    exchanges gets a copy.

    Args:
        program: what :func:`torchtrt_md.capture` returned; it is left as it was.
    """

    def __init__(self, program: ShardedProgram) -> None:
        self.program = program
        self._analyzed: dict[Placement, _Analyzed] = {}

    @uncollected()
    def lower(
        self,
        *,
        placement: Placement = "engine",
        exchanges: Mapping[str, Exchange] | None = None,
        stores: bool = False,
        exchange_dtype: str = "model",
        dump: str | Path | None = None,
    ) -> ShardedProgram:
        """See :func:`lower`.

        Args:
            stores: ranks will store into each other's memory (``transport="store"``), and not exchange by NCCL.
            exchange_dtype: what queries, keys and values are sent as: their own dtype (``model``) or, in the placement
                ``split``, ``float8``.
        """
        program = self.program
        check_lower(program, placement, exchanges, dump)
        if program.lowered:
            return program
        dump = None if dump is None else Path(dump)
        context = PassContext(
            program.mesh,
            program.strategies,
            program.groups,
            placement,
            exchanges or {},
            alike=program.alike,
            stores=stores,
            exchange_dtype=exchange_dtype,
        )
        lowered: dict[int, GraphModule] = {}
        counts: dict[str, int] = {}
        analyzed = self._analysis(placement, dump)
        if exchange_dtype != "model":
            self._check_float8(placement, [graph for graph, _ in analyzed.values()])
        for graph, ranks in program.distinct():
            analysis, before = analyzed[id(graph)]
            new = copied(analysis)
            done = before | run_passes(PASSES, new, context, self._folder(dump, ranks), behind=_ANALYSIS)
            if not counts:
                counts = done
            lowered[id(graph)] = new
        first = lowered[id(program.graphs[0])]
        added = {
            node.name: _source_of(node, program)
            for graph in lowered.values()
            for node in placeholders(graph)
            if node.name not in program.sources
        }
        return program.with_graphs(
            lowered,
            sources={**program.sources, **added},
            outputs=_outputs(program, first),
            groups={},
            counts=counts,
            lowered=True,
        )

    def asks_for_transport(self, placement: Placement) -> bool:
        """May lowering do otherwise where ranks store?"""
        graphs = [graph for graph, _ in self._analysis(placement).values()]
        return any(scatter_sums.has_sums(graph, self.program.alike) for graph in graphs)

    def attention_order(self, placement: Placement = "engine") -> tuple[str, ...]:
        """The ``attention_key`` of each attention over a split sequence, in order; that of the first rank's graph.

        Raises:
            as :func:`lower`.
        """
        return _keys(self._analysis(placement)[id(self.program.graphs[0])][0])

    def attention_keys(self) -> tuple[str, ...]:
        """The different ones of all graphs.

        Raises:
            as :func:`lower`.
        """
        graphs = [graph for graph, _ in self._analysis("engine").values()]
        return tuple(dict.fromkeys(key for graph in graphs for key in _keys(graph)))

    def _analysis(self, placement: Placement, dump: Path | None = None) -> _Analyzed:
        """What the passes up to ``sequence`` made of each graph; they are run again where they are to be dumped."""
        if dump is not None or placement not in self._analyzed:
            program = self.program
            found: _Analyzed = {}
            context = PassContext(program.mesh, program.strategies, program.groups, placement)
            for graph, ranks in program.distinct():
                new = copied(graph)
                for node in placeholders(new):
                    node.meta[merge_products.SOURCE] = program.sources[node.name]
                found[id(graph)] = new, run_passes(PASSES, new, context, self._folder(dump, ranks), last=_ANALYSIS)
            self._analyzed[placement] = found
        return self._analyzed[placement]

    def _check_float8(self, placement: Placement, graphs: list[GraphModule]) -> None:
        """See that there are queries, keys and values that can be sent in float8, if there are ranks to send them to.

        Raises:
            PlanError: not in the placement ``split``.
            ShardingError: there are none, or of another dtype.
        """
        if placement != "split":
            raise PlanError(
                "exchanges in float8 are between engines; collectives inside one send what they are given",
                fix="use placement='split', or leave exchange_dtype out",
            )
        target = torch.ops.torchtrt_md.context_attention.default
        attentions = [node for graph in graphs for node in graph.graph.find_nodes(op="call_function", target=target)]
        sizes = [self.program.mesh.joined_size(axis) for axis in self.program.strategies]
        if not attentions and not (sizes and max(sizes) == 1):
            raise ShardingError(
                "no attention exchanges queries, keys or values, which exchange_dtype is about",
                fix="leave exchange_dtype out",
            )
        for node in attentions:
            dtype = value_of(node).dtype
            if dtype not in DTYPES:
                raise ShardingError(
                    f"attention {node.name!r} is in {dtype_name(dtype)}, which is not exchanged in float8",
                    fix="leave exchange_dtype out, or use a model in 16 or 32 bits",
                    at=source_line(node),
                )

    def _folder(self, dump: Path | None, ranks: tuple[int, ...]) -> Path | None:
        """Where the graph of these ranks is dumped."""
        return dump / f"rank{ranks[0]}" if dump and len(self.program.distinct()) > 1 else dump


def _source_of(node: Node, program: ShardedProgram) -> Source:
    """What a placeholder stands for that a pass added."""
    if merge_products.JOINS not in node.meta:
        return Coordinate(str(node.target).removeprefix(rank_input.PREFIX))
    parts = []
    for name in node.meta[merge_products.JOINS]:
        weight = program.sources[name]
        assert isinstance(weight, Weight), f"{name} is no weight"
        parts.append(weight)
    shape = (sum(weight.shape[0] for weight in parts), *parts[0].shape[1:])
    return Weight("+".join(weight.name for weight in parts), shape, parts[0].dtype, parts=tuple(parts))


def attention_keys(program: ShardedProgram) -> tuple[str, ...]:
    """The different ``attention_key`` of all attentions over a split sequence, of all graphs.

    Raises:
        as :func:`lower`.
    """
    return Lowering(program).attention_keys()


def _keys(graph: GraphModule) -> tuple[str, ...]:
    nodes = graph.graph.find_nodes(op="call_function", target=torch.ops.torchtrt_md.context_attention.default)
    return tuple(choose_strategy.attention_key(node) for node in nodes)


def split_outputs(program: ShardedProgram) -> tuple[Value, ...]:
    """The outputs of a captured program with the sharding that lowering will give them.

    Raises:
        as :func:`lower`.
    """
    graph = copied(program.graphs[0])
    run_passes(PASSES, graph, PassContext(program.mesh, program.strategies, program.groups), last=_ANALYSIS)
    return _outputs(program, graph)


def _outputs(program: ShardedProgram, graph: GraphModule) -> tuple[Value, ...]:
    """The outputs with the sharding that the analysis found, and so their global shape."""
    values = []
    for value, node in zip(program.outputs, outputs_of(graph), strict=True):
        shape = list(value_of(node).shape)
        shardings = []
        for axis, sharded in node.meta.get("sharding", {}).items():
            shape[sharded.dim] *= program.mesh.joined_size(axis)
            shardings += [Sharding(sharded.dim, one) for one in axes_of(axis)]  # which apply in order
        values.append(msgspec.structs.replace(value, shape=tuple(shape), sharding=tuple(shardings)))
    return tuple(values)


__all__ = ["PASSES", "Lowering", "attention_keys", "lower", "split_outputs"]
