"""What a model needs whose plan has styles that DTensor applies, so that it is traced as it was written.

A style as ``ColwiseParallel(use_local_output=False)`` hands on a DTensor, which knows its global shape.  So a model
that counts its heads itself, as by ``view(-1, self.num_heads, head_dim)``, runs on some of them unchanged.  There it
meets plain tensors, such as weights of norms and rotary tables, and DTensor has no rule for an RMS norm's addition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.overrides import TorchFunctionMode


@contextmanager
def beside_dtensor() -> Iterator[None]:
    """While active, a plain tensor beside a DTensor counts as whole, and DTensors have RMS norms.

    PyTorch's documentation calls the first unsafe: a plain tensor may be one rank's part, as a named style makes them.
    The comparison with the dense model finds that.
    """
    with implicit_replication(), _OutOfPlace():
        yield


class _OutOfPlace(TorchFunctionMode):
    """RMS norms of DTensors without ATen's addition in place, which no sum over a dim that is split can take."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (F.rms_norm, torch.rms_norm) and isinstance(args[0] if args else kwargs.get("input"), DTensor):
            return _rms_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _rms_norm(
    input: Tensor,  # as PyTorch names it, and as callers may
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    wide = input if input.dtype == torch.float64 else input.float()
    squares = wide.pow(2).mean(dim=list(range(-len(normalized_shape), 0)), keepdim=True)
    result = wide * (squares + (torch.finfo(wide.dtype).eps if eps is None else eps)).rsqrt()
    return (result if weight is None else result * weight).type_as(input)
