"""What is equal to what, where a difference could change what a module does."""

from __future__ import annotations

import collections
import functools
import itertools
import random
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from torchtrt_md.capture.alike import alike, same


@dataclass
class Plain:
    a: int
    b: object = None


class Slots:
    __slots__ = ("a",)


def function(x: int, y: int = 0) -> int:
    return x + y


EQUAL: list[tuple[Any, Any]] = [
    (1, 1),
    ("a", "a"),
    (None, None),
    (torch.float16, torch.float16),
    (torch.Size([1, 2]), torch.Size([1, 2])),
    ([1, (2, {"a": 3.0})], [1, (2, {"a": 3.0})]),
    ({1, 2}, {2, 1}),
    (Plain(1, Plain(2)), Plain(1, Plain(2))),
    (collections.OrderedDict(a=1), collections.OrderedDict(a=1)),
    (function, function),
    (functools.partial(function, 1, y=2), functools.partial(function, 1, y=2)),
]
EQUAL_MODULES: list[tuple[nn.Module, nn.Module]] = [
    (nn.GELU(), nn.GELU()),
    (nn.Linear(2, 3), nn.Linear(2, 3)),
    (nn.ModuleList([nn.ReLU()]), nn.ModuleList([nn.ReLU()])),
]
_one, _generator, _lock = iter([1]), (x for x in "ab"), threading.Lock()
_random, _array, _count = random.Random(0), np.arange(3), itertools.count()
OTHER: list[tuple[Any, Any]] = [
    (1, True),
    (1, 1.0),
    (0.0, -0.0),
    (float("nan"), float("nan")),
    ([1], (1,)),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    ({1: "a"}, {True: "a"}),
    (Plain(1), Plain(2)),
    (lambda x: x, lambda x: x),
    (functools.partial(function, 1), functools.partial(function, 2)),
    (torch.zeros(1), torch.zeros(1)),
    # Nothing says what these hold, so they are not even equal to themselves.
    (_one, _one),
    (_generator, _generator),
    (_lock, _lock),
    (_random, _random),
    (_array, _array),
    (_count, _count),
    (Slots(), Slots()),
    (collections.deque([1]), collections.deque([1])),
    (collections.defaultdict(list), collections.defaultdict(int)),
    (torch.Generator(), torch.Generator()),
    (nn.ReLU(), nn.ReLU()),  # one that is no part of the module that holds it, nor are its weights
]


class Named(str):
    pass


class Holding(nn.Module):
    """Holds another, and is not told so."""

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.held = [held]


OTHER_MODULES: list[tuple[nn.Module, nn.Module]] = [
    (nn.GELU(), nn.GELU("tanh")),
    (nn.Linear(2, 3), nn.Linear(2, 3, bias=False)),
    (nn.Dropout(0.1), nn.Dropout(0.2)),
    (nn.ReLU().eval(), nn.ReLU()),
    (Holding(nn.Linear(2, 3)), Holding(nn.Linear(2, 4))),
    (nn.ModuleList([nn.ReLU()]), nn.ModuleList([nn.ReLU(), nn.ReLU()])),
]


@pytest.mark.parametrize(("a", "b"), EQUAL, ids=[str(i) for i in range(len(EQUAL))])
def test_equal(a: Any, b: Any) -> None:
    assert same(a, b)


@pytest.mark.parametrize(("a", "b"), EQUAL_MODULES, ids=lambda m: type(m).__name__)
def test_equal_modules(a: nn.Module, b: nn.Module) -> None:
    assert alike(a, b)
    assert alike(nn.Sequential(a), nn.Sequential(b))


@pytest.mark.parametrize(("a", "b"), OTHER_MODULES, ids=lambda m: type(m).__name__)
def test_other_modules(a: nn.Module, b: nn.Module) -> None:
    assert not alike(a, b)
    assert not alike(nn.Sequential(a), nn.Sequential(b))


def test_one_module_in_two_places() -> None:
    one, other = nn.ReLU(), nn.ReLU()
    assert alike(nn.Sequential(one, one), nn.Sequential(other, other))
    assert not alike(nn.Sequential(one, one), nn.Sequential(one, other))
    assert not alike(nn.Sequential(one, other), nn.Sequential(other, other))


def test_a_string_with_attributes_is_no_mere_string() -> None:
    a, b = Named("a"), Named("a")
    a.note = 1  # type: ignore[attr-defined]
    assert not same(a, b)


@pytest.mark.parametrize(("a", "b"), OTHER, ids=[str(i) for i in range(len(OTHER))])
def test_not_equal(a: Any, b: Any) -> None:
    assert not same(a, b)
    assert not same([1, {"a": a}], [1, {"a": b}])


def test_what_is_one_object_here_is_one_there() -> None:
    one, other, another = [1], [1], [1]
    assert same([one, one], [other, other])
    assert not same([one, one], [other, another])
    assert not same([one, other], [another, another])


def test_objects_that_name_each_other() -> None:
    def made(number: int) -> Plain:
        found = Plain(1)
        found.b = Plain(number, found)
        return found

    assert same(made(1), made(1))
    assert not same(made(1), made(2))


def test_hooks_of_a_module_do_not_count_those_of_its_parts_do() -> None:
    def made() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    a, b = made(), made()
    a.register_forward_hook(print)
    assert alike(a, b)
    a[1].register_forward_hook(print)  # type: ignore[index]
    b[1].register_forward_hook(print)  # type: ignore[index]
    assert not alike(a, b)
