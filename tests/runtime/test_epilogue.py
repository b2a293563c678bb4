"""GELU in a product's epilogue."""

from __future__ import annotations

from collections.abc import Callable

import models
import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import torchtrt_md as md
from torchtrt_md.graph.functional import copied
from torchtrt_md.place import place
from torchtrt_md.runtime.epilogue import fuse_gelu

aten = torch.ops.aten


def traced(function: Callable[..., Tensor], dtype: torch.dtype = torch.bfloat16) -> tuple[GraphModule, list[Tensor]]:
    torch.manual_seed(0)
    operands = [torch.randn(1, 6, 16), torch.randn(32, 16) / 4, torch.randn(32)]
    inputs = [t.to(dtype) for t in operands]
    return make_fx(function, tracing_mode="fake")(*inputs), inputs


def test_it_is_fused_and_computes_the_same() -> None:
    graph, inputs = traced(lambda x, w, b: F.gelu(F.linear(x, w, b), approximate="tanh"))
    assert fuse_gelu(graph) == 1
    targets = {node.target for node in graph.graph.nodes}
    assert aten.gelu.default not in targets
    assert aten._addmm_activation.default in targets
    wide = [t.double() for t in inputs]
    exact = F.gelu(F.linear(*wide), approximate="tanh")
    plain = F.gelu(F.linear(*inputs), approximate="tanh")
    error, own = (((t.double() - exact).norm() / exact.norm()).item() for t in (graph(*inputs), plain))
    assert error <= 1.1 * own


def test_inductor_compiles_it() -> None:
    graph, inputs = traced(lambda x, w, b: F.gelu(F.linear(x, w, b), approximate="tanh") * 2)
    fuse_gelu(graph)
    expected = graph(*inputs)
    with torch.no_grad():
        result = torch._inductor.compile(graph, list(inputs))(*inputs)
    torch.testing.assert_close(torch.utils._pytree.tree_leaves(result), [expected])


@pytest.mark.parametrize(
    ("function", "dtype"),
    [
        (lambda x, w, b: F.gelu(F.linear(x, w, b)), torch.bfloat16),  # the exact form
        (lambda x, w, b: F.gelu(F.linear(x, w, b), approximate="tanh"), torch.float32),
        (lambda x, w, b: F.gelu(F.linear(x, w), approximate="tanh"), torch.bfloat16),
        (lambda x, w, b: (y := F.linear(x, w, b)) + F.gelu(y, approximate="tanh"), torch.bfloat16),  # read twice
    ],
)
def test_what_is_left_alone(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    graph, _ = traced(function, dtype)
    assert fuse_gelu(graph) == 0


def test_every_gelu_of_a_model_in_parts_is_fused() -> None:
    """What parts know of where a program was cut is nothing to those who compile them."""
    call = models.flux(torch.bfloat16)
    captured = md.capture(*call, mesh=md.Mesh(cp=2), parallel=md.ContextParallel("cp", "ulysses"))
    placed = place(md.lower(captured, placement="split"), "split", compute="inductor")
    graphs = [part.graph for part in placed.parts[0] if part.runs == "inductor" and part.graph is not None]
    written = sum(len(graph.graph.find_nodes(op="call_function", target=aten.gelu.default)) for graph in graphs)
    assert sum(fuse_gelu(copied(graph)) for graph in graphs) == written == 4  # of image and text, and two single blocks
