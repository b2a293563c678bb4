"""Three small passes that say in plain ops what models write in odd ones."""

from __future__ import annotations

import graphs
import pytest
import torch
from torch import Tensor

from torchtrt_md.lowering import empty_operands, slice_bounds, uninitialized
from torchtrt_md.mesh import Mesh

MESH = Mesh(cp=2)


def written(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[..., 0::2] = x[..., 1::2]
    y[..., 1::2] = -x[..., 0::2]
    z = x.new_empty(x.shape, dtype=torch.float32)
    z[:] = x
    w = torch.empty(x.shape, dtype=torch.int64)
    w[:] = 3
    return y + z + w


def test_uninitialised_memory_becomes_zeros() -> None:
    from torchtrt_md.graph.functional import functional

    x = torch.randn(3, 4, dtype=torch.float64)
    graph = graphs.trace(written, x)
    (node,) = graph.graph.find_nodes(op="placeholder")
    graph = functional(graph, [node.meta["val"]])
    assert any("empty" in op for op in graphs.ops(graph))
    assert graphs.rewrite(uninitialized.run, graph, MESH) >= 2
    assert not any("empty" in op for op in graphs.ops(graph))
    assert torch.equal(graph(x)[0], written(x))


@pytest.mark.parametrize("empties", [1, 2])
def test_empty_operands_of_cat_are_left_out(empties: int) -> None:
    def cached(x: Tensor, y: Tensor) -> Tensor:
        nothing = [torch.tensor([], dtype=x.dtype) for _ in range(empties)]
        return torch.cat([torch.cat([*nothing, x], -2), y, *nothing], -2)

    x, y = torch.randn(1, 2, 3), torch.randn(1, 4, 3)
    graph = graphs.trace(cached, x, y)
    assert graphs.rewrite(empty_operands.run, graph, MESH) == 2
    assert graphs.ops(graph).count("aten.cat") == 1
    assert torch.equal(graph(x, y)[0], torch.cat([x, y], -2))


def test_cat_of_nothing_but_empties_stays() -> None:
    graph = graphs.trace(lambda x: torch.cat([x, x]), torch.empty(0, 2))
    assert graphs.rewrite(empty_operands.run, graph, MESH) == 0


def test_a_wider_empty_operand_still_decides_the_dtype() -> None:
    graph = graphs.trace(lambda x: torch.cat([torch.tensor([], dtype=torch.float64), x]), torch.randn(2))
    assert graphs.rewrite(empty_operands.run, graph, MESH) == 0
    assert graph(torch.randn(2))[0].dtype == torch.float64


def test_open_ends_of_slices_are_the_end_of_the_dim() -> None:
    def opened(x: Tensor) -> Tensor:
        y = torch.slice_scatter(x, x[:, 1:] * 2, 1, 1)
        return torch.slice_scatter(y, x[..., ::2], 2, 0, 2**63 - 1, 2)

    x = torch.randn(2, 5, 6)
    graph = graphs.trace(opened, x)
    assert graphs.rewrite(slice_bounds.run, graph, MESH) >= 1
    assert not any(2**63 - 1 in node.args for node in graph.graph.nodes)
    assert torch.equal(graph(x)[0], opened(x))
    assert graphs.rewrite(slice_bounds.run, graph, MESH) == 0
