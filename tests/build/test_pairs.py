"""Rotary embeddings of interleaved pairs are products in engines, and exactly what they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphs
import models
import networks
import pytest
import torch
from torch import Tensor, nn

import torchtrt_md as md
from torchtrt_md.build.decompose import decompose
from torchtrt_md.build.pairs import find_pairs, rotate_every_two, rotation

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
def test_pairs_are_found_and_all_else_stays(call: Callable[[Tensor], Tensor], dtype: torch.dtype, count: int) -> None:
    x = (torch.randn(2, 5, 3, 8) * 10.0 ** torch.randint(-3, 4, (2, 5, 3, 8))).to(dtype)
    graph = graphs.trace(call, x)
    assert find_pairs(graph) == count
    graph.graph.lint()
    assert torch.equal(graph(x)[0] if isinstance(graph(x), (tuple, list)) else graph(x), call(x))
    assert graphs.ops(graph).count("torchtrt_md.rotate_every_two") == count
    if count:
        assert not {"aten.unbind", "aten.neg", "aten.stack"} & set(graphs.ops(graph))


def test_a_wide_one_stays() -> None:
    assert find_pairs(graphs.trace(turned, torch.randn(2, 1024).bfloat16())) == 0


def test_the_product_is_the_op() -> None:
    x = torch.randn(3, 6)
    assert torch.equal(x @ rotation(6, torch.float32), turned(x))
    assert torch.equal(rotate_every_two(x), turned(x))


class Rotary(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return rotary(x)


def test_a_network_has_one_product_with_the_constant(tmp_path: Path) -> None:
    """And TensorRT builds it."""
    x = torch.randn(1, 5, 3, 8).bfloat16()
    program = md.capture(Rotary(), (x,), mesh=md.Mesh(tp=1))
    net, _, interpreter = networks.network(program)
    (product,) = networks.layers_of(net, "MATRIX_MULTIPLY")
    assert [tuple(product.get_input(i).shape) for i in range(2)] == [(15, 8), (8, 8)]
    assert product.get_input(1).dtype.name == "BF16"
    del interpreter
    (engine,) = md.build(md.lower(program), tmp_path)
    assert engine.file.stat().st_size


def test_the_engines_of_a_model_have_them() -> None:
    model, args, kwargs = models.flux(torch.bfloat16)
    program = md.lower(
        md.capture(model, args, kwargs, mesh=md.Mesh(cp=2), parallel=md.ContextParallel("cp", "ulysses"))
    )
    graph = program.graphs[0]
    before = graphs.ops(graph)
    turns = len([n for n in graph.graph.nodes if n.target is aten.stack.default and n.args[1] == -1])
    assert turns
    decomposed: Any = decompose(graph)
    assert graphs.ops(decomposed).count("torchtrt_md.rotate_every_two") == turns
    assert graphs.ops(graph) == before, "it is as it was"
