"""Inputs that tell programs apart, for examples that do not: zeros, constants, equal rows.

Attention to the wrong tokens is right where all tokens are equal.  An example whose slices along some dim are all equal
is drawn anew, from a fixed seed, so that it is as valid as it was:

    floating    normal where all are zero; else each multiplied by a number from [0.5, 1), which keeps signs, zeros
                and infinities, as masks have them
    integers    from the range of the example; where the model does nothing with them but look something up, from all
                that can be looked up
    booleans    the other value at the end of the last row, as a mask has where a sequence is padded

A weight of zeros hides what it is multiplied with, and a bias of zeros how often it is added; so models are made, and a
bundle may get other weights later.  So for structure, parameters that are one number everywhere are drawn too
(:func:`drawn_constants`).

The largest number of a sequence is right wherever a program looks for it, unless it is where the program does not look;
and programs forget the last position, or count it twice.  So where a model looks for such numbers, structure is asked
once more, with the largest numbers of its inputs at the end (:func:`largest_last`).  A bound that the example stays
inside hides what is computed of it: where a model whose width is split has one, structure is asked with larger and with
smaller inputs, too (:func:`scaled`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from torchtrt_md.program import ShardedProgram, Value, placeholders, value_of

_SEED = 0
_OF_BIAS = 0.25
_MOST_BYTES = 4 << 30
_OUTLIES = 4.0  # times the largest of the others
_SCALED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
aten = torch.ops.aten
# What hands on the same numbers.
_MOVES = {
    aten.view,
    aten._unsafe_view,
    aten.reshape,
    aten.unsqueeze,
    aten.squeeze,
    aten.expand,
    aten.permute,
    aten.transpose,
    aten.t,
    aten.clone,
    aten.alias,
    aten.detach,
    aten.slice,
    aten.select,
    aten.cat,
    aten.stack,
    aten.repeat,
}
# What takes any number.
_COMPARISONS = {aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge}


def draw(dense: ShardedProgram, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New tensors for those of the inputs that cannot tell programs apart; empty where all can.

    Args:
        dense: the captured graph of the dense model, which says what integers are for.
        inputs: the examples, by name.
    """
    generator = torch.Generator().manual_seed(_SEED)
    drawn = {}
    for node in placeholders(dense.graphs[0]):
        source = dense.sources[node.name]
        if isinstance(source, Value) and repeats(inputs[source.name]):
            example = inputs[source.name].detach()
            new = _drawn(example, node, generator)
            if not repeats(new) or not torch.equal(new.cpu(), example.cpu()):
                drawn[source.name] = new
    return drawn


def drawn_constants(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New tensors for those parameters that are one number everywhere; empty if there are none.

    Zeros become normal numbers, which in a matrix are the smaller, the longer the sums; all else is multiplied by
    numbers from [0.75, 1.25).

    Args:
        parameters: by name; tied ones stay tied.  Of those that take more than 4 GiB together the largest stay as
            they are, as those of a model that nobody has given weights.
    """
    generator = torch.Generator().manual_seed(_SEED)
    found: dict[str, Tensor] = {}
    made: dict[tuple[Any, ...], Tensor] = {}
    held = 0
    for name, t in sorted(parameters.items(), key=lambda item: item[1].numel()):
        memory = (t.data_ptr(), t.shape, t.stride(), t.dtype)
        if t.dtype in _SCALED and _is_constant(t):
            if memory not in made:
                held += t.numel() * t.dtype.itemsize
                if held > _MOST_BYTES:
                    break
                made[memory] = _other(t, generator)
            found[name] = made[memory]
    return found


def _is_constant(t: Tensor) -> bool:
    """Is it one number everywhere?  Of a single one, is it zero?"""
    if not t.numel():
        return False
    number = t[(0,) * t.ndim]
    if t.numel() == 1:
        return not bool(number)
    return bool((t[(0,) * (t.ndim - 1)] == number).all()) and bool((t == number).all())


def _other(t: Tensor, generator: torch.Generator) -> Tensor:
    if bool(t[(0,) * t.ndim]):
        return (t * (0.75 + torch.rand(t.shape, generator=generator) / 2).to(t.device)).to(t.dtype)
    size = (t.numel() / len(t)) ** -0.5 if t.ndim > 1 else _OF_BIAS
    return (torch.randn(t.shape, generator=generator) * size).to(t.device, t.dtype)


def largest_last(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of floating dtypes with larger numbers at their ends than elsewhere; empty if there are none.

    The last row is multiplied by one number, and the last of it by another, so that zeros stay, as masks have them.

    Args:
        inputs: by name.
    """
    return {name: _with_largest_last(t.detach()) for name, t in inputs.items() if t.dtype in _SCALED and t.numel() > 1}


def scaled(inputs: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """The inputs of floating dtypes times a power of two; empty if there are none.

    Args:
        inputs: by name.
    """
    return {name: t.detach() * factor for name, t in inputs.items() if t.dtype in _SCALED and t.numel()}


def _with_largest_last(example: Tensor) -> Tensor:
    found = example.clone(memory_format=torch.contiguous_format)
    rows = found.view(-1, found.shape[-1])
    for end in (rows[-1], rows[-1, -1:]):
        largest, own = (float(t[t.isfinite()].abs().max()) if t.isfinite().any() else 0.0 for t in (found, end))
        if own:
            end.mul_(_OUTLIES * largest / own)
    return found


def repeats(tensor: Tensor) -> bool:
    """Are all slices along some dim equal?"""
    if tensor.dtype.itemsize == 1 and tensor.is_floating_point():
        tensor = tensor.float()  # float8 has no comparisons
    return any(
        size > 1 and bool((tensor == tensor.narrow(dim, 0, 1)).all()) for dim, size in enumerate(tensor.shape)
    ) and bool(tensor.numel())


def _drawn(example: Tensor, node: Node, generator: torch.Generator) -> Tensor:
    shape, dtype = example.shape, example.dtype
    if dtype == torch.bool:
        return _with_other_end(example)
    if dtype.is_floating_point or dtype.is_complex:
        if not bool(example.ne(0).any() if dtype.itemsize > 1 else example.float().any()):
            of = dtype if dtype.is_complex else torch.float32
            return torch.randn(shape, generator=generator, dtype=of).to(example.device, dtype)
        factor = (1 + torch.rand(shape, generator=generator)) / 2
        return (example * factor.to(example.device, dtype)).to(dtype) if dtype.itemsize > 1 else example
    low, high = int(example.min()), int(example.max())
    looked_up = _looked_up(node)
    if looked_up is not None and low >= 0:
        low, high = 0, looked_up - 1
    return torch.randint(low, high + 1, shape, generator=generator).to(example.device, dtype)


def _with_other_end(example: Tensor) -> Tensor:
    """The last quarter of the last row inverted, along the last dim; as it is where that has one element."""
    found = example.clone(memory_format=torch.contiguous_format)
    row = found.shape[-1]
    if row > 1:
        found.view(-1, row)[-1, -max(row // 4, 1) :].logical_not_()
    return found


def _looked_up(node: Node) -> int | None:
    """The size of the smallest dim that this value is an index of; None where it may be anything else."""
    sizes: list[int] = []
    todo, seen = [node], {node}
    while todo:
        at = todo.pop()
        for user in at.users:
            packet = getattr(user.target, "overloadpacket", None)
            if packet in _MOVES or (packet == aten._to_copy and not value_of(user).is_floating_point()):
                todo += [user] if user not in seen else []
                seen.add(user)
            elif packet in (aten.embedding, aten.index_select, aten.gather, aten.index):
                size = _indexed(user, at)
                if size is None:
                    return None
                sizes.append(size)
            elif packet not in _COMPARISONS:
                return None
    return min(sizes, default=None)


def _indexed(user: Node, index: Node) -> int | None:
    """The size of the dim of the user's first operand that ``index`` is looked up in."""
    table = user.args[0]
    if not isinstance(table, Node) or table is index:
        return None
    shape, packet = value_of(table).shape, user.target.overloadpacket  # type: ignore[union-attr]
    if packet == aten.embedding:
        return int(shape[0])
    if packet == aten.index:
        where = user.args[1]
        assert isinstance(where, (list, tuple))
        return min(int(shape[dim]) for dim, node in enumerate(where) if node is index)
    dim = user.args[1]
    return int(shape[dim]) if isinstance(dim, int) and len(user.args) > 2 and user.args[2] is index else None
