"""Apply a context-parallel plan: module hooks that mark where the sequence is split and gathered.

The marks are ``split_sequence`` and ``gather_sequence``, which leave a value whole: the model's code runs on, and is
traced with, the shapes that its author meant.  What a rank holds is decided in lowering
(:mod:`torchtrt_md.lowering.sequence`), so no local length can enter the graph as a number.
"""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from torchtrt_md.errors import PlanError
from torchtrt_md.lowering import ops
from torchtrt_md.parallel import ContextParallel, Gather, Split


def apply(model: nn.Module, parallel: ContextParallel, size: int) -> None:
    """Hook the model by the plan; ``size`` is the number of ranks along the axis.

    Raises:
        PlanError: there is no plan, or it does not fit the model.
    """
    plan = parallel.plan if parallel.plan is not None else getattr(model, "_cp_plan", None)
    if not plan:
        raise PlanError(
            f"{type(model).__name__} has no context-parallel plan of its own (_cp_plan)",
            fix='pass one: ContextParallel("cp", plan={"": {"x": md.Split(1)}, "proj_out": md.Gather(1)})',
        )
    for name, entry in plan.items():
        for path, module in modules_named(model, name):
            if isinstance(entry, Mapping):
                _hook_splits(module, path, {key: _splits(s) for key, s in entry.items()}, parallel.axis, size)
            else:
                gathers = list(entry) if isinstance(entry, (list, tuple)) else [entry]
                _hook_gathers(module, path, [_gather(g) for g in gathers], parallel.axis, size)


def modules_named(model: nn.Module, pattern: str) -> list[tuple[str, nn.Module]]:
    """The modules whose dotted name fits the pattern, part by part, in the model's order.

    Raises:
        PlanError: none does.
    """
    parts = pattern.split(".")
    found = [
        (name, module)
        for name, module in model.named_modules()
        if len(name.split(".")) == len(parts) and all(map(fnmatch.fnmatchcase, name.split("."), parts))
    ]
    if not found:
        names = [name for name, _ in model.named_modules() if name]
        close = difflib.get_close_matches(pattern, names, n=3) or names[:3]
        raise PlanError(
            f"the plan names a module {pattern!r} that {type(model).__name__} does not have",
            fix=f"use a name from model.named_modules(), such as {', '.join(map(repr, close))}",
        )
    return found


def _splits(entry: Any) -> Split | list[Split]:
    if isinstance(entry, Split):
        return entry
    if isinstance(entry, (list, tuple)):
        return [s for s in map(_splits, entry) if isinstance(s, Split)]
    if hasattr(entry, "split_dim"):  # diffusers' ContextParallelInput
        return Split(entry.split_dim, output=entry.split_output, ndim=entry.expected_dims)
    raise PlanError(f"{entry!r} does not say how to split", fix="use md.Split(dim)")


def _gather(entry: Any) -> Gather | None:
    if entry is None or isinstance(entry, Gather):
        return entry
    if hasattr(entry, "gather_dim"):  # diffusers' ContextParallelOutput
        return Gather(entry.gather_dim)
    raise PlanError(f"{entry!r} does not say where to gather", fix="use md.Gather(dim)")


def _hook_splits(
    module: nn.Module, path: str, entries: Mapping[str | int, Split | list[Split]], axis: str, size: int
) -> None:
    signature = inspect.signature(module.forward)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    by_argument: dict[str, Split | list[Split]] = {}
    by_result: dict[str | int, Split] = {}
    for key, split in entries.items():
        if isinstance(split, Split) and split.output:
            by_result[key] = split
        elif isinstance(key, str) and (key in signature.parameters or open_ended):
            by_argument[key] = split
        else:
            raise PlanError(
                f"the plan splits argument {key!r} of {_shown(path)}, which takes {', '.join(signature.parameters)}",
                fix="name one of these, or say md.Split(dim, output=True) with the index of a result",
            )

    def split_arguments(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        bound = signature.bind(*args, **kwargs)
        extra = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
        for key, split in by_argument.items():
            where = bound.arguments if key in signature.parameters else bound.arguments.get(extra or "", {})
            if where.get(key) is not None:
                where[key] = _split(where[key], split, f"argument {key!r} of {_shown(path)}", axis, size)
        return bound.args, bound.kwargs

    def split_results(_: nn.Module, args: Any, result: Any) -> Any:
        def at(index: int, value: Any) -> Any:
            if index not in by_result:
                return value
            return _split(value, by_result[index], f"result {index} of {_shown(path)}", axis, size)

        return _map_results(result, at, path)

    if by_argument:
        module.register_forward_pre_hook(split_arguments, with_kwargs=True)
    if by_result:
        module.register_forward_hook(split_results)


def _hook_gathers(module: nn.Module, path: str, entries: Sequence[Gather | None], axis: str, size: int) -> None:
    def gather_results(_: nn.Module, args: Any, result: Any) -> Any:
        def at(index: int, value: Any) -> Any:
            entry = entries[index] if index < len(entries) else None
            if entry is None or size == 1:
                return value
            return ops.gather_sequence(value, _dim(value, entry.dim, f"result {index} of {_shown(path)}"), axis, size)

        return _map_results(result, at, path)

    module.register_forward_hook(gather_results)


def _map_results(result: Any, at: Callable[[int, Any], Any], path: str) -> Any:
    if isinstance(result, Tensor):
        return at(0, result)
    if isinstance(result, (tuple, list)):
        return type(result)(at(i, value) for i, value in enumerate(result))
    raise PlanError(
        f"{_shown(path)} returns a {type(result).__name__}, not a tensor or a tuple of them",
        fix="split or gather at a module that returns tensors",
    )


def _split(value: Any, split: Split | list[Split], what: str, axis: str, size: int) -> Any:
    if isinstance(split, list):
        if not isinstance(value, (tuple, list)) or len(value) != len(split):
            raise PlanError(f"{what} is not a list of {len(split)} tensors", fix="give one md.Split for each")
        return type(value)(_split(v, s, what, axis, size) for v, s in zip(value, split, strict=True))
    if not isinstance(value, Tensor):
        raise PlanError(f"{what} is a {type(value).__name__}, not a tensor", fix="split tensors only")
    if size == 1 or (split.ndim is not None and value.dim() != split.ndim):
        return value
    dim = _dim(value, split.dim, what)
    extent = value.shape[dim]
    if extent % size:
        raise PlanError(
            f"{what} has {extent} on dim {dim}, which does not divide by the {size} ranks of axis {axis!r}:"
            f" {extent % size} left over",
            fix=f"pad to {extent + size - extent % size} or cut to {extent - extent % size}",
        )
    return ops.split_sequence(value, dim, axis, size)


def _dim(value: Tensor, dim: int, what: str) -> int:
    if not -value.dim() <= dim < value.dim():
        raise PlanError(f"{what} has {value.dim()} dims and the plan says dim {dim}", fix="correct the plan's dim")
    return dim % value.dim()


def _shown(path: str) -> str:
    return f"module {path!r}" if path else "the model"
