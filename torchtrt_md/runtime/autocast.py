"""Autocast, which is none of a program's: its casts were captured, as ops of the graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_KINDS = ("cpu", "cuda")


@contextmanager
def without_autocast() -> Iterator[None]:
    """Let ops compute in the dtypes of their operands.

    Under autocast an op that PyTorch runs would return another dtype than the part that reads its result was compiled
    for, and the part reads the memory as if it were its own.
    """
    with ExitStack() as stack:
        for kind in _KINDS:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
