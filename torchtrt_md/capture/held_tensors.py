"""Tensors that a model's code holds and that are no weights, such as a mask or a table: a graph has what they were.

The trace meets them as they are, and not as inputs: they become constants, or answer what the code asks about values.
So a program says which these were (:class:`torchtrt_md.program.Constant`), for its runner to notice that one was
changed.  Capture traces a copy of the modules (the shadow); what is watched is what the user's own modules hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn

from torchtrt_md.capture.alike import alike, same
from torchtrt_md.program import Constant
from torchtrt_md.wrappers import named_weights

# What PyTorch keeps on every module: weights, submodules, hooks.
_INTERNAL = frozenset(vars(nn.Module()))
_UNCALLED = _INTERNAL | {"_compiled_call_impl", "extra_repr"}  # what torch.compile and torchao put there


def originals(memo: Mapping[int, Any]) -> dict[int, Tensor]:
    """By the id of a tensor that ``copy.deepcopy`` made, what it is a copy of; ``memo`` is what it was given."""
    kept: list[Any] = memo.get(id(memo), [])  # where deepcopy keeps what it copied
    return {id(memo[id(t)]): t for t in kept if isinstance(t, Tensor)}


def constants(model: nn.Module, met: Iterable[Tensor], copied: Mapping[int, Tensor]) -> tuple[Constant, ...]:
    """What is to be watched of the tensors that a trace met, each in all places where the model's modules have it.

    Args:
        model: the user's.
        met: tensors with values, of the shadow or of the code itself.
        copied: from :func:`originals`, of the shadow.
    """
    own = {id(t): t for t in (copied.get(id(t), t) for t in met)}
    found = [Constant(name, own[id(t)], read) for name, t, read in _places(model) if id(t) in own]
    placed = {id(constant.tensor) for constant in found}
    return (*found, *(Constant(_described(t), t) for key, t in own.items() if key not in placed))


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} of the model's code"


def _places(model: nn.Module) -> Iterator[tuple[str, Tensor, Callable[[], object]]]:
    """Name, value and what reads it again, of the plain tensors among the attributes of all modules."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in _INTERNAL:
                yield from _within(f"{path}.{name}".lstrip("."), value, partial(vars(module).get, name))


def _within(name: str, value: object, read: Callable[[], Any]) -> Iterator[tuple[str, Tensor, Callable[[], object]]]:
    if isinstance(value, Tensor):
        yield name, value, read
    elif isinstance(value, (list, tuple, dict)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _within(f"{name}[{key!r}]", item, partial(_entry, read, key))


def _entry(read: Callable[[], Any], key: object) -> object:
    try:
        return read()[key]
    except (LookupError, TypeError):  # it is gone, or what held it is
        return None


def _calls_alike(a: object, b: object) -> bool:
    """Do these do the same where they are called?  A method of a module is that of this module, and no other."""
    if isinstance(a, MethodType) and isinstance(b, MethodType):
        return a == b or same(a, b)
    if isinstance(a, partial) and isinstance(b, partial):
        mine, theirs = ({**dict(enumerate(p.args)), **p.keywords} for p in (a, b))
        bound_alike = mine.keys() == theirs.keys() and all(value is theirs[key] for key, value in mine.items())
        return (bound_alike and _calls_alike(a.func, b.func)) or same(a, b)
    return a is b or same(a, b)


class Slots:
    """Where a model's modules have their weights, each other, and what they call besides, as attention processors of
    diffusers, to tell when something else was put there.

    Args:
        model: the user's.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._look()

    def replaced(self) -> Iterator[tuple[str, Tensor | None, object]]:
        """The name of each weight that is another object than at the last look, what it was, and what is there now.

        And of each weight that was added, and of each module that was, or is gone, or is not like the one in its place;
        these were None.  Whoever does not take all of them, because one is refused, finds them again.
        """
        for index, (path, key, of, value) in enumerate(self._called):
            now = of.get(key)
            if now is not value:
                if not _calls_alike(value, now):
                    yield f"{path}.{key}".lstrip("."), None, now
                self._called[index] = path, key, of, now
        same_keys = all(len(of) == size for of, size in self._sizes)
        if same_keys and all(of.get(key) is value for of, key, value in self._slots):
            return
        held, modules = named_weights(self._model), dict(self._model.named_modules())
        for name, weight in self._held.items():
            if held.get(name) is not weight:
                yield name, weight, held.get(name)
        for name in held.keys() - self._held.keys():
            yield name, None, held[name]
        for path in self._modules.keys() | modules.keys():
            was, now = self._modules.get(path), modules.get(path)
            if was is not now and not (was is not None and now is not None and alike(was, now)):
                yield path, None, now
        self._look()

    def _look(self) -> None:
        kinds = ("_modules", "_parameters", "_buffers")
        of_all = [getattr(module, kind) for module in self._model.modules() for kind in kinds]
        self._held, self._modules = named_weights(self._model), dict(self._model.named_modules())
        self._sizes = [(of, len(of)) for of in of_all]
        self._slots = [(of, key, value) for of in of_all for key, value in of.items()]
        self._called = [
            (path, key, vars(module), value)
            for path, module in self._modules.items()
            for key, value in vars(module).items()
            if key not in _UNCALLED and callable(value)
        ]
