"""Kernels of collectives without NCCL: one stores all parts of an exchange into other GPUs' memory, one adds up.

Two more pack rows in float8 (:mod:`torchtrt_md.lowering.float8_rows`), here or there, and unpack them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchtrt_md.lowering.float8_rows import LEAST, NOT_FINITE, packed_bytes

# For each peer: what keeps NVLink busy on an H200, and takes a part of its multiprocessors only.  More are faster by
# themselves, and slow down what runs beside them (benchmarks/results/2026-11-22-store-programs-h200-x4.md).
_PROGRAMS, _ALONE, _WORDS, _WARPS = 32, 64, 2048, 16
# Numbers that a program has in hand when it packs, and when it unpacks; packing computes, so more programs do it
# (benchmarks/results/2026-11-23-float8-exchanges-h200-x2.md).
_PACKED, _UNPACKED, _UNPACK_WARPS = 8192, 2048, 8


@triton.jit
def _store(to, source, count, PARTS: tl.constexpr, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program (i, part) copies every ``num_programs(0)``-th run of words of a part, from the i-th on."""
    for part in tl.static_range(PARTS):
        if tl.program_id(1) == part:
            for start in range(tl.program_id(0).to(tl.int64) * WORDS, count, tl.num_programs(0) * WORDS):
                at = start + tl.arange(0, WORDS)
                tl.store(to[part] + at, tl.load(source[part] + at, at < count), at < count)


def store(copies: Sequence[tuple[Tensor, Tensor]], *, alone: bool = False) -> None:
    """Enqueue the copies on the current stream, as one kernel.

    Args:
        copies: (to, from), contiguous, all of one size.
        alone: nothing runs beside it.
    """
    words = [(_words(to), _words(source)) for to, source in copies]
    word = min((pair for both in words for pair in both), key=lambda t: t.element_size()).dtype
    to, source = (tuple(t.view(word) for t in side) for side in zip(*words, strict=True))
    count = to[0].numel()
    grid = (min(_ALONE if alone else _PROGRAMS, triton.cdiv(count, _WORDS)), len(to))
    if count:
        _store[grid](to, source, count, PARTS=len(to), WORDS=_WORDS, num_warps=_WARPS)


def _words(tensor: Tensor) -> Tensor:
    """Its bytes, flat, as the widest integers that they divide into and are aligned to."""
    flat = tensor.view(-1).view(torch.uint8)
    odd = flat.numel() | flat.data_ptr()
    return flat.view(torch.int64 if odd % 8 == 0 else torch.int32 if odd % 4 == 0 else torch.uint8)


@triton.jit
def _add(out, parts, count, scale, PARTS: tl.constexpr, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    total = tl.load(parts + at, at < count).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += tl.load(parts + tl.cast(count, tl.int64) * part + at, at < count).to(tl.float32)
    tl.store(out + at, total * scale, at < count)


def add_up(parts: Tensor, out: Tensor, scale: float) -> None:
    """Enqueue the sum over dim 0, in float32 and in order, times a factor.

    Args:
        parts: [P, ...], of at most 32 bits an element, contiguous.
        out: [...] of the same dtype, contiguous.
    """
    count = out.numel()
    if count:
        _add[(triton.cdiv(count, _WORDS),)](out, parts, count, scale, PARTS=len(parts), WORDS=_WORDS)


@triton.jit
def _pack(  # type: ignore[no-untyped-def]
    to,
    source,
    rows,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    LEAST: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Program (i, part) packs every ``num_programs(0)``-th run of rows of a part, from the i-th on."""
    column = tl.arange(0, COLUMNS)
    for part in tl.static_range(PARTS):
        if tl.program_id(1) == part:
            for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
                row = (start + tl.arange(0, ROWS)).to(INDEX)
                at = row[:, None] * WIDTH + column[None, :]
                inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
                x = tl.load(source[part] + at, inside, other=0.0).to(tl.float32)
                magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # in the order of the numbers, NaN last
                exponent = tl.maximum(tl.max(magnitude, 1) >> 23, LEAST)
                scale = ((261 - exponent) << 23).to(tl.float32, bitcast=True)
                numbers = (x * scale[:, None]).to(tl.float8e4nv)
                tl.store(to[part] + at, numbers.to(tl.uint8, bitcast=True), inside)
                tl.store(to[part] + tl.cast(rows, INDEX) * WIDTH + row, exponent.to(tl.uint8), row < rows)


def pack(copies: Sequence[tuple[Tensor, Tensor]], *, alone: bool = False) -> None:
    """Enqueue the packing of some tensors on the current stream, as one kernel.

    Args:
        copies: (to, from): uint8 [1, bytes] of one [..., D] each, contiguous, all of one shape and dtype.
        alone: nothing runs beside it.
    """
    to, source = zip(*copies, strict=True)
    if not source[0].numel():
        return
    width = source[0].shape[-1]
    rows, columns = source[0].numel() // width, triton.next_power_of_2(width)
    at_once = max(_PACKED // columns, 1)
    grid = (min(2 * (_ALONE if alone else _PROGRAMS), triton.cdiv(rows, at_once)), len(to))
    _pack[grid](
        to,
        source,
        rows,
        PARTS=len(to),
        WIDTH=width,
        COLUMNS=columns,
        ROWS=at_once,
        LEAST=LEAST,
        INDEX=_index(source[0]),
        num_warps=_WARPS,
    )


@triton.jit
def _unpack(  # type: ignore[no-untyped-def]
    out,
    numbers,
    rows,
    stride,
    most,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    NOT_FINITE: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Program (i, part) unpacks the i-th run of rows of a part."""
    part = tl.program_id(1).to(tl.int64)
    numbers += part * stride
    out += part * rows * WIDTH
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(INDEX)
    column = tl.arange(0, COLUMNS)
    at = row[:, None] * WIDTH + column[None, :]
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    x = tl.load(numbers + at, inside, other=0).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    exponent = tl.load(numbers + tl.cast(rows, INDEX) * WIDTH + row, row < rows, other=0).to(tl.int32)
    scale = tl.where(exponent == NOT_FINITE, float("nan"), ((exponent - 7) << 23).to(tl.float32, bitcast=True))
    x *= scale[:, None]
    x = tl.where(x > most, most, tl.where(x < -most, -most, x))  # NaN stays
    tl.store(out + at, x, inside)


def unpack(numbers: Tensor, out: Tensor) -> None:
    """Enqueue the unpacking.

    Args:
        numbers: uint8 [parts, bytes], contiguous.
        out: [parts n, ..., D], contiguous.
    """
    if not out.numel():
        return
    parts, width = len(numbers), out.shape[-1]
    assert numbers.shape[1] == packed_bytes(out.shape, parts)
    rows, columns = out.numel() // width // parts, triton.next_power_of_2(width)
    at_once = max(_UNPACKED // columns, 1)
    _unpack[(triton.cdiv(rows, at_once), parts)](
        out,
        numbers,
        rows,
        numbers.shape[1],
        torch.finfo(out.dtype).max,
        WIDTH=width,
        COLUMNS=columns,
        ROWS=at_once,
        NOT_FINITE=NOT_FINITE,
        INDEX=_index(out),
        num_warps=_UNPACK_WARPS,
    )


def _index(x: Tensor) -> tl.dtype:
    """Of what elements, and the bytes that they become, are counted in: 64 bits take longer."""
    return tl.int32 if packed_bytes(x.shape, 1) + 2 * _PACKED * _ALONE < 2**31 else tl.int64
