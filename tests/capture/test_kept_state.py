"""A model's own caches: right in the trace of every rank, and the user's model as it was afterwards."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fresh_python import fresh_python
from torch import Tensor, nn

import torchtrt_md as md
from torchtrt_md.capture import kept_state
from torchtrt_md.capture.function_caches import _live
from torchtrt_md.capture.torch_private import is_fake

TABLES: dict[int, Tensor] = {}
LATEST: Tensor | None = None
CALLS = {"forward": 0}


def make(n: int) -> Tensor:
    return torch.arange(n * 8.0).view(n, 8) / 7


class Base(nn.Module):
    """Two layers and a table, which every kind of model below keeps in another place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        CALLS["forward"] += 1
        result: Tensor = self.b(self.a(x).relu()) + self.table(x.shape[1])
        return result

    def table(self, n: int) -> Tensor:
        raise NotImplementedError


@functools.lru_cache
def cached(n: int) -> Tensor:
    return make(n)


@functools.cache
def cached_pair(n: int) -> dict[str, tuple[Tensor, ...]]:
    return {"tables": (make(n), make(n))}


class OfFunction(Base):
    def table(self, n: int) -> Tensor:
        return cached(n)


class OfFunctionInContainers(Base):
    def table(self, n: int) -> Tensor:
        return cached_pair(n)["tables"][1]


class OfMethod(Base):
    @functools.lru_cache  # noqa: B019 - as diffusers' QwenImage does
    def table(self, n: int) -> Tensor:
        return make(n)


class OfProperty(Base):
    @functools.cached_property
    def six(self) -> Tensor:
        return make(6)

    def table(self, n: int) -> Tensor:
        return self.six[:n]


class OnModule(Base):
    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[int, Tensor] = {}
        self.length = 0
        self.kept: Tensor | None = None

    def table(self, n: int) -> Tensor:
        if n not in self.tables:
            self.tables[n] = make(n)
        if n > self.length:
            self.length, self.kept = n, make(n)
        assert self.kept is not None
        return (self.tables[n] + self.kept[:n]) / 2


class OnBuffer(Base):
    def table(self, n: int) -> Tensor:
        if not hasattr(self, "late"):
            self.register_buffer("late", make(n), persistent=False)
        late: Tensor = self.late  # type: ignore[assignment]
        return late


class OfFile(Base):
    def table(self, n: int) -> Tensor:
        return kept_in_file(n)


def kept_in_file(n: int) -> Tensor:
    if n not in TABLES:
        TABLES[n] = make(n)
    return TABLES[n]


class OfFileByName(Base):
    def table(self, n: int) -> Tensor:
        global LATEST
        if LATEST is None or LATEST.shape[0] != n:
            LATEST = make(n)
        return LATEST


class OfClass(Base):
    def table(self, n: int) -> Tensor:
        if "shared" not in vars(OfClass):
            OfClass.shared = make(n)  # type: ignore[attr-defined]
        shared: Tensor = OfClass.shared  # type: ignore[attr-defined]
        return shared


def remembering() -> Callable[[int], Tensor]:
    known: dict[int, Tensor] = {}
    last: Tensor | None = None

    def table(n: int) -> Tensor:
        nonlocal last
        if last is None:
            known[n] = last = make(n)
        return (known[n] + last) / 2

    return table


class OfClosure(Base):
    def __init__(self) -> None:
        super().__init__()
        self.function = remembering()

    def table(self, n: int) -> Tensor:
        return self.function(n)


class OfDefault(Base):
    @torch.no_grad()
    def table(self, n: int, known: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006 - it is meant
        if n not in known:
            known[n] = make(n)
        return known[n]


class Store:
    def __init__(self) -> None:
        self.tables: list[Tensor] = []


STORE = Store()


class OfObject(Base):
    def table(self, n: int) -> Tensor:
        if not STORE.tables:
            STORE.tables.append(make(n))
        return STORE.tables[0]


KINDS = [
    OfFunction,
    OfFunctionInContainers,
    OfMethod,
    OfProperty,
    OnModule,
    OnBuffer,
    OfFile,
    OfFileByName,
    OfClass,
    OfClosure,
    OfDefault,
    OfObject,
]
PARALLEL: dict[str, tuple[md.Mesh, Any]] = {
    "tp": (md.Mesh(tp=2), md.TensorParallel("tp", plan={"a": "colwise", "b": "rowwise"})),
    "cp": (md.Mesh(cp=2), md.ContextParallel("cp", plan={"a": {"input": md.Split(1)}, "b": md.Gather(1)})),
}


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    cached.cache_clear()
    cached_pair.cache_clear()
    TABLES.clear()
    STORE.tables.clear()
    globals()["LATEST"] = None
    if "shared" in vars(OfClass):
        del OfClass.shared  # type: ignore[attr-defined]


@pytest.mark.parametrize(("along", "called_before"), [("tp", False), ("tp", True), ("cp", False)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cached_table_is_right_on_every_rank_and_real_afterwards(
    kind: type[Base], along: str, called_before: bool
) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(1, 6, 8)
    expected = model(x) if called_before else None
    mesh, parallel = PARALLEL[along]
    program = md.lower(md.capture(model, (x,), mesh=mesh, parallel=parallel))
    afterwards = model(x)
    assert not is_fake(afterwards)
    assert expected is None or torch.equal(afterwards, expected)
    assert md.verify(program, model, (x,)).error <= 1e-5


def test_what_a_forward_writes_without_fake_tensors_stays() -> None:
    before = CALLS["forward"]
    md.capture(OfProperty().eval(), (torch.randn(1, 6, 8),), mesh=md.Mesh(tp=1))
    assert CALLS["forward"] == before + 1


def test_the_users_caches_without_tensors_are_left_alone() -> None:
    @functools.cache
    def only_one() -> nn.Module:
        return nn.Linear(2, 2)

    @functools.cache
    def number(n: int) -> int:
        return n

    first, _ = only_one(), number(3)
    md.capture(OfFunction().eval(), (torch.randn(1, 6, 8),), mesh=md.Mesh(tp=1))
    assert only_one() is first
    assert number.cache_info().currsize == 1


def test_a_cache_is_looked_into_again_once_there_is_something_new_in_it() -> None:
    @functools.cache
    def kept(n: int) -> object:
        return n if n < 2 else make(n)

    kept(0)
    md.capture(nn.Linear(8, 8), (torch.ones(1, 8),), mesh=md.Mesh(d=1))  # finds no tensor in it
    assert kept.cache_info().currsize == 1
    kept(1)
    md.capture(nn.Linear(8, 8), (torch.ones(1, 8),), mesh=md.Mesh(d=1))
    assert kept.cache_info().currsize == 2
    kept(6)
    md.capture(nn.Linear(8, 8), (torch.ones(1, 8),), mesh=md.Mesh(d=1))
    assert kept.cache_info().currsize == 0


@pytest.mark.parametrize("kind", KINDS)  # one of which has an assertion, which pytest has rewritten
def test_no_model_leads_into_pytest(kind: type[Base], request: pytest.FixtureRequest) -> None:
    walk = kept_state._Walk()
    walk.data(kind())
    walk.code()
    assert id(request.config) not in walk._seen
    assert id(request.session) not in walk._seen


class Unfinished:
    """An object that cannot be asked for what it has not, as a validator of pydantic's."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"asked for {name}")


def test_objects_that_raise_what_is_no_attribute_error_are_walked_past() -> None:
    class Holds(Base):
        of_class = (Unfinished(), object())

        def table(self, n: int) -> Tensor:
            held = vars(self.of_class[0])
            return held.setdefault("table", make(n))  # type: ignore[no-any-return]

    md.capture(Holds().eval(), (torch.randn(1, 6, 8),), mesh=md.Mesh(tp=1))
    assert vars(Holds.of_class[0]) == {}


def test_a_failed_trace_leaves_no_fake_tensor_either() -> None:
    class Fails(OfFile):
        def forward(self, x: Tensor) -> Tensor:
            if super().forward(x).sum() > 0:
                return x
            return -x

    with pytest.raises(md.MDError):
        md.capture(Fails().eval(), (torch.randn(1, 6, 8),), mesh=md.Mesh(tp=1))
    assert TABLES == {}


def test_what_cannot_be_copied_is_named() -> None:
    import threading

    class Locked(OfFunction):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)
            self.inner.lock = threading.Lock()  # type: ignore[assignment]

    with pytest.raises(md.MDError, match=r"Locked holds a lock in 'inner\.lock', which cannot be copied"):
        md.capture(Locked(), (torch.randn(1, 6, 8),), mesh=md.Mesh(tp=1))


@pytest.mark.parametrize("generation", [None, 0, 1, 2])
def test_a_functions_cache_is_found_whatever_was_collected_since_the_last_look(generation: int | None) -> None:
    _live()
    cache = functools.cache(str)
    if generation is not None:
        gc.collect(generation)
    assert any(found is cache for found in _live())


_EARLIER = """
import functools, gc, sys, types, torch

@functools.cache
def table(n):
    return torch.ones(n)

sys.modules["tables"] = types.SimpleNamespace(table=table)

class Adds(torch.nn.Module):
    def forward(self, x):
        return x + table(4)

gc.{}()  # which moves the cache to where old objects are, or to where the collector does not look
gc.disable()  # and what this package makes when it is imported stays where new ones are
import torchtrt_md as md
model, x = Adds().eval(), torch.ones(4)
program = md.capture(model, (x,), mesh=md.Mesh(d=1))
assert type(model(x)) is torch.Tensor, "a cache keeps what a trace made"
assert table.cache_info().currsize == 1
"""


@pytest.mark.parametrize("by", ["collect", "freeze"])
def test_a_cache_that_is_older_than_this_package_is_looked_into(by: str) -> None:
    """The first look is at all caches; later ones at what was made since."""
    fresh_python(_EARLIER.format(by))
