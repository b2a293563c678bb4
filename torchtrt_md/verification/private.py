"""The private names of PyTorch that running a model on meta needs: without them it cannot be verified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class ReadWhenUsed(Tensor):
    """A weight that is read whenever an op takes it, and has no memory in between.

    Args:
        form: its shape, strides and dtype.
        device: where ``read`` gives it, and where the model is to believe it is.
        read: gives its value.
    """

    read: Callable[[], Tensor]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # results are plain

    @staticmethod
    def __new__(cls, form: Tensor, device: torch.device, read: Callable[[], Tensor]) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls, form.shape, strides=form.stride(), dtype=form.dtype, device=device
        )
        made.read = read
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Do the op with the values."""
        args, kwargs = pytree.tree_map(lambda x: x.read() if isinstance(x, cls) else x, (args, kwargs or {}))
        return func(*args, **kwargs)
