"""Caches of ``functools`` around functions that make tensors.

A model that keeps a table with ``functools.lru_cache`` (as diffusers' QwenImage keeps its rotary frequencies) would
find in it, while it is traced, a tensor of an earlier eager call, which belongs to no graph, or one of another rank's
trace.  And it would keep the fake tensors of the trace for its next eager call.  A cache may lose its entries at any
time, by what it is, so those that hold such tensors are emptied.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn

from torchtrt_md.capture.torch_private import is_fake

# What is not part of a value, though the value refers to it.
_OPAQUE = (type, FunctionType, ModuleType, nn.Module)
# Cache -> its misses when no tensor was found in it: with no other miss there is nothing new in it.
_LOOKED_INTO: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
_FOUND: WeakSet[Any] = WeakSet()


class FunctionCaches:
    """Every ``functools.lru_cache`` and ``functools.cache`` of this process, wherever it is defined."""

    def __init__(self) -> None:
        self._imported = len(sys.modules)
        self._misses: dict[Any, int] = {cache: cache.cache_info().misses for cache in _live()}

    def clear_real(self) -> None:
        """Empty those that hold tensors, by themselves or in tuples, lists and dicts, so that a trace makes its own.

        An object that has tensors stays: it may be the only one of its kind, as a model that a cached function loads.
        """
        for cache, misses in self._misses.items():
            if not cache.cache_info().currsize or _LOOKED_INTO.get(cache) == misses:
                continue
            if any(isinstance(p, Tensor) for p in parts(_entries(cache), False)):
                cache.cache_clear()
                self._misses[cache] = 0
            else:
                _LOOKED_INTO[cache] = misses

    def clear_fake(self) -> None:
        """Empty those that got fake tensors since, at any depth."""
        if len(sys.modules) != self._imported:  # with caches of their own
            self._imported = len(sys.modules)
            self._misses = {cache: self._misses.get(cache, 0) for cache in _live()}
        for cache, misses in self._misses.items():
            if cache.cache_info().misses != misses and any(
                isinstance(p, Tensor) and is_fake(p) for p in parts(_entries(cache), True)
            ):
                cache.cache_clear()
            self._misses[cache] = cache.cache_info().misses


# Made at the last look; None before the first, which is at all there are.  The garbage collector moves objects to older
# generations, each generation as a whole: while this is in a young one, so is all that was made after it.
_marker: list[None] | None = None


def _live() -> list[Any]:
    """All there are.  Only the first look, and one after the collector has moved things, is at a million objects."""
    global _marker
    last, _marker = _marker, []  # before the look, so that the next one finds what is made meanwhile
    kind = functools._lru_cache_wrapper
    # In this order: what is moved between the two is in the second, or the marker is in neither.
    found = [t for age in (0, 1) for t in gc.get_objects(age) if type(t) is kind or t is last]
    if last is None or not any(thing is last for thing in found):
        found = [thing for thing in (*gc.get_objects(), *_frozen()) if type(thing) is kind]
    _FOUND.update(cache for cache in found if cache is not last)
    return list(_FOUND)


def _frozen() -> Iterator[object]:
    """What modules and their classes have where ``gc.freeze`` was called: the collector does not list what it froze."""
    if gc.get_freeze_count():
        for module in list(sys.modules.values()):
            for value in list(getattr(module, "__dict__", {}).values()):
                yield value
                if isinstance(value, type):
                    yield from list(vars(value).values())


def _entries(cache: Any) -> list[object]:
    """The keys and results in it; not what its function refers to."""
    outside = (id(cache.__dict__), id(cache.__wrapped__))
    return [entry for entry in gc.get_referents(cache) if id(entry) not in outside]


def parts(values: Iterable[object], into_objects: bool) -> Iterator[object]:
    """The values and what is in them at any depth: in containers, and in attributes of objects, where asked for."""
    stack = list(values)
    seen: dict[int, object] = {}
    while stack:
        value = stack.pop()
        if id(value) in seen or isinstance(value, _OPAQUE):
            continue
        seen[id(value)] = value
        yield value
        if isinstance(value, dict):
            stack += [*dict.keys(value), *dict.values(value)]  # a subclass may make them when they are asked for
        elif isinstance(value, (tuple, list, set, frozenset, deque)):
            stack += value
        elif into_objects and not isinstance(value, Tensor):
            stack += (attributes(value) or {}).values()


def attributes(value: object) -> dict[str, object] | None:
    """The object's own, without its ``__getattr__``, which may raise anything, as that of pydantic's validators does.

    None where it has no dict of them.
    """
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return found if isinstance(found, dict) else None
