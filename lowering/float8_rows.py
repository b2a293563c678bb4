"""Rows in float8, which is half of what bfloat16 takes to send.

    row of D numbers  ->  e4m3(x 2^(7 - e)) for each, and one byte: e + 127, where 2^e <= max |x| < 2^(e + 1)

The scale is a power of two, so it adds no rounding of its own, and numbers that are sent on again round to themselves,
except the smallest of a row whose largest was rounded up to the next power.  Each is off by at most 1/16 of itself, or
2^-17 of the largest of its row.  A row with an infinity or a NaN arrives as NaN.  Rows whose largest number is below
2^-93 lose more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT8 = "float8"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ALIGNED = 16  # bytes; what each part takes is a multiple of it, so that all begin where a wide load can
FLOAT8_CAPABILITY = (8, 9)  # of the first GPUs that convert to float8
LEAST = 34  # the least exponent byte: 2^(134 - 34) is the largest scale
LARGEST_ERROR = 2.0**-4  # of a number, relative
NOT_FINITE = 255  # the exponent byte of infinities and NaN


def packed_bytes(shape: Sequence[int], parts: int) -> int:
    """What one of so many parts of a tensor takes; rows are along the last dim."""
    rows = math.prod(shape[:-1]) // parts if shape[-1] else 0
    return -(-rows * (shape[-1] + 1) // _ALIGNED) * _ALIGNED


def packed(x: Tensor, parts: int) -> Tensor:
    """x [parts n, ..., D] as uint8 [parts, bytes]: of each part the numbers, then the rows' exponents."""
    out = x.new_zeros(parts, packed_bytes(x.shape, parts), dtype=torch.uint8)
    if not x.numel():
        return out
    rows = x.float().reshape(parts, -1, x.shape[-1])
    # By their bits, as the kernel does: of those of a NaN the floating amax may have the sign.
    exponent = ((rows.view(torch.int32) & 0x7FFFFFFF).amax(-1) >> 23).clamp(min=LEAST)
    scale = ((261 - exponent) << 23).view(torch.float32)  # 2^(134 - exponent)
    numbers = (rows * scale.unsqueeze(-1)).to(torch.float8_e4m3fn).view(torch.uint8).flatten(1)
    count = numbers.shape[1]
    out[:, :count] = numbers
    out[:, count : count + exponent.shape[1]] = exponent.to(torch.uint8)
    return out


def unpacked(numbers: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What :func:`packed` was given, as far as it was sent: uint8 [parts, bytes] -> [parts n, ..., D]."""
    parts, width = len(numbers), shape[-1]
    if not math.prod(shape):
        return numbers.new_zeros(tuple(shape), dtype=dtype)
    count = math.prod(shape) // parts
    exponent = numbers[:, count : count + count // width].to(torch.int32)
    scale = ((exponent - 7) << 23).view(torch.float32)  # 2^(exponent - 134)
    scale = torch.where(exponent == NOT_FINITE, torch.nan, scale)
    rows = numbers[:, :count].view(torch.float8_e4m3fn).reshape(parts, -1, width).float() * scale.unsqueeze(-1)
    most = torch.finfo(dtype).max  # the largest numbers may have been rounded up beyond it
    return rows.clamp(-most, most).to(dtype).reshape(tuple(shape))


def rounded(x: Tensor) -> Tensor:
    """x as it arrives."""
    return unpacked(packed(x, 1), x.shape, x.dtype)
