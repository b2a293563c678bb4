"""Weights that are held in 8 bits: as inputs of an engine and inside it, with TensorRT's layer that makes them wide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from torch import Tensor, nn

import torchtrt_md as md
from torchtrt_md.build import builder, converters
from torchtrt_md.build.decompose import decompose
from torchtrt_md.build.part import unconvertible
from torchtrt_md.bundle.read import read_manifest
from torchtrt_md.lowering.ops import fake_quantize
from torchtrt_md.place import place

linear, ops = nn.functional.linear, torch.ops.torchtrt_md
OF = {torch.int8: (8, 0, False), torch.float8_e4m3fn: (8, 4, False)}
HELD = sorted(OF, key=str)


class Held(nn.Module):
    """Two linear layers of one operand that is quantized; the weights are held in 8 bits, and scaled by rows."""

    def __init__(self, held: torch.dtype, *, quantized: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.quantized = OF[held], quantized
        for name, rows in (("a", 32), ("b", 24)):
            numbers = torch.randint(-100, 101, (rows, 16)).to(held)
            self.register_parameter(name, nn.Parameter(numbers, requires_grad=False))
            self.register_buffer(f"of_{name}", torch.rand(rows, 1) / 100 + 0.001)
        self.bias = nn.Parameter(torch.randn(32), requires_grad=False)
        self.register_buffer("of_x", torch.tensor(2.0))

    def wide(self, name: str, dtype: torch.dtype) -> Tensor:
        held: Tensor = getattr(self, name)
        scale: Tensor = getattr(self, f"of_{name}")
        return held.to(dtype) * scale.to(dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q: Tensor = fake_quantize(x, self.of_x, *self.how) if self.quantized else x
        return linear(q, self.wide("a", x.dtype), self.bias.to(x.dtype)), linear(q, self.wide("b", x.dtype))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 3e-7), (torch.bfloat16, 6e-3), (torch.float16, 6e-4)])
def test_it_is_the_same_function(held: torch.dtype, quantized: bool, dtype: torch.dtype, off: float) -> None:
    x = torch.randn(2, 8, 16, dtype=dtype)
    program = networks.lowered(Held(held, quantized=quantized), x)
    graph = decompose(program.graphs[0])
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(ops.held_numbers.default) == 2
    # where the operand has its scale behind the product, too, the weights have; float16 could not hold the sums
    assert targets.count(ops.eight_bits.default) == (quantized and dtype != torch.float16)
    before, after = (networks.outputs(program, g, x) for g in (program.graphs[0], graph))
    for y, z in zip(before, after, strict=True):
        assert z.dtype == y.dtype
        assert torch.linalg.vector_norm((y - z).double()) <= off * torch.linalg.vector_norm(y.double())


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("inside", [False, True])
def test_no_weight_is_quantized_when_the_engine_runs(held: torch.dtype, inside: bool, quantized: bool) -> None:
    """As an input it has DQ alone; inside, a Q of a constant, which TensorRT folds."""
    program = networks.lowered(Held(held, quantized=quantized), torch.randn(1, 8, 16, dtype=torch.bfloat16))
    if inside:
        net, _, keep = networks.network(program)
    else:
        converters.register()
        (part,) = place(program, "engine", ranks=[0], boundary=(torch.bfloat16, torch.float32)).parts[0]
        assert part.graph is not None
        assert not unconvertible(part.graph)
        keep = builder._convert(decompose(part.graph), part.segment)
        net = keep.ctx.net
    constants = {layer.get_output(0).name for layer in networks.layers_of(net, "CONSTANT")}
    inputs = {net.get_input(i).name: net.get_input(i).dtype.name for i in range(net.num_inputs)}
    quantize, dequantize = (networks.layers_of(net, kind) for kind in ("QUANTIZE", "DEQUANTIZE"))
    kind = "INT8" if held == torch.int8 else "FP8"
    assert len(dequantize) == 2 + quantized
    assert len(quantize) == quantized + (2 if inside else 0)
    assert sum(q.get_input(0).name in constants for q in quantize) == (2 if inside else 0)
    assert sum(dq.get_input(0).name in inputs for dq in dequantize) == (0 if inside else 2)
    assert sum(dtype == kind for dtype in inputs.values()) == (0 if inside else 2)
    for dq in dequantize:
        assert dq.get_input(1).name in constants
        assert dq.get_input(0).dtype.name == kind
        assert dq.get_output(0).dtype.name == "BF16"
    del keep


class Otherwise(nn.Module):
    """An op on numbers of 8 bits that is no cast."""

    def __init__(self) -> None:
        super().__init__()
        self.held = nn.Buffer(torch.arange(6, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.held + self.held).to(x.dtype)


def test_other_ops_on_them_stay_out_of_engines() -> None:
    converters.register()
    program: Any = networks.lowered(Otherwise(), torch.randn(6))
    refused = unconvertible(program.graphs[0])
    assert len(refused) == 2, "the sum and its cast"
    assert all("layers of its own only" in reason for reason in refused.values())


class Given(nn.Module):
    """Any function of an input and of what is held."""

    def __init__(self, function: Callable[..., Any], **held: Tensor) -> None:
        super().__init__()
        self.function, self.names = function, tuple(held)
        for name, tensor in held.items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *(getattr(self, name) for name in self.names))


W = torch.arange(-48, 48, dtype=torch.int8).view(6, 16)
CASES: dict[str, tuple[Given, Tensor, list[str]]] = {
    "of no dims": (Given(lambda x, w: x * w.float(), w=W[0, 0]), torch.randn(5, 16), ["eager", "engine"]),
    "returned, too": (Given(lambda x, w: (w, x @ w.float().t()), w=W), torch.randn(5, 16), ["engine", "eager"]),
    "an input, returned, too": (Given(lambda x, w: (x, x.float() @ w), w=torch.randn(16, 3)), W, ["engine", "eager"]),
    "returned alone": (
        Given(lambda x, v, w: (x @ v, w), v=torch.randn(16, 3), w=W),
        torch.randn(5, 16),
        ["engine", "eager"],
    ),
    "a constant, returned": (Given(lambda x: (x * 2, W)), torch.randn(3), ["engine", "eager"]),
    "of fewer dims than its scale": (
        Given(
            lambda x, w, scale, of_x: linear(fake_quantize(x, of_x, 8, 0, False), w.float() * scale),
            w=W[0],
            scale=torch.rand(6, 1),
            of_x=torch.tensor(2.0),
        ),
        torch.randn(5, 16),
        ["engine"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_engines_are_given_what_they_can_take(case: str, tmp_path: Path) -> None:
    """And return nothing in 8 bits."""
    model, x, runs = CASES[case]
    md.export(model, (x,), mesh=md.Mesh(tp=1), out=tmp_path / "held.mdtrt")
    found = [segment.runs for segment in read_manifest(tmp_path / "held.mdtrt").ranks[0]]
    assert found[-len(runs) :] == runs
