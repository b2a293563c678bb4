"""Quantized models along a split sequence: the same numbers as dense, in all strategies."""

from __future__ import annotations

from typing import Any

import models
import pytest
import quantized
import split_functions as sf
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

import torchtrt_md as md
from torchtrt_md.errors import ShardingError, VerificationError
from torchtrt_md.lowering.ops import bound_args
from torchtrt_md.program import ShardedProgram
from torchtrt_md.wrappers import plain

aten, ir = torch.ops.aten, torch.ops.torchtrt_md
PLAN = {"": {"x": md.Split(1)}, "out": md.Gather(1)}
STRATEGIES = ("ulysses", "allgather_kv", "ring")


def lowered(call: Any, strategy: str, plan: Any = PLAN) -> ShardedProgram:
    model, args, kwargs = call
    parallel = md.ContextParallel("cp", strategy, plan)  # type: ignore[arg-type]
    return md.lower(md.capture(model, args, kwargs, mesh=md.Mesh(cp=2), parallel=parallel), placement="split")


def compared(program: ShardedProgram) -> list[str]:
    """What is looked for among what ranks found: "amax" or "amin"."""
    names: dict[Any, str] = {aten.amax.default: "amax", aten.amin.default: "amin"}
    return [names[node.target] for node, _ in gathered(program.graphs[0])]


def gathered(graph: GraphModule) -> list[tuple[Node, Node]]:
    """The largest, or least, of what all ranks found, and of what this one did."""
    found = []
    for node in graph.graph.nodes:
        rows = node.args[0] if node.target in (aten.amax.default, aten.amin.default) else None
        if isinstance(rows, Node) and rows.target is ir.all_gather.default:
            found.append((node, bound_args(rows)["x"].args[0]))
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("config", quantized.CONFIGS)
def test_attention(config: str, strategy: str) -> None:
    call = quantized.attention(config)
    program = lowered(call, strategy)
    assert compared(program) == (["amax"] * 3 if config == "float8 by tensor" else [])
    report = md.verify(program, *call)
    assert report.precision == torch.float64
    assert report.structure_error < 1e-8
    assert report.dense_error > 1e-4, "a model of 16 bits that rounds nothing was not quantized"


@pytest.mark.parametrize(("config", "strategy"), [("float8 by row", "ulysses"), ("int8 by row", "ring")])
def test_flux(config: str, strategy: str) -> None:
    call = quantized.flux(config)
    assert len(plain(call[0].named_parameters())) > len(list(call[0].parameters()))
    report = md.verify(lowered(call, strategy, None), *call)
    assert report.structure_error < 1e-8
    assert report.precision == torch.float64


def test_the_scale_of_all_tokens_is_that_of_all_ranks_tokens() -> None:
    """Without the reduction each rank would scale by its own; ranks that hold copies of the last token do no harm."""
    model, (x,), kwargs = quantized.attention("float8 by tensor")
    x = x[:, :15].clone()
    x[:, 2] *= 20  # the largest, which rank 1 does not have
    program = lowered((model, (x,), kwargs), "ulysses")
    md.verify(program, model, (x,))
    for graph, _ in program.distinct():
        for node, own in gathered(graph):
            node.replace_all_uses_with(own)
    with pytest.raises(VerificationError, match="the program does not compute what SelfAttention computes"):
        md.verify(program, model, (x,))


def test_the_largest_of_a_split_value_is_that_of_all_ranks() -> None:
    def function(x: Tensor) -> Any:
        return x.amax(1), x.amin((0, 1), True), x.max(), x.flatten(0, 1).t().amin(-1), x.amin(-1).min()

    x = torch.randn(2, 7, 6)  # of which one rank has a copy
    graph = sf.trace(lambda x: function(sf.shard(x)), x)
    assert sf.analyze(graph) == 5
    assert sf.targets(graph).count("all_gather") == 5
    assert sf.check_claims(graph, [x], function(x)) == [None] * 5


def test_what_causal_attention_makes_behind_the_end_is_not_compared() -> None:
    """Queries behind the end see keys behind the end, so what they get is no copy, and could be the largest."""
    model, (x,), _ = quantized.attention("float8 by tensor")
    model.causal = True
    for tokens in (15, 16):
        call: models.Call = (model, (x[:, :tokens].clone(),), {})
        md.verify(lowered(call, "ulysses"), *call)


def test_where_the_largest_is_depends_on_the_rank() -> None:
    graph = sf.trace(lambda x: sf.shard(x).max(1), torch.randn(2, 8, 6))
    with pytest.raises(ShardingError, match="mixes positions across the shard"):
        sf.analyze(graph)
