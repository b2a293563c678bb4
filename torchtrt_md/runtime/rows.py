"""Rows in float8 (:mod:`torchtrt_md.lowering.float8_rows`) in memory: by kernels of Triton where GPUs are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchtrt_md.errors import LaunchError
from torchtrt_md.lowering.float8_rows import FLOAT8_CAPABILITY, packed, unpacked


def check_device(device: torch.device) -> None:
    """See that a device can convert.

    Raises:
        LaunchError: it cannot.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY:
        raise LaunchError(
            f"{torch.cuda.get_device_name(device)} does not convert to float8; GPUs of compute capability 8.9 do",
            fix="leave exchange_dtype out",
        )


def pack(copies: Sequence[tuple[Tensor, Tensor]], *, alone: bool = False) -> None:
    """Write each tensor [..., D] packed into uint8 [1, bytes], which may be another GPU's memory.

    Args:
        copies: (to, from), contiguous, all of one shape.
        alone: nothing runs beside it.
    """
    if copies[0][1].is_cuda:
        from torchtrt_md.runtime import store  # Triton is there where GPUs are

        store.pack(copies, alone=alone)
        return
    for to, x in copies:
        to.copy_(packed(x, 1))


def unpack(numbers: Tensor, out: Tensor) -> None:
    """Read what was packed, uint8 [parts, bytes], into a contiguous tensor [parts n, ..., D]."""
    if out.is_cuda:
        from torchtrt_md.runtime import store

        store.unpack(numbers, out)
        return
    out.copy_(unpacked(numbers, out.shape, out.dtype))
