"""Is what a graph says of its values true?

A file may say anything of the shape of a node, and memory is allocated and Inductor compiles by what it says.  So each
op is run once on tensors without memory, of which PyTorch works out the shape alone, and must give what the file says.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from torchtrt_md.bundle.limits import check_shape
from torchtrt_md.errors import BundleError
from torchtrt_md.graph.results import signature
from torchtrt_md.graph.schema import REBUILD
from torchtrt_md.program import dtype_name

_META = torch.device("meta")
_MAX_RESULTS = 1 << 12
_results: dict[tuple[Any, ...], Any] = {}


def value_of_call(node: Node, values: Mapping[Node, Any]) -> Any:
    """What a call gives, on device ``meta``: computed, and compared with ``node.meta["val"]`` where that is there.

    Of an op that returns several tensors of its own (a norm and its statistics) the first is compared; the shapes and
    dtypes of the others depend, in PyTorch, on the device.  Where PyTorch has no rule for an op's shape, what the file
    says counts.

    Args:
        node: a call of an allowed op, or of ``operator.getitem``.
        values: what the nodes before it give.

    Raises:
        BundleError: the op cannot take its operands, or gives what the file does not say or what is beyond all limits.
    """
    stated = node.meta.get("val")
    args, kwargs = map_arg((node.args, node.kwargs), lambda operand: values[operand])
    if node.target is operator.getitem:
        return _agreed(stated, _item(*args, **kwargs))
    op = node.target
    assert isinstance(op, torch._ops.OpOverload)
    args, kwargs = _without_device(op, args, kwargs)
    if _returns_list(op):
        _check_count(_bound(op, args, kwargs), stated)
    try:
        found = _run(op, args, kwargs)
    except NotImplementedError:
        if stated is None:
            raise BundleError(f"does not say what {op} returns", fix=REBUILD) from None
        return stated
    return _agreed(stated, found if _returns_list(op) else _with_statistics(found, stated))


def _run(op: torch._ops.OpOverload[Any, Any], args: Any, kwargs: Any) -> Any:
    """What the op gives; asked once for equal operands, since models repeat their blocks."""
    key = (op, signature(args), signature(kwargs))
    if key not in _results:
        if len(_results) >= _MAX_RESULTS:
            _results.clear()
        with torch.no_grad():
            _results[key] = op(*args, **kwargs)
    return _results[key]


def _with_statistics(found: Any, stated: Any) -> Any:
    """What was found, but for what depends on the device: that is as stated."""
    if not isinstance(found, tuple) or not isinstance(stated, tuple) or len(found) != len(stated):
        return found
    return (*found[:1], *(f if s is None else s for f, s in zip(found[1:], stated[1:], strict=True)))


def _item(value: object, index: object) -> object:
    if not isinstance(value, tuple) or type(index) is not int or not 0 <= index < len(value):
        raise BundleError(f"takes item {index!r} of what has no such item", fix=REBUILD)
    return value[index]


def _without_device(op: torch._ops.OpOverload[Any, Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments with which an op makes its result on ``meta``, wherever it would make it."""
    for at, argument in enumerate(op._schema.arguments):
        if argument.name == "device":
            if at < len(args):
                return (*args[:at], _META, *args[at + 1 :]), kwargs
            return args, {**kwargs, "device": _META}
    return args, kwargs


def _returns_list(op: torch._ops.OpOverload[Any, Any]) -> bool:
    """Does it return as many tensors as its arguments say?"""
    return [str(r.type) for r in op._schema.returns] == ["List[Tensor]"]


def _bound(op: torch._ops.OpOverload[Any, Any], args: Any, kwargs: Any) -> dict[str, Any]:
    schema = op._schema.arguments
    given: dict[str, Any] = {a.name: a.default_value for a in schema if a.has_default_value()}
    return {**given, **dict(zip((a.name for a in schema), args, strict=False)), **kwargs}


def _check_count(given: Mapping[str, Any], stated: object) -> None:
    """Refuse a split into more parts than the file lists, before they are made: a length may be anything."""
    x, dim = given.get("self"), given.get("dim")
    if not isinstance(x, Tensor) or not isinstance(dim, int):
        return  # an op of several operands, with a result for each
    extent, size = x.shape[dim], given.get("split_size", given.get("split_sizes", 1))
    if "chunks" in given:
        size = -(-extent // max(given["chunks"], 1))
    if isinstance(size, (list, tuple)):
        count = len(size)
    else:
        count = -(-extent // max(size, 1)) if extent else given.get("chunks", 1)
    listed = len(stated) if isinstance(stated, tuple) else 0
    if count > listed:
        raise BundleError(f"splits {extent} into {count} parts, and the file says {listed}", fix=REBUILD)


def _agreed(stated: Any, found: Any) -> Any:
    """What was found, where it is what was stated."""
    if isinstance(found, (list, tuple)):
        if stated is None:
            stated = (None,) * len(found)
        if not isinstance(stated, tuple) or len(stated) != len(found):
            raise BundleError(f"gives {len(found)} tensors, and the file says {_text(stated)}", fix=REBUILD)
        return tuple(_agreed(s, f) for s, f in zip(stated, found, strict=True))
    if found is None and stated is None:
        return None
    if isinstance(found, Tensor) and (stated is None or isinstance(stated, Tensor)):
        if found.layout is not torch.strided or found.device != _META:
            raise BundleError(f"gives a {found.layout} tensor on {found.device}", fix=REBUILD)
        check_shape(found.shape, found.itemsize, "its result", found.stride())
        if _end(found) > found.untyped_storage().nbytes():  # a view of any size and strides, which kernels believe
            raise BundleError(f"gives {_text(found)}, which reads beyond its operand", fix=REBUILD)
        if stated is None or (stated.dtype, stated.shape) == (found.dtype, found.shape):
            return found if stated is None or stated.stride() == found.stride() else stated
    raise BundleError(f"gives {_text(found)}, and the file says {_text(stated)}", fix=REBUILD)


def _end(tensor: Tensor) -> int:
    """Where the last element of a tensor ends in its storage, in bytes."""
    if not tensor.numel():
        return 0
    last = sum(int((extent - 1) * stride) for extent, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (int(tensor.storage_offset()) + last + 1) * tensor.itemsize


def _text(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)} {list(value.shape)}"
    return "nothing" if value is None else f"{len(value)} tensors" if isinstance(value, tuple) else type(value).__name__
