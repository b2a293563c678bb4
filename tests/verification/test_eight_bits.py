"""What is quantized is rounded to its eight bits in the widest precision too, and alike on all roads."""

from __future__ import annotations

from typing import Any

import pytest
import quantized
import torch
from graphs import trace
from torch import Tensor

import torchtrt_md as md
from torchtrt_md.errors import VerificationError
from torchtrt_md.verification.simulate import Precision, compute

aten = torch.ops.aten
WIDE = Precision(torch.float64)


def computed(function: Any, *operands: Tensor) -> Tensor:
    (result,) = compute(trace(lambda *x: (function(*x),), *operands), operands, WIDE)
    return result


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_cast_to_float8_rounds_and_is_held_wide(dtype: torch.dtype) -> None:
    x = torch.randn(64) * 3
    found = computed(lambda x: x.to(dtype).to(torch.float32) * 2, x)
    assert found.dtype == torch.float64
    assert torch.equal(found, x.to(dtype).double() * 2)


def test_a_cast_to_another_dtype_does_not_round() -> None:
    x = torch.randn(64)
    assert torch.equal(computed(lambda x: x.to(torch.bfloat16).to(torch.float32) * 2, x), x.double() * 2)


def test_a_tie_is_a_tie_whatever_noise_there_is() -> None:
    """By a symmetric quantization the largest of a row is one: 127.5."""
    ties = torch.tensor([127.5, -127.5, 0.5, 2.5, -1.5], dtype=torch.float64)
    graph = trace(lambda x: (x.round(), x.to(torch.float8_e4m3fn).to(torch.float32)), ties.float())
    for noise in (-1e-13, 0.0, 1e-13):
        rounded, narrow = compute(graph, [ties * (1 + noise)], WIDE)
        assert rounded.tolist() == [128.0, -128.0, 0.0, 2.0, -2.0]
        assert narrow.tolist() == [128.0, -128.0, 0.5, 2.5, -1.5]
    large = torch.tensor([2.0**30 + 0.75], dtype=torch.float64)  # of which float32 has no fraction
    assert compute(graph, [large], WIDE)[0] == 2.0**30 + 1


@pytest.mark.parametrize("rows", [1, 6])
def test_a_scaled_product_is_computed_wide(rows: int) -> None:
    x, y = (torch.randn(6, 16) * 4).to(torch.float8_e4m3fn), (torch.randn(32, 16) * 4).to(torch.float8_e4m3fn)
    a, b = torch.rand(rows, 1), torch.rand(1, 32 if rows > 1 else 1)
    bias = torch.randn(32, dtype=torch.bfloat16)

    def product(*operands: Tensor) -> Tensor:
        x, y, a, b, bias = operands
        return torch._scaled_mm(x, y.t(), a, b, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True)

    found = computed(product, x, y, a, b, bias)
    want = (x.double() @ y.double().t()) * a.double() * b.double() + bias.double()
    torch.testing.assert_close(found, want, rtol=1e-14, atol=1e-14)
    own = torch._scaled_mm(x, y.t(), a, b, bias=bias, out_dtype=torch.bfloat16)
    torch.testing.assert_close(own.double(), want, rtol=0.02, atol=0.02)


def test_a_product_of_int8_is_exact() -> None:
    x, y = torch.randint(-128, 128, (6, 16)).char(), torch.randint(-128, 128, (16, 8)).char()
    assert torch.equal(computed(torch._int_mm, x, y), (x.long() @ y.long()).int())


@pytest.mark.parametrize("config", quantized.DYNAMIC)
def test_a_program_that_leaves_a_rounding_out_is_caught(config: str) -> None:
    """In bfloat16 it would be the more accurate of the two."""
    call = quantized.mlp(config)
    model, args, kwargs = call
    plan = {"up": "colwise", "down": "rowwise"}
    program = md.lower(md.capture(model, args, kwargs, mesh=md.Mesh(tp=2), parallel=md.TensorParallel("tp", plan)))
    graph = program.graphs[0].graph
    if config == "int8 by row":
        for node in graph.find_nodes(op="call_function", target=aten.round.default):
            node.target, node.args = aten.mul.Tensor, (node.args[0], 0.99)
    else:
        for node in graph.nodes:
            if node.op == "call_function" and node.meta["val"].dtype == torch.float8_e4m3fn:
                node.meta["val"] = node.meta["val"].to(torch.bfloat16)
    with pytest.raises(VerificationError, match="the program does not compute what MLP computes"):
        md.verify(program, *call)
