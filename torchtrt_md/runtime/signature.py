"""A call's arguments and outputs, against the manifest.  Nothing here needs a GPU."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchtrt_md.bundle import manifest as m
from torchtrt_md.bundle.structure import local_shape, mesh_of
from torchtrt_md.capture.arguments import DENSE, Scalar, comparable, named_leaves, odd_kind
from torchtrt_md.capture.async_private import arrived
from torchtrt_md.errors import InputError, VerificationError
from torchtrt_md.mesh import Mesh
from torchtrt_md.program import Value, dtype_name
from torchtrt_md.runtime.tensors import ALIGNMENT
from torchtrt_md.wrappers import is_wrapper


class Signature:
    """What a program takes and gives, on each rank."""

    def __init__(self, manifest: m.Manifest) -> None:
        self.mesh = mesh_of(manifest)
        self.constants, self.result, self.positional = manifest.constants, manifest.result, manifest.positional
        self.opaque = manifest.opaque
        self.inputs = {t.name: t for t in manifest.inputs}
        self.outputs = manifest.outputs
        self._places = [{name: i for i, name in enumerate(known)} for known in (self.inputs, self.constants)]
        self.local = {t.name: (t.dtype, torch.Size(local_shape(t, self.mesh))) for t in manifest.inputs}

    def named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of a call by name, in the manifest's order; their dtypes and shapes are not looked at.

        Arguments are passed as they were at export: by position, by name, nested as they were nested, or each
        leaf by its own name.  A built-in constant may be left out; if it is passed, its value must be the built-in
        one.  What the bundle cannot hold, such as a dtype or inf, is built in too but cannot be compared: such an
        argument is refused, and those after it are passed by name.

        Raises:
            InputError: an argument too many, unknown, missing or given twice, or another value of a constant.
        """
        found = self._found(args, kwargs)
        for name, value in found.items():
            if name in self.constants:
                self._check_constant(name, value)
            elif name not in self.inputs:
                self._refuse(name, value)
        missing = [name for name in self.inputs if name not in found]
        if missing:
            raise InputError(
                f"the program's input{'s' if len(missing) > 1 else ''} {', '.join(map(repr, missing))}"
                f" {'are' if len(missing) > 1 else 'is'} missing; it takes {self._takes()}",
                fix="pass every tensor that was passed when it was compiled or exported",
            )
        return {name: found[name] for name in self.inputs}

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
        """The inputs of a call by name, each checked to be what the engines read on this rank.

        Raises:
            InputError: as :meth:`named`, or a value that is no plain tensor of the right device, dtype and shape.
        """
        inputs = {name: arrived(value) for name, value in self.named(args, kwargs).items()}
        for name, value in inputs.items():
            self._check_tensor(name, value, device)
        return inputs

    def nest(self, outputs: Mapping[str, Tensor]) -> Any:
        """The outputs as the model returns them."""
        return _nest(self.result, [outputs[t.name] for t in self.outputs])

    def flat(self, returned: Any) -> dict[str, Tensor]:
        """The reverse of :meth:`nest`, also of what the model itself returns: its output tensors by name.

        Raises:
            VerificationError: it is nested otherwise.
        """
        try:
            by_index = dict(_flat(self.result, returned))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise VerificationError(
                f"a {type(returned).__name__} is not what the bundle returns, {self.result}: {error}",
                fix="compare with the model that the bundle was exported from",
            ) from error
        return {t.name: by_index[i] for i, t in enumerate(self.outputs) if i in by_index}

    def _found(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The leaves of a call by name."""
        if len(args) > len(self.positional):
            names = f": {', '.join(self.positional)}" if self.positional else ""
            raise InputError(
                f"{len(args)} positional arguments, and the program takes {len(self.positional)}{names}",
                fix="pass the model's other arguments by name",
            )
        found: dict[str, Any] = {}
        for argument, value in [*zip(self.positional, args, strict=False), *kwargs.items()]:
            leaves = list(named_leaves(argument, value))
            self._check_whole(argument, value, {name for name, _ in leaves})
            if len(leaves) > 1:
                self._check_order(argument, [name for name, _ in leaves])
            for name, leaf in leaves:
                if name in found:
                    raise InputError(f"argument {name!r} is given twice", fix="give it once, by position or by name")
                found[name] = leaf
        return found

    def _check_order(self, argument: str, names: Sequence[str]) -> None:
        """Refuse a dict whose keys are in another order: what a model does with its values may depend on it."""
        for known in self._places:
            given = [name for name in names if name in known]
            built = sorted(given, key=known.__getitem__)
            if given != built:
                raise InputError(
                    f"{argument} has {', '.join(given)} in this order, and the program was built with"
                    f" {', '.join(built)}",
                    fix=f"pass {argument} in that order, or compile or export again with this one",
                )

    def _check_whole(self, argument: str, value: object, given: Collection[str]) -> None:
        """Refuse a list or dict that lacks what was built in of it: the program would compute with that all the same.

        An argument that is left out as a whole is another matter.  Of one that has more than what cannot be compared, a
        call leaves that out.
        """
        if isinstance(value, Tensor):  # as most are, and each call comes here
            return
        every = (*self.inputs, *self.constants, *self.opaque)
        others = [name for name in self.positional if _is_of(argument, name) and name != argument]  # those of *args
        built = [n for n in every if _is_of(argument, n) and not any(_is_of(other, n) for other in others)]
        compared = [name for name in built if name not in self.opaque]
        lacking = [name for name in compared or built if name not in given]
        if lacking:
            raise InputError(
                f"{argument} is a {type(value).__name__}, and the program was built with {', '.join(lacking)}, which it"
                " lacks",
                fix=f"pass {argument} as it was, or compile or export again with the other value",
            )

    def _refuse(self, name: str, value: object) -> None:
        if isinstance(value, Tensor) or comparable(value):
            raise InputError(
                f"the program has no input {name!r}; it takes {self._takes()}",
                fix="leave it out, or compile or export again with it among the example arguments",
            )
        given = repr(value) if isinstance(value, float) else f"a {type(value).__name__}"
        raise InputError(
            f"{name} is {given}, which cannot be compared with what was built in",
            fix=f"leave {name} out, and pass the arguments after it by name",
        )

    def _takes(self) -> str:
        shapes = [f"{name} {dtype_name(m_t.dtype)}{list(self.local[name][1])}" for name, m_t in self.inputs.items()]
        return ", ".join(shapes)

    def _check_constant(self, name: str, value: object) -> None:
        built = self.constants[name]
        # In Python 1 == True == 1.0, and what is computed with them differs.
        alike = all(isinstance(value, kind) == isinstance(built, kind) for kind in (bool, float))
        same = alike and isinstance(value, Scalar) and value == built
        if not same:
            given = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise InputError(
                f"{name} is {given}, and the program was built with {name}={built!r}",
                fix=f"leave {name} out, or compile or export again with the other value",
            )

    def _check_tensor(self, name: str, value: object, device: torch.device) -> None:
        tensor, (dtype, shape) = self.inputs[name], self.local[name]
        if not isinstance(value, Tensor):
            raise InputError(
                f"input {name!r} is a {type(value).__name__}, and the program takes a tensor there",
                fix=f"pass a {dtype} tensor of shape {list(shape)}",
            )
        kind = odd_kind(value)
        if kind:
            raise InputError(f"input {name!r} is a {kind} tensor, and the program takes a dense one", fix=DENSE)
        if isinstance(value, DTensor):
            raise InputError(
                f"input {name!r} is a DTensor", fix="pass this rank's plain tensor: its to_local() or full_tensor()"
            )
        if is_wrapper(value):
            raise InputError(
                f"input {name!r} is a {type(value).__name__}", fix="pass a plain tensor: dequantize() of it"
            )
        if value.device != device:
            raise InputError(
                f"input {name!r} is on {value.device} and the program runs on {device}", fix=f"move it to {device}"
            )
        if value.dtype != dtype:
            raise InputError(
                f"input {name!r} is {value.dtype} and the program takes {dtype}", fix=f"cast it to {dtype}"
            )
        if value.shape != shape:
            raise InputError(
                f"input {name!r} has shape {list(value.shape)} and the program takes {list(shape)}"
                + _chunk_note(tensor, self.mesh),
                fix="pass that shape, or compile or export the model for this one",
            )
        if value.requires_grad and torch.is_grad_enabled():
            raise InputError(
                f"input {name!r} requires a gradient, and a compiled program gives none",
                fix="call the runner under torch.no_grad(), or pass the detached tensor",
            )


def _is_of(argument: str, name: str) -> bool:
    """Is this the name of the argument, or of a leaf of it?"""
    return name == argument or name.startswith(f"{argument}.")


def prepared(tensor: Tensor) -> Tensor:
    """The tensor as an engine can read it: contiguous, and starting where TensorRT may load from."""
    tensor = tensor.detach()
    if tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0 and not tensor.is_neg() and not tensor.is_conj():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format).resolve_conj().resolve_neg()


def _chunk_note(tensor: Value, mesh: Mesh) -> str:
    if not tensor.sharding:
        return ""
    parts = ", ".join(f"dim {dim} over the {mesh.axis_size(axis)} ranks of {axis!r}" for dim, axis in tensor.sharding)
    return f": this rank's chunk of {list(tensor.shape)}, split on {parts}"


def _nest(result: Mapping[str, Any], outputs: Sequence[Tensor]) -> Any:
    ((kind, value),) = result.items()
    if kind == "output":
        return outputs[value]
    if kind == "tuple":
        return tuple(_nest(part, outputs) for part in value)
    if kind == "list":
        return [_nest(part, outputs) for part in value]
    if kind == "dict":
        return {key: _nest(part, outputs) for key, part in value.items()}
    return value


def _flat(result: Mapping[str, Any], returned: Any) -> Iterator[tuple[int, Tensor]]:
    ((kind, value),) = result.items()
    if isinstance(returned, Tensor) != (kind == "output"):  # a tensor can be indexed as if it were a container
        raise TypeError(f"a {type(returned).__name__} where there should be {kind} {value}")
    if kind == "output":
        yield value, returned
    elif kind in ("tuple", "list"):
        for part, element in zip(value, returned, strict=True):
            yield from _flat(part, element)
    elif kind == "dict":
        for key, part in value.items():
            yield from _flat(part, returned[key])
