"""A model call's arguments: names for the tensors, and all else to be built in.

A leaf's name is its path in the call, never the tensor that happens to be there: the parameter's name, or the
key among ``**kwargs``, then the path where the argument nests: ``mask.0``, ``joint.scale``; an element of
``*args`` is ``args.0``.  The runtime names the leaves of its calls by the same function.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchtrt_md.errors import CaptureError
from torchtrt_md.wrappers import is_wrapper

Scalar = (type(None), bool, int, float, str)
_NO_DEFAULT = object()


@dataclass(frozen=True)
class Arguments:
    """The leaves of a call by name, and how to make the call again from other tensors.

    A leaf that is neither a tensor nor comparable (a dtype, a device, an object) is built in by its name alone.

    Attributes:
        tensors: name -> example, in the order of the call.
        constants: name -> value, for the leaves that are :func:`comparable`.
        opaque: the names of the leaves that are neither, but for those that are what forward has as its default.
        positional: the arguments that may be passed by position, in order: those that were, and those that were
            passed by name but could have followed them by position.
        leaves: every leaf of the call, in order.
        names: the names of ``leaves``.
        spec: how ``leaves`` nest in (args, kwargs).
    """

    tensors: Mapping[str, Tensor]
    constants: Mapping[str, object]
    opaque: tuple[str, ...]
    positional: tuple[str, ...]
    leaves: tuple[object, ...]
    names: tuple[str, ...]
    spec: pytree.TreeSpec

    @classmethod
    def of(cls, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
        """Raises CaptureError where forward does not take these arguments, none is a tensor, or two have one name."""
        signature = inspect.signature(model.forward)
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise CaptureError(
                f"{type(model).__name__}.forward{signature} cannot be called with the example arguments: {error}",
                fix="pass the args and kwargs that the model itself takes",
            ) from error
        positional = _positional(signature, len(args), kwargs)
        given = [*zip(positional, args, strict=False), *kwargs.items()]
        names = [name for argument, value in given for name, _ in named_leaves(argument, value)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise CaptureError(
                f"two values among the example arguments have the name {twice!r}",
                fix="rename a key of a dict, or an argument",
            )
        if "" in names:
            raise CaptureError(
                "one of the example arguments has no name: it is passed as **{'': ...}", fix="give the argument a name"
            )
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        by_name = dict(zip(names, leaves, strict=True))
        tensors = {name: leaf for name, leaf in by_name.items() if isinstance(leaf, Tensor)}
        if not tensors:
            raise CaptureError("no argument is a tensor", fix="pass example tensors as args or kwargs")
        for name, tensor in tensors.items():
            _check_plain(name, tensor)
        constants = {name: _plain(leaf) for name, leaf in by_name.items() if comparable(leaf)}
        defaults = {p.name: p.default for p in signature.parameters.values()}
        opaque = [
            name
            for name, leaf in by_name.items()
            if name not in tensors and name not in constants and leaf is not defaults.get(name, _NO_DEFAULT)
        ]
        return cls(tensors, constants, tuple(opaque), tuple(positional), tuple(leaves), tuple(names), spec)

    @property
    def device(self) -> torch.device:
        """Where the example tensors are."""
        return next(iter(self.tensors.values())).device

    def call_with(self, tensors: Mapping[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """args and kwargs with these tensors in place of the examples."""
        leaves = [
            tensors[name] if isinstance(leaf, Tensor) else leaf
            for name, leaf in zip(self.names, self.leaves, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs


def _check_plain(name: str, tensor: Tensor) -> None:
    """Refuse tensors that are not one block of numbers, which is all that an engine takes."""
    if kind := odd_kind(tensor):
        raise CaptureError(f"argument {name!r} is a {kind} tensor", fix=DENSE)
    if tensor.is_meta:
        raise CaptureError(
            f"argument {name!r} is on meta and has no value",
            fix="make the parameters of the model on meta, if it is large, and the example arguments where it will run",
        )
    if hasattr(tensor, "device_mesh"):
        raise CaptureError(
            f"argument {name!r} is a DTensor", fix="pass the whole tensor (full_tensor()); the plan says what is split"
        )
    if is_wrapper(tensor):
        raise CaptureError(
            f"argument {name!r} is a {type(tensor).__name__}, and an engine takes plain tensors",
            fix="pass dequantize() of it, or let a module hold it as a parameter or buffer",
        )


DENSE = "pass a dense one: to_dense(), dequantize(), or padded"


def odd_kind(tensor: Tensor) -> str:
    """What a tensor is called that is not one block of numbers by its layout; "" of one that is."""
    if tensor.is_nested:
        return "nested"
    if tensor.layout != torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    return "quantized" if tensor.is_quantized else ""


def named_leaves(argument: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of one argument by name, in the order of ``tree_flatten``."""
    try:
        leaves = pytree.tree_flatten_with_path(value)[0]
    except ValueError:  # a class that was registered without keys for its parts: they are counted
        leaves = [((pytree.SequenceKey(i),), leaf) for i, leaf in enumerate(pytree.tree_leaves(value))]
    for path, leaf in leaves:
        keys = (str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)
        yield ".".join([argument, *keys]), leaf


def _plain(leaf: object) -> object:
    """A constant as a manifest has it: NumPy's numbers and texts are Python's, too, by their class, and are no JSON."""
    if isinstance(leaf, Enum) or not isinstance(leaf, (float, str)):
        return leaf
    return float(leaf) if isinstance(leaf, float) else str(leaf)


def comparable(leaf: object) -> bool:
    """Whether a bundle can hold this constant, for calls to be compared with it: JSON has no inf or nan."""
    return isinstance(leaf, Scalar) and not (isinstance(leaf, float) and not math.isfinite(leaf))


def _positional(signature: inspect.Signature, count: int, kwargs: Mapping[str, Any]) -> list[str]:
    """The names of ``count`` positional arguments, then of those in ``kwargs`` that could follow by position."""
    parameters = signature.parameters.values()
    plain = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = [p.name for p in plain[:count]]
    variadic = "".join(p.name for p in parameters if p.kind is p.VAR_POSITIONAL)
    names += [f"{variadic}.{i}" for i in range(count - len(names))]
    following = takewhile(lambda p: p.kind is p.POSITIONAL_OR_KEYWORD and p.name in kwargs, plain[count:])
    return [*names, *(p.name for p in following)]
