"""The hooks of a context-parallel plan: they mark arguments and results of modules as split or gathered."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchtrt_md.capture.marks import mark_gathered, mark_split
from torchtrt_md.errors import PlanError
from torchtrt_md.graph.source import running_line
from torchtrt_md.parallel import Gather, Split

# What a plan says of one argument or result: a split or gather, nothing, or a nest of these in the form of the value.
Nested: TypeAlias = "Split | Gather | list[Nested] | dict[str, Nested] | None"


@dataclass
class Entry:
    """One entry of a plan: what one split or gather is for, whatever number of modules its pattern stands for.

    Attributes:
        name: in words, for messages.
        axis, size: along which it splits or gathers, over how many ranks.
        splits: and does not gather.
        undeclared: it names an argument that only ``**kwargs`` would take.
        applied: it was found, in some module, by the time that the model was traced.
        why: what kept it from that.
    """

    name: str
    axis: str
    size: int
    splits: bool
    undeclared: bool = False
    applied: bool = False
    why: str = "its module is never called"


class Hooks:
    """Puts the hooks of one plan on modules."""

    def __init__(self, axis: str, size: int) -> None:
        self.axis, self.size = axis, size
        self.entries: list[Entry] = []
        self._taken: dict[tuple[str, str | int, bool], str] = {}  # (module, what, splits) -> pattern

    def add_splits(
        self, modules: Sequence[tuple[str, nn.Module]], pattern: str, splits: Mapping[str | int, Nested]
    ) -> None:
        of_arguments: dict[str, tuple[Nested, Entry]] = {}
        of_results: dict[int | str, tuple[Nested, Entry]] = {}
        for key, split in splits.items():
            for path, module in modules:
                self._take(path, key, pattern, splits=True)
                _check_key(key, split, path, module)
            if isinstance(split, Split) and split.output:
                of_results[key] = split, self._entry(f"result {key!r} of {named(pattern)}", splits=True)
            else:
                assert isinstance(key, str), "_check_key has refused it"
                undeclared = not any(key in inspect.signature(m.forward).parameters for _, m in modules)
                entry = self._entry(f"argument {key!r} of {named(pattern)}", splits=True, undeclared=undeclared)
                of_arguments[key] = split, entry
        for path, module in modules:
            if of_arguments:
                # Before DTensor's hooks, as the hooks of results are behind them: those take and return plain tensors.
                hook = _ArgumentHook(module, path, of_arguments)
                module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
                module.register_forward_hook(hook.check)
            if of_results:
                module.register_forward_hook(_result_hook(path, of_results))

    def add_gathers(
        self, modules: Sequence[tuple[str, nn.Module]], pattern: str, gathers: Mapping[int | str, Nested]
    ) -> None:
        of_results: dict[int | str, tuple[Nested, Entry]] = {}
        for key, gather in gathers.items():
            if gather is not None:
                for path, _ in modules:
                    self._take(path, key, pattern, splits=False)
                of_results[key] = gather, self._entry(f"result {key!r} of {named(pattern)}", splits=False)
        for path, module in modules:
            module.register_forward_hook(_result_hook(path, of_results))

    def _entry(self, name: str, splits: bool, undeclared: bool = False) -> Entry:
        self.entries.append(Entry(name, self.axis, self.size, splits, undeclared))
        return self.entries[-1]

    def _take(self, path: str, key: str | int, pattern: str, splits: bool) -> None:
        other = self._taken.setdefault((path, key, splits), pattern)
        if other != pattern:
            what = f"argument {key!r}" if isinstance(key, str) and splits else f"result {key!r}"
            raise PlanError(
                f"the plan {'splits' if splits else 'gathers'} {what} of {named(path)} twice: by {other!r} and by"
                f" {pattern!r}",
                fix="let one of the two names stand for it",
            )


def _check_key(key: str | int, split: Nested, path: str, module: nn.Module) -> None:
    """An argument is named by its name, a result by its index, or its name where it has one.

    Raises:
        PlanError: the module does not take the argument, or the other of the two is meant.
    """
    parameters = inspect.signature(module.forward).parameters
    declared = ", ".join(arguments_of(module)) if parameters else "no arguments"
    if isinstance(split, Split) and split.output:
        return
    if isinstance(key, int):
        raise PlanError(
            f"the plan splits {key} of {named(path)}, which is no argument's name; it takes {declared}",
            fix=f"write md.Split(dim, output=True) to split result {key}, or name the argument",
        )
    if isinstance(key, str) and key not in parameters:
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return
        close = difflib.get_close_matches(key, arguments_of(module), n=1)
        raise PlanError(
            f"the plan splits argument {key!r} of {named(path)}, which takes {declared}",
            fix=f"name one of these{f', such as {close[0]!r}' if close else ''}, or say md.Split(dim, output=True) with"
            " the index of a result",
        )


class _ArgumentHook:
    """Changes the arguments of a module that have an entry, in each call."""

    def __init__(self, module: nn.Module, path: str, splits: Mapping[str, tuple[Nested, Entry]]) -> None:
        self.module, self.path, self.splits = module, path, splits
        self.signature = inspect.signature(module.forward)
        self.extra = next((p.name for p in self.signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")
        self.passed: list[list[tuple[str, Any, list[Any]]]] = []  # of each call under way: lists and dicts made anew

    def __call__(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        bound = self.signature.bind(*args, **kwargs)
        made: dict[tuple[int, int], Tensor] = {}
        nests: list[tuple[str, Any, list[Any]]] = []
        for key, (split, entry) in self.splits.items():
            where = bound.arguments if key in self.signature.parameters else bound.arguments.get(self.extra, {})
            if where.get(key) is None:
                others = f"{named(self.path)} takes {', '.join(arguments_of(self.module))}"
                entry.why = others if entry.undeclared else f"it is {'None' if key in where else 'not passed'}"
            else:
                what = f"argument {key!r} of {named(self.path)}"
                where[key] = _changed(where[key], split, entry, what, made)
                if isinstance(split, (list, dict)):
                    nests.append((what, where[key], pytree.tree_leaves(where[key])))
        self.passed.append(nests)
        return _as_passed(bound, args, kwargs)

    def check(self, _: nn.Module, args: Any, result: Any) -> None:
        """Refuse a module that put something into a list or dict that was made anew: its caller has the former one.

        Raises:
            PlanError: naming the argument.
        """
        for what, nest, leaves in self.passed.pop():
            now = pytree.tree_leaves(nest)
            if len(now) != len(leaves) or any(a is not b for a, b in zip(now, leaves, strict=True)):
                raise PlanError(
                    f"{what} is a {type(nest).__name__} of which the plan splits an entry, and the module changes it,"
                    " which its caller would not see",
                    fix="return what is new, or split it where it is made",
                    at=running_line(),
                )


def _as_passed(
    bound: inspect.BoundArguments, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, by position and by name as these are: ``BoundArguments`` would pass by position all that
    it can, and other hooks look for names.
    """
    parameters = bound.signature.parameters.values()
    named_only = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    extra: dict[str, Any] = next((bound.arguments.get(p.name, {}) for p in parameters if p.kind is p.VAR_KEYWORD), {})
    by_name = {key: bound.arguments[key] if key in named_only else extra[key] for key in kwargs}
    return bound.args[: len(args)], by_name


def _result_hook(path: str, entries: Mapping[int | str, tuple[Nested, Entry]]) -> Callable[[nn.Module, Any, Any], Any]:
    """Change the results of a module that have an entry."""

    def change_results(_: nn.Module, args: Any, result: Any) -> Any:
        if not isinstance(result, (Tensor, tuple, list, Mapping)):
            raise PlanError(
                f"{named(path)} returns a {type(result).__name__}, not a tensor, a tuple or a dict of them",
                fix="split or gather at a module that returns tensors; models of diffusers and transformers do with"
                " return_dict=False",
                at=running_line(),
            )
        names = list(result) if isinstance(result, Mapping) else list(getattr(result, "_fields", ()))
        values = [result] if isinstance(result, Tensor) else list(values_of(result))
        for key, (what, entry) in entries.items():
            index = names.index(key) if key in names else key
            if not isinstance(index, int) or not 0 <= index < len(values):
                raise PlanError(
                    f"the plan {_does(entry)} result {key!r} of {named(path)}, which returns {_returned(result)}",
                    fix=_results_fix(entry, key, result),
                    at=running_line(),
                )
            values[index] = _changed(values[index], what, entry, f"result {key!r} of {named(path)}")
        return values[0] if isinstance(result, Tensor) else _rebuilt(result, values)

    return change_results


def _results_fix(entry: Entry, key: int | str, result: Any) -> str:
    only = isinstance(result, Tensor) or len(result) == 1
    fix = "results are counted from 0" + (": the plan's first is the only" if only else "")
    if isinstance(result, Mapping):
        fix = f"name one of {', '.join(map(repr, result))}"
    elif isinstance(key, str):
        fix = "results have names where a module returns a dict; write the entry for the first as {0: ...}"
    argument = isinstance(key, str) and entry.splits
    return f"{fix}; or leave out output=True, to split the argument {key!r}" if argument else fix


def _returned(result: Any) -> str:
    if isinstance(result, Mapping):
        return f"a {type(result).__name__} of {', '.join(map(repr, result))}"
    return "one tensor" if isinstance(result, Tensor) else f"{len(result)} values"


def _does(entry: Entry) -> str:
    return "splits" if entry.splits else "gathers"


def values_of(nest: Any) -> Any:
    return nest.values() if isinstance(nest, Mapping) else nest


def _rebuilt(nest: Any, values: Sequence[Any]) -> Any:
    """A nest of the same class with other values."""
    if isinstance(nest, Mapping):
        items = dict(zip(nest, values, strict=True))
        return type(nest)(**items) if is_dataclass(nest) else type(nest)(items)  # type: ignore[call-arg]
    return type(nest)(*values) if hasattr(nest, "_fields") else type(nest)(values)


def _changed(
    value: Any, form: Nested, entry: Entry, what: str, made: dict[tuple[int, int], Tensor] | None = None
) -> Any:
    """The value with what the plan says of it, or of parts of it, done.

    Args:
        made: what was split in this call so far, by tensor and dim: one tensor that is passed twice stays one.
    """
    if form is None:
        return value
    if isinstance(form, dict):
        if not isinstance(value, Mapping) or not form.keys() <= value.keys():
            keys = f"a dict of {', '.join(map(repr, value))}" if isinstance(value, Mapping) else _kind(value)
            raise PlanError(
                f"{what} is {keys}, and the plan {_does(entry)} {', '.join(map(repr, form))} of it",
                fix=f"write the entry in the form of the {what.partition(' ')[0]}",
                at=running_line(),
            )
        return _rebuilt(value, [_changed(v, form.get(k), entry, f"{k!r} of {what}", made) for k, v in value.items()])
    if isinstance(form, list):
        if not isinstance(value, (tuple, list)) or len(value) != len(form):
            found = f"{len(value)} values" if isinstance(value, (tuple, list)) else _kind(value)
            raise PlanError(
                f"{what} is {found}, and the plan has {len(form)} {_does(entry)} for it",
                fix=f"give one md.{'Split' if entry.splits else 'Gather'} for each, or None for those that stay"
                f" {'whole' if entry.splits else 'as they are'}",
                at=running_line(),
            )
        return _rebuilt(value, [_changed(v, one, entry, what, made) for v, one in zip(value, form, strict=True)])
    if isinstance(form, Gather):
        dim = _dim(value, form.dim, what)
        entry.applied = True
        return mark_gathered(value, dim, entry.axis, entry.size)
    if form.ndim is not None and isinstance(value, Tensor) and value.dim() != form.ndim:
        entry.why = f"it has {value.dim()} dims, and the plan splits it where it has {form.ndim}"
        return value
    dim = _dim(value, form.dim, what)
    entry.applied = True
    if made is None:
        return mark_split(value, dim, entry.axis, entry.size)
    if (id(value), dim) not in made:
        made[id(value), dim] = mark_split(value, dim, entry.axis, entry.size)
    return made[id(value), dim]


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return "one tensor"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _dim(value: Any, dim: int, what: str) -> int:
    """The plan's dim of a value, counted from the left."""
    if not isinstance(value, Tensor):
        raise PlanError(
            f"{what} is {_kind(value)}, not a tensor",
            fix="name a tensor in the plan; for a list of tensors, give a list",
            at=running_line(),
        )
    if not -value.dim() <= dim < value.dim():
        raise PlanError(
            f"{what} has {value.dim()} dims and the plan says dim {dim}",
            fix="correct the plan's dim" + (f": -{value.dim()} to {value.dim() - 1}" if value.dim() else ""),
            at=running_line(),
        )
    return dim % value.dim()


def named(path: str) -> str:
    return f"module {path!r}" if path else "the model"


def arguments_of(module: nn.Module) -> list[str]:
    """The names of what a module takes, all that ``**kwargs`` may take left out; ``["x"]`` where it declares none."""
    parameters = inspect.signature(module.forward).parameters.values()
    return [p.name for p in parameters if p.kind is not p.VAR_KEYWORD] or ["x"]
