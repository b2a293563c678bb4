"""The named styles of tensor-parallel plans, as cuts of weights and hooks in the collective IR.

A style says which part of a weight a rank holds, and what is sent where its module is called: the module's own code
runs on its rank's part of the weights, all tensors being plain ones.  What differs between ranks, such as where a
rank's rows of a vocabulary begin, is computed from ``shard``, which lowering turns into an input.  So one graph serves
all ranks, however many there are.

A dim that does not divide is filled up at its end.  What a rank computes by the rows that fill up a ``colwise`` weight
reaches the result in two ways only: through a product whose weight is zero there, or in a gathered result, from which
it is cut off.  They are copies of the last row, and only the columns of a ``rowwise`` weight are filled up with zeros:
what becomes of a copy is as finite as what becomes of the last, and zero times that is zero.  Parameters of no linear
layer are filled up with zeros all, since it is not known which of their dims is summed over.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torchtrt_md.capture import quantizers
from torchtrt_md.capture.transformers_private import mark_expert_parallel
from torchtrt_md.errors import PlanError
from torchtrt_md.graph.source import running_line
from torchtrt_md.lowering import ops
from torchtrt_md.program import Sharding, UnevenSharding
from torchtrt_md.wrappers import is_wrapper

Args = tuple[Any, ...]


@dataclass(frozen=True)
class Axis:
    """The ranks that a plan is for, and what they send each other."""

    name: str
    size: int

    def sum(self, x: Tensor) -> Tensor:
        """x of all ranks, added."""
        summed: Tensor = ops.all_reduce(x.contiguous(), "sum", self.name, self.size)
        return summed

    def whole(self, x: Tensor, extent: int) -> Tensor:
        """The parts of the last dim of all ranks, one after the other, as far as ``extent``."""
        if x.shape[-1] != (part := -(-extent // self.size)):
            raise PlanError(
                f"a module of {extent} features returns {x.shape[-1]} of them on a rank that has a part of its weight,"
                f" and should return {part}",
                fix=_FITS,
                at=running_line(),
            )
        gathered: Tensor = ops.all_gather(x, x.dim() - 1, self.name, self.size)
        return gathered if gathered.shape[-1] == extent else gathered.narrow(-1, 0, extent)

    def mine(self, x: Tensor) -> Tensor:
        """This rank's part of the last dim of what all ranks have."""
        missing = -x.shape[-1] % self.size
        x = F.pad(x, (0, missing)) if missing else x
        part: Tensor = ops.shard(x, x.dim() - 1, self.name, self.size)
        return part

    def first(self, step: int, like: Tensor) -> Tensor:
        """``step`` times this rank's place along the axis, int64 [1], on the device of ``like``."""
        starts = torch.arange(0, self.size * step, step, device=like.device)
        start: Tensor = ops.shard(starts, 0, self.name, self.size)
        return start


@dataclass(frozen=True)
class Cut:
    """A weight is cut on ``dim``, counted from the first; see :class:`UnevenSharding`."""

    dim: int
    blocks: tuple[int, ...] = (1,)
    copies: int = 1
    zeros: bool = False

    def sharding(self, shape: Sequence[int], axis: Axis) -> Sharding | UnevenSharding:
        """As the program has it; a plain one where the parts are views of the whole."""
        if len(self.blocks) == self.copies == 1 and shape[self.dim] % axis.size == 0:
            return Sharding(self.dim, axis.name)
        return UnevenSharding(self.dim, axis.name, self.blocks, self.copies, self.zeros)

    def extents(self, shape: Sequence[int], axis: Axis) -> list[int]:
        """How much of each block a rank has."""
        uneven = UnevenSharding(self.dim, axis.name, self.blocks, self.copies)
        return uneven.extents(shape[self.dim], axis.size)

    def local(self, shape: Sequence[int], axis: Axis) -> list[int]:
        """The shape of a rank's part."""
        extent = sum(self.extents(shape, axis))
        return [extent if dim == self.dim else whole for dim, whole in enumerate(shape)]


class Style:
    """What is done about one module, or one parameter, that a plan names."""

    def cut(self, module: nn.Module, name: str, shape: tuple[int, ...]) -> Cut | None:
        """Which part of the module's parameter a rank holds; None for all of it."""
        return None

    def hooks(self, module: nn.Module, axis: Axis) -> Hooks | None:
        """What is done before and behind the module; None for nothing.

        Raises:
            PlanError: the style is not for such a module.
        """
        return None


@dataclass(frozen=True)
class Hooks:
    """``before`` takes and returns the positional arguments; ``behind`` takes the result too and returns it."""

    before: Callable[[Args], Args] | None = None
    behind: Callable[[Args, Any], Any] | None = None

    def put_on(self, module: nn.Module) -> None:
        """The module is then called so."""
        before, behind = self.before, self.behind
        if before is not None:
            module.register_forward_pre_hook(lambda _, args: before(args))
        if behind is not None:
            module.register_forward_hook(lambda _, args, result: behind(args, result))


@dataclass(frozen=True)
class Colwise(Style):
    """A linear layer of which a rank computes a part of the result; an embedding, a part of each row."""

    gather: bool = False
    blocks: tuple[int, ...] = (1,)
    copies: int = 1

    def cut(self, module: nn.Module, name: str, shape: tuple[int, ...]) -> Cut | None:
        if isinstance(module, nn.Embedding):
            return Cut(1)
        # Of a parameter of no linear layer, such as those of experts, this dim may be the one that is summed over.
        return Cut(max(len(shape) - 2, 0), self.blocks, self.copies, zeros=not isinstance(module, nn.Linear))

    def hooks(self, module: nn.Module, axis: Axis) -> Hooks | None:
        extent = module.embedding_dim if isinstance(module, nn.Embedding) else _features(module, "out_features", -2)
        return Hooks(behind=lambda _, y: axis.whole(y, extent)) if self.gather else None


def _features(module: nn.Module, name: str, dim: int) -> int:
    """How many a module says that it has, by an attribute; its weights have them on this dim, as a linear layer's.

    Raises:
        PlanError: it has no such attribute, or weights of another form.
    """
    extent = getattr(module, name, None)
    if not isinstance(extent, int):
        raise PlanError(f"a {type(module).__name__} has no {name}", fix=_FITS)
    for of, weight in {} if isinstance(module, nn.Linear) else dict(module.named_parameters(recurse=False)).items():
        square = weight.dim() > 2 and weight.shape[-1] == weight.shape[-2]  # of groups: which dim is summed over?
        if weight.dim() > 1 and (square or weight.shape[dim] != extent):
            raise PlanError(
                f"a {type(module).__name__} has {name} = {extent} and a {of!r} of shape {list(weight.shape)}, which is"
                " not that of a linear layer: [..., out_features, in_features]",
                fix=_FITS,
            )
    return extent


@dataclass(frozen=True)
class Rowwise(Style):
    """A linear layer of which a rank computes one term of the sum; an embedding of which it has some of the rows.

    ``split``: the argument is whole and the layer takes this rank's part of it.
    """

    split: bool = False
    blocks: tuple[int, ...] = (1,)

    def cut(self, module: nn.Module, name: str, shape: tuple[int, ...]) -> Cut | None:
        if isinstance(module, nn.Embedding):
            return Cut(0) if name == "weight" else None
        return None if name == "bias" else Cut(len(shape) - 1, self.blocks, zeros=True)

    def hooks(self, module: nn.Module, axis: Axis) -> Hooks | None:
        if isinstance(module, nn.Embedding):
            return _vocabulary(module, axis)
        extent = _features(module, "in_features", -1)
        (local,) = Cut(0, self.blocks).local([extent], axis)
        held: list[Any] = []
        kind = f"{type(module).__name__} of {extent} to {getattr(module, 'out_features', '?')} features"
        if any(map(is_wrapper, module.parameters(recurse=False))) or quantizers.scales_argument(module):
            _compare_parts(module, kind, axis, filled=bool(extent % axis.size) and not self.split)

        def before(args: Args) -> Args:
            x = axis.mine(args[0]) if self.split else args[0]
            if x.shape[-1] != local:
                raise PlanError(
                    f"a {kind} with the style rowwise takes this rank's {local} of them, and is called with"
                    f" {x.shape[-1]}",
                    at=running_line(),
                    fix="give what feeds it the style colwise, or this module rowwise_split_input where its argument"
                    " is whole on every rank",
                )
            # Added once, behind the sum.
            held.append(module._parameters.get("bias"))
            if held[-1] is not None:
                module._parameters["bias"] = None
            return (x, *args[1:])

        def behind(_: Args, y: Any) -> Any:
            bias, y = held.pop(), axis.sum(y)
            if bias is None:
                return y
            module._parameters["bias"] = bias
            return y + bias.to(y.dtype)  # which autocast may have changed

        return Hooks(before, behind)


class _Compared(TorchDispatchMode):
    """While active, the largest, or least, over the features of ``x``, of which a rank has a part, is that of all.

    They are gathered and not reduced, so that NaN stays what it is in PyTorch.  What fills up features that do not
    divide could be the largest, so those that are ``filled`` are refused.
    """

    def __init__(self, kind: str, x: Tensor, axis: Axis, filled: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kind, self._elements, self._local = kind, x.numel(), x.shape[-1]
        self._axis, self._filled = axis, filled

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # the wrapper's own code is next, and what it calls comes here
        result = func(*args, **(kwargs or {}))
        if func not in ops.OF_PARTS and func not in _OTHERWISE:
            return result
        x = args[0]
        dims = args[1] if len(args) > 1 else []
        over = [dim % x.dim() for dim in (dims if isinstance(dims, list) else [dims])] or [*range(x.dim())]
        if x.shape[-1:] != (self._local,) or x.dim() - 1 not in over:
            return result
        if self._filled:
            raise PlanError(
                f"a quantized {self._kind} scales its argument by the largest number, and its features do not divide by"
                f" the {self._axis.size} ranks of axis {self._axis.name!r}",
                fix="use an axis whose size divides them, quantize the weight alone, or leave the layer out",
                at=running_line(),
            )
        if func in _OTHERWISE or x.numel() != self._elements:
            raise PlanError(
                f"a quantized {self._kind} with the style rowwise scales its argument by {func} of {list(x.shape)},"
                " which is not known to be that of its rows or of all of it",
                fix="quantize its weight alone, or leave the layer out of the plan",
                at=running_line(),
            )
        rows = ops.all_gather(result.unsqueeze(0), 0, self._axis.name, self._axis.size)
        return ops.OF_PARTS[func](rows, [0])


_OTHERWISE = {torch.ops.aten.max.dim, torch.ops.aten.min.dim, torch.ops.aten.aminmax.default}


def _compare_parts(module: nn.Module, kind: str, axis: Axis, filled: bool) -> None:
    """Let a quantized layer scale its argument as the dense one does: by the largest of all ranks' features."""
    forward = module.forward

    @functools.wraps(forward)  # hooks that come later ask for its arguments
    def compared(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with _Compared(kind, x, axis, filled):
            return forward(x, *args, **kwargs)

    module.forward = compared


def _vocabulary(module: nn.Embedding, axis: Axis) -> Hooks | None:
    """An embedding of which each rank has a part of the rows; what it has none of is zero in its term of the sum.

    A class with code of its own may ask which ids it is given, and what is done to them is done where they are looked
    up.
    """
    rows = -(-module.num_embeddings // axis.size)
    if module.max_norm is not None:
        raise PlanError("the embedding has a max_norm, for which it writes to its weight", fix=_FITS)

    def mine(ids: Tensor) -> tuple[Tensor, Tensor]:
        local = ids - axis.first(rows, ids)
        return local, (local >= 0) & (local < rows)

    def before(args: Args) -> Args:
        local, there = mine(args[0])
        kept.append(there)
        return (torch.where(there, local, 0), *args[1:])

    def behind(_: Args, y: Any) -> Any:
        there = kept.pop()
        return axis.sum(torch.where(there.unsqueeze(-1), y, 0.0))

    kept: list[Tensor] = []
    if quantizers.forward_of(module) is nn.Embedding.forward:
        module.padding_idx = None  # says something about gradients only, and is a row of the whole
        return Hooks(before, behind)
    whole: nn.Module = module
    forward = whole.forward

    @functools.wraps(forward)  # hooks that come later ask for its arguments
    def with_lookups(*args: Any, **kwargs: Any) -> Any:
        with _Lookups(module, lambda ids, weight: behind((), F.embedding(before((ids,))[0], weight))):
            return forward(*args, **kwargs)

    whole.forward = with_lookups
    return None


# What a rank's part of a weight answers as the whole does.  Its sizes are not among them.
_OF_EVERY_PART = frozenset(["dtype", "device", "layout", "requires_grad", "is_meta", "is_cuda", "ndim", "dim"])


class _Lookups(TorchFunctionMode):
    """While active, what is looked up in an embedding's weight is computed by ``looked_up``, of ids and the weight."""

    def __init__(self, module: nn.Embedding, looked_up: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._module, self._looked_up = module, looked_up

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, weight = kwargs or {}, self._module._parameters["weight"]  # not what a quantizer makes of it
        if func is F.embedding and len(args) == 2 and args[1] is weight and not kwargs.get("max_norm"):
            return self._looked_up(*args)
        result = func(*args, **kwargs)
        takes = any(leaf is weight for leaf in pytree.tree_leaves((args, kwargs)))
        # Of an attribute the function is its __get__.
        name = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
        if takes and name not in _OF_EVERY_PART:
            raise PlanError(
                f"a {type(self._module).__name__} of which each rank has some of the rows reads its weight by"
                f" {name}, and not by a lookup of ids",
                fix="give it the style embedding_colwise, or leave it out of the plan",
                at=running_line(),
            )
        return result


@dataclass(frozen=True)
class Summed(Style):
    """Ranks compute terms of the module's result, or of the first of its results."""

    def hooks(self, module: nn.Module, axis: Axis) -> Hooks | None:
        def behind(_: Args, y: Any) -> Any:
            if isinstance(y, tuple):
                return (axis.sum(y[0]), *y[1:])
            return None if y is None else axis.sum(y)

        return Hooks(behind=behind)


@dataclass(frozen=True)
class OneTerm(Style):
    """All ranks compute the same, and what becomes of it is summed: each passes on its share."""

    def hooks(self, module: nn.Module, axis: Axis) -> Hooks | None:
        return Hooks(before=lambda args: (args[0] / axis.size, *args[1:]))


@dataclass(frozen=True)
class ByExpert(Style):
    """A parameter that has an entry for each expert, of which a rank has some."""

    def cut(self, module: nn.Module, name: str, shape: tuple[int, ...]) -> Cut | None:
        return Cut(0)


@dataclass(frozen=True)
class Dispatched(Style):
    """Experts of which a rank has some, called with (tokens, the experts of each, their weights).

    As transformers has it, the number of the first expert that is not there stands for all that are elsewhere.
    """

    def hooks(self, module: nn.Module, axis: Axis) -> Hooks | None:
        experts = getattr(module, "num_experts", None)
        if not isinstance(experts, int):
            raise PlanError(f"a {type(module).__name__} has no num_experts", fix=_FITS)
        if experts % axis.size:
            raise PlanError(
                f"{experts} experts do not divide by the {axis.size} ranks of axis {axis.name!r}:"
                f" {experts % axis.size} left over",
                fix=f"use an axis whose size divides {experts}",
            )
        here = experts // axis.size
        module.num_experts = here  # type: ignore[assignment]
        mark_expert_parallel(module)

        def before(args: Args) -> Args:
            tokens, chosen, weights, *rest = args
            local = chosen - axis.first(here, chosen).to(chosen.dtype)
            there = (local >= 0) & (local < here)
            return (tokens, torch.where(there, local, here), torch.where(there, weights, 0.0), *rest)

        return Hooks(before, lambda _, y: axis.sum(y))


_FITS = (
    "colwise and rowwise are for linear layers and embeddings, packed ones for linear layers and for parameters that"
    " join several; or leave the module out of the plan"
)
_WHOLE = Style()

# The names in the plans of transformers and diffusers.
STYLES: Mapping[str, Style] = {
    "colwise": Colwise(),
    "colwise_gather_output": Colwise(gather=True),
    "colwise_rep": Colwise(gather=True),
    "rowwise": Rowwise(),
    "rowwise_split_input": Rowwise(split=True),
    "rowwise_rep": Rowwise(split=True),
    "embedding_rowwise": Rowwise(),
    "embedding_colwise": Colwise(gather=True),
    "packed_colwise": Colwise(blocks=(1, 1)),
    "packed_rowwise": Rowwise(blocks=(1, 1)),
    "moe_tp_experts": Summed(),
    "all_reduce": Summed(),
    "gather": Summed(),
    "moe_identity_expert": OneTerm(),
    "grouped_gemm": ByExpert(),
    "ep_dispatch_experts": Dispatched(),
    # Ranks do the same as the whole model, or as their weights have it; what these add concerns gradients, or DTensor.
    "replicate": _WHOLE,
    "replicated_with_grad_allreduce": _WHOLE,
    "mla_kv_a_proj": _WHOLE,
    "local_params": _WHOLE,
}


def style_of(entry: object, module: nn.Module | None) -> Style | None:
    """The style that an entry of a plan names, or that diffusers has a class for; None where it is neither.

    diffusers' packed styles say how large the parts are that one weight joins, or leave it to the module.

    Raises:
        PlanError: neither of them says it.
    """
    if isinstance(entry, str):
        return STYLES.get(entry)
    found = _PACKED.get(type(entry).__name__)
    if found is None or not hasattr(entry, "blocks"):
        return None
    style, attribute = found
    blocks = entry.blocks or getattr(module, attribute, None)
    if not blocks:
        raise PlanError(
            f"{type(entry).__name__} says no blocks, and its module has no {attribute}",
            fix="say how large the parts are that its weight joins, relatively: blocks=[1, 1]",
        )
    return style(blocks=tuple(blocks))


_PACKED: Mapping[str, tuple[type[Colwise] | type[Rowwise], str]] = {
    "PackedColwiseParallel": (Colwise, "_tp_packed_col_blocks"),
    "PackedRowwiseParallel": (Rowwise, "_tp_packed_row_blocks"),
}
