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
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from torchtrt_md.capture.plan_hooks import Entry, Hooks, Nested, arguments_of, named, values_of
from torchtrt_md.errors import PlanError, PlanWarning
from torchtrt_md.mesh import joined, shown
from torchtrt_md.parallel import ContextParallel, Gather, Split


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
    hooks = Hooks(axis, size)
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
                modules, name, {key: _splits(s, f"{_what(key)} of {named(name)}") for key, s in entry.items()}
            )
            continue
        listed = entry if isinstance(entry, (list, tuple)) else [entry]
        gathers = entry if isinstance(entry, Mapping) else dict(enumerate(listed))
        for key, gather in gathers.items():
            if _is_split(gather):
                raise _bare_split(name, modules[0][1], key, _splits(gather, ""))
            if gather is not None and not _all_gathers(gather):
                raise PlanError(
                    f"the plan has {gather!r} for {named(name)}, which does not say where to gather its result",
                    fix=f'write {{"{name}": md.Gather(dim)}} to gather its result, or'
                    f" {_in_plan(name, arguments_of(modules[0][1])[0], 'md.Split(dim)')} to split an argument",
                )
        hooks.add_gathers(modules, name, {key: _gather(gather) for key, gather in gathers.items()})
    return AppliedPlan(type(model).__name__, axis, tuple(hooks.entries), own)


def _example(model: nn.Module, axis: str) -> str:
    """A plan in the model's own names, for a message."""
    argument = arguments_of(model)[0]
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
    of_argument = _in_plan(name, arguments_of(module)[0], _code(Split(split.dim, ndim=split.ndim)))
    of_result = _in_plan(name, index, _code(Split(split.dim, output=True, ndim=split.ndim)))
    takes = ", ".join(arguments_of(module))
    return PlanError(
        f"the plan has {_code(split)} for {named(name)}, and not for one of its arguments or results; it takes {takes}",
        fix=f"write {of_result} to split result {index}"
        if split.output
        else f"write {of_argument} to split an argument, or {of_result} to split result {index}",
    )


def _gather_in_dict(name: str, key: Any, gather: Any) -> PlanError:
    """A gather among splits of arguments and results."""
    return PlanError(
        f"the plan gathers {_what(key)} of {named(name)} in a dict that splits others",
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
        for one in values_of(entry):
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
