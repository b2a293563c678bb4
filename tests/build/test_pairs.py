"""Rotary embeddings of interleaved pairs are products in engines, and exactly what they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import graphs
import models
import pytest
import torch
from torch import Tensor

import torchtrt_md as md
from torchtrt_md.build.decompose import decompose
from torchtrt_md.build.pairs import turn_by_product, turning

aten = torch.ops.aten


def turned(x: Tensor) -> Tensor:
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([-b, a], -1).flatten(-2)


def by_halves(x: Tensor) -> Tensor:
    a, b = x.reshape(*x.shape[:-1], 2, -1).unbind(-2)
    return torch.cat([-b, a], -1)


def swapped(x: Tensor) -> Tensor:
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([-a, b], -1).flatten(-2)


def on_another_dim(x: Tensor) -> Tensor:
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([-b, a], 2).reshape(x.shape)


def of_fours(x: Tensor) -> Tensor:
    a, b, *_ = x.reshape(*x.shape[:-1], -1, 4).unbind(-1)
    return torch.stack([-b, a], -1).flatten(-2)


def rotary(x: Tensor) -> Tensor:
    table = torch.arange(1.0, 1 + x.shape[-1])
    return (x.float() * table.cos() + turned(x).float() * table.sin()).to(x.dtype)


CALLS: list[tuple[Callable[[Tensor], Tensor], torch.dtype, int]] = [
    (turned, torch.bfloat16, 1),
    (turned, torch.float16, 1),
    (rotary, torch.bfloat16, 1),
    (turned, torch.float32, 0),  # which TensorRT may multiply in fewer bits
    (by_halves, torch.bfloat16, 0),
    (swapped, torch.bfloat16, 0),
    (on_another_dim, torch.bfloat16, 0),
    (of_fours, torch.bfloat16, 0),
]


@pytest.mark.parametrize(("call", "dtype", "count"), CALLS, ids=lambda value: str(getattr(value, "__name__", value)))
def test_turned_pairs_are_a_product_and_all_else_stays(
    call: Callable[[Tensor], Tensor], dtype: torch.dtype, count: int
) -> None:
    x = (torch.randn(2, 5, 3, 8) * 10.0 ** torch.randint(-3, 4, (2, 5, 3, 8))).to(dtype)
    graph = graphs.trace(call, x)
    before = graphs.ops(graph)
    assert turn_by_product(graph) == count
    graph.graph.lint()
    assert torch.equal(graph(x)[0] if isinstance(graph(x), (tuple, list)) else graph(x), call(x))
    assert ("aten.stack" in graphs.ops(graph)) == ("aten.stack" in before and not count)


def test_a_wide_one_stays() -> None:
    graph = graphs.trace(turned, torch.randn(2, 1024).bfloat16())
    assert turn_by_product(graph) == 0


def test_turning() -> None:
    x = torch.randn(3, 6)
    assert torch.equal(x @ turning(6, torch.float32), turned(x))


def test_the_engines_of_a_model_have_them() -> None:
    model, args, kwargs = models.flux(torch.bfloat16)
    program = md.lower(
        md.capture(model, args, kwargs, mesh=md.Mesh(cp=2), parallel=md.ContextParallel("cp", "ulysses"))
    )
    graph = program.graphs[0]
    turns = len([n for n in graph.graph.nodes if n.target is aten.stack.default and n.args[1] == -1])
    assert turns
    decomposed: Any = decompose(graph)
    constants = [n for n in decomposed.graph.find_nodes(op="get_attr") if value(decomposed, n).ndim == 2]
    found = [n for n in constants if torch.equal(value(decomposed, n), turning(16, torch.bfloat16))]
    assert sum(len(n.users) for n in found) == turns
    assert len([n for n in graph.graph.nodes if n.target is aten.stack.default and n.args[1] == -1]) == turns, (
        "as it was"
    )


def value(graph: torch.fx.GraphModule, node: torch.fx.Node) -> Tensor:
    held: Tensor = getattr(graph, str(node.target))
    return held
