"""Values that depend on shapes alone are known while a model is traced.

    mask = torch.ones(S, S).tril().bool()
    for row in range(S):
        at = mask[row].nonzero()        how many there are is known: the mask depends on no input and no weight

Fake tensors have no values, so an op whose result's size, or whose plain result, depends on values would end the trace.
What depends on neither inputs nor weights is therefore computed beside it, on the CPU.  Where such an op asks, it gets
the answer, which enters the graph as a constant: it is the same for all inputs of these shapes, and on all ranks.
So do tensors with values that an op takes, since the model's code holds them; :attr:`KnownValues.met` are those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from torchtrt_md.capture.torch_private import FakeTensor, untraced

aten = torch.ops.aten
# Larger ones are taken for unknown: masks of 8192 tokens are kept.
_MOST_ELEMENTS = 1 << 26
_ASKS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
# Their values are what was in the memory before.
_UNINITIALIZED = {aten.empty, aten.empty_like, aten.empty_strided, aten.empty_permuted, aten.new_empty}
_UNINITIALIZED |= {aten.new_empty_strided, aten.resize_, aten.set_}


class KnownValues(TorchDispatchMode):
    """While active, ops are computed as well where all that they take is known."""

    supports_higher_order_operators = True  # ops that take ops, as torchao's products of int8 on a GPU: they go past

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: Any = WeakTensorKeyDictionary()
        self.met: dict[int, Tensor] = {}  # by id, which is the tensor's own while it is kept here
        # The memory of known values into which something unknown was written; kept, so that no other has its address.
        self._lost: dict[int, Tensor] = {}

    def _of(self, tensor: Tensor) -> Tensor | None:
        """The value of a tensor that is traced, on the CPU and not to be written to; None where it is not known."""
        value: Tensor | None = self._known.get(tensor)
        return None if value is None or value.untyped_storage().data_ptr() in self._lost else value

    def _forget_written(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What an op writes to its operands is not known; nor is what shares their memory."""
        for tensor in _written_by(func, args, kwargs):
            if not isinstance(tensor, FakeTensor) and type(tensor) is not Tensor:
                self._known.clear()  # a DTensor's part may share memory with anything
            value = self._known.get(tensor)
            if value is not None and value.numel():
                self._lost[value.untyped_storage().data_ptr()] = value

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].device  # PyTorch asks for it nearly as often as all ops are called, and no mode adds to it
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.HigherOrderOperator):
            return func(*args, **kwargs)
        if func is not aten.lift_fresh.default:  # which takes what the code wrote as numbers
            self._meet(args, kwargs)
        if func is not aten.index.Tensor and not func._schema.is_mutable and any(map(self.is_unknown, args)):
            return func(*args, **kwargs)  # as most are
        if func is aten.index.Tensor:
            args = (args[0], self._without_masks(args[1]))
        leaves, spec = pytree.tree_flatten((args, kwargs))
        values = [self._operand(leaf) for leaf in leaves]
        computes = all(v is not None for v, leaf in zip(values, leaves, strict=True) if isinstance(leaf, Tensor))
        given = [v if isinstance(leaf, Tensor) else _on_cpu(leaf) for v, leaf in zip(values, leaves, strict=True)]
        if not computes or not _is_computable(func, leaves):
            self._forget_written(func, args, kwargs)
            return func(*args, **kwargs)
        known_args, known_kwargs = pytree.tree_unflatten(given, spec)
        if _asks(func):
            with untraced():
                answer = func(*known_args, **known_kwargs)
            device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
            return pytree.tree_map_only(Tensor, lambda t: self._constant(t, device), answer)
        result = func(*args, **kwargs)
        made = _tensors_of(result)
        found = _computed(func, known_args, known_kwargs) if sum(map(Tensor.numel, made)) <= _MOST_ELEMENTS else None
        if found is None:
            self._forget_written(func, args, kwargs)
        for tensor, value in zip(made, found or (), strict=found is not None):
            self._known[tensor] = value
        return result

    def _meet(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the tensors with values among the operands."""
        for operand in (*args, *kwargs.values()):
            for leaf in operand if isinstance(operand, (list, tuple)) else (operand,):
                if type(leaf) is Tensor or type(leaf) is Parameter:
                    self.met[id(leaf)] = leaf

    def _without_masks(self, indices: list[Tensor | None]) -> list[Tensor | None]:
        """Indices with positions in place of masks that are known: there are then as many as the shape says."""
        found: list[Tensor | None] = []
        for index in indices:
            value = self._operand(index) if index is not None and index.dtype in (torch.bool, torch.uint8) else None
            if index is None or value is None:
                found.append(index)
                continue
            with untraced():
                positions = value.nonzero().unbind(1)
            found.extend(self._constant(position, index.device) for position in positions)
        return found

    def is_unknown(self, leaf: object) -> bool:
        """Is it a tensor of the trace, without a value?"""
        return isinstance(leaf, FakeTensor) and leaf not in self._known

    def _operand(self, leaf: object) -> Tensor | None:
        if not isinstance(leaf, Tensor):
            return None
        if isinstance(leaf, FakeTensor):
            return self._of(leaf)
        if type(leaf) is not Tensor or leaf.is_meta or leaf.numel() > _MOST_ELEMENTS:
            return None
        if leaf not in self._known:  # one that the model's code holds; its own is not written to
            with untraced():
                self._known[leaf] = leaf.detach().cpu().clone()
        return self._of(leaf)

    def _constant(self, value: Tensor, device: torch.device) -> Tensor:
        """A tensor in the graph that has this value."""
        made: Tensor = aten.lift_fresh_copy.default(value)
        made = made if made.device == device else made.to(device)
        with untraced():
            self._known[made] = value.clone()  # what is written to it is not written to the graph's own
        return made


def _is_computable(func: Any, leaves: list[Any]) -> bool:
    """Is the result that of the operands alone, and the same on every rank?"""
    return (
        func.namespace in ("aten", "prims")
        and torch.Tag.nondeterministic_seeded not in func.tags
        and func.overloadpacket not in _UNINITIALIZED
        and not any(isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)) for leaf in leaves)
    )


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
    """The results; None where the CPU has no kernel for it."""
    try:
        with untraced():
            return _tensors_of(func(*args, **kwargs))
    except (RuntimeError, TypeError, IndexError):  # NotImplementedError is a RuntimeError
        return None


def _asks(func: Any) -> bool:
    """Does the result's size, or a plain result, depend on values?"""
    return func is not aten.index.Tensor and any(tag in func.tags for tag in _ASKS)


def _on_cpu(leaf: object) -> object:
    return torch.device("cpu") if isinstance(leaf, torch.device) else leaf


def _tensors_of(result: object) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


def _written_by(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The operands that an op writes to."""
    schema = func._schema  # type: ignore[attr-defined]
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            operand = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from _tensors_of(operand)
