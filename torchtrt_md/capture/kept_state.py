"""What a model's forward may write beside its parameters, put back as it was.

Tracing runs the model's own code, with fake tensors.  A forward that keeps a table, on a module, in a dict of its
file, on a class or in a closure, would keep fake ones: the next rank's trace would meet those of the last, and the
user's model would return fake tensors ever after.
"""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from operator import is_
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, TracebackType
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor, nn

from torchtrt_md.capture.function_caches import FunctionCaches, attributes, parts
from torchtrt_md.capture.torch_private import is_fake

_ABSENT = object()
_ATOMS = (type(None), bool, int, float, complex, str, bytes, Tensor, torch.dtype, torch.device, torch.Size, ModuleType)
# Code that keeps no tensor of a model: it is not looked into.  A file whose assertions pytest rewrites can name all of
# pytest, and through it every test of the session.
_FOREIGN = frozenset({*sys.stdlib_module_names, "torch", "torchtrt_md", "numpy", "sympy", "triton", "_pytest"})
# Classes of the standard library that a program keeps its data in.
_KEEPERS = frozenset({"collections", "weakref", "types", "_thread", "_weakrefset"})
# What PyTorch itself keeps on every module, of which a forward writes to the first only.
_INTERNAL = frozenset(vars(nn.Module())) - {"_buffers"}


class KeptState:
    """A context, entered for each trace: on leaving it all is as it was when this object was made.

    Found are what the modules hold, at any depth, and what the code that they run can name: globals of its files,
    attributes of its classes, closures, default arguments; and :class:`FunctionCaches`.  What the model shares with
    the rest of the program is put back only where a fake tensor was written to it, so that a count of calls stays.

    Attributes:
        packages: of all classes and functions that the model's code can name, those of PyTorch and of Python left out.
    """

    def __init__(self, model: nn.Module) -> None:
        self._caches = FunctionCaches()
        self._caches.clear_real()
        walk = _Walk()
        walk.data(model)
        self._own = list(walk.places)
        walk.code()
        self._shared = walk.places[len(self._own) :]
        self.packages = frozenset(walk.packages)
        self._dicts = _Dicts(walk.places)

    def state(self) -> State | None:
        """What differs by now from when this object was made, of all that it would put back.

        None where it cannot be told what does: what was put there may change, as a dict does, and is not looked into.
        """
        changed: State = []
        for place in self._dicts.others if self._dicts.unchanged() else (*self._own, *self._shared):
            if new := place.changes():
                if not all(value is _ABSENT or isinstance(value, _ATOMS) for value in new):
                    return None
                changed.append((place, place.now()))
        return changed

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._caches.clear_fake()
        for places in (self._own, self._shared):
            changed = [place for place in places if place.changes()]
            written = [value for place in changed for value in place.changes()]
            if places is self._own or any(map(is_fake, parts(written, into_objects=True))):
                for place in changed:
                    place.restore()


class OwnState:
    """A context: on leaving it a model's modules hold what they held.  What their code can name is not looked at."""

    def __init__(self, model: nn.Module) -> None:
        walk = _Walk()
        walk.data(model)
        self._places = walk.places

    def changed(self) -> bool:
        """Do they hold anything else now?"""
        return any(place.changes() for place in self._places)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for place in self._places:
            if place.changes():
                place.restore()


class _Container:
    """A dict, list, set or deque, and what was in it.

    It is read and written as its base class does: a subclass may make its values when they are asked for.
    """

    def __init__(self, container: Any) -> None:
        self.container = container
        self._base: Any = next(base for base in (OrderedDict, dict, list, set, deque) if isinstance(container, base))
        self._before = self._read()

    def changes(self) -> list[object]:
        """What is in it that was not, and something at least where anything changed."""
        (keys, values), (old_keys, old_values) = self._read(), self._before
        if identical(keys, old_keys) and identical(values, old_values):
            return []
        old = set(map(id, old_values))
        return [_ABSENT, *(value for value in values if id(value) not in old)]

    def now(self) -> list[tuple[Any, Any]]:
        return list(zip(*self._read(), strict=True))

    def restore(self) -> None:
        self._base.clear(self.container)
        for key, value in zip(*self._before, strict=True):
            if isinstance(self.container, dict):
                self._base.__setitem__(self.container, key, value)
            elif isinstance(self.container, set):
                set.add(self.container, value)
            else:
                self._base.append(self.container, value)

    def _read(self) -> tuple[list[Any], list[Any]]:
        """The keys, of a dict, and the values."""
        if type(self.container) is dict:  # as most are
            return list(self.container), list(self.container.values())
        content = list(self._base.__iter__(self.container))
        if isinstance(self.container, dict):
            return content, [dict.__getitem__(self.container, key) for key in content]
        return [None] * len(content), content


class _Dicts:
    """The places that are dicts, as most are, asked all at once: a capture asks for each block.

    Attributes:
        others: the places that are none.
    """

    def __init__(self, places: Sequence[_Container | _Names]) -> None:
        self._dicts: list[dict[Any, Any]] = []
        self.others: list[_Container | _Names] = []
        for place in places:
            if isinstance(place, _Container) and type(place.container) is dict:
                self._dicts.append(place.container)
            else:
                self.others.append(place)
        self._before = self._read()

    def unchanged(self) -> bool:
        (sizes, keys, values), (old_sizes, old_keys, old_values) = self._read(), self._before
        return sizes == old_sizes and identical(keys, old_keys) and identical(values, old_values)

    def _read(self) -> tuple[list[int], list[Any], list[Any]]:
        """How many entries each has; the keys and the values of all."""
        values = chain.from_iterable(map(dict.values, self._dicts))
        return list(map(len, self._dicts)), list(chain.from_iterable(self._dicts)), list(values)


class _Names:
    """The names of a file, a class or a closure, and what they stood for."""

    def __init__(self, read: Callable[[], Mapping[str, Any]], write: Callable[[str, Any], None]) -> None:
        self._read, self._write = read, write
        self._before = dict(read())

    def changes(self) -> list[object]:
        return list(self._changed().values())

    def now(self) -> list[tuple[Any, Any]]:
        return list(self._changed().items())

    def restore(self) -> None:
        for name in self._changed():
            self._write(name, self._before.get(name, _ABSENT))

    def _changed(self) -> dict[str, object]:
        """Not modules, classes and functions: they were imported late, and stay."""
        return {
            name: value
            for name, value in self._read().items()
            if value is not self._before.get(name, _ABSENT) and not isinstance(value, (ModuleType, type, FunctionType))
        }


# Places that hold something else by now, and what is in each.
State: TypeAlias = "list[tuple[_Container | _Names, list[tuple[Any, Any]]]]"


def same_state(a: State, b: State) -> bool:
    """Is the same in all places, as far as they changed?"""
    return len(a) == len(b) and all(
        one is other
        and len(then) == len(now)
        and all(k == key and v is value for (k, v), (key, value) in zip(then, now, strict=True))
        for (one, then), (other, now) in zip(a, b, strict=True)
    )


def identical(a: Sequence[object], b: Sequence[object]) -> bool:
    """Are these the very same objects, in this order?"""
    return len(a) == len(b) and all(map(is_, a, b))


class _Walk:
    """Finds the places that a model's code can write to.

    Which code runs is not known before it does, so names decide: an attribute of a class is looked into where code
    that was looked into mentions its name.
    """

    def __init__(self) -> None:
        self.places: list[_Container | _Names] = []
        self.packages: set[str] = set()
        self._seen: dict[int, object] = {}  # by id, which is the object's own while it is kept here
        self._names: set[str] = {"forward"}  # PyTorch calls it
        self._attributes: dict[str, list[Any]] = {}  # of all classes, where no code mentions them yet
        self._later: list[type | FunctionType] = []

    def data(self, *values: Any) -> None:
        """Values and what they are made of; code that is met is left for :meth:`code`."""
        stack = list(values)
        while stack:
            value = stack.pop()
            if isinstance(value, _ATOMS):
                continue
            if isinstance(value, (type, FunctionType)):
                self._later.append(value)
            elif self._new(value):
                stack += self._inside(value)

    def code(self) -> None:
        """What the code that was met can name, and the code that this leads to."""
        while self._later:
            thing = self._later.pop()
            if not self._new(thing):
                continue
            if isinstance(thing, type):
                if (package := _package(thing)) not in _FOREIGN:
                    self.packages.add(package)
                    self._class(thing)
            elif (package := thing.__globals__.get("__name__", "").partition(".")[0]) not in _FOREIGN:
                self.packages.add(package)
                self._function(thing)
            else:  # a decorator of PyTorch's, as torch.no_grad(), around the user's function
                self.data(getattr(thing, "__wrapped__", None))

    def _new(self, thing: object) -> bool:
        if id(thing) in self._seen:
            return False
        self._seen[id(thing)] = thing
        return True

    def _inside(self, value: Any) -> Iterable[Any]:
        if isinstance(value, (tuple, frozenset)):
            return value
        if isinstance(value, (dict, list, set, deque)):
            self.places.append(_Container(value))
            return dict.values(value) if isinstance(value, dict) else value
        if isinstance(value, nn.Module):
            self.places.append(_Container(vars(value)))
            kept = [part for name, part in vars(value).items() if name not in _INTERNAL]
            hooks = (*value._forward_hooks.values(), *value._forward_pre_hooks.values())
            return [type(value), *kept, *value._modules.values(), *hooks]
        if wrapped := _wrapped(value):
            return wrapped
        if _package(type(value)) in _FOREIGN and type(value).__module__ not in _KEEPERS:
            return ()
        held = attributes(value)
        return [type(value)] if held is None else [type(value), held]

    def _class(self, cls: type) -> None:
        self._later += cls.__bases__
        self.places.append(_Names(lambda: vars(cls), lambda name, value: _put(cls, name, value)))
        for name, value in vars(cls).items():
            if name in self._names or name.startswith("__"):  # no code has to mention __getitem__ to use it
                self.data(value)
            else:
                self._attributes.setdefault(name, []).append(value)

    def _function(self, function: FunctionType) -> None:
        for cell in filter(self._new, function.__closure__ or ()):
            self._closure(cell)
        self.data(function.__defaults__, function.__kwdefaults__, vars(function) or None)
        names = set(_names(function.__code__))
        files = [function.__globals__]
        for file in files:  # which grows: the files of modules that are mentioned, and of theirs
            if self._new(file):
                self._file(file)
            for value in [file[name] for name in names & file.keys()]:
                if not isinstance(value, ModuleType):
                    self.data(value)
                elif _package(value) not in _FOREIGN and all(vars(value) is not known for known in files):
                    files.append(vars(value))
        for name in names - self._names:
            self.data(*self._attributes.pop(name, ()))
        self._names |= names

    def _file(self, file: dict[str, Any]) -> None:
        def write(name: str, value: Any) -> None:
            if value is _ABSENT:
                file.pop(name, None)
            else:
                file[name] = value

        self.places.append(_Names(lambda: file, write))

    def _closure(self, cell: CellType) -> None:
        def read() -> Mapping[str, Any]:
            try:
                return {"": cell.cell_contents}
            except ValueError:  # nothing is in it yet
                return {}

        def write(_: str, value: Any) -> None:
            if value is _ABSENT:
                del cell.cell_contents
            else:
                cell.cell_contents = value

        self.places.append(_Names(read, write))
        self.data(*read().values())


def _package(thing: Any) -> str:
    name = thing.__name__ if isinstance(thing, ModuleType) else getattr(thing, "__module__", None)
    return name.partition(".")[0] if isinstance(name, str) else ""


def _put(cls: type, name: str, value: Any) -> None:
    if value is _ABSENT:
        delattr(cls, name)
    else:
        setattr(cls, name, value)


def _wrapped(value: Any) -> list[Any]:
    """The functions, and what else is called with them, in what Python wraps around functions."""
    if isinstance(value, (staticmethod, classmethod)):
        return [value.__func__]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, property):
        return [value.fget, value.fset]
    if isinstance(value, functools.cached_property):
        return [value.func]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    return [value.__wrapped__] if isinstance(value, functools._lru_cache_wrapper) else []


def _names(code: CodeType) -> Iterator[str]:
    """The names that code mentions, of globals and attributes, and the code of functions within it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
