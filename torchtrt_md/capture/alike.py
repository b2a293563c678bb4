"""Do two modules hold the same, but for the values of their weights?"""

from __future__ import annotations

import functools
from collections import OrderedDict
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

# Values that are equal or not, and that nothing can change.
_ATOMS = (
    *(type(None), bool, int, float, complex, str, bytes, type(...)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)
_NAMED = (type, FunctionType, BuiltinFunctionType, ModuleType, torch._ops.OpOverload, torch._ops.OpOverloadPacket)
_WEIGHTS = ("_parameters", "_buffers")
_HOOKS = frozenset(name for name in vars(nn.Module()) if name.startswith("_forward_"))
_CONTAINERS = (tuple, list, dict, OrderedDict, set, frozenset)
_POINTER = 8  # bytes
# What was compared, by the id of each; kept, so that no other object has its address.
_Pairs: TypeAlias = dict[tuple[str, int], tuple[Any, Any]]


def alike(a: nn.Module, b: nn.Module) -> bool:
    """Of what these hold, at any depth, is all equal that can decide what their ``forward`` does?

    Weights count by their names.  The modules' own hooks do not count: they run around ``forward``.  Whatever
    cannot be compared, such as an iterator, is not equal, not even to itself: it may be another at the next call.
    """
    return _same_module(a, b, {}, outer=True)


def is_atom(value: object) -> bool:
    """Is it equal to another or not, and can nothing change it?"""
    return type(value) in _ATOMS or isinstance(value, Enum)


def same(a: Any, b: Any) -> bool:
    """The same of two values of any kind."""
    return _same(a, b, {})


def _same(a: Any, b: Any, pairs: _Pairs) -> bool:
    if type(a) is not type(b):
        return False
    if is_atom(a):
        return bool(a == b) and str(a) == str(b)  # 0.0 == -0.0
    known = pairs.get(("a", id(a))) or pairs.get(("b", id(b)))
    if known is not None:  # what is one object here is one object there
        return known[0] is a and known[1] is b
    pairs["a", id(a)] = pairs["b", id(b)] = a, b
    if isinstance(a, (*_NAMED, Tensor)):
        return a is b
    if isinstance(a, nn.Module):
        return False  # one that is no part: whoever asks for the weights does not see its
    if isinstance(a, MethodType):
        return _same((a.__func__, a.__self__), (b.__func__, b.__self__), pairs)
    if isinstance(a, functools.partial):
        return _same((a.func, a.args, a.keywords), (b.func, b.args, b.keywords), pairs)
    if not _is_plain(type(a)):
        return False
    if isinstance(a, (tuple, list)):
        content = len(a) == len(b) and all(_same(x, y, pairs) for x, y in zip(a, b, strict=True))
    elif isinstance(a, dict):
        content = len(a) == len(b) and all(
            is_atom(k) and _same(k, other, pairs) and _same(a[k], b[k], pairs) for k, other in zip(a, b, strict=True)
        )
    elif isinstance(a, (set, frozenset)):
        content = a == b and all(is_atom(x) for x in a)
    else:
        content = hasattr(a, "__dict__")
    return content and _same_attributes(getattr(a, "__dict__", {}), getattr(b, "__dict__", {}), pairs)


def _same_module(a: nn.Module, b: nn.Module, pairs: _Pairs, outer: bool = False) -> bool:
    if type(a) is not type(b) or any(_names(getattr(a, of)) != _names(getattr(b, of)) for of in _WEIGHTS):
        return False
    if not outer and any(getattr(m, hooks) for m in (a, b) for hooks in _HOOKS):
        return False  # these run inside, and may do anything
    pairs["a", id(a)] = pairs["b", id(b)] = a, b
    parts, others = a._modules, b._modules
    if list(parts) != list(others) or not all(_same_part(m, others[name], pairs) for name, m in parts.items()):
        return False
    left_out = {*_WEIGHTS, *_HOOKS, "_modules", "extra_repr"}  # which torchao sets, and only printing asks for
    mine, theirs = ({name: v for name, v in vars(m).items() if name not in left_out} for m in (a, b))
    return _same_attributes(mine, theirs, pairs)


def _same_part(a: nn.Module | None, b: nn.Module | None, pairs: _Pairs) -> bool:
    if a is None or b is None:
        return a is b
    known = pairs.get(("a", id(a))) or pairs.get(("b", id(b)))
    return _same_module(a, b, pairs) if known is None else known[0] is a and known[1] is b


def _names(weights: dict[str, Tensor | None]) -> list[tuple[str, bool]]:
    return [(name, weight is None) for name, weight in weights.items()]


def _same_attributes(a: dict[str, Any], b: dict[str, Any], pairs: _Pairs) -> bool:
    return a.keys() == b.keys() and all(_same(value, b[name], pairs) for name, value in a.items())


def _is_plain(cls: type) -> bool:
    """Is all that its objects hold in their attributes, or what a container has?

    Objects of C, as iterators, hold more: they are larger than what points to attributes, or have none.
    """
    held = max(c.__basicsize__ for c in cls.__mro__ if c in (*_CONTAINERS, object))
    return cls.__basicsize__ <= held + 2 * _POINTER and all(
        c in _CONTAINERS or ("__module__" in vars(c) and not vars(c).get("__slots__") and "__next__" not in vars(c))
        for c in cls.__mro__[:-1]
    )
