"""What ops give of tensors without memory, computed once for equal operands, since models repeat their blocks.

Nodes then share fake tensors, so none is changed in place, and no placeholder has one of these: a trace that is given
one tensor twice takes it for one operand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from torchtrt_md.graph.private import FakeTensorMode

_known: ContextVar[dict[tuple[Any, ...], Any] | None] = ContextVar("results that are known", default=None)


@contextmanager
def each_once() -> Iterator[None]:
    """Compute each different result once as long as this lasts."""
    if _known.get() is not None:
        yield
        return
    token = _known.set({})
    try:
        yield
    finally:
        _known.reset(token)


def fake_result(
    mode: FakeTensorMode, op: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> Any:
    """What a functional op gives of this mode's fake tensors."""
    known = _known.get()
    key = (op, id(mode), signature(args), signature(kwargs))
    if known is None or key not in known:
        with mode:
            found = op(*args, **(kwargs or {}))
        if known is None:
            return found
        known[key] = found
    return known[key]


def signature(value: Any) -> Any:
    """All of an operand that the dtype, shape and memory of a result can depend on, to be hashed."""
    if isinstance(value, Tensor):
        memory = (value.storage_offset(), value.untyped_storage().nbytes(), value.is_conj(), value.is_neg())
        return (value.dtype, value.device, value.shape, value.stride(), *memory)
    if isinstance(value, (list, tuple)):
        return tuple(signature(item) for item in value)
    if isinstance(value, dict):
        return tuple((name, signature(item)) for name, item in value.items())
    return (type(value), value)
