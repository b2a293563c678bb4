"""Quantizers that keep the dtype: what they compute, and what becomes of them along a split sequence."""

from __future__ import annotations

from typing import Any

import pytest
import split_functions as sf
import torch
from torch import Tensor

from torchtrt_md.errors import CaptureError
from torchtrt_md.lowering.ops import fake_quantize

FLOAT8, INT8 = (8, 4, False), (8, 0, False)


def test_integers_are_rounded_to_the_scale_that_amax_gives() -> None:
    x = torch.tensor([-3.0, -2.01, -1.0, 0.0, 0.5, 0.509, 1.0, 1e9])
    amax = torch.tensor(2.0)
    step = 2 / 127
    whole = fake_quantize(x, amax, *INT8)
    assert torch.allclose(whole, torch.tensor([-128, -128, -64, 0, 32, 32, 64, 127]) * step)
    narrow = fake_quantize(x, amax, 8, 0, True)
    assert torch.equal(narrow[2:], whole[2:])
    assert torch.allclose(narrow[:2], torch.tensor(-2.0))
    few = [-16 / 7, -2, -8 / 7, 0, 4 / 7, 8 / 7, 2]
    assert fake_quantize(x, amax, 4, 0, False).unique().tolist() == pytest.approx(few)


def test_float8_is_that_of_pytorch() -> None:
    x, amax = torch.randn(64), torch.tensor(1.75)
    scale = 448 / 1.75
    want = (x.clamp(-1.75, 1.75) * scale).to(torch.float8_e4m3fn).float() / scale
    assert torch.equal(fake_quantize(x, amax, *FLOAT8), want)


@pytest.mark.parametrize("how", [FLOAT8, INT8])
def test_a_double_is_rounded_as_a_float_and_16_bits_stay(how: Any) -> None:
    x, amax = torch.randn(3, 8), torch.rand(3, 1)
    want = fake_quantize(x, amax, *how)
    assert torch.equal(fake_quantize(x.double() * (1 + 1e-15), amax.double(), *how), want.double())
    narrow = fake_quantize(x.bfloat16(), amax, *how)
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow, fake_quantize(x.bfloat16().float(), amax, *how).bfloat16())
    assert torch.equal(fake_quantize(x.t(), amax.t(), *how), want.t())


def test_without_an_amax_integers_are_zero_and_float8_is_not_scaled_up() -> None:
    """A row of a weight may be all zero, and a layer may never have been called with anything else."""
    x = torch.tensor([[0.0, 1.0], [3.0, 400.0]])
    for none in (0.0, 2.0**-25):
        amax = torch.tensor([[1.0], [none]])
        assert torch.equal(fake_quantize(x, amax, *INT8)[1], torch.zeros(2))
        assert torch.equal(fake_quantize(x, amax, *FLOAT8)[1], torch.tensor([1.0, 1.0]).clamp(max=1.0))


@pytest.mark.parametrize("shape", [(), (1,), (6,), (1, 1, 6), (1, 8, 1), (8, 1), (2, 1, 1), (2, 8, 1)])
@pytest.mark.parametrize("how", [FLOAT8, INT8])
def test_a_scale_is_split_with_the_dim_that_it_is_of(shape: tuple[int, ...], how: Any) -> None:
    x, amax = torch.randn(2, 8, 6), torch.rand(shape) + 0.5
    graph = sf.trace(lambda x, amax: fake_quantize(sf.shard(x), amax, *how), x, amax)
    sf.analyze(graph)
    assert sf.targets(graph).count("all_gather") == 0
    (state,) = sf.check_claims(graph, [x, amax], (fake_quantize(x, amax, *how),))
    assert state is not None
    assert state.dim == 1


def test_a_scale_that_is_found_in_the_call_is_that_of_all_ranks() -> None:
    def function(x: Tensor) -> Tensor:
        quantized: Tensor = fake_quantize(x, x.abs().max(), *INT8)
        return quantized

    x = torch.randn(2, 8, 6)
    x[0, 1, 2] = 9.0  # which one rank has
    graph = sf.trace(lambda x: function(sf.shard(x)), x)
    sf.analyze(graph)
    assert sf.targets(graph).count("all_gather") == 1
    sf.check_claims(graph, [x], (function(x),))


@pytest.mark.parametrize("shape", [(4,), (3, 1), (1, 2, 8, 6)])
def test_a_scale_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(CaptureError, match=r"an amax of .*, and quantizes \[2, 8, 6\]"):
        sf.trace(lambda x, amax: fake_quantize(x, amax, *INT8), torch.randn(2, 8, 6), torch.ones(shape))
