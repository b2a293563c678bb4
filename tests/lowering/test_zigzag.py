"""The order of the sequence for causal rings: put in, taken back, and refused where it would show."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import graphs
import models
import pytest
import split_functions as sf
import torch
import torch.nn.functional as F
from test_sharding_rules import ACCEPTED
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

import torchtrt_md
from torchtrt_md.errors import MDError, ShardingError
from torchtrt_md.lowering import PASSES, allgather_kv, cancel_inverse, lower, ring, sequence, zigzag
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.lowering.passes import PassContext, run_passes
from torchtrt_md.lowering.sharding import Sharded
from torchtrt_md.mesh import Mesh
from torchtrt_md.program import ShardedProgram
from torchtrt_md.verification import verify

md = torch.ops.torchtrt_md


def analyzed(
    forward: Callable[..., object], *examples: Tensor, size: int = 2, strategy: str = "ring"
) -> tuple[GraphModule, PassContext]:
    graph = graphs.trace(forward, *examples)
    context = PassContext(Mesh(cp=size), {"cp": strategy}, {}, "split")
    run_passes({"sequence": sequence.run}, graph, context)
    return graph, context


def reorder(graph: GraphModule, context: PassContext) -> int:
    return run_passes({"zigzag": zigzag.run}, graph, context)["zigzag"]


def attend(x: Tensor, is_causal: bool = True) -> Tensor:
    """Each position's 4 entries are one head."""
    result: Tensor = md.attention(x[:, None], x[:, None], x[:, None], None, is_causal, None, False)[:, 0]
    return result


# The order.


@pytest.mark.parametrize("size", [2, 3, 4])
def test_each_rank_has_two_chunks_and_the_gather_has_all_in_order(size: int) -> None:
    def forward(x: Tensor) -> list[Tensor]:
        part = md.split_sequence(x, 1, "cp", size)
        return [md.gather_sequence(attend(part), 1, "cp", size), md.gather_sequence(part, 1, "cp", size)]

    x = torch.randn(1, 4 * size, 4, dtype=torch.float64)
    graph, context = analyzed(forward, x, size=size)
    assert reorder(graph, context) == 3
    (node,) = graph.graph.find_nodes(op="call_function", target=md.shard.default)
    held = graphs.run_ranks(_returning(graph, node), context.mesh, x)
    for rank, (part,) in enumerate(held):
        chunks = x.chunk(2 * size, 1)
        assert part.equal(torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], 1))
    gathers = graph.graph.find_nodes(op="call_function", target=md.all_gather.default)
    assert all("cp" not in n.meta["sharding"] for n in gathers)
    (output,) = graph.graph.find_nodes(op="output")
    for (back,) in graphs.run_ranks(_returning(graph, output.args[0][1]), context.mesh, x):
        assert back.equal(x)


def _returning(graph: GraphModule, node: torch.fx.Node) -> GraphModule:
    """The graph up to one of its nodes, before attention is lowered."""
    copied = torch.fx.Graph()
    values: dict[torch.fx.Node, torch.fx.Node] = {}
    for each in graph.graph.nodes:
        if each.op != "output":
            values[each] = copied.node_copy(each, values.__getitem__)
    copied.output((values[node],))
    copied.eliminate_dead_code()
    return GraphModule(graph, copied)


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_the_analysis_accepts_does_the_same_in_this_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each op: with all that is split in zigzag order, its result is the part of the whole in zigzag order."""
    monkeypatch.setattr(sequence, "_check_outputs", lambda call: None)
    function, inputs = ACCEPTED[name]

    def forward(*xs: Tensor) -> list[Tensor]:
        parts = [x if dim is None else sf.shard(x, dim) for x, (_, dim) in zip(xs, inputs, strict=True)]
        return pytree.tree_leaves(function(*parts))

    graph = sf.trace(forward, *(t for t, _ in inputs))
    sf.analyze(graph)
    states = [state for node in graph.graph.nodes for state in zigzag._held(node, "cp")]
    if any(part.held % 2 and not part.is_whole for state in states for part in state.parts(sf.SIZE)):
        with pytest.raises(ShardingError, match="positions on each rank of axis"):
            zigzag._check_order(graph, "cp", sf.SIZE, sf.SIZE)
        return
    zigzag._reorder(graph, "cp", sf.SIZE)
    results = sf.run_ranks(graph, [t for t, _ in inputs])
    claims = [node.meta["sharding"].get("cp") for node in sf.returned(graph)]
    whole = pytree.tree_leaves(function(*(t for t, _ in inputs)))
    for ranks, claim, expected in zip(results, claims, whole, strict=True):
        for rank, result in enumerate(ranks):
            torch.testing.assert_close(result, sf.part(ordered(expected, claim), claim, rank) if claim else expected)


def ordered(whole: Tensor, state: Sharded) -> Tensor:
    """The whole with each of its sequences in zigzag order, but those that every rank has."""
    parts = state.parts(sf.SIZE)
    lengths = [part.total for part in parts]
    shape = whole.shape
    split = whole.reshape(*shape[: state.dim], state.outer, sum(lengths), state.inner, *shape[state.dim + 1 :])
    starts = [0, *accumulate(lengths)]
    order = [chunk for rank in range(sf.SIZE) for chunk in (rank, 2 * sf.SIZE - 1 - rank)]
    pieces = []
    for start, part in zip(starts, parts, strict=False):
        piece = split.narrow(state.dim + 1, start, part.total)
        chunks = piece.chunk(2 * sf.SIZE, state.dim + 1)
        pieces += [piece] if part.is_whole else [chunks[i] for i in order]
    return torch.cat(pieces, state.dim + 1).flatten(state.dim, state.dim + 2)


# Whole models.


class Decoder(nn.Module):
    """Tokens, positions and two causal attentions with grouped queries; text that is attended to in no order."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 32), nn.Embedding(64, 32)
        self.first = models.SelfAttention(4, 2, causal=True)
        self.cross = models.SelfAttention(4, 4)
        self.second = models.SelfAttention(4, 4, causal=True)
        self.head = nn.Linear(32, 11)

    def forward(self, tokens: Tensor, positions: Tensor, text: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(positions)
        x = x + self.first(x)
        joint = self.cross(torch.cat([text, x], 1))
        x = x + joint[:, text.shape[1] :]
        x = x + self.second(F.layer_norm(x, (32,)))
        logits: Tensor = self.head(x)
        return logits


SPLITS = {"tokens": torchtrt_md.Split(1), "positions": torchtrt_md.Split(1), "text": torchtrt_md.Split(1)}


def decoder(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    tokens = torch.randint(0, 11, (2, 32))
    return Decoder().to(dtype).eval(), (tokens, torch.arange(32)[None], torch.randn(2, 16, 32, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_decoder(size: int, dtype: torch.dtype) -> None:
    model, args = decoder(dtype)
    plan = {"": SPLITS, "head": torchtrt_md.Gather(1)}
    parallel = [torchtrt_md.ContextParallel("cp", "ring", plan)]
    program = torchtrt_md.capture(model, args, mesh=Mesh(cp=size), parallel=parallel)
    lowered = lower(program, placement="split")
    assert {name: lowered.counts[name] for name in ("zigzag", "ring")} == {"zigzag": 4, "ring": 3}
    report = verify(lowered, model, args)
    assert report.structure_error <= 1e-12


def test_an_attention_that_is_not_causal_may_have_another_strategy() -> None:
    def forward(x: Tensor) -> Tensor:
        part = attend(md.split_sequence(x, 1, "cp", 2))
        gathered: Tensor = md.gather_sequence(attend(part, is_causal=False), 1, "cp", 2)
        return gathered

    x = torch.randn(1, 8, 4, dtype=torch.float64)
    graph, context = analyzed(forward, x)
    _, second = graph.graph.find_nodes(op="call_function", target=md.context_attention.default)
    second.args = tuple({**bound_args(second), "strategy": "allgather_kv"}.values())
    reorder(graph, context)
    run_passes({"allgather_kv": allgather_kv.run, "ring": ring.run}, graph, context)
    dense = attend(attend(x), is_causal=False)
    graphs.assert_same(graphs.run_ranks(graph, context.mesh, x), [(dense,)] * 2, exact=False)


def test_only_shards_of_the_axis() -> None:
    """Along another axis, the batch is split in plain order."""

    def forward(x: Tensor) -> Tensor:
        part = md.split_sequence(md.split_sequence(x, 1, "cp", 2), 0, "dp", 2)
        gathered: Tensor = md.gather_sequence(md.gather_sequence(attend(part), 0, "dp", 2), 1, "cp", 2)
        return gathered

    x = torch.randn(4, 8, 4, dtype=torch.float64)
    graph = graphs.trace(forward, x)
    context = PassContext(Mesh(cp=2, dp=2), {"cp": "ring"}, {}, "split")
    run_passes({"sequence": sequence.run}, graph, context)
    assert reorder(graph, context) == 2


@pytest.mark.parametrize(("causal", "placement", "strategy"), [(False, "split", "ring"), (True, "split", "ulysses")])
def test_nothing_to_do(causal: bool, placement: str, strategy: str) -> None:
    graph, context = analyzed(
        lambda x: md.gather_sequence(attend(md.split_sequence(x, 1, "cp", 2), causal), 1, "cp", 2),
        torch.randn(1, 8, 4),
        strategy=strategy,
    )
    before = graphs.ops(graph)
    assert reorder(graph, context) == 0
    assert graphs.ops(graph) == before


def test_what_is_gathered_and_split_again_is_neither() -> None:
    """The pairs of a plan that gathers and splits at each block go first, and with them their reorderings."""

    def forward(x: Tensor) -> Tensor:
        part = attend(md.split_sequence(x, 1, "cp", 2))
        part = md.split_sequence(md.gather_sequence(part, 1, "cp", 2), 1, "cp", 2)
        gathered: Tensor = md.gather_sequence(attend(part), 1, "cp", 2)
        return gathered

    x = torch.randn(1, 8, 4)
    passes = list(PASSES)
    assert passes.index("sequence") < passes.index("cancel_inverse") < passes.index("zigzag") < passes.index("ulysses")
    graph, context = analyzed(forward, x)
    run_passes({"cancel_inverse": cancel_inverse.run}, graph, context)
    assert reorder(graph, context) == 2


# What is refused.


def captured(model: nn.Module, args: tuple[Tensor, ...], plan: dict[str, Any], size: int = 4) -> ShardedProgram:
    parallel = [torchtrt_md.ContextParallel("cp", "ring", plan)]
    return torchtrt_md.capture(model, args, mesh=Mesh(cp=size), parallel=parallel)


def refusal(program: ShardedProgram) -> MDError:
    with pytest.raises(ShardingError) as raised:
        lower(program, placement="split")
    return raised.value


class Outer(nn.Module):
    """A module whose parts the plan names, so that errors cite a line of this file."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.inner = nn.Identity(), models.SelfAttention(causal=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        result: Tensor = self.inner(x)
        return result


@pytest.mark.parametrize("length", [12, 13])
def test_a_length_that_does_not_divide(length: int) -> None:
    """Each rank has two equal chunks of 16 positions, the last of which are copies."""
    plan = {"before": {0: torchtrt_md.Split(1, output=True)}, "inner": torchtrt_md.Gather(1)}
    model, args = Outer().eval(), (torch.randn(1, length, 32),)
    lowered = lower(captured(model, args, plan), placement="split")
    assert lowered.counts["zigzag"] == 2
    assert verify(lowered, model, args).structure_error <= 1e-12


def test_an_output_that_is_left_split() -> None:
    plan = {"before": {0: torchtrt_md.Split(1, output=True)}}
    error = refusal(captured(Outer(), (torch.randn(1, 16, 32),), plan))
    assert "output 0 (" in error.problem
    assert "[1, 4, 32]) is left split over axis 'cp', on which causal ring attention" in error.problem
    assert "md.Gather" in error.fix
    assert error.at.startswith(f"{models.__file__}:")


def test_a_chunk_border_inside_of_a_position() -> None:
    """12 entries are 6 positions of 2, so half of a rank's part is one and a half."""

    def forward(x: Tensor) -> Tensor:
        part = md.split_sequence(x, 1, "cp", 2).view(1, -1, 2).repeat(1, 1, 2)
        gathered: Tensor = md.gather_sequence(attend(part), 1, "cp", 2)
        return gathered

    graph, context = analyzed(forward, torch.randn(1, 12))
    with pytest.raises(ShardingError, match="has 3 of 6 positions on each rank") as raised:
        reorder(graph, context)
    assert raised.value.at.startswith(f"{__file__}:")
    assert "in forward: part = md.split_sequence(x, 1" in raised.value.at


def test_causal_attentions_of_two_strategies() -> None:
    def forward(x: Tensor) -> Tensor:
        part = attend(md.split_sequence(x, 1, "cp", 2))
        gathered: Tensor = md.gather_sequence(attend(part), 1, "cp", 2)
        return gathered

    graph, context = analyzed(forward, torch.randn(1, 8, 4))
    _, second = graph.graph.find_nodes(op="call_function", target=md.context_attention.default)
    second.args = tuple({**bound_args(second), "strategy": "ulysses"}.values())
    with pytest.raises(ShardingError, match="has the strategy 'ulysses', and other causal attentions over") as raised:
        reorder(graph, context)
    assert raised.value.at.startswith(f"{__file__}:")
    assert "the same strategy" in raised.value.fix


def test_an_attention_whose_operands_nobody_split() -> None:
    """Made by hand: nothing says in which order its operands are."""

    def forward(x: Tensor) -> Tensor:
        attended: Tensor = md.context_attention(x, x, x, True, None, False, "ring", "cp", 2)
        return attended

    graph, context = analyzed(forward, torch.randn(1, 2, 8, 4))
    with pytest.raises(ShardingError, match="it is not known how the operands of causal attention") as raised:
        reorder(graph, context)
    assert raised.value.at.startswith(f"{__file__}:")


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: md.reduce_scatter(x, "sum", 2, "cp", 2),
        lambda x: md.all_to_all(x, 1, 1, "cp", 2),
        lambda x: md.permute_tensor(x, 1, "cp", 2),
        lambda x: x.flip(1),
        lambda x: x.cumsum(1),
        lambda x: x[:, 1:],
    ],
)
def test_what_mixes_positions_was_refused_before(mix: Callable[[Tensor], Tensor]) -> None:
    def forward(x: Tensor) -> Tensor:
        return mix(attend(md.split_sequence(x, 1, "cp", 2)))

    with pytest.raises(ShardingError) as raised:
        analyzed(forward, torch.randn(1, 8, 4))
    assert raised.value.at.startswith(f"{__file__}:")
