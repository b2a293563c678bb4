"""Kernels of collectives without NCCL: one stores all parts of an exchange into other GPUs' memory, one adds up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# For each peer: what keeps NVLink busy on an H200, and takes a part of its multiprocessors only.  More are faster by
# themselves, and slow down what runs beside them (benchmarks/results/2026-11-22-store-programs-h200-x4.md).
_PROGRAMS, _ALONE, _WORDS, _WARPS = 32, 64, 2048, 16


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
