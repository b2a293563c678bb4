"""Attention in the forms that TensorRT's layer has, and in those that it has not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import layers_of, network
from torch import Tensor, nn

import torchtrt_md as md
from torchtrt_md.build import layers, probes
from torchtrt_md.build.flavour import flavour
from torchtrt_md.errors import BuildError
from torchtrt_md.program import ShardedProgram

pytestmark = pytest.mark.usefixtures("own_cache")  # each test builds what it needs


class Attention(nn.Module):
    def __init__(self, scale: float | None = None) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale)


def attention(
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    scale: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> ShardedProgram:
    args = tuple(torch.randn(shape, dtype=dtype) for shape in (q, k, v))
    return md.capture(Attention(scale), args, mesh=md.Mesh(tp=1))


@pytest.mark.parametrize(
    ("width", "scale", "dtype", "constant"),
    [
        (16, None, torch.bfloat16, "BF16"),  # 1/4: exact
        (16, 0.0625, torch.float16, "HALF"),
        (32, None, torch.bfloat16, "FLOAT"),  # 1/sqrt(32) is not
        (32, None, torch.float16, "FLOAT"),
        (16, 0.1, torch.bfloat16, "FLOAT"),
        (32, None, torch.float32, "FLOAT"),
    ],
)
def test_the_scale_is_not_rounded_to_16_bits(
    width: int, scale: float | None, dtype: torch.dtype, constant: str, tmp_path: Path
) -> None:
    shape = (1, 2, 8, width)
    program = attention(shape, shape, shape, scale, dtype)
    net, _, _ = network(program)
    (factor,) = layers_of(net, "CONSTANT")
    (product,) = layers_of(net, "ELEMENTWISE")
    name = {torch.bfloat16: "BF16", torch.float16: "HALF", torch.float32: "FLOAT"}[dtype]
    assert factor.get_output(0).dtype.name == product.get_output(0).dtype.name == constant
    assert len(layers_of(net, "CAST")) == (2 if constant != name else 0)
    assert net.get_output(0).dtype.name == name
    assert len(md.build(program, tmp_path)) == 1


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((1, 2, 8, 16), (1, 2, 8, 16), (1, 2, 8, 32)),  # v wider
        ((1, 2, 8, 32), (1, 2, 8, 32), (1, 2, 8, 16)),  # v narrower
        ((1, 2, 8, 32), (3, 2, 8, 32), (3, 2, 8, 32)),  # one batch of q
        ((3, 2, 8, 32), (1, 2, 8, 32), (1, 2, 8, 32)),  # one of k and v
        ((1, 1, 8, 32), (3, 2, 4, 32), (3, 2, 4, 48)),  # a head, a batch and a width
        ((1, 4, 8, 32), (3, 1, 4, 32), (3, 1, 4, 16)),
    ],
)
def test_shapes_that_the_layer_has_not(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], tmp_path: Path
) -> None:
    program = attention(q, k, v)
    (value,) = program.outputs
    net, _, _ = network(program)
    assert tuple(net.get_output(0).shape) == value.shape
    assert len(md.build(program, tmp_path)) == 1


def test_the_scale_is_that_of_the_width_before_zeros() -> None:
    """The exact 1/4 of width 16 stays in the dtype; 1/sqrt(32), of the width filled up to, would be float32."""
    net, _, _ = network(attention((1, 2, 8, 16), (1, 2, 8, 16), (1, 2, 8, 32)))
    (factor,) = layers_of(net, "CONSTANT")
    assert factor.get_output(0).dtype.name == "BF16"


def test_shapes_that_cannot_be_are_named_at_the_layer() -> None:
    f = flavour()
    net = f.trt.Builder(probes._silent(f)).create_network(probes.network_flags(f))

    def heads(name: str, *shape: int) -> object:
        return net.add_input(name, f.trt.DataType.HALF, shape)

    one = probes._one(f, net, "HALF")
    q, k = heads("q", 2, 3, 8, 16), heads("k", 2, 2, 8, 16)  # 2 heads do not divide 3
    with pytest.raises(BuildError, match=r"q \(2, 3, 8, 16\), k \(2, 2, 8, 16\)"):
        layers.add_attention(f, net, q, k, k, None, False, one)
    flat = heads("flat", 8, 16)
    with pytest.raises(BuildError, match=r"four dims .* q \(8, 16\)"):
        layers.add_attention(f, net, flat, flat, flat, None, False, one)
