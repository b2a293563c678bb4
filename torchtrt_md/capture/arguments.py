"""A model call's arguments: names for the tensors, and all else to be built in."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchtrt_md.errors import CaptureError

Scalar = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Arguments:
    """The leaves of a call by name, and how to make the call again from other tensors.

    Attributes:
        tensors: name -> example; the parameter's name, with the path inside it where it nests ("mask.0").
        constants: name -> value, for leaves that are plain scalars.
    """

    tensors: Mapping[str, Tensor]
    constants: Mapping[str, object]
    leaves: tuple[object, ...]
    names: tuple[str, ...]
    spec: pytree.TreeSpec

    @classmethod
    def of(cls, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
        """Raises CaptureError where the model's forward does not take these arguments, or none is a tensor."""
        signature = inspect.signature(model.forward)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise CaptureError(
                f"{type(model).__name__}.forward{signature} cannot be called with the example arguments: {error}",
                fix="pass the args and kwargs that the model itself takes",
            ) from error
        variadic = {p.name: p.kind for p in signature.parameters.values()}
        names: dict[int, str] = {}
        by_name: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            if variadic[name] is inspect.Parameter.VAR_KEYWORD:
                by_name.update(value)
            else:
                by_name[name] = value
        paths, _ = pytree.tree_flatten_with_path(by_name)
        leaf_names = [_name(path) for path, _ in paths]
        # The call itself is made as it came; its leaves are the same objects in another order.
        for name, (_, leaf) in zip(leaf_names, paths, strict=True):
            if isinstance(leaf, Tensor):
                names.setdefault(id(leaf), name)
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        tensors = {names[id(leaf)]: leaf for leaf in leaves if isinstance(leaf, Tensor)}
        if not tensors:
            raise CaptureError("no argument is a tensor", fix="pass example tensors as args or kwargs")
        constants = {n: leaf for n, (_, leaf) in zip(leaf_names, paths, strict=True) if isinstance(leaf, Scalar)}
        return cls(
            tensors=tensors,
            constants=constants,
            leaves=tuple(leaves),
            names=tuple(names.get(id(leaf), "") for leaf in leaves),
            spec=spec,
        )

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


def _name(path: Sequence[Any]) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)
