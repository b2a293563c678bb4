"""Apply a context-parallel plan: module hooks that mark where the sequence is split and gathered.

The marks are ``split_sequence`` and ``gather_sequence``, which leave a value whole: the model's code runs on, and is
traced with, the shapes that its author meant.  What a rank holds is decided in lowering
(:mod:`torchtrt_md.lowering.sequence`), so no local length can enter the graph as a number.  Every entry of the plan
keeps whether it applied to something, so that none is ignored in silence.
"""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from torchtrt_md.capture.marks import mark_gathered, mark_split
from torchtrt_md.errors import PlanError, PlanWarning
from torchtrt_md.graph.source import running_line
from torchtrt_md.mesh import joined, shown
from torchtrt_md.parallel import ContextParallel, Gather, Split

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


@dataclass(frozen=True)
class AppliedPlan:
    """A plan whose hooks are on a model; after a trace, :meth:`check_used` says what it missed.

    Attributes:
        model: the model's name.
        axis: along which it splits.
        entries: of the plan.
        own: the plan is the model's own, which has entries for arguments of every kind of call.
    """

    model: str
    axis: str
    entries: tuple[Entry, ...]
    own: bool

    def check_used(self, split_by_code: Collection[str]) -> None:
        """
        Args:
            split_by_code: the axes over which the model's own code split something.

        Raises:
            PlanError: nothing was split, or an entry names an argument that does not exist.

        Warns:
            PlanWarning: an entry of the user's plan applied to nothing.
        """
        missed = [entry for entry in self.entries if not entry.applied]
        for entry in missed:
            if entry.undeclared and not self.own:
                raise PlanError(
                    f"the plan splits {entry.name}, which is never passed: it is none of the declared arguments, and"
                    " no call had it among its **kwargs",
                    fix="correct the name; " + entry.why if entry.why else "correct the name",
                )
        if self.axis not in split_by_code and not any(entry.applied for entry in self.entries if entry.splits):
            raise PlanError(
                f"the plan splits nothing of {self.model}"
                + "".join(f"; {entry.name}: {entry.why}" for entry in missed if entry.splits),
                fix="split the arguments that hold the sequence: {'': {'name': md.Split(dim)}}; or call"
                f" md.split(x, dim, {shown(self.axis)}) in the model",
            )
        for entry in missed if not self.own else ():
            what = "splits" if entry.splits else "gathers"
            warnings.warn(
                f"the plan {what} {entry.name}, and that did not happen: {entry.why}", PlanWarning, stacklevel=4
            )


def apply(model: nn.Module, parallel: ContextParallel, size: int) -> AppliedPlan:
    """Hook the model by the plan; ``size`` is the number of ranks along the axis, or along all of several.

    Raises:
        PlanError: there is no plan, or it does not fit the model.
    """
    own, axis = parallel.plan is None, joined(parallel.axis)
    plan = getattr(model, "_cp_plan", None) if own else parallel.plan
    if plan is None:
        raise PlanError(
            f"{type(model).__name__} has no context-parallel plan of its own (_cp_plan)",
            fix=f"pass one: {_example(model, axis)}; a model that calls md.split itself needs plan={{}} only",
        )
    hooks = _Hooks(axis, size)
    for name, entry in plan.items():
        modules = modules_named(model, name)
        if not modules and own:  # it serves other configurations too, as of more layers
            continue
        if not modules:
            raise _no_module(model, name, entry)
        if isinstance(entry, Mapping) and not _all_gathers(entry):
            for key, split in entry.items():
                if _is_gather(split):
                    raise _gather_in_dict(name, key, split)
            hooks.add_splits(
                modules, name, {key: _splits(s, f"{_what(key)} of {_shown(name)}") for key, s in entry.items()}
            )
            continue
        listed = entry if isinstance(entry, (list, tuple)) else [entry]
        gathers = entry if isinstance(entry, Mapping) else dict(enumerate(listed))
        for key, gather in gathers.items():
            if _is_split(gather):
                raise _bare_split(name, modules[0][1], key, _splits(gather, ""))
            if gather is not None and not _all_gathers(gather):
                raise PlanError(
                    f"the plan has {gather!r} for {_shown(name)}, which does not say where to gather its result",
                    fix=f'write {{"{name}": md.Gather(dim)}} to gather its result, or'
                    f" {_in_plan(name, _arguments(modules[0][1])[0], 'md.Split(dim)')} to split an argument",
                )
        hooks.add_gathers(modules, name, {key: _gather(gather) for key, gather in gathers.items()})
    return AppliedPlan(type(model).__name__, axis, tuple(hooks.entries), own)


def _example(model: nn.Module, axis: str) -> str:
    """A plan in the model's own names, for a message."""
    argument = _arguments(model)[0]
    last = next((name for name, _ in reversed(list(model.named_children()))), "")
    gather = f'"{last}": md.Gather(1)' if last else ""
    splits = f'"": {{"{argument}": md.Split(1)}}'
    return f"ContextParallel({shown(axis)}, plan={{{', '.join(filter(None, (splits, gather)))}}})"


def modules_named(model: nn.Module, pattern: str) -> list[tuple[str, nn.Module]]:
    """The modules whose dotted name fits the pattern, part by part, in the model's order."""
    parts = pattern.split(".")
    return [
        (name, module)
        for name, module in model.named_modules()
        if bool(name) == bool(pattern)  # the model itself has no name, which * would fit
        and len(name.split(".")) == len(parts)
        and all(map(fnmatch.fnmatchcase, name.split("."), parts))
    ]


def _arguments(module: nn.Module) -> list[str]:
    """The names of what a module takes, all that ``**kwargs`` may take left out; ``["x"]`` where it declares none."""
    parameters = inspect.signature(module.forward).parameters.values()
    return [p.name for p in parameters if p.kind is not p.VAR_KEYWORD] or ["x"]


def _no_module(model: nn.Module, pattern: str, entry: Any) -> PlanError:
    problem = f"the plan names a module {pattern!r} that {type(model).__name__} does not have"
    if pattern in inspect.signature(model.forward).parameters:
        split = _code(_splits(entry, "")) if _is_split(entry) else "md.Split(dim)"
        return PlanError(
            f"{problem}; {pattern!r} is an argument of the model", fix=f"write {_in_plan('', pattern, split)}"
        )
    names = [name for name, _ in model.named_modules() if name]
    close = difflib.get_close_matches(pattern, names, n=3) or names[:3]
    return PlanError(
        problem,
        fix=f"use a name from model.named_modules(), such as {', '.join(map(repr, close))}"
        if close
        else 'the model has no modules in it: name the model itself, as ""',
    )


def _bare_split(name: str, module: nn.Module, index: int, split: Nested) -> PlanError:
    """A split of a module, and not of one of its arguments or results."""
    assert isinstance(split, Split)
    of_argument = _in_plan(name, _arguments(module)[0], _code(Split(split.dim, ndim=split.ndim)))
    of_result = _in_plan(name, index, _code(Split(split.dim, output=True, ndim=split.ndim)))
    takes = ", ".join(_arguments(module))
    return PlanError(
        f"the plan has {_code(split)} for {_shown(name)}, and not for one of its arguments or results; it takes"
        f" {takes}",
        fix=f"write {of_result} to split result {index}"
        if split.output
        else f"write {of_argument} to split an argument, or {of_result} to split result {index}",
    )


def _gather_in_dict(name: str, key: Any, gather: Any) -> PlanError:
    """A gather among splits of arguments and results."""
    return PlanError(
        f"the plan gathers {_what(key)} of {_shown(name)} in a dict that splits others",
        fix="a module has splits or gathers: gather it at another module, such as the one that takes it",
    )


def _in_plan(name: str, key: str | int, split: str) -> str:
    shown = key if isinstance(key, int) else f'"{key}"'
    return f'{{"{name}": {{{shown}: {split}}}}}'


def _what(key: Any) -> str:
    return f"result {key}" if isinstance(key, int) else f"argument {key!r}"


def _code(split: Nested) -> str:
    """A split as the user writes it."""
    if not isinstance(split, Split):
        return repr(split)
    output = ", output=True" if split.output else ""
    return f"md.Split({split.dim}{output}{'' if split.ndim is None else f', ndim={split.ndim}'})"


def _is_split(entry: Any) -> bool:
    return isinstance(entry, Split) or hasattr(entry, "split_dim")  # the latter of diffusers' ContextParallelInput


def _is_gather(entry: Any) -> bool:
    return isinstance(entry, Gather) or hasattr(entry, "gather_dim")  # and of its ContextParallelOutput


def _splits(entry: Any, of: str) -> Nested:
    """The splits of an argument or a result, which ``of`` names for messages."""
    if isinstance(entry, Split):
        return entry
    if isinstance(entry, (list, tuple)):
        return [_nested(one, entry, of) for one in entry]
    if isinstance(entry, Mapping):
        return {key: _nested(one, entry, of) for key, one in entry.items()}
    if _is_split(entry):
        return Split(entry.split_dim, output=entry.split_output, ndim=entry.expected_dims)
    raise PlanError(f"the plan has {entry!r} for {of}, which does not say how to split it", fix="use md.Split(dim)")


def _nested(entry: Any, nest: Any, of: str) -> Nested:
    """An entry for a part of an argument, which may be left as it is."""
    found = None if entry is None else _splits(entry, f"a part of {of}")
    if isinstance(found, Split) and found.output:
        raise PlanError(
            f"{nest!r} does not say how to split a list of tensors",
            fix="give one md.Split(dim) or None for each; results are split one by one, by index",
        )
    return found


def _all_gathers(entry: Any) -> bool:
    """Do all leaves gather, those that do anything?"""
    leaves = [leaf for leaf in _leaves(entry) if leaf is not None]
    return bool(leaves) and all(map(_is_gather, leaves))


def _leaves(entry: Any) -> Iterator[Any]:
    if isinstance(entry, (Mapping, list, tuple)):
        for one in _values(entry):
            yield from _leaves(one)
    else:
        yield entry


def _gather(entry: Any) -> Nested:
    if entry is None or isinstance(entry, Gather):
        return entry
    if isinstance(entry, Mapping):
        return {key: _gather(one) for key, one in entry.items()}
    if isinstance(entry, (list, tuple)):
        return [_gather(one) for one in entry]
    return Gather(entry.gather_dim)  # diffusers' ContextParallelOutput


class _Hooks:
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
                of_results[key] = split, self._entry(f"result {key!r} of {_shown(pattern)}", splits=True)
            else:
                assert isinstance(key, str), "_check_key has refused it"
                undeclared = not any(key in inspect.signature(m.forward).parameters for _, m in modules)
                entry = self._entry(f"argument {key!r} of {_shown(pattern)}", splits=True, undeclared=undeclared)
                of_arguments[key] = split, entry
        for path, module in modules:
            if of_arguments:
                # Before DTensor's hooks, as the hooks of results are behind them: those take and return plain tensors.
                hook = _argument_hook(module, path, of_arguments)
                module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
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
                of_results[key] = gather, self._entry(f"result {key!r} of {_shown(pattern)}", splits=False)
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
                f"the plan {'splits' if splits else 'gathers'} {what} of {_shown(path)} twice: by {other!r} and by"
                f" {pattern!r}",
                fix="let one of the two names stand for it",
            )


def _check_key(key: str | int, split: Nested, path: str, module: nn.Module) -> None:
    """An argument is named by its name, a result by its index, or its name where it has one.

    Raises:
        PlanError: the module does not take the argument, or the other of the two is meant.
    """
    parameters = inspect.signature(module.forward).parameters
    declared = ", ".join(_arguments(module)) if parameters else "no arguments"
    if isinstance(split, Split) and split.output:
        return
    if isinstance(key, int):
        raise PlanError(
            f"the plan splits {key} of {_shown(path)}, which is no argument's name; it takes {declared}",
            fix=f"write md.Split(dim, output=True) to split result {key}, or name the argument",
        )
    if isinstance(key, str) and key not in parameters:
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return
        close = difflib.get_close_matches(key, _arguments(module), n=1)
        raise PlanError(
            f"the plan splits argument {key!r} of {_shown(path)}, which takes {declared}",
            fix=f"name one of these{f', such as {close[0]!r}' if close else ''}, or say md.Split(dim, output=True) with"
            " the index of a result",
        )


def _argument_hook(
    module: nn.Module, path: str, splits: Mapping[str, tuple[Nested, Entry]]
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    signature = inspect.signature(module.forward)
    extra = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")

    def split_arguments(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        bound = signature.bind(*args, **kwargs)
        for key, (split, entry) in splits.items():
            where = bound.arguments if key in signature.parameters else bound.arguments.get(extra, {})
            if where.get(key) is None:
                others = f"{_shown(path)} takes {', '.join(_arguments(module))}"
                entry.why = others if entry.undeclared else f"it is {'None' if key in where else 'not passed'}"
            else:
                where[key] = _changed(where[key], split, entry, f"argument {key!r} of {_shown(path)}")
        return bound.args, bound.kwargs

    return split_arguments


def _result_hook(path: str, entries: Mapping[int | str, tuple[Nested, Entry]]) -> Callable[[nn.Module, Any, Any], Any]:
    """Change the results of a module that have an entry."""

    def change_results(_: nn.Module, args: Any, result: Any) -> Any:
        if not isinstance(result, (Tensor, tuple, list, Mapping)):
            raise PlanError(
                f"{_shown(path)} returns a {type(result).__name__}, not a tensor, a tuple or a dict of them",
                fix="split or gather at a module that returns tensors; models of diffusers and transformers do with"
                " return_dict=False",
                at=running_line(),
            )
        names = list(result) if isinstance(result, Mapping) else list(getattr(result, "_fields", ()))
        values = [result] if isinstance(result, Tensor) else list(_values(result))
        for key, (what, entry) in entries.items():
            index = names.index(key) if key in names else key
            if not isinstance(index, int) or not 0 <= index < len(values):
                raise PlanError(
                    f"the plan {_does(entry)} result {key!r} of {_shown(path)}, which returns {_returned(result)}",
                    fix=_results_fix(entry, key, result),
                    at=running_line(),
                )
            values[index] = _changed(values[index], what, entry, f"result {key!r} of {_shown(path)}")
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


def _values(nest: Any) -> Any:
    return nest.values() if isinstance(nest, Mapping) else nest


def _rebuilt(nest: Any, values: Sequence[Any]) -> Any:
    """A nest of the same class with other values."""
    if isinstance(nest, Mapping):
        items = dict(zip(nest, values, strict=True))
        return type(nest)(**items) if is_dataclass(nest) else type(nest)(items)  # type: ignore[call-arg]
    return type(nest)(*values) if hasattr(nest, "_fields") else type(nest)(values)


def _changed(value: Any, form: Nested, entry: Entry, what: str) -> Any:
    """The value with what the plan says of it, or of parts of it, done."""
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
        return _rebuilt(value, [_changed(v, form.get(k), entry, f"{k!r} of {what}") for k, v in value.items()])
    if isinstance(form, list):
        if not isinstance(value, (tuple, list)) or len(value) != len(form):
            found = f"{len(value)} values" if isinstance(value, (tuple, list)) else _kind(value)
            raise PlanError(
                f"{what} is {found}, and the plan has {len(form)} {_does(entry)} for it",
                fix=f"give one md.{'Split' if entry.splits else 'Gather'} for each, or None for those that stay"
                f" {'whole' if entry.splits else 'as they are'}",
                at=running_line(),
            )
        return _rebuilt(value, [_changed(v, one, entry, what) for v, one in zip(value, form, strict=True)])
    if isinstance(form, Gather):
        dim = _dim(value, form.dim, what)
        entry.applied = True
        return mark_gathered(value, dim, entry.axis, entry.size)
    if form.ndim is not None and isinstance(value, Tensor) and value.dim() != form.ndim:
        entry.why = f"it has {value.dim()} dims, and the plan splits it where it has {form.ndim}"
        return value
    dim = _dim(value, form.dim, what)
    entry.applied = True
    return mark_split(value, dim, entry.axis, entry.size)


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


def _shown(path: str) -> str:
    return f"module {path!r}" if path else "the model"
