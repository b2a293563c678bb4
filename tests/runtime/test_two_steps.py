"""Large sums over many ranks are a scatter and a gather, which compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule

import torchtrt_md
from torchtrt_md.runtime.push import push_of
from torchtrt_md.runtime.two_steps import sum_in_two
from torchtrt_md.verification.simulate import simulate

md = torch.ops.torchtrt_md
RANKS = 4


def summed(
    shape: tuple[int, ...], op: str = "sum", size: int = RANKS, dtype: torch.dtype = torch.float32
) -> GraphModule:
    mode, graph = FakeTensorMode(), Graph()
    x = graph.placeholder("x")
    y = graph.call_function(md.all_reduce.default, (x, op, "tp", size))
    z = graph.call_function(torch.ops.aten.relu.default, (y,))
    with mode:
        for node in (x, y, z):
            node.meta["val"] = torch.empty(shape, dtype=dtype)
    graph.output([z])
    return GraphModule({}, graph)


def ops(graph: GraphModule) -> list[str]:
    return [str(n.target).split(".")[1] for n in graph.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("op", ["sum", "avg"])
@pytest.mark.parametrize("shape", [(1, 512, 1024), (3, 1024, 128)])
def test_a_large_sum_is_a_scatter_and_a_gather(shape: tuple[int, ...], op: str) -> None:
    graph = summed(shape, op)
    assert sum_in_two(graph) == 1
    assert [o for o in ops(graph) if o not in ("reshape", "view")] == ["reduce_scatter", "all_gather", "relu"]
    graph.graph.lint()
    pushed = [
        push_of(n, 0) for n in graph.graph.nodes if "reduce_scatter" in str(n.target) or "all_gather" in str(n.target)
    ]
    assert [push is not None and push.sums for push in pushed] == [RANKS, 0]
    assert all(push is not None and push.alone for push in pushed)


@pytest.mark.parametrize(
    "other",
    [
        {"shape": (4, 4)},
        {"shape": (1, 512, 1024), "size": 2},
        {"shape": (1, 512, 1024), "op": "max"},
        {"shape": (1, 512, 1024), "dtype": torch.float64},
        {"shape": (1, 523, 1021)},  # not in parts of whole words
    ],
)
def test_others_stay_whole(other: dict[str, Any]) -> None:
    graph = summed(**other)
    assert sum_in_two(graph) == 0
    assert ops(graph) == ["all_reduce", "relu"]


def test_all_ranks_compute_what_they_did() -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    for name, layer in {"up": nn.Linear(64, 128), "act": nn.GELU(), "down": nn.Linear(128, 64)}.items():
        model.add_module(name, layer)
    x = torch.randn(8192, 64)
    parallel = torchtrt_md.TensorParallel("tp", plan={"up": "colwise", "down": "rowwise"})
    program = torchtrt_md.lower(
        torchtrt_md.capture(model, (x,), mesh=torchtrt_md.Mesh(tp=RANKS), parallel=parallel), placement="split"
    )
    (name,) = (value.name for value in program.inputs)
    before = simulate(program, {name: x})
    assert sum(sum_in_two(graph) for graph, _ in program.distinct()) >= 1
    after = simulate(program, {name: x})
    for mine, other in zip(before, after, strict=True):
        torch.testing.assert_close(mine, other)
    torch.testing.assert_close(after[0][0], model(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(after[0][0], rank[0]) for rank in after), "ranks would differ in bits"
