"""Quantizers in engines: TensorRT's own Q and DQ, and what stays in PyTorch because they would do something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchtrt_md as md
from torchtrt_md.build.flavour import flavour
from torchtrt_md.build.part import unconvertible
from torchtrt_md.errors import BuildError
from torchtrt_md.lowering.ops import fake_quantize
from torchtrt_md.options import Options
from torchtrt_md.program import ShardedProgram
from torchtrt_md.road import Road

FLOAT8, INT8 = (8, 4, False), (8, 0, False)


class Layer(nn.Module):
    """Quantizes its argument and a table, and multiplies them by each other's elements: no product of matrices."""

    of_weight: Tensor

    def __init__(self, how: Any, rows: bool, dynamic: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(32, 16), requires_grad=False)
        self.weight.data[3] = 0.0
        amax = self.weight.abs().amax(1, keepdim=True) if rows else self.weight.abs().max()
        self.register_buffer("of_weight", amax)
        self.register_buffer("of_argument", torch.tensor(2.5))
        self.how, self.dynamic = how, dynamic

    def forward(self, x: Tensor) -> Tensor:
        amax = x.abs().max() if self.dynamic else self.of_argument
        quantized: Tensor = fake_quantize(x, amax, *self.how) * fake_quantize(self.weight, self.of_weight, *self.how)
        return quantized


def captured(layer: Layer, dtype: torch.dtype = torch.float32, mesh: md.Mesh | None = None) -> ShardedProgram:
    return md.capture(layer.to(dtype), (torch.randn(1, 32, 16, dtype=dtype),), mesh=mesh or md.Mesh(tp=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("how", [FLOAT8, INT8])
def test_a_network_has_q_and_dq_with_the_scales(how: Any, rows: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """And TensorRT builds it: for the weight too, which constant folding would otherwise have made wide again."""
    layer = Layer(how, rows)
    program = captured(layer, dtype)
    net, _, _ = networks.network(program)
    quantize, dequantize = (networks.layers_of(net, kind) for kind in ("QUANTIZE", "DEQUANTIZE"))
    assert len(quantize) == len(dequantize) == 2
    for q, dq in zip(quantize, dequantize, strict=True):
        assert q.get_output(0).dtype.name == ("FP8" if how is FLOAT8 else "INT8")
        assert q.get_input(1).name == dq.get_input(1).name
        assert dq.get_input(0).name == q.get_output(0).name
        assert dq.get_output(0).dtype == q.get_input(0).dtype
        assert tuple(q.get_output(0).shape) == tuple(q.get_input(0).shape)
    scales = {tuple(q.get_input(1).shape) for q in quantize}
    assert scales == {(), (32,)} if rows else {()}
    assert all(q.get_input(1).dtype.name == "FLOAT" for q in quantize)
    (engine,) = md.build(md.lower(program), tmp_path, target="portable")
    assert engine.file.stat().st_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("how", [FLOAT8, INT8])
def test_float8_is_within_its_range_in_front_of_q(how: Any, rows: bool, dtype: torch.dtype) -> None:
    """Without it TensorRT-RTX makes NaN of a whole FLUX."""
    layer = Layer(how, rows)
    with torch.no_grad():
        layer.of_weight.mul_(0.5)  # as a calibration that leaves outliers out
    net, _, interpreter = networks.network(captured(layer, dtype))
    selects = networks.layers_of(net, "SELECT")
    assert len(selects) == (2 if how is FLOAT8 else 0), "of the argument; the weight is a constant"
    found = {}
    for constant in networks.layers_of(net, "CONSTANT"):
        constant.__class__ = flavour().trt.IConstantLayer
        found[constant.get_output(0).name] = constant.get_output(0).dtype, constant.weights
    for q in networks.layers_of(net, "QUANTIZE"):
        x = q.get_input(0)
        if x.name not in found:
            assert how is INT8 or x.name == selects[-1].get_output(0).name
        elif found[x.name][0] == flavour().trt.float32:
            beyond = np.abs(np.reshape(found[x.name][1], (32, 16))) > layer.of_weight.numpy()
            assert beyond.any() == (how is INT8)
    del interpreter


@pytest.mark.parametrize("how", [FLOAT8, INT8])
def test_the_scale_is_amax_over_the_largest_number(how: Any) -> None:
    """And of a row that is all zero, one with which zero stays zero."""
    layer = Layer(how, rows=True)
    net, _, interpreter = networks.network(captured(layer))
    found = {}
    for constant in networks.layers_of(net, "CONSTANT"):
        constant.__class__ = flavour().trt.IConstantLayer
        found[constant.get_output(0).name] = np.array(constant.weights, copy=True)
    values = [found[q.get_input(1).name] for q in networks.layers_of(net, "QUANTIZE")]
    largest = 448.0 if how is FLOAT8 else 127.0
    of_argument, of_weight = sorted(values, key=np.size)
    assert of_argument.reshape(-1) == pytest.approx([2.5 / largest])
    want = (layer.of_weight.reshape(-1) / largest).numpy()
    assert of_weight[np.arange(32) != 3] == pytest.approx(want[np.arange(32) != 3])
    assert of_weight[3] == pytest.approx(1 / 448 if how is FLOAT8 else 2.0**100)
    del interpreter


def test_weights_as_inputs_are_quantized_in_the_engine(tmp_path: Path) -> None:
    options = Options(mesh=md.Mesh(tp=1), target="portable", cache=str(tmp_path))
    road = Road(captured(Layer(INT8, rows=True)), options, ranks=[0])
    choices = road.default()
    built = road.build(road.lower(choices), choices)
    (part,) = built.parts[0]
    assert part.engine is not None
    assert {b.weight for b in part.segment.inputs} == {"weight", "of_weight", "of_argument", None}
    assert not built.placed.kept


@pytest.mark.parametrize(
    ("how", "dynamic", "reason"),
    [
        ((8, 0, True), False, "begin at -128"),
        ((4, 0, False), False, "no integers of 4 bits"),
        (INT8, True, "its scale is found in each call"),
    ],
)
def test_what_tensorrt_would_round_otherwise_stays_in_pytorch(
    how: Any, dynamic: bool, reason: str, tmp_path: Path
) -> None:
    program = md.lower(captured(Layer(how, True, dynamic)))
    found = unconvertible(program.graphs[0])
    assert found
    assert all(reason in why for why in found.values())
    with pytest.raises(BuildError, match=reason) as error:  # no engine does it silently, either
        md.build(program, tmp_path, target="portable")
    assert "inductor" in error.value.fix
    options = Options(mesh=md.Mesh(tp=1), target="portable", cache=str(tmp_path))
    road = Road(program, options, ranks=[0])
    kept = road.build(program, road.default()).placed.kept
    assert {k.op for k in kept} == {"torchtrt_md.fake_quantize.default"}


def test_scales_of_several_dims_stay_in_pytorch() -> None:
    class Tokens(nn.Module):
        def forward(self, x: Tensor, amax: Tensor) -> Tensor:
            quantized: Tensor = fake_quantize(x, amax, *INT8)
            return quantized

    program = md.capture(Tokens(), (torch.randn(2, 8, 6), torch.ones(2, 8, 1)), mesh=md.Mesh(tp=1))
    (reason,) = unconvertible(md.lower(program).graphs[0]).values()
    assert reason == "TensorRT has scales of one dim only, and these are [2, 8, 1]"
