"""What a quantizer computes that rounds to few bits and keeps the dtype, as NVIDIA's Model Optimizer has them.

    float8 e4m3     scale = 448 / amax,  y = e4m3(clamp(x scale, -448, 448)) / scale
    b bits          scale = (2^(b-1) - 1) / amax,  y = clamp(round(x scale), -2^(b-1), 2^(b-1) - 1) / scale

All is computed in float32, whatever the dtype: so a number that is a tie but for the order of sums in fp64 is one in
the model and in the program.  An amax of at most 2^-24 is none: b bits then give zero, and float8 scales by 448.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT8 = (8, 4)  # num_bits, exponent_bits
LARGEST_FLOAT8 = 448.0
NO_AMAX = 2.0**-24


def fake_quantized(x: Tensor, amax: Tensor, num_bits: int, exponent_bits: int, narrow_range: bool) -> Tensor:
    """x, each element rounded to ``num_bits``.

    Args:
        x: of any floating dtype and shape.
        amax: the largest magnitude that is represented; its dims are trailing ones of x, or 1.
        num_bits, exponent_bits: (8, 4) for float8 e4m3; else 0 exponent bits, and integers.
        narrow_range: integers without the least one, as -128.
    """
    numbers = rounded(x, amax, num_bits, exponent_bits, narrow_range)
    scale = scale_of(amax, num_bits, exponent_bits)
    if (num_bits, exponent_bits) == FLOAT8:
        return (numbers * (1 / scale)).to(x.dtype).contiguous()
    return (numbers / torch.where(scale == 0, 1.0, scale)).to(x.dtype).contiguous()


def rounded(x: Tensor, amax: Tensor, num_bits: int, exponent_bits: int, narrow_range: bool) -> Tensor:
    """The numbers of few bits, in float32 and not scaled back, of which :func:`fake_quantized` makes its result."""
    scaled = x.to(torch.float32) * scale_of(amax, num_bits, exponent_bits)
    if (num_bits, exponent_bits) == FLOAT8:
        return scaled.clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(torch.float8_e4m3fn).to(torch.float32)
    largest = 2.0 ** (num_bits - 1) - 1
    return scaled.round().clamp(-largest - (not narrow_range), largest)


def scale_of(amax: Tensor, num_bits: int, exponent_bits: int) -> Tensor:
    """What an element is multiplied with before it is rounded, float32."""
    amax = amax.to(torch.float32)
    none = amax <= NO_AMAX
    if (num_bits, exponent_bits) == FLOAT8:
        return LARGEST_FLOAT8 / torch.where(none, 1.0, amax)
    largest = 2.0 ** (num_bits - 1) - 1
    quotient = torch.full_like(amax, largest) / amax  # of a number, PyTorch would multiply with the reciprocal
    return torch.where(none, 0.0, quotient)
