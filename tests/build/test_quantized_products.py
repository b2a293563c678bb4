"""Products of quantized operands: the scales behind them, and a power of two in TensorRT's layers."""

from __future__ import annotations

from typing import Any

import networks
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from torchtrt_md.build import builder, converters
from torchtrt_md.build.decompose import decompose
from torchtrt_md.lowering.ops import fake_quantize
from torchtrt_md.place import place

FLOAT8, INT8 = (8, 4, False), (8, 0, False)
linear, ops = nn.functional.linear, torch.ops.torchtrt_md


class Layers(nn.Module):
    """Two linear layers of one operand, as Model Optimizer quantizes them."""

    def __init__(self, how: Any, rows: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 32), nn.Linear(16, 24, bias=False)
        self.a.weight.data[3] = 0.0  # has no amax
        for name, layer in (("of_a", self.a), ("of_b", self.b)):
            weight = layer.weight.detach().abs()
            self.register_buffer(name, weight.amax(1, keepdim=True) if rows else weight.max())
        self.register_buffer("of_x", torch.tensor(2.0))
        self.how = how

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = fake_quantize(x, self.of_x, *self.how)
        a, b = (fake_quantize(layer.weight, of, *self.how) for layer, of in ((self.a, self.of_a), (self.b, self.of_b)))
        return linear(q, a, self.a.bias), linear(q, b)


def targets(graph: GraphModule) -> list[object]:
    return [node.target for node in graph.graph.nodes]


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("how", [FLOAT8, INT8])
@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 3e-7), (torch.bfloat16, 5e-3)])
def test_it_is_the_same_function(how: Any, rows: bool, dtype: torch.dtype, off: float) -> None:
    """Beyond what is represented, too, and in rows of zeros."""
    x = 2 * torch.randn(2, 8, 16, dtype=dtype)
    program = networks.lowered(Layers(how, rows).to(dtype), x)
    graph = decompose(program.graphs[0])
    assert targets(graph).count(ops.eight_bits.default) == 3, "the operand once, and two weights"
    assert ops.fake_quantize.default not in targets(graph)
    before, after = (networks.outputs(program, g, x) for g in (program.graphs[0], graph))
    for y, z in zip(before, after, strict=True):
        assert z.dtype == y.dtype
        assert torch.linalg.vector_norm((y - z).double()) <= off * torch.linalg.vector_norm(y.double())
    assert torch.equal(after[0][..., 3], before[0][..., 3])


def test_products_of_one_operand_get_units_of_their_own() -> None:
    """TensorRT-RTX would join them to one product, which is slow in 8 bits."""
    graph = decompose(networks.lowered(Layers(INT8, True), torch.randn(1, 8, 16)).graphs[0])
    rounding = graph.graph.find_nodes(op="call_function", target=ops.eight_bits.default)
    units = [node.args[4] for node in rounding if node.args[0].op == "placeholder" and node.meta["val"].ndim == 2]
    assert len(set(units)) == len(units) == 2, "of the weights"
    assert all(np.log2(float(unit)) % 1 == 0 for unit in units), "in which nothing is rounded"


class Many(nn.Module):
    """As many products of one operand as the keys and values of all cross attentions of a model."""

    def __init__(self, products: int, held: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        numbers = [torch.randint(-100, 101, (8, 16)).to(torch.int8) for _ in range(products)]
        weights = [n if held else n.float() / 40 for n in numbers]
        self.weights = nn.ParameterList([nn.Parameter(w, requires_grad=False) for w in weights])
        self.register_buffer("of_x", torch.tensor(2.0))
        self.of_weights = nn.Buffer(torch.tensor(3.0))

    def wide(self, weight: Tensor) -> Tensor:
        if weight.dtype == torch.int8:
            return weight.float() * (self.of_weights / 127)
        wide: Tensor = fake_quantize(weight, self.of_weights, *INT8)
        return wide

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q = fake_quantize(x, self.of_x, *INT8)
        return tuple(linear(q, self.wide(weight)) for weight in self.weights)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("flush", [False, True])
def test_any_number_of_products_of_one_operand_is_right(held: bool, flush: bool) -> None:
    """A unit of each would be zero at the 150th, or where what is not normal is flushed, at the 127th."""
    x = torch.randn(4, 16)
    program = networks.lowered(Many(300, held), x)
    graph = decompose(program.graphs[0])
    assert ops.eight_bits.default in targets(graph)
    torch.set_flush_denormal(flush)
    try:
        before, after = (networks.outputs(program, g, x) for g in (program.graphs[0], graph))
    finally:
        torch.set_flush_denormal(False)
    for y, z in zip(before, after, strict=True):
        torch.testing.assert_close(z, y)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("how", [FLOAT8, INT8])
@pytest.mark.parametrize("inside", [False, True])
def test_scales_of_q_and_dq_are_constants(how: Any, rows: bool, inside: bool) -> None:
    """Where weights and scales are inputs of the engine, too.  TensorRT multiplies in 8 bits only then."""
    program = networks.lowered(Layers(how, rows).to(torch.bfloat16), torch.randn(1, 8, 16, dtype=torch.bfloat16))
    if inside:
        net, _, keep = networks.network(program)
    else:
        converters.register()
        (part,) = place(program, "engine", ranks=[0]).parts[0]
        assert part.graph is not None
        keep = builder._convert(decompose(part.graph), part.segment)
        net = keep.ctx.net
    constants = {layer.get_output(0).name for layer in networks.layers_of(net, "CONSTANT")}
    quantize, dequantize = (networks.layers_of(net, kind) for kind in ("QUANTIZE", "DEQUANTIZE"))
    assert len(quantize) == len(dequantize) == 3
    for q, dq in zip(quantize, dequantize, strict=True):
        assert q.get_input(1).name == dq.get_input(1).name
        assert q.get_input(1).name in constants
        assert tuple(q.get_input(1).shape) == ()
        assert q.get_output(0).dtype.name == ("FP8" if how is FLOAT8 else "INT8")
        assert dq.get_output(0).dtype.name == "BF16"
    weights = sum(q.get_input(0).name in constants for q in quantize)
    assert weights == (2 if inside else 0)
    del keep


class Other(nn.Module):
    """One product, of operands quantized in some other way."""

    def __init__(self, of_x: Tensor, of_weight: Tensor, how: Any = INT8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6), requires_grad=False)
        self.register_buffer("of_x", of_x)
        self.register_buffer("of_weight", of_weight)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return linear(
            fake_quantize(x, self.of_x, *self.how),
            fake_quantize(self.weight, self.of_weight, *self.how),
        )


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        (Other(torch.ones(6), torch.ones(6, 1)), torch.float32),  # a scale for each feature is no factor of the product
        (Other(torch.tensor(1.0), torch.ones(1, 6)), torch.float32),
        (Other(torch.tensor(1.0), torch.ones(6)), torch.float32),
        (Other(torch.tensor(1.0), torch.tensor(1.0), (8, 0, True)), torch.float32),  # which TensorRT does not round
        (Other(torch.tensor(1.0), torch.tensor(1.0)), torch.float16),  # sums could be beyond its range
    ],
)
def test_what_is_no_factor_stays_where_it_is(model: Other, dtype: torch.dtype) -> None:
    graph = decompose(networks.lowered(model.to(dtype), torch.randn(4, 6, dtype=dtype)).graphs[0])
    assert ops.eight_bits.default not in targets(graph)
    assert ops.fake_quantize.default in targets(graph)


def test_a_value_that_others_read_is_scaled_back_for_them() -> None:
    class Both(Other):
        def forward(self, x: Tensor) -> Tensor:
            q: Tensor = fake_quantize(x, self.of_x, *self.how)
            return linear(q, fake_quantize(self.weight, self.of_weight, *self.how)) + q

    x = torch.randn(4, 6)
    program = networks.lowered(Both(torch.tensor(1.0), torch.full((6, 1), 2.0)), x)
    graph = decompose(program.graphs[0])
    assert {ops.eight_bits.default, ops.fake_quantize.default} <= set(targets(graph))
    (y,), (z,) = (networks.outputs(program, g, x) for g in (program.graphs[0], graph))
    torch.testing.assert_close(z, y)
